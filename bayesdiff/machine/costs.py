"""What pieces of work take: seconds, memory and network evaluations, for whoever keeps them."""

import resource
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from bayesdiff.machine.progress import evaluations

Keeper = Callable[[str, dict[str, Any]], None]

_keeper: Keeper | None = None
_inside: list[list[float]] = []  # seconds and evaluations measured within each open piece


@contextmanager
def kept_by(keeper: Keeper | None) -> Generator[None, None, None]:
    """Hand what pieces take to the keeper for a while; None measures nothing."""
    global _keeper
    before, _keeper = _keeper, keeper
    try:
        yield
    finally:
        _keeper = before


@contextmanager
def making(stage: str) -> Generator[None, None, None]:
    """Measure a piece of work that is made now, without what is measured inside it.

    Args:
        stage: its name, empty for a piece that belongs to the one around it.
    """
    if not stage or _keeper is None:
        yield
        return
    started, counted = time.perf_counter(), evaluations()
    _inside.append([0.0, 0])
    try:
        yield
    finally:
        inner, whole = _inside.pop(), (time.perf_counter() - started, evaluations() - counted)
        if _inside:
            _inside[-1] = [a + b for a, b in zip(_inside[-1], whole, strict=True)]
    seconds, count = (a - b for a, b in zip(whole, inner, strict=True))
    _keeper(stage, {"seconds": seconds, "memory": peak_memory(), "evaluations": count})


def keep(stage: str, cost: dict[str, Any]) -> None:
    """Hand over what was measured elsewhere."""
    if _keeper is not None:
        _keeper(stage, cost)


def peak_memory() -> float:
    """GiB that this process has held at most until now: of its GPU, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
