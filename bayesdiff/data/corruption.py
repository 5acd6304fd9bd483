"""Known corruption of training data, so that the right answer of a search for bad images is known.

Every corruption takes a data set and returns another: other training images, labels or visits, the
same test images and classes. What it does depends on its options and its seed alone.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hydra.utils import get_method
from torch import Tensor

from bayesdiff.checks import UserError, at_least, one_line, seed_of, share
from bayesdiff.data.images import ImageData

Corruption = Callable[[ImageData], ImageData]
_WHERE = "data.source.corruption"


@dataclass(frozen=True, eq=False, kw_only=True)
class RarelyVisited(ImageData):
    """Images of which training visits some in few epochs only; all else sees them as they are.

    Attributes:
        rare: places of these images in ``images``, int64 (R,), in the order of their visits.
        visits: share of the epochs that visit each of them.
    """

    rare: Tensor = field(repr=False)
    visits: float

    def visited(self, epoch: int) -> Tensor:
        """Places of the images that training visits in an epoch, ascending, int64 (n,)."""
        there = torch.ones(len(self.images), dtype=torch.bool)
        there[self.rare] = False
        # Windows that follow each other without a gap: after E epochs every rare image has had
        # E * visits of them, rounded down or up.
        turns = torch.arange(self._turns(epoch), self._turns(epoch + 1))
        there[self.rare[turns % len(self.rare)]] = True
        return there.nonzero().flatten()

    @property
    def fewest(self) -> int:
        """Images that every epoch visits at least."""
        return len(self.images) - len(self.rare) + self._turns(1)

    def _turns(self, epoch: int) -> int:
        """Visits of rare images before an epoch; 0.1 is a tenth here, not its binary neighbour."""
        return math.floor(epoch * len(self.rare) * Fraction(str(self.visits)))


def images_per_epoch(data: ImageData) -> int:
    """Images that every epoch of training visits at least."""
    return data.fewest if isinstance(data, RarelyVisited) else len(data.images)


def corrupted(source: str, corruption: Corruption, **options: Any) -> ImageData:
    """A data set from any source, corrupted: the ``_target_`` of the group ``corruption``.

    Args:
        source: full name of the function that reads the data, ``bayesdiff.data.sources.digits``.
        corruption: one of this module's, with its options.
        options: of the source.

    Raises:
        UserError: for a source that is not there, or does not take the options.

    Example:
        >>> from functools import partial
        >>> few = partial(truncated, classes=["3"], keep=10)
        >>> data = corrupted("bayesdiff.data.sources.digits", few, crop=8)
        >>> int((data.labels == 3).sum())
        10
    """
    try:
        read = get_method(source)
        inspect.signature(read).bind(**options)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"data.source.source={source} cannot read this data ({one_line(error, 100)}); give "
            "what data.source._target_ is without the corruption, for example "
            "bayesdiff.data.sources.torchvision_images for data=mnist"
        ) from error
    return corruption(read(**options))


def mislabelled(
    data: ImageData,
    classes: Sequence[str | int],
    into: Sequence[str | int],
    share: float = 0.3,
    seed: int = 0,
) -> ImageData:
    """A share of the training labels of some classes are another's: annotators' confusion.

    Args:
        data: what is corrupted.
        classes: names of the classes that lose labels.
        into: names of those that receive them, one for each; two classes that are confused with
            each other are ``classes=[3,8] into=[8,3]``.
        share: of the images of each class whose label is moved, rounded to whole images.
        seed: chooses them.

    Raises:
        UserError: for an unknown class, a class moved into itself, or a share that moves no image
            or all.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> data = digits()
        >>> wrong = mislabelled(data, classes=[3], into=[8], share=0.3)
        >>> threes = data.labels == 3
        >>> int(threes.sum()), int((wrong.labels[threes] == 8).sum())
        (153, 46)
        >>> torch.equal(wrong.images, data.images)
        True
    """
    labels, sources = _labels(data), _numbers(data, classes)
    targets = _numbers(data, into, "into")
    if len(sources) != len(targets):
        raise UserError(
            f"{_WHERE}: {len(sources)} classes but {len(targets)} in into; name one for each"
        )
    _inside("share", share)
    changed = labels.clone()
    for number, other in zip(sources, targets, strict=True):
        name, count = data.classes[number], int((labels == number).sum())
        if number == other:
            raise UserError(f"{_WHERE}.into moves class {name} into itself; name another class")
        if not 0 < round(share * count) < count:
            raise UserError(
                f"{_WHERE}.share={share} of {count} images of class {name} moves none or all; "
                "choose another share"
            )
        changed[_shuffled(labels, number, seed)[: round(share * count)]] = other
    return _rebuilt(data, changed)


def truncated(
    data: ImageData, classes: Sequence[str | int], keep: int = 10, seed: int = 0
) -> ImageData:
    """Only a few training images of some classes are kept.

    Args:
        data: what is corrupted.
        classes: their names.
        keep: images that are left of each.
        seed: chooses them.

    Raises:
        UserError: for an unknown class, or a class that has no more images than are kept.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> data = truncated(digits(), classes=[3], keep=10)
        >>> torch.bincount(data.labels)
        tensor([148, 152, 147,  10, 151, 151, 151, 149, 145, 150])
    """
    labels = _labels(data)
    at_least(f"{_WHERE}.keep", keep)
    left = torch.ones(len(labels), dtype=torch.bool)
    for number in _numbers(data, classes):
        order = _shuffled(labels, number, seed)
        if keep >= len(order):
            raise UserError(
                f"{_WHERE}.keep={keep} takes nothing from class {data.classes[number]}, which has "
                f"{len(order)} training images; keep fewer"
            )
        left[order[keep:]] = False
    return _rebuilt(data, labels[left], left)


def undertrained(
    data: ImageData, classes: Sequence[str | int], visits: float = 0.05, seed: int = 0
) -> RarelyVisited:
    """All images are there, but training visits those of some classes rarely.

    An epoch is shorter by the images that it leaves out. The curvature and every classifier see
    all images alike.

    Args:
        data: what is corrupted.
        classes: names of the rare classes.
        visits: share of the epochs that visit an image of theirs.
        seed: fixes in which ones.

    Raises:
        UserError: for an unknown class, or a share that is not between 0 and 1.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> data = undertrained(digits(), classes=[3], visits=0.1)
        >>> epochs = [data.labels[data.visited(epoch)] for epoch in range(10)]
        >>> [int((labels == 3).sum()) for labels in epochs]  # of 153
        [15, 15, 15, 16, 15, 15, 16, 15, 15, 16]
    """  # noqa: DOC502 - raised one level down
    labels, numbers = _labels(data), _numbers(data, classes)
    _inside("visits", visits)
    rare = torch.cat([_shuffled(labels, number, seed) for number in numbers])
    if visits * len(rare) < 1:
        raise UserError(
            f"{_WHERE}.visits={visits} of {len(rare)} images visits none in an epoch; raise it"
        )
    # Classes take turns together, so that every epoch has its share of each.
    rare = rare[_permutation(len(rare), seed)]
    text = f"{data.fingerprint} visits {visits!r} of {rare.tolist()}"
    fields = {name: getattr(data, name) for name in _FIELDS}
    fields["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return RarelyVisited(**fields, rare=rare, visits=float(visits))


_FIELDS = (
    *("name", "images", "labels", "test_images", "test_labels", "classes", "fingerprint",
    "embeddings", "test_embeddings"),
)  # fmt: skip


def _rebuilt(data: ImageData, labels: Tensor, kept: Tensor | None = None) -> ImageData:
    """The data set with other labels, or fewer training images, checked and hashed anew."""
    gone = sorted(set(_labels(data).tolist()) - set(labels.tolist()))
    if gone:
        raise UserError(f"{_WHERE} leaves no image of class {data.classes[gone[0]]}; take fewer")
    images, vectors = data.images, data.embeddings
    if kept is not None:
        images, vectors = images[kept], None if vectors is None else vectors[kept]
    tests = (data.test_images, data.test_labels)
    both = vectors is not None and data.test_embeddings is not None
    pair = (vectors, data.test_embeddings) if both else None
    return ImageData.build(data.name, images, labels, *tests, data.classes, pair)  # type: ignore[arg-type]


def _labels(data: ImageData) -> Tensor:
    if data.labels is None:
        raise UserError(f"{_WHERE} needs classes, but {data.name} has no labels; label the images")
    return data.labels


def _numbers(data: ImageData, names: Sequence[str | int], option: str = "classes") -> list[int]:
    """Labels of classes that are given by name."""
    if isinstance(names, (str, int)) or not names:
        raise UserError(f"{_WHERE}.{option} must be a list of class names, got {names!r}")
    asked = [str(name) for name in names]
    for name in asked:
        if name not in data.classes:
            raise UserError(
                f"{_WHERE}.{option}: {data.name} has no class {name}; "
                f"choose from {', '.join(data.classes)}"
            )
    if option == "classes" and len(set(asked)) < len(asked):
        raise UserError(f"{_WHERE}.classes={asked} names a class twice; name each once")
    return [data.classes.index(name) for name in asked]


def _inside(option: str, value: float) -> None:
    if not share(f"{_WHERE}.{option}", value):
        raise UserError(f"{_WHERE}.{option}=0 changes nothing; give a number between 0 and 1")


def _shuffled(labels: Tensor, number: int, seed: int) -> Tensor:
    """Places of the images of a class in an order that depends on the seed."""
    places = (labels == number).nonzero().flatten()
    return places[_permutation(len(places), seed)]


def _permutation(count: int, seed: int) -> Tensor:
    # RandomState's stream is frozen by NumPy's promise, so a corruption outlives its versions.
    state = np.random.RandomState(seed_of(f"{_WHERE}.seed", seed))
    return torch.from_numpy(state.permutation(count))
