"""Rows of many samples, made in batches that all processes share."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.machine.progress import track
from bayesdiff.machine.ranks import dealt, gather_rows

Rows = dict[str, Tensor]
Batch = Callable[[list[int]], Rows]


def shared_rows(
    numbers: range, size: int, batch: Batch, what: str, each: float | None = None
) -> Rows:
    """Rows of all samples, on every process; each process makes some of the batches.

    Args:
        numbers: of the samples.
        size: samples in a batch.
        batch: gives tensors ``(n, ...)`` of n samples, on the CPU.
        what: of the progress.
        each: network evaluations that a sample is expected to take, see ``track``.
    """
    batches = torch.arange(numbers.start, numbers.stop).split(size)
    mine = dealt(batches)
    parts = [batch(part.tolist()) for part in track(mine, what, "images", len, each)]
    if not parts:  # there are more processes than batches; the shapes must be known all the same
        parts = [{name: value[:0] for name, value in batch([numbers.start]).items()}]
    place = torch.cat(mine) - numbers.start if mine else torch.zeros(0, dtype=torch.long)
    return {
        name: gather_rows(torch.cat([part[name] for part in parts]), place, len(numbers))
        for name in parts[0]
    }


def own_rows(numbers: range, size: int, batch: Batch, what: str) -> Rows:
    """Rows of all samples, all made by this process for itself; see ``shared_rows``."""
    batches = torch.arange(numbers.start, numbers.stop).split(size)
    parts = [batch(part.tolist()) for part in track(batches, what, "images", len)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
