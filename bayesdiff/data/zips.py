"""Zips in the StyleGAN/EDM format: images, and ``dataset.json`` with their labels."""

import json
import logging
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, few, one_line
from bayesdiff.data.decode import Decoded, decode
from bayesdiff.data.framing import Framing
from bayesdiff.data.listing import (
    is_hidden,
    is_image,
    say_left_out,
    shown,
    split_of,
)
from bayesdiff.data.pixels import DECODE_ERRORS

log = logging.getLogger(__name__)
_META = "dataset.json"


@dataclass(frozen=True)
class ZipPart:
    """What a zip holds, before any image is decoded.

    Attributes:
        path: the zip.
        names: its images, sorted as EDM sorts them, so that image i is the same one there.
        numbers: their labels as ``dataset.json`` counts them, None without labels.
        titles: names of the classes by number; empty where it gives none.
    """

    path: Path
    names: list[str]
    numbers: list[int] | None
    titles: tuple[str, ...]

    def title(self, number: int) -> str:
        """Name of a class, or its number as text."""
        return self.titles[number] if self.titles else str(number)

    def classes(self, training: "ZipPart | None" = None) -> tuple[Tensor | None, tuple[str, ...]]:
        """Labels 0 ... K-1 of the images (N,), and the names of the K classes.

        Args:
            training: whose classes they are; None for this zip's own. Numbers that no training
                image has are no classes, so that gaps between numbers make none.

        Raises:
            UserError: for an image of a class that the training images do not have.
        """
        if self.numbers is None:
            return None, ()
        known = training or self
        numbers = sorted(set(known.numbers or self.numbers))
        index = {number: i for i, number in enumerate(numbers)}
        for name, number in zip(self.names, self.numbers, strict=True):
            if number not in index:
                raise UserError(
                    f"{self.path}: {shown(name)} has label {number}, which no training image has; "
                    f"the training labels are {few(numbers)}"
                )
            if self.titles and known.titles and self.title(number) != known.title(number):
                raise UserError(
                    f"{self.path} calls class {number} {self.title(number)}, but {known.path} "
                    f"calls it {known.title(number)}; give both the same list of classes"
                )
        unused = [t for n, t in enumerate(self.titles) if n not in index]
        if unused and training is None:
            log.warning(
                '%s: %d of the %d "classes" of %s have no image, and are none: %s',
                *(self.path, len(unused), len(self.titles), _META, few(unused)),
            )
        labels = torch.tensor([index[number] for number in self.numbers])
        return labels, tuple(known.title(number) for number in numbers)

    def decode(self, framing: Framing) -> Decoded:
        """Read all images."""
        with _open(self.path) as archive:
            return decode(self.names, archive.read, self.path, framing)


def zip_part(path: Path, key: str) -> ZipPart:
    """List a zip and read its labels.

    Args:
        path: the file.
        key: the option that names it, for messages.

    Raises:
        UserError: for a file that is not a whole zip of images, and a bad ``dataset.json``.
    """
    if path.is_dir():
        example = next(iter(sorted(path.glob("*.zip"))), path / "images.zip")
        raise UserError(f"{key}={path} is a folder; give a zip, for example {key}={example}")
    try:
        with _open(path) as archive:
            files = [n for n in archive.namelist() if not n.endswith("/") and not is_hidden(n)]
            names = sorted(n for n in files if is_image(n))
            _check_members(archive, key, names)
            say_left_out(str(path), (n for n in files if not is_image(n) and n != _META))
            meta = _read_meta(archive, path, files)
    except FileNotFoundError as error:
        raise UserError(f"{key}={path} does not exist; give a zip of images") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{key}={path} is not a zip, or not a whole one ({one_line(error)}); copy it again"
        ) from error
    if meta is None:
        _say_folders(path, names)
        return ZipPart(path, names, None, ())
    return ZipPart(path, names, *_labels(meta, f"{_META} in {path}", names))


def _open(path: Path) -> zipfile.ZipFile:
    """Open a zip; names that are not marked as UTF-8 mostly are so nevertheless."""
    try:
        return zipfile.ZipFile(path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(path)


def _check_members(archive: zipfile.ZipFile, key: str, names: list[str]) -> None:
    """Refuse a zip without images, and images that cannot be read as one set."""
    path = archive.filename
    if not names:
        raise UserError(f"{key}={path} holds no images; give a zip of images")
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path} holds {shown(twice)} {count} times; zip the images again")
    locked = next((n for n in names if archive.getinfo(n).flag_bits & 1), None)
    if locked is not None:
        raise UserError(f"{path}: {shown(locked)} is encrypted; zip the images without a password")
    splits = {split_of(p) for n in names for p in n.split("/")[:-1][:2]} - {None}
    if len(splits) > 1:
        raise UserError(
            f"{path} holds {' and '.join(sorted(map(str, splits)))} folders; give two zips, "
            "data.root and data.source.test_root, or unpack it and use data=folder"
        )


def _say_folders(path: Path, names: list[str]) -> None:
    """Without labels: folders are no classes here, which a reader might expect."""
    folders = sorted({n.rpartition("/")[0] for n in names})
    log.info("no %s in %s: images without labels", _META, path)
    if len(folders) > 1 and not all(f.rpartition("/")[2].isdigit() for f in folders):
        log.warning(
            "%s: its %d folders (%s, ...) are no classes without %s; unpack it and use "
            "data=folder to read them as classes",
            *(path, len(folders), shown(folders[-1]), _META),
        )


def _read_meta(archive: zipfile.ZipFile, path: Path, files: list[str]) -> Any:
    """Content of ``dataset.json``, None without one."""
    found = [n for n in files if n.rpartition("/")[2] == _META]
    if not found:
        return None
    if found != [_META]:
        raise UserError(
            f"{path} holds {shown(found[-1])}; zip the content of the folder, not the folder, "
            f"with one {_META} at the top"
        )
    try:
        return json.loads(archive.read(_META))
    except DECODE_ERRORS as error:
        raise UserError(_unreadable(f"{_META} in {path}", error)) from error


def _unreadable(where: str, error: Exception) -> str:
    return (
        f'{where} cannot be read ({one_line(error)}); it must hold {{"labels": '
        '[["name.png", 0], ...]} or {"labels": null}'
    )


def _labels(meta: Any, where: str, names: list[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels in the order of ``names``, and the class names by number."""
    try:
        pairs = meta["labels"]
        labels: dict[str, Any] | None = None if pairs is None else dict(pairs)
        titles = meta.get("classes") or []
    except DECODE_ERRORS as error:
        raise UserError(_unreadable(where, error)) from error
    if not isinstance(titles, list):
        raise UserError(f'{where}: "classes" is {titles!r}; give a list of names')
    if labels is None:
        return None, ()
    if len(labels) != len(pairs):
        raise UserError(f"{where} names {len(pairs) - len(labels)} image(s) twice; keep one entry")
    _check_entries(where, labels, names, len(titles))
    numbers = [labels[n] for n in names]
    used = Counter(str(titles[n]) for n in set(numbers)) if titles else Counter()
    if used and used.most_common(1)[0][1] > 1:
        raise UserError(
            f'{where}: "classes" names {used.most_common(1)[0][0]} twice; name each class once'
        )
    return numbers, tuple(str(title) for title in titles)


def _check_entries(where: str, labels: dict[str, Any], names: list[str], titles: int) -> None:
    """Every entry is an image with a class number, and every image has one."""
    present = set(names)
    for entry, label in labels.items():
        if entry not in present:
            raise UserError(f"{where} names {entry}, which is not in the zip; remove the entry")
        if type(label) is not int or label < 0:
            raise UserError(f"{where}: {entry} has label {label!r}; give a class number from 0")
        if titles and label >= titles:
            raise UserError(
                f'{where}: {entry} has label {label}, but "classes" names {titles} classes, '
                f"numbers 0 to {titles - 1}; correct one of them"
            )
    missing = next((n for n in names if n not in labels), None)
    if missing is not None:
        raise UserError(f"{where} has no label for {shown(missing)}; add it or remove the image")
