"""Files that are there whole or not at all, and a disk's errors in one line."""

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from bayesdiff.checks import UserError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_UMASK = os.umask(0)
os.umask(_UMASK)


def _machine() -> str:
    """8 hex digits that tell apart machines, and containers on one, that share a folder."""
    space = Path("/proc/self/ns/pid")
    number = os.readlink(space) if space.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {number}".encode()).hexdigest()[:8]


_MACHINE = _machine()


def file_name(text: str, fill: str = "_", *, ascii_only: bool = True) -> str:
    """``text`` as a part of a file's name: letters, digits and ``_.+-``, ``fill`` for all else.

    Args:
        text: such as a class name or a setting.
        fill: between what is left.
        ascii_only: whether to keep only what no shell and no command line of Hydra quotes.
    """
    return re.sub(r"[^\w.+-]+", fill, text, flags=re.ASCII if ascii_only else 0)


@contextmanager
def named_disk(place: Path) -> Generator[None, None, None]:
    """Turn an error of the disk, whoever raises it, into one line that names the place.

    Raises:
        UserError: if the disk is full, failing or read-only, or the place may not be written to.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # writers in C++ and Rust have errors of their own
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(f"cannot write to {place}: {reason}") from error


def disk_error(error: BaseException) -> str | None:
    """What the disk has to do with an error, and the cure; None for nothing."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        match = re.search(r"\(os error (\d+)\)", str(cause))  # safetensors
        if match and number is None:
            number = int(match[1])
        if number in _FULL:
            return f"{_FULL[number]}; free some space and give the same command again"
        if number in _DENIED:
            return f"{os.strerror(number)}; choose another output_dir"
        cause = cause.__cause__ or cause.__context__
    return None


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` and move it into place: all or nothing.

    Raises:
        UserError: if the folder cannot be written, or the disk is full.
    """
    try:
        with named_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{path.stem}-{_MACHINE}-"
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f"{prefix}{os.getpid()}-", suffix=path.suffix
            )
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror}); choose another output_dir"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        with named_disk(path):
            write(temporary)
            # Last, since some writers put a new file there: mkstemp's mode hides results.
            os.chmod(name, 0o666 & ~_UMASK)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _remove_abandoned(path.parent, prefix)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` make the files of a folder beside ``path`` and move it there: all or nothing.

    Args:
        path: of the folder, which must not be there.
        fill: called with an empty folder.
    """
    prefix = f".{path.name}-{_MACHINE}-"
    with named_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{prefix}{os.getpid()}-"))
        try:
            fill(temporary)
            os.chmod(temporary, 0o777 & ~_UMASK)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _remove_abandoned(path.parent, prefix)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before any work.

    Raises:
        UserError: if it cannot.
    """  # noqa: DOC502 - raised one level down
    probe = folder / ".writable"
    write_atomic(probe, lambda file: None)
    probe.unlink(missing_ok=True)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove what a process that was killed left of its attempt at the same file."""
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True
