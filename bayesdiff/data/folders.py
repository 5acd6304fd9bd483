"""Trees of image files: which folders are splits, which are classes, and what is neither."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayesdiff.checks import UserError, few
from bayesdiff.data.decode import Decoded, decode
from bayesdiff.data.framing import Framing
from bayesdiff.data.listing import (
    holds_images,
    image_names,
    is_image,
    shown,
    split_of,
    subfolders,
)

log = logging.getLogger(__name__)

_HELD_OUT = ("test", "val", "dev")  # in the order of preference
_CONTAINERS = ("image", "images", "img", "imgs")  # beside masks, labels, ...: no class
_LAYOUT = "class folders look like data.root/cat/1.png and data.root/dog/2.png"


@dataclass(frozen=True)
class Part:
    """Images, their labels (N,) if any, and the names of the classes."""

    decoded: Decoded
    labels: Tensor | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """Folder of the training images, and of the test images where the tree has one."""

    train: Path
    test: Path | None


def splits(base: Path) -> Splits:
    """Find ``train/`` beside ``test/`` or ``val/``, under their usual names in any case.

    Raises:
        UserError: for trees that could be read in more than one way.
    """
    inside = subfolders(base)
    train = [n for n in inside if split_of(n) == "train"]
    held_out = sorted((n for n in inside if split_of(n) in _HELD_OUT), key=_preference)
    if not train and not held_out:
        return Splits(base, None)
    others = [n for n in inside if not split_of(n) and holds_images(base / n)]
    if not train:
        raise UserError(
            f"{base} has {held_out[0]}/ but no train/; set data.root={base / held_out[0]} "
            "to use that folder alone, or rename it if it is a class"
        )
    same = [n for n in held_out if _preference(n) == _preference(held_out[0])]
    for twins in (train, same):
        if len(twins) > 1:
            raise UserError(f"{base} has both {twins[0]}/ and {twins[1]}/; keep one of them")
    if others and not held_out:
        raise UserError(
            f"{shown(base)} has {train[0]}/ beside {shown(others[0])}/: a split or a class? Set "
            f"data.root={base / train[0]} if it is the training set, rename it if it is a class"
        )
    beside = [f"{n}/" for n in [*held_out[1:], *others]]
    beside += [p.name for p in base.iterdir() if p.is_file() and is_image(p.name)][:1]
    if beside:
        used = " and ".join(f"{n}/" for n in [train[0], *held_out[:1]])
        log.warning("%s: %s are read; left out: %s", base, used, shown(", ".join(beside[:9])))
    return Splits(base / train[0], base / held_out[0] if held_out else None)


def _preference(name: str) -> int:
    """Test sets before validation sets, which training may have been tuned on."""
    return _HELD_OUT.index(split_of(name) or "")


@dataclass(frozen=True)
class FolderPart:
    """What a folder holds, before any image is decoded.

    Attributes:
        base: the folder.
        names: its images, sorted.
        labels: their classes (N,), None where there are no class folders.
        classes: names of the classes.
    """

    base: Path
    names: list[str]
    labels: Tensor | None
    classes: tuple[str, ...]

    def decode(self, framing: Framing) -> Part:
        """Read all images."""
        decoded = decode(self.names, lambda n: (self.base / n).read_bytes(), self.base, framing)
        return Part(decoded, self.labels, self.classes)


def folder_part(base: Path, known: tuple[str, ...] = ()) -> FolderPart:
    """List all images below ``base``; ``known`` are the classes of the training set, if any.

    Raises:
        UserError: for images both beside and inside class folders, and unknown classes.
    """
    names = image_names(base)
    inside = [n for n in names if "/" in n]
    if inside and len(inside) < len(names):
        beside = next(n for n in names if "/" not in n)
        raise UserError(
            f"{base} has images beside and inside class folders ({shown(beside)} and "
            f"{shown(inside[0])}); move all of them into class folders, or none"
        )
    folders = [n.split("/")[0] for n in inside]
    if inside:
        _check_classes(base, inside)
    classes = known if inside and known else tuple(sorted(set(folders)))
    index = {c: i for i, c in enumerate(classes)}
    strange = next((c for c in folders if c not in index), None)
    if strange is not None:
        raise UserError(
            f"{shown(base / strange)} is no class of the training set; remove or rename it"
        )
    labels = torch.tensor([index[c] for c in folders]) if inside else None
    if inside and not known:
        _say_classes(base, classes)
    return FolderPart(base, names, labels, classes)


def _check_classes(base: Path, inside: list[str]) -> None:
    """Refuse folders that are no classes."""
    tops = {n.split("/")[0]: n for n in inside}
    for top in tops:
        try:
            top.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the name of the folder {shown(base / top)} is not UTF-8; rename it"
            ) from error
    deeper: dict[str, set[str]] = {top: set() for top in tops}
    for top, *middle, _ in (n.split("/") for n in inside):
        deeper[top].add(middle[0] if middle else "")
    for top, below in deeper.items():
        split = next((name for name in sorted(below) if split_of(name)), None)
        if split is not None:
            cure = (
                f"; one level too high? Set data.root={base / top}"
                if len(tops) == 1
                else (f"; put the splits outside, {split}/{top}/, or one data set into data.root")
            )
            raise UserError(f"{base / top} holds a split, {split}/, and is no class{cure}")
        if top.lower() in _CONTAINERS:
            raise UserError(
                f"{shown(base)} has a folder {top}/, which is no class by its name; set "
                f"data.root={base / top}, or rename it"
            )
    (first, below), *more = deeper.items()
    if not more and "" not in below:
        raise UserError(
            f"data.root={base} has one folder, {first}/, with the folders "
            f"{shown(', '.join(sorted(below)[:3]))} inside: one level too high? Set "
            f"data.root={base / first}; {_LAYOUT}"
        )


def _say_classes(base: Path, classes: tuple[str, ...]) -> None:
    """The classes, and folders that became none."""
    log.info("%s: %d class(es), one for each subfolder: %s", base, len(classes), few(classes))
    empty = [name for name in subfolders(base) if name not in classes]
    if empty:
        log.warning(
            "%s: %d folder(s) without images are no classes: %s",
            *(base, len(empty), shown(few(empty))),
        )
