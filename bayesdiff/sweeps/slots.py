"""Which device a cell of a sweep works on, whatever started the cell's process."""

import logging
import os
import platform
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from bayesdiff.checks import UserError
from bayesdiff.storage.locks import lock_of, taken

log = logging.getLogger(__name__)

# Cells at once on this machine; 0 where the launcher itself hands out devices.
SLOTS = "BAYESDIFF_SLOTS"
_POLL = 0.5
# This process's GPU and all of them: it cannot change it once it has used it.
_bound: tuple[str, Sequence[str]] | None = None


@contextmanager
def device_slot(folder: Path, accelerator: str) -> Generator[None, None, None]:
    """Wait for a free slot and keep it for one cell, or until this process ends.

    A slot is a GPU of this machine, whichever of the user's sweeps asks for it; without GPUs, as
    many cores as a process has threads (``OMP_NUM_THREADS``, else all), for each sweep apart.
    ``BAYESDIFF_SLOTS`` is another number of them. This process then sees the GPU of its slot
    alone: slot k has device k mod n.

    Args:
        folder: of the sweep, whose processes share its cores.
        accelerator: Lightning's, ``cpu`` uses no GPU.
    """
    global _bound
    own, gpus = _bound if _bound and accelerator != "cpu" else (None, ())
    if own is None and accelerator != "cpu":
        gpus = visible_gpus()
    slots = number_of_slots(len(gpus))
    if not slots:
        yield
        return
    names = [gpus[k % len(gpus)] if gpus else "cpu" for k in range(slots)]
    host, where = platform.node(), machine_folder() if gpus else folder
    places = {
        where / f"slot-{host}-{name.replace('/', '-')}-{k}": name
        for k, name in enumerate(names)
        if own in (None, name)
    }
    lock, path = _wait(list(places))
    if gpus and own is None:
        _bound = (places[path], gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = places[path]
        log.info("%s: GPU %s", path.name, places[path])
    try:
        yield
    finally:
        lock.release()


def machine_folder() -> Path:
    """Where all sweeps of this user on this machine meet."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"bayesdiff-{user}"


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


def _wait(paths: Sequence[Path]) -> tuple[FileLock, Path]:
    """The lock of the first slot that is free, as soon as there is one, and which it is."""
    warned = False
    locks = {path: lock_of(path) for path in paths}
    while True:
        for path, lock in locks.items():
            if taken(lock, 0):
                return lock, path
        if not warned:
            log.info("waiting for one of %d slots on %s", len(locks), platform.node())
            warned = True
        time.sleep(_POLL)
