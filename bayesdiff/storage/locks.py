"""Locks on artefacts: of two processes that need the same one, one makes it and one waits.

The locks are the operating system's: they end with the process that holds them, however it ends,
so a lock file that was left behind blocks nobody. To exclude deadlocks, a lock is only ever asked
for inside one of an earlier stage, in the order fit > curvature > images > calibration > its
trainings > maps > refiner > validation > scores > classifier > statistics of the training images >
report.
"""

import errno
import logging
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from bayesdiff.machine.costs import making
from bayesdiff.machine.ranks import rank, total, world_size
from bayesdiff.storage.atomic import named_disk

log = logging.getLogger(__name__)

# Seconds between two words among the processes of a run that waits: no collective times out.
_PATIENCE = 5.0
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held: set[Path] = set()


@contextmanager
def alone(path: Path | str) -> Generator[None, None, None]:
    """Hold this process's lock on an artefact while it is looked for, made and written.

    What is inside must not wait for other processes of the run, which may come for the same lock;
    for that there is ``together``. Inside itself the lock is free.

    Args:
        path: of the artefact, which need not be there.
    """
    yield from _locked(Path(path).absolute(), mine=True, shared=False)


@contextmanager
def together(path: Path | str) -> Generator[None, None, None]:
    """``alone`` for all processes of a run at once: the first one holds the lock for them all.

    Every process of the run must come here, and look for the artefact only inside.

    Args:
        path: of the artefact, which need not be there.
    """
    yield from _locked(Path(path).absolute(), mine=rank() == 0, shared=world_size() > 1)


def lock_of(place: Path) -> FileLock:
    """The lock on an artefact, in a hidden folder beside it."""
    folder = place.parent / ".locks"
    with named_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{place.name}.lock")


def taken(lock: FileLock, seconds: float) -> bool:
    """Whether this process could get the lock within this time; it then signs it.

    Raises:
        OSError: that is no matter of locks.
    """
    path = Path(lock.lock_file)
    try:
        with named_disk(path):
            lock.acquire(timeout=seconds, poll_interval=min(0.25, max(seconds, 0.01)))
    except Timeout:
        return False
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s has no locks; do not run two processes on the same run", path.parent)
        return True
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}")
    except OSError:
        pass  # a full disk; only the name of the holder is lost
    return True


def holder(lock: FileLock) -> str:
    """Who holds the lock, as far as is known."""
    try:
        return Path(lock.lock_file).read_text() or "another process"
    except OSError:
        return "another process"


def _locked(place: Path, *, mine: bool, shared: bool) -> Generator[None, None, None]:
    """Hold the lock, where it is this process's to take; inside itself it is free."""
    if place in _held:
        yield
        return
    lock = lock_of(place) if mine else None
    _wait(lock, place, shared=shared)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        if lock is not None:
            lock.release()


def _wait(lock: FileLock | None, place: Path, *, shared: bool) -> None:
    """Return when the lock is there, for all processes if it is shared."""
    with making("waiting"):  # counts for nothing that is made
        seconds = _waited(lock, place, shared=shared)
    if seconds and lock is not None:
        log.info("the wait for %s is over", place.name)


def _waited(lock: FileLock | None, place: Path, *, shared: bool) -> float:
    """Seconds between two words, 0 where there was no wait."""
    seconds = 0.0
    while True:
        missing = float(lock is not None and not taken(lock, seconds))
        if shared:
            missing = float(total(torch.tensor(missing)))
        if not missing:
            return seconds
        if lock is not None and not seconds:
            log.info("waiting for %s, which %s makes", place, holder(lock))
        seconds = _PATIENCE
