"""One data set of images in memory: checked once, hashed once, never changed."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, few, positive
from bayesdiff.data.spaces import Pixels, Space

if TYPE_CHECKING:
    from bayesdiff.data.binarised import Intensities
    from bayesdiff.data.two_digits import Unseen


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels of one data set; make it with `build`, which checks and hashes.

    Attributes:
        name: short name, for logs and tables.
        images: training images, shape (N, C, H, W), uint8.
        labels: their classes, shape (N,), int64; None for a data set without labels.
        test_images: held-out images, shape (M, C, H, W), uint8.
        test_labels: their classes, shape (M,), int64; None exactly where ``labels`` is.
        classes: class names in the order of the labels; empty without labels.
        fingerprint: 16 hex digits that change with any pixel, label, class name or vector.
        embeddings: a vector for each training image, shape (N, E), float32; None for none.
        test_embeddings: the same for the held-out images, shape (M, E).
        states: the space that a model works in, None for the data's own; see ``space``.
        intensities: what training draws its images from anew in every epoch, see ``binarised``;
            None where it sees ``images``.
        unseen: test images of classes that no training image has, beside ``test_images``.
        stored: fingerprint of the images themselves, where the other one is of a space as well.

    Example:
        >>> images, labels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1])
        >>> data = ImageData.build("mine", images, labels, images, labels, classes=("cat", "dog"))
        >>> data.channels, data.image_size, data.num_classes
        (3, 16, 2)
    """

    name: str
    images: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor | None = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str
    embeddings: Tensor | None = field(default=None, repr=False)
    test_embeddings: Tensor | None = field(default=None, repr=False)
    states: Space | None = field(default=None, repr=False)
    intensities: "Intensities | None" = field(default=None, repr=False)
    unseen: "Unseen | None" = None
    stored: str = ""

    @classmethod
    def build(
        cls,
        name: str,
        images: Tensor,
        labels: Tensor | None,
        test_images: Tensor,
        test_labels: Tensor | None,
        classes: tuple[str, ...] = (),
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Check everything a later stage relies on, and hash it.

        Raises:
            UserError: for an empty set, a wrong dtype or shape, sizes that differ, labels that
                are missing, too many or out of range, a class that no training image has, and
                vectors that do not fit the images.
        """
        check_both_labelled(name, labels is not None, test_labels is not None)
        if labels is None and classes:
            raise UserError(f"data set {name}: {len(classes)} class names but no labels")
        for part, x, y in (("training", images, labels), ("test", test_images, test_labels)):
            _check_images(f"data set {name}", part, x)
            if y is not None:
                check_labels(f"data set {name}", part, x, y, len(classes))
        if labels is not None:
            check_classes(f"data set {name}", labels, classes)
        if images.shape[1:] != test_images.shape[1:]:
            colours = images.shape[1] != test_images.shape[1]
            cure = "convert all to grey or all to RGB" if colours else "bring them to one size"
            raise UserError(
                f"data set {name}: training images are {_size(images)} but test images are "
                f"{_size(test_images)}; {cure}"
            )
        parts = (images, labels, test_images, test_labels)
        vectors = embeddings or (None, None)
        if embeddings is not None:
            _check_embeddings(f"data set {name}", embeddings, (len(images), len(test_images)))
        fingerprint = fingerprint_of((*parts, *(embeddings or ())), classes)
        return cls(name, *parts, classes, fingerprint, *vectors)

    @property
    def images_fingerprint(self) -> str:
        """Of the images themselves, whatever states a model makes of them."""
        return self.stored or self.fingerprint

    @property
    def space(self) -> Space:
        """The states in which a model trains and samples."""
        return Pixels(self) if self.states is None else self.states

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Channels per image: 1 for grey, 3 for RGB."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of square images, (height, width) of others, in pixels."""
        height, width = self.images.shape[2:]
        return height if height == width else (height, width)


def check_both_labelled(name: str, training: bool, test: bool) -> None:
    """Whether training and test images have labels: both or neither.

    Raises:
        UserError: if only one of them does.
    """
    if training != test:
        which = "training" if training else "test"
        raise UserError(f"data set {name}: only the {which} images have labels; label both")


def _size(images: Tensor) -> str:
    return "x".join(str(n) for n in images.shape[1:]) + " (channels x height x width)"


def _check_images(where: str, part: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise UserError(f"{where}: {part} images are {images.dtype}; give uint8, values 0 to 255")
    if images.ndim != 4:
        raise UserError(f"{where}: {part} images have shape {tuple(images.shape)}, not (N,C,H,W)")
    if images.numel() == 0:
        raise UserError(f"{where}: no {part} images, shape {tuple(images.shape)}; add some")


def check_labels(where: str, part: str, images: Tensor, labels: Tensor, classes: int) -> None:
    """One class number for each image.

    Raises:
        UserError: for another dtype or shape, or a number that is no class.
    """
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(
            f"{where}: {part} labels are {labels.dtype} of shape {tuple(labels.shape)}; "
            "give int64 of shape (N,)"
        )
    if len(labels) != len(images):
        raise UserError(
            f"{where}: {len(labels)} {part} labels for {len(images)} images; give one per image"
        )
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{where}: {part} image {first} has label {int(labels[first])}, but there are "
            f"{classes} classes; labels run from 0 to the number of classes minus 1"
        )


def _check_embeddings(where: str, vectors: tuple[Tensor, Tensor], counts: tuple[int, int]) -> None:
    for part, given, count in zip(("training", "test"), vectors, counts, strict=True):
        if given.dtype != torch.float32 or given.ndim != 2 or len(given) != count:
            raise UserError(
                f"{where}: {part} embeddings are {given.dtype} of shape {tuple(given.shape)}; "
                f"give float32 of shape ({count}, E), a vector for each image"
            )
        if not bool(given.isfinite().all()):
            raise UserError(f"{where}: {part} embeddings hold nan or inf; leave these images out")
    if vectors[0].shape[1] != vectors[1].shape[1]:
        raise UserError(
            f"{where}: training embeddings have {vectors[0].shape[1]} numbers and test embeddings "
            f"{vectors[1].shape[1]}; give both the same"
        )


def check_classes(where: str, labels: Tensor, classes: tuple[str, ...]) -> None:
    """A model would draw, map and score what it has never seen.

    Raises:
        UserError: for a class without training image, and two classes of one name.
    """
    counts = torch.bincount(labels, minlength=len(classes))
    empty = [classes[i] for i in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        raise UserError(
            f"{where}: no training image of {len(empty)} of {len(classes)} classes "
            f"({few(empty, 5)}); leave these classes out, or add images of them"
        )
    if len(set(classes)) < len(classes):
        twice = next(c for i, c in enumerate(classes) if c in classes[:i])
        raise UserError(f"{where}: two classes are named {twice}; give each its own name")


def fingerprint_of(parts: tuple[Tensor | None, ...], classes: tuple[str, ...]) -> str:
    """Hash of shapes, contents and class names, the same on every platform."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none" if part is None else str(tuple(part.shape)).encode())
        if part is not None:
            array = part.contiguous().numpy()
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).data)
    digest.update("\0".join(classes).encode())
    return digest.hexdigest()[:16]


def hold_out(
    name: str,
    images: Tensor,
    labels: Tensor | None,
    classes: tuple[str, ...],
    test_fraction: float,
    seed: int,
    embeddings: Tensor | None = None,
) -> ImageData:
    """Hold out the same share of every class for testing; the same images for the same seed.

    Every class keeps a training image.

    Args:
        name: short name of the data set.
        images: all images, shape (N, C, H, W), uint8.
        labels: their classes, shape (N,), or None.
        classes: class names in the order of the labels.
        test_fraction: share to hold out, between 0 and 1; at least one image is.
        seed: chooses which images are held out.
        embeddings: a vector for each image, shape (N, E), float32, or None.

    Raises:
        UserError: for a share outside (0, 1), a negative seed, or fewer than two images.

    Example:
        >>> images, labels = torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.arange(100) % 2
        >>> data = hold_out("mine", images, labels, ("even", "odd"), test_fraction=0.1, seed=0)
        >>> len(data.images), torch.bincount(data.test_labels)
        (90, tensor([5, 5]))
    """
    n = len(images)
    positive("data.source.test_fraction", test_fraction, "give a number between 0 and 1")
    if test_fraction >= 1:
        raise UserError(
            f"data.source.test_fraction={test_fraction} leaves no training images; use 0.1"
        )
    at_least("data.source.seed", seed, 0)
    if n < 2:
        raise UserError(f"data set {name} has {n} image; add some, one is held out for testing")
    held = min(max(round(n * test_fraction), 1), n - 1)
    # RandomState's stream is frozen by NumPy's promise, so a split outlives its versions.
    order = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(n))
    if labels is not None:
        order = order[torch.sort(labels[order], stable=True).indices]
    # Evenly spaced places in a list sorted by class take a fair share of each class.
    places = ((torch.arange(held, dtype=torch.float64) + 0.5) * n / held).long()
    test = torch.zeros(n, dtype=torch.bool)
    test[order[places]] = True
    if labels is not None:
        for number in set(labels.tolist()) - set(labels[~test].tolist()):
            test[(labels == number).nonzero()[0]] = False
        if not test.any() and n > len(classes):
            # One of a class that has others.
            test[order[labels[order] == int(torch.bincount(labels).argmax())][-1]] = True
        if not test.any():
            raise UserError(
                f"data set {name} has {n} images of {len(classes)} classes, and every class needs "
                "one for training; add images, some are held out for testing"
            )
    train_labels, test_labels = (None, None) if labels is None else (labels[~test], labels[test])
    vectors = None if embeddings is None else (embeddings[~test], embeddings[test])
    parts = (images[~test], train_labels, images[test], test_labels)
    return ImageData.build(name, *parts, classes, vectors)
