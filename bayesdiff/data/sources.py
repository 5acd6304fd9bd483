"""Where images come from: one function per source, each the ``_target_`` of a data config."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bayesdiff.checks import UserError
from bayesdiff.data.faces import find_faces
from bayesdiff.data.folders import Part, folder_part, splits
from bayesdiff.data.framing import Framing
from bayesdiff.data.images import ImageData, check_both_labelled, hold_out
from bayesdiff.data.torchvision_part import torchvision_part
from bayesdiff.data.zips import zip_part

_TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10")
Crop = int | str | Sequence[int] | None  # ``data.crop``, see `bayesdiff.data.framing.Framing`
Sides = int | Sequence[int] | None  # ``data.resize``


def digits(
    name: str = "digits", root: str | None = None, crop: Crop = None, resize: Sides = None
) -> ImageData:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn; 300 are held out.

    Args:
        name: short name of the data set.
        root: must stay unset; it is here because every other data set has it.
        crop: side or [height, width] of a centred part to cut out, or ``square``.
        resize: side or [height, width] that images are brought to after that.

    Raises:
        UserError: if ``root`` is set.

    Example:
        >>> data = digits()
        >>> data.images.shape, data.images.dtype, len(data.test_images)
        (torch.Size([1497, 1, 8, 8]), torch.uint8, 300)
        >>> digits(resize=16).images.shape
        torch.Size([1497, 1, 16, 16])
    """
    if root is not None:
        raise UserError(
            f"data.root={root} has no effect: digits ship with scikit-learn and take no "
            "data.root; leave it out or choose another data set, for example data=mnist"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * 255 / 16).astype(np.uint8)  # 0..16 to 0..255
    images = Framing.of(crop, resize).of_tensor(torch.from_numpy(grey).unsqueeze(1), name)
    labels = torch.from_numpy(bunch.target).long()
    classes = tuple(str(c) for c in bunch.target_names)
    return hold_out(name, images, labels, classes, 1 / 6, seed=0)


def torchvision_images(
    name: str,
    root: str | Path,
    dataset: str,
    download: bool = True,
    crop: Crop = None,
    resize: Sides = None,
) -> ImageData:
    """A torchvision data set with its own test set, read whole.

    Args:
        name: short name of the data set.
        root: folder that holds, or will hold, torchvision's layout (``MNIST/raw``, ...).
        dataset: ``MNIST``, ``FashionMNIST``, ``KMNIST`` or ``CIFAR10``.
        download: fetch missing files; files that are there never touch the network.
        crop: side or [height, width] of a centred part to cut out, or ``square``.
        resize: side or [height, width] that images are brought to after that.

    Raises:
        UserError: if the files are missing and cannot be fetched, or are damaged.

    Example:
        Of files that were fetched before; ``download=True`` fetches 11 MB.

        >>> data = torchvision_images("mnist", "data", "MNIST", resize=16)  # doctest: +SKIP
        >>> data.images.shape, data.num_classes  # doctest: +SKIP
        (torch.Size([60000, 1, 16, 16]), 10)
    """
    if dataset not in _TORCHVISION:
        raise UserError(
            f"data.source.dataset={dataset} is unknown; use one of {', '.join(_TORCHVISION)}"
        )
    framing = Framing.of(crop, resize)
    base = _path(root, "data.root")
    train = torchvision_part(dataset, base, True, download, framing)
    test = torchvision_part(dataset, base, False, download, framing)
    return _build(name, train, test)


def folder(
    name: str,
    root: str | Path,
    test_fraction: float = 0.1,
    seed: int = 0,
    crop: Crop = None,
    resize: Sides = None,
) -> ImageData:
    """Image files below a folder: one subfolder per class, or none and no labels.

    Every format that Pillow reads as pictures is read. ``train/`` beside ``test/`` (or else
    ``val/``), under their usual names, are the two sets; otherwise a share is held out.

    Args:
        name: short name of the data set.
        root: the folder.
        test_fraction: share to hold out, between 0 and 1; used without a test folder.
        seed: chooses which images are held out.
        crop: side or [height, width] to cut out of the middle of every image, or ``square``, the
            largest.
        resize: side or [height, width] that images are brought to after that.

    Raises:
        UserError: for a missing or empty folder, a tree that can be read in more than one way,
            and a file that cannot be read or differs from the others in size or colour.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in "cat", "dog":
        ...     (root / label).mkdir()
        ...     for n in range(5):
        ...         Image.new("RGB", (12, 8), (n, 0, 0)).save(root / label / f"{n}.png")
        >>> data = folder("pets", root, test_fraction=0.2, crop="square")
        >>> data.images.shape, data.classes, len(data.test_images)
        (torch.Size([8, 3, 8, 8]), ('cat', 'dog'), 2)
    """
    framing = Framing.of(crop, resize)
    base = _path(root, "data.root")
    if not base.is_dir():
        state = "is a file" if base.exists() else "does not exist"
        raise UserError(f"data.root={base} {state}; give a folder of images")
    if (base / "dataset.json").exists():
        raise UserError(
            f"data.root={base} holds dataset.json, the StyleGAN/EDM format; "
            "zip the folder without compression and read the zip with data=zip"
        )
    tree = splits(base)
    listed = folder_part(tree.train)
    if tree.test is not None:
        test = folder_part(tree.test, listed.classes)
        check_both_labelled(name, listed.labels is not None, test.labels is not None)
        return _build(name, listed.decode(framing), test.decode(framing))
    return _held_out(name, listed.decode(framing), test_fraction, seed)


def zip_images(
    name: str,
    root: str | Path,
    test_root: str | Path | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    crop: Crop = None,
    resize: Sides = None,
) -> ImageData:
    """A zip in the StyleGAN/EDM format: images, and ``dataset.json`` with their labels.

    ``dataset.json`` holds ``{"labels": [["00000/img00000000.png", 6], ...]}`` and, if wanted,
    ``"classes"``, a list of names. Without it, or with ``"labels": null``, there are no labels.
    Only numbers that images have are classes: labels 3 and 7 are two classes of these names.
    Nothing is unpacked to disk.

    Args:
        name: short name of the data set.
        root: the zip file.
        test_root: second zip with the test images; unset holds out a share of the first.
        test_fraction: share to hold out, between 0 and 1; used without ``test_root``.
        seed: chooses which images are held out.
        crop: side or [height, width] to cut out of the middle of every image, or ``square``, the
            largest.
        resize: side or [height, width] that images are brought to after that.

    Raises:
        UserError: for a file that is not a whole zip, a bad ``dataset.json``, labels that no
            training image has, and images that cannot be read or differ in size or colour.

    Example:
        >>> import io, json, tempfile, zipfile
        >>> from PIL import Image
        >>> root, image = Path(tempfile.mkdtemp()) / "mine.zip", io.BytesIO()
        >>> Image.new("L", (8, 8)).save(image, "png")
        >>> with zipfile.ZipFile(root, "w") as file:
        ...     for n in range(10):
        ...         file.writestr(f"{n}.png", image.getvalue())
        ...     labels = [[f"{n}.png", n % 2] for n in range(10)]
        ...     file.writestr("dataset.json", json.dumps({"labels": labels}))
        >>> data = zip_images("mine", root, test_fraction=0.2)
        >>> data.images.shape, data.classes, len(data.test_images)
        (torch.Size([8, 1, 8, 8]), ('0', '1'), 2)
    """  # noqa: DOC502 - raised one level down
    framing = Framing.of(crop, resize)
    train = zip_part(_path(root, "data.root"), "data.root")
    if test_root is None:
        labels, classes = train.classes()
        part = Part(train.decode(framing), labels, classes)
        return _held_out(name, part, test_fraction, seed)
    test = zip_part(_path(test_root, "data.source.test_root"), "data.source.test_root")
    check_both_labelled(name, train.numbers is not None, test.numbers is not None)
    test_labels, _ = test.classes(train)
    labels, classes = train.classes()
    tests = Part(test.decode(framing), test_labels, classes)
    return _build(name, Part(train.decode(framing), labels, classes), tests)


def celeba(
    name: str,
    root: str | Path,
    attribute: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    crop: Crop = 140,
    resize: Sides = 64,
) -> ImageData:
    """CelebA, aligned and cropped faces of 178x218 pixels (Liu et al. 2015).

    The defaults are the 64x64 images of score-based models (Song et al. 2021, ``score_sde``): the
    centred square of 140 pixels, resized. Training and test images are those of
    ``list_eval_partition`` where it is there; its validation images are left out.

    Args:
        name: short name of the data set.
        root: folder that holds ``img_align_celeba/`` and the lists, or ``celeba/`` with them.
        attribute: name of one of the 40 attributes of ``list_attr_celeba``, such as ``Smiling``,
            which gives two classes; None for no labels.
        test_fraction: share to hold out, between 0 and 1; used without ``list_eval_partition``.
        seed: chooses which images are held out.
        crop: side or [height, width] to cut out of the middle of every image, or ``square``, the
            largest.
        resize: side or [height, width] that images are brought to after that.

    Raises:
        UserError: for files that are missing, an unknown attribute, and images without a line
            in a list.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "img_align_celeba").mkdir()
        >>> for n in range(10):  # in place of the 202,599 faces
        ...     file = root / "img_align_celeba" / f"{n:06}.jpg"
        ...     Image.new("RGB", (178, 218), (25 * n, 0, 0)).save(file)
        >>> celeba("faces", root, test_fraction=0.2).images.shape
        torch.Size([8, 3, 64, 64])
    """  # noqa: DOC502 - raised one level down
    framing = Framing.of(crop, resize)
    faces = find_faces(_path(root, "data.root"), attribute)
    train = faces.part("train", framing)
    if faces.has("test"):
        return _build(name, train, faces.part("test", framing))
    return _held_out(name, train, test_fraction, seed)


def _build(name: str, train: Part, test: Part) -> ImageData:
    """Two parts as one data set; whether palettes of greys are grey is decided for both."""
    images, tests = train.decoded.like(test.decoded), test.decoded.like(train.decoded)
    return ImageData.build(name, images, train.labels, tests, test.labels, train.classes)


def _held_out(name: str, part: Part, test_fraction: float, seed: int) -> ImageData:
    images = part.decoded.images
    return hold_out(name, images, part.labels, part.classes, test_fraction, seed)


def _path(value: str | Path | None, key: str) -> Path:
    if value is None or not str(value):
        raise UserError(f"{key} is not set; give {key}=PATH or set BAYESDIFF_DATA")
    return Path(str(value)).expanduser()
