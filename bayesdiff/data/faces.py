"""CelebA as it is downloaded: a folder of faces beside lists of splits and attributes."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from bayesdiff.checks import UserError
from bayesdiff.data.decode import decode
from bayesdiff.data.folders import Part
from bayesdiff.data.framing import Framing
from bayesdiff.data.listing import image_names

log = logging.getLogger(__name__)

_FACES = "img_align_celeba"
_PARTS = {"0": "train", "1": "validation", "2": "test"}


@dataclass(frozen=True)
class Faces:
    """Which images there are, of which split, and with which label.

    Attributes:
        folder: of the images.
        splits: names of the images by split.
        labels: 0 or 1 by name; None without an attribute.
        classes: names of the two classes; empty without an attribute.
    """

    folder: Path
    splits: dict[str, list[str]]
    labels: dict[str, int] | None
    classes: tuple[str, ...]

    def has(self, split: str) -> bool:
        """Whether there are images of a split."""
        return bool(self.splits.get(split))

    def part(self, split: str, framing: Framing) -> Part:
        """Images and labels of one split."""
        names = self.splits[split]
        labels = None if self.labels is None else torch.tensor([self.labels[n] for n in names])
        decoded = decode(names, lambda n: (self.folder / n).read_bytes(), self.folder, framing)
        return Part(decoded, labels, self.classes)


def find_faces(root: Path, attribute: str | None) -> Faces:
    """List the images below ``root``, with the official splits and an attribute as label.

    Raises:
        UserError: for files that are missing, an unknown attribute, and images without a line.
    """
    places = (root, root / "celeba", root / "CelebA")
    base = next((p for p in places if (p / _FACES).is_dir()), None)
    if base is None:
        raise UserError(
            f"data.root={root} holds no {_FACES}/; download the aligned CelebA images from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and give the folder with them"
        )
    folder = base / _FACES
    if (folder / _FACES).is_dir():  # as Kaggle packs it
        folder = folder / _FACES
    names = image_names(folder)
    splits = _splits(base, folder, names)
    if not splits.get("train"):
        raise UserError(f"{folder} has no training images by list_eval_partition; add them")
    if attribute is None:
        return Faces(folder, splits, None, ())
    used = [n for part in ("train", "test") for n in splits.get(part, [])]
    labels = _attribute(base, folder, used, attribute)
    return Faces(folder, splits, labels, (f"not {attribute}", attribute))


def _splits(base: Path, folder: Path, names: list[str]) -> dict[str, list[str]]:
    path = _list(base, folder, "list_eval_partition")
    if path is None:
        log.warning("%s: no list_eval_partition; test images are held out at random", base)
        return {"train": names}
    parts = {row[0]: row[1] for row in _rows(path) if len(row) == 2}
    splits: dict[str, list[str]] = {}
    for name in names:
        if parts.get(name) not in _PARTS:
            raise UserError(f"{path} has no line with 0, 1 or 2 for {name}; copy the list again")
        splits.setdefault(_PARTS[parts[name]], []).append(name)
    log.info("%s: %s", path, ", ".join(f"{len(v)} {k} images" for k, v in splits.items()))
    return splits


def _attribute(base: Path, folder: Path, names: list[str], attribute: str) -> dict[str, int]:
    """Whether each image has the attribute, 0 or 1."""
    path = _list(base, folder, "list_attr_celeba")
    if path is None:
        raise UserError(
            f"data.source.attribute={attribute} needs list_attr_celeba.txt in {base}; download it "
            "or leave the attribute out"
        )
    rows = _rows(path)
    header = next((row for row in rows if attribute in row), None)
    if header is None:
        known = next((row for row in rows[:2] if row and not row[0].isdigit()), [])
        listed = ", ".join(name for name in known if name != "image_id")
        raise UserError(f"{path} has no attribute {attribute}; choose from {listed}")
    # Counted from the end: the header of the text file has no column for the image.
    column = header.index(attribute) - len(header)
    values = {row[0]: row[column] for row in rows if len(row) >= -column}
    for name in names:
        if values.get(name) not in ("-1", "0", "1"):
            raise UserError(f"{path} has no line for {name}; copy the list again")
    labels = {name: int(values[name] == "1") for name in names}
    log.info("%s: %d of %d images are %s", path, sum(labels.values()), len(labels), attribute)
    return labels


def _list(base: Path, folder: Path, stem: str) -> Path | None:
    places = (p / f"{stem}{ending}" for p in (base, folder.parent) for ending in (".txt", ".csv"))
    return next((p for p in places if p.is_file()), None)


def _rows(path: Path) -> list[list[str]]:
    """Words of each line; commas and blanks both separate."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); copy it again") from error
    return [line.replace(",", " ").split() for line in text.splitlines()]
