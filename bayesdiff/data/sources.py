"""Where images come from: one function per source, each the ``_target_`` of a data config."""

import json
import logging
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.decode import DECODE_ERRORS, decode, image_names, is_image, one_line
from bayesdiff.data.images import ImageData, hold_out

log = logging.getLogger(__name__)

_TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10")
# What torchvision raises for a failed download and for damaged files.
_TORCHVISION_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError),
    HTTPException,
)
_FETCH = "set data.source.download=true"
_MOST_CLASSES = 100_000  # a larger label is a slip, and names for all classes would fill memory


@dataclass(frozen=True)
class _Part:
    """Images (N, C, H, W), their labels (N,) if any, and the names of the classes."""

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]


def digits(name: str = "digits", root: str | None = None) -> ImageData:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn; 300 are held out.

    Args:
        name: short name of the data set.
        root: must stay unset; it is here because every other data set has it.

    Raises:
        UserError: if ``root`` is set.
    """
    if root is not None:
        raise UserError(
            f"data.root={root} has no effect: digits ship with scikit-learn and take no "
            "data.root; leave it out or choose another data set, for example data=mnist"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * 255 / 16).astype(np.uint8)  # 0..16 to 0..255
    labels = torch.from_numpy(bunch.target).long()
    classes = tuple(str(c) for c in bunch.target_names)
    return hold_out(name, torch.from_numpy(grey).unsqueeze(1), labels, classes, 1 / 6, seed=0)


def torchvision_images(
    name: str, root: str | Path, dataset: str, download: bool = True
) -> ImageData:
    """A torchvision data set with its own test set, read whole.

    Args:
        name: short name of the data set.
        root: folder that holds, or will hold, torchvision's layout (``MNIST/raw``, ...).
        dataset: ``MNIST``, ``FashionMNIST``, ``KMNIST`` or ``CIFAR10``.
        download: fetch missing files; files that are there never touch the network.

    Raises:
        UserError: if the files are missing and cannot be fetched, or are damaged.
    """
    if dataset not in _TORCHVISION:
        raise UserError(
            f"data.source.dataset={dataset} is unknown; use one of {', '.join(_TORCHVISION)}"
        )
    base = _path(root, "data.root")
    train = _torchvision_part(dataset, base, True, download)
    test = _torchvision_part(dataset, base, False, download)
    return _build(name, train, test)


def _torchvision_part(dataset: str, root: Path, train: bool, download: bool) -> _Part:
    from torchvision import datasets

    source = getattr(datasets, dataset)
    files = root / getattr(source, "base_folder", f"{dataset}/raw")
    # A failed download leaves the folder empty: that is missing, not damaged.
    there = next(files.glob("*"), None) is not None
    state = "is incomplete or damaged" if there else "is missing"
    try:
        try:
            data = source(str(root), train=train, download=False)
        except _TORCHVISION_ERRORS:
            if not download:
                raise
            log.info("%s %s; torchvision fetches what is missing", files, state)
            data = source(str(root), train=train, download=True)
    except _TORCHVISION_ERRORS as error:
        repair = "delete it to fetch it again" if there else "check the network"
        raise UserError(
            f"{dataset}: {files} {state} ({one_line(error)}); set data.root or BAYESDIFF_DATA to "
            f"a folder with {files.relative_to(root)}, or {repair if download else _FETCH}"
        ) from error
    pixels = torch.as_tensor(data.data)
    # The MNIST family is (N, H, W); CIFAR-10 is (N, H, W, C).
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(data.targets).long()
    return _Part(images.contiguous(), labels, tuple(data.classes))


def folder(name: str, root: str | Path, test_fraction: float = 0.1, seed: int = 0) -> ImageData:
    """PNG and JPEG files below a folder: one subfolder per class, or none and no labels.

    ``train/`` beside ``test/`` (or else ``val/``) are the two sets; otherwise a share is held out.

    Args:
        name: short name of the data set.
        root: the folder.
        test_fraction: share to hold out, between 0 and 1; used without a test folder.
        seed: chooses which images are held out.

    Raises:
        UserError: for a missing or empty folder, and a file that cannot be read or differs
            from the others in size or colour.
    """
    base = _path(root, "data.root")
    if not base.is_dir():
        state = "is a file" if base.exists() else "does not exist"
        raise UserError(f"data.root={base} {state}; give a folder of PNG or JPEG images")
    if (base / "dataset.json").exists():
        raise UserError(
            f"data.root={base} holds dataset.json, the StyleGAN/EDM format; "
            "zip the folder without compression and read the zip with data=zip"
        )
    inside = {p.name for p in base.glob("*") if p.is_dir() and not p.name.startswith(".")}
    held_out = next((n for n in ("test", "val") if n in inside), None)
    if "train" in inside and held_out is not None:
        train = _folder_part(base / "train")
        return _build(name, train, _folder_part(base / held_out, train.classes))
    # A lone train/ is a set without a test set, not a class of that name.
    train = _folder_part(base / "train" if inside == {"train"} else base)
    return hold_out(name, train.images, train.labels, train.classes, test_fraction, seed)


def _folder_part(base: Path, known: tuple[str, ...] = ()) -> _Part:
    """Read all images below ``base``; ``known`` are the classes of the training set, if any.

    Raises:
        UserError: for images both beside and inside class folders, and unknown classes.
    """
    names = image_names(base)
    inside = [n for n in names if "/" in n]
    if inside and len(inside) < len(names):
        beside = next(n for n in names if "/" not in n)
        raise UserError(
            f"{base} has images beside and inside class folders ({beside} and {inside[0]}); "
            "move all of them into class folders, or none"
        )
    folders = [n.split("/")[0] for n in inside]
    classes = known if inside and known else tuple(sorted(set(folders)))
    index = {c: i for i, c in enumerate(classes)}
    strange = next((c for c in folders if c not in index), None)
    if strange is not None:
        raise UserError(f"{base / strange} is no class of the training set; remove or rename it")
    labels = torch.tensor([index[c] for c in folders]) if inside else None
    return _Part(decode(names, lambda n: (base / n).read_bytes(), base), labels, classes)


def zip_images(
    name: str,
    root: str | Path,
    test_root: str | Path | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """A zip in the StyleGAN/EDM format: images, and ``dataset.json`` with their labels.

    ``dataset.json`` holds ``{"labels": [["00000/img00000000.png", 6], ...]}`` and, if wanted,
    ``"classes"``, a list of names. Without it, or with ``"labels": null``, there are no labels.
    Nothing is unpacked to disk.

    Args:
        name: short name of the data set.
        root: the zip file.
        test_root: second zip with the test images; unset holds out a share of the first.
        test_fraction: share to hold out, between 0 and 1; used without ``test_root``.
        seed: chooses which images are held out.

    Raises:
        UserError: for a file that is not a whole zip, a bad ``dataset.json``, and images that
            cannot be read or differ in size or colour.
    """  # noqa: DOC502 - raised one level down
    train = _zip_part(_path(root, "data.root"), "data.root")
    if test_root is None:
        return hold_out(name, train.images, train.labels, train.classes, test_fraction, seed)
    return _build(
        name, train, _zip_part(_path(test_root, "data.source.test_root"), "data.source.test_root")
    )


def _zip_part(path: Path, key: str) -> _Part:
    with _open_zip(path, key) as archive:
        # Sorted by name, as EDM does, so that image i is the same image there and here.
        names = sorted(n for n in archive.namelist() if is_image(n))
        if not names:
            raise UserError(f"{key}={path} holds no PNG or JPEG images; give a zip of images")
        labels, classes = _zip_labels(archive, f"dataset.json in {path}", names)
        return _Part(decode(names, archive.read, path), labels, classes)


def _open_zip(path: Path, key: str) -> zipfile.ZipFile:
    if path.is_dir():
        example = next(iter(sorted(path.glob("*.zip"))), path / "images.zip")
        raise UserError(f"{key}={path} is a folder; give a zip, for example {key}={example}")
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise UserError(f"{key}={path} does not exist; give a zip of images") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{key}={path} is not a zip, or not a whole one ({one_line(error)}); copy it again"
        ) from error


def _zip_labels(
    archive: zipfile.ZipFile, where: str, names: list[str]
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels (N,) in the order of ``names``, and the class names.

    Raises:
        UserError: for a dataset.json that cannot be read or does not fit the images.
    """
    if "dataset.json" not in archive.namelist():
        log.info("no %s: images without labels", where)
        return None, ()
    try:
        content = json.loads(archive.read("dataset.json"))
        pairs = content["labels"]
        labels: dict[str, Any] | None = None if pairs is None else dict(pairs)
        classes = content.get("classes") or []
    except (*DECODE_ERRORS, KeyError, TypeError) as error:
        raise UserError(
            f'{where} cannot be read ({one_line(error)}); it must hold {{"labels": '
            '[["name.png", 0], ...]} or {"labels": null}'
        ) from error
    if not isinstance(classes, list):
        raise UserError(f'{where}: "classes" is {classes!r}; give a list of names')
    if labels is None:
        return None, ()
    if len(labels) != len(pairs):
        raise UserError(f"{where} names {len(pairs) - len(labels)} image(s) twice; keep one entry")
    _check_entries(where, labels, names)
    ordered = torch.tensor([labels[n] for n in names])
    return ordered, tuple(str(c) for c in classes or range(int(ordered.max()) + 1))


def _check_entries(where: str, labels: dict[str, Any], names: list[str]) -> None:
    """Every entry is an image with a class number, and every image has one.

    Raises:
        UserError: naming the first that breaks this.
    """
    present = set(names)
    for entry, label in labels.items():
        if entry not in present:
            raise UserError(f"{where} names {entry}, which is not in the zip; remove the entry")
        if type(label) is not int or not 0 <= label < _MOST_CLASSES:
            raise UserError(f"{where}: {entry} has label {label!r}; give a class number from 0")
    missing = next((n for n in names if n not in labels), None)
    if missing is not None:
        raise UserError(f"{where} has no label for {missing}; add it or remove the image")


def _build(name: str, train: _Part, test: _Part) -> ImageData:
    return ImageData.build(
        name, train.images, train.labels, test.images, test.labels, train.classes
    )


def _path(value: str | Path | None, key: str) -> Path:
    if value is None or not str(value):
        raise UserError(f"{key} is not set; give {key}=PATH or set BAYESDIFF_DATA")
    return Path(str(value)).expanduser()
