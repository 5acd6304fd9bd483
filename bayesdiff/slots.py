"""Which device a cell of a sweep works on, whatever started the cell's process."""

import logging
import os
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from bayesdiff.checks import UserError
from bayesdiff.locks import lock_of, taken

log = logging.getLogger(__name__)

# Cells at once on this machine; 0 where the launcher itself hands out devices.
SLOTS = "BAYESDIFF_SLOTS"
_POLL = 0.5
# This process's GPU and of how many: it cannot change it once it has used it.
_bound: tuple[int, int] | None = None


@contextmanager
def device_slot(folder: Path, accelerator: str) -> Generator[None, None, None]:
    """Wait for a free slot of this machine and keep it for one cell, or until this process ends.

    A slot is a GPU, or as many cores as a process has threads (``OMP_NUM_THREADS``, else all);
    ``BAYESDIFF_SLOTS`` is another number of them. This process then sees the GPU of its slot
    alone: slot k has device k mod n.

    Args:
        folder: of the sweep, whose processes share the slots.
        accelerator: Lightning's, ``cpu`` uses no GPU.
    """
    global _bound
    bound = None if accelerator == "cpu" else _bound
    gpus = [] if accelerator == "cpu" or bound else visible_gpus()
    count = bound[1] if bound else len(gpus)
    slots = number_of_slots(count)
    if not slots:
        yield
        return
    mine = [k for k in range(slots) if bound is None or k % count == bound[0]]
    lock, number = _wait(folder, mine)
    if gpus:
        _bound = (number % count, count)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % count]
        log.info("slot %d: GPU %s", number, gpus[number % count])
    try:
        yield
    finally:
        lock.release()


def number_of_slots(gpus: int) -> int:
    """Cells at once on this machine, 0 for no bound.

    Raises:
        UserError: if ``BAYESDIFF_SLOTS`` is no whole number.
    """
    given = os.environ.get(SLOTS, "")
    if given:
        try:
            number = int(given)
        except ValueError as error:
            raise UserError(
                f"{SLOTS} must be a whole number, got {given!r}; unset it, or give the cells that "
                "may run at once"
            ) from error
        return number if number >= 0 else cores()
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return gpus or (max(1, cores() // max(1, int(threads))) if threads.isdigit() else 1)


def visible_gpus() -> Sequence[str]:
    """Names of the GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    # Counted without touching CUDA, which would fix the device.
    return [str(number) for number in range(torch.cuda.device_count())]


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _wait(folder: Path, numbers: Sequence[int]) -> tuple[FileLock, int]:
    """A free slot of these, as soon as there is one, and its number."""
    host, told = platform.node(), False
    locks = {number: lock_of(folder / f"slot-{host}-{number}") for number in numbers}
    while True:
        for number, lock in locks.items():
            if taken(lock, 0):
                return lock, number
        if not told:
            log.info("waiting for one of %d slots on %s", len(locks), host)
            told = True
        time.sleep(_POLL)
