"""Which files of a folder or a zip are images, and what the rest is."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from bayesdiff.checks import UserError, few
from bayesdiff.data.pixels import readable_endings

log = logging.getLogger(__name__)

# Folders that systems add: they hold resource forks and thumbnails, not data.
_SYSTEM = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found")
# Names of folders that split a data set: Train, valid, test1, train2017, test_images, images_val.
_SPLIT = re.compile(
    r"(?:(?:images?|imgs?|data|set)[\W_]+)?"
    r"(train|test|val|dev|eval|(?:train|test)ing|valid|validation|evaluation)"
    r"[\W_]*(?:sets?|images?|imgs?|data|split|\d+)?",
    re.IGNORECASE,
)
_PARTS = {"tr": "train", "te": "test", "va": "val", "de": "dev", "ev": "dev"}


def shown(name: str | Path) -> str:
    """A name as messages can print it: bytes that are no UTF-8 are written in hexadecimal."""
    return os.fsencode(str(name)).decode("utf-8", "backslashreplace")


def is_hidden(name: str) -> bool:
    """Whether a name with forward slashes is, or lies in, a hidden or a system's folder."""
    return any(p.startswith(".") or p.lower() in _SYSTEM for p in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a name with forward slashes is that of a visible image."""
    return PurePosixPath(name).suffix.lower() in readable_endings() and not is_hidden(name)


def split_of(name: str) -> str | None:
    """``train``, ``test``, ``val`` or ``dev`` for the name of a part of a data set, or None."""
    split = _SPLIT.fullmatch(name)
    return _PARTS[split[1][:2].lower()] if split else None


def image_names(base: Path) -> list[str]:
    """Sorted names of the images below ``base``, relative to it, with forward slashes.

    Raises:
        UserError: if a folder cannot be listed or there is no image.
    """
    names = sorted(_walk(base, "", ()))
    images = [n for n in names if is_image(n)]
    say_left_out(str(base), (n for n in names if not is_image(n)))
    if not images:
        raise UserError(f"no images below {base}; set data.root to a folder of images")
    return images


def subfolders(base: Path) -> list[str]:
    """Sorted names of the visible folders in ``base``."""
    return sorted(e.name for e in _listed(base) if _is(e.is_dir) and not is_hidden(e.name))


def holds_images(base: Path) -> bool:
    """Whether there is an image below ``base``."""
    return any(is_image(name) for name in _walk(base, "", ()))


def say_left_out(where: str, names: Iterable[str]) -> None:
    """One line on the visible files that are no images: how many, and of which endings."""
    endings = Counter(PurePosixPath(n).suffix.lower() or "no ending" for n in names)
    if endings:
        most = [f"{count} {shown(ending)}" for ending, count in endings.most_common()]
        log.warning(
            "%s: left out %d file(s) that are no images Pillow reads (%s)",
            *(where, endings.total(), few(most, 6)),
        )


def _walk(folder: Path, inside: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Visible files below a folder; links are followed, but never in a circle.

    Yields:
        Their names, relative to the folder and after ``inside``.
    """
    entries, status = _listed(folder), folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        log.warning("%s links to a folder that holds it; not followed", shown(folder))
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        # Class folders are often links into a larger collection.
        if _is(entry.is_dir):
            yield from _walk(folder / entry.name, f"{inside}{entry.name}/", (*above, here))
        elif _is(entry.is_file) or entry.is_symlink():
            yield inside + entry.name


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry is; a link that cannot be followed, as one to itself, is neither."""
    try:
        return kind()
    except OSError:
        return False


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"cannot list {shown(folder)}: {error.strerror}; check its permissions"
        ) from error
