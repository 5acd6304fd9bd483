"""Several processes, one result: who does which part, and sums over all of them."""

import atexit
import logging
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

Part = TypeVar("Part")

# Seconds for a process to end by itself, and to say why, once another one of its run has ended.
_GRACE = 10.0


def rank() -> int:
    """Number of this process, 0 without others.

    Example:
        >>> rank()  # one process alone; only the first of several writes files
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum of the tensor over all processes, on every one of them."""
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        moved = value.to(device, copy=True)
        dist.all_reduce(moved)
        return moved.to(value.device)
    return value


def gather_rows(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """Put together rows ``(n, ...)`` that belong at ``indices (n,)`` of ``count`` rows in all.

    Every row comes from exactly one process; the sum of zero-filled tables is the whole table.
    """
    table = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    table[indices] = rows
    return total(table)


def dealt(work: Sequence[Part]) -> list[Part]:
    """This process's share of the work; every part is one process's."""
    return list(work[rank() :: world_size()])


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def start(accelerator: str, devices: int | str | list[int], timeout: float) -> None:
    """Start the other processes of this machine, by repeating the command in each.

    Args:
        accelerator: Lightning's name of the devices.
        devices: their number or their numbers, a process for each.
        timeout: seconds that a process may keep the others waiting.
    """
    import lightning as L
    from lightning.fabric.strategies import DDPStrategy

    strategy = DDPStrategy(timeout=timedelta(seconds=timeout))
    fabric = L.Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
    fabric.launch()
    children = getattr(strategy.launcher, "procs", [])
    guard(list(children))
    children.clear()  # Lightning's own watch kills without a word


def guard(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End this process soon after another one of its run has ended badly.

    What waits for a process that is gone need not notice by itself, least of all on GPUs.

    Args:
        children: those that this process started, none in a process that was started.
    """
    if children:
        atexit.register(_end, children)
    watch = threading.Thread(target=_watch, args=(children, os.getppid()), daemon=True)
    watch.start()


def _watch(children: Sequence["subprocess.Popen[bytes]"], parent: int) -> None:
    while True:
        codes = [child.poll() for child in children]
        # The first process has the user's shell as its parent, which may end before the run does.
        if any(codes) or (not children and os.getppid() != parent):
            break
        if children and None not in codes:
            return
        time.sleep(1)
    time.sleep(_GRACE)
    what = f"ended with status {max(codes, key=bool)}" if any(codes) else "is gone"
    log.error("another process of this run %s; ending this one too", what)
    _end(children, wait=0)
    os._exit(1)


def _end(children: Sequence["subprocess.Popen[bytes]"], wait: float = _GRACE) -> None:
    """Wait for the children for a while, and kill those that do not end."""
    limit = time.monotonic() + wait
    for child in children:
        try:
            child.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
