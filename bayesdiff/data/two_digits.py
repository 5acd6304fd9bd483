"""Two MNIST digits side by side on a black square: 100 classes, some of which may be held out.

The layout is that of MultiDigitMNIST (https://github.com/shaohua0116/MultiDigitMNIST): one digit
in each half, moved at random within it. Training images are made of MNIST's training digits and
test images of its test digits, so that no digit is in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.data.counters import below, keys_of, words
from bayesdiff.data.images import ImageData, fingerprint_of
from bayesdiff.data.sources import torchvision_images
from bayesdiff.storage.artefacts import key_of

_SIDE = 64  # of an image; a digit has half of its width
_AT_ONCE = 2000  # images
_TRAINING, _TESTS = range(2)


@dataclass(frozen=True, eq=False)
class Unseen:
    """Test images of classes that no training image has; nothing but an evaluation reads them.

    Attributes:
        images: uint8 ``(K, C, H, W)``.
        labels: their classes, places in ``classes``, int64 ``(K,)``.
        classes: names of the classes that were held out.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]


class Composition(NamedTuple):
    """What images are made of, each ``(n, 2)``: left and right digit.

    Attributes:
        digits: places of the digits among those of their part of MNIST.
        top: rows above a digit.
        left: columns before a digit, within its half.
        numbers: the two-digit number that an image shows, ``(n,)``.
    """

    digits: Tensor
    top: Tensor
    left: Tensor
    numbers: Tensor


def two_digits(
    name: str,
    root: str | Path,
    download: bool = True,
    images: int = 60_000,
    test_images: int = 10_000,
    holdout_classes: Sequence[int | str] | None = None,
    generator_compat: bool = False,
    seed: int = 0,
) -> ImageData:
    """Images of 64x64 with two digits, a function of seed, part and place.

    Args:
        name: short name of the data set.
        root: folder that holds, or will hold, ``MNIST/raw``.
        download: fetch missing files of MNIST.
        images: for training.
        test_images: held out, of all 100 classes; those of classes that training never shows are
            in ``unseen``, the others in ``test_images``.
        holdout_classes: two-digit numbers that no training image shows, such as ``[7, 42]``.
        generator_compat: classes are equally likely, not digits of MNIST, and offsets stay one
            below their largest value, as in the generator of MultiDigitMNIST.
        seed: of the choice of digits and their places.

    Raises:
        UserError: if MNIST is missing or damaged or lacks a digit, for counts and held-out
            classes that there are not, and for so few images that a class has none.

    Example:
        The first call fetches MNIST, 11 MB.

        >>> data = two_digits("pairs", "data", holdout_classes=[7, 42])  # doctest: +SKIP
        >>> data.images.shape, data.num_classes, data.unseen.classes  # doctest: +SKIP
        (torch.Size([60000, 1, 64, 64]), 98, ('07', '42'))
    """
    held = _held_out(holdout_classes)
    counts = (
        at_least("data.source.images", images),
        at_least("data.source.test_images", test_images),
    )
    if not isinstance(generator_compat, bool):
        raise UserError(
            f"data.source.generator_compat must be true or false, got {generator_compat!r}"
        )
    seed_of("data.source.seed", seed)
    mnist = torchvision_images("MNIST", root, "MNIST", download)
    assert mnist.labels is not None and mnist.test_labels is not None
    compose = partial(composed, compat=generator_compat, seed=seed)
    shown = compose(mnist.labels, counts[0], part=_TRAINING, without=held)
    tests = compose(mnist.test_labels, counts[1], part=_TESTS)
    numbers = torch.tensor([n for n in range(100) if n not in held])
    classes = tuple(f"{n:02}" for n in numbers.tolist())
    pictures, known = drawn(mnist.test_images, tests), torch.isin(tests.numbers, numbers)
    data = ImageData.build(
        name,
        drawn(mnist.images, shown),
        torch.searchsorted(numbers, shown.numbers),
        pictures[known] if held else pictures,
        torch.searchsorted(numbers, tests.numbers[known]),
        classes,
    )
    if not held:
        return data
    labels = torch.searchsorted(torch.tensor(held), tests.numbers[~known])
    unseen = Unseen(pictures[~known], labels, tuple(f"{n:02}" for n in held))
    others = fingerprint_of((unseen.images, unseen.labels), unseen.classes)
    return replace(data, unseen=unseen, fingerprint=key_of(data.fingerprint, others))


def composed(
    labels: Tensor,
    count: int,
    *,
    part: int,
    seed: int = 0,
    compat: bool = False,
    without: Sequence[int] = (),
) -> Composition:
    """Choose digits and their places.

    Args:
        labels: digits that there are, int64 ``(N,)``.
        count: of images.
        part: number of the part of the data set, which shares no random number with another.
        seed: of the choice.
        compat: as in the generator of MultiDigitMNIST.
        without: two-digit numbers that are not to come up, in order.

    Raises:
        UserError: if there is no image of a digit.
    """
    for digit in range(10):
        if not bool((labels == digit).any()):
            raise UserError(
                f"MNIST has no image of the digit {digit}; delete it to fetch it again"
            )
    places = torch.arange(count)
    allowed = torch.tensor([n for n in range(100) if n not in without])
    chosen = torch.zeros(count, 2, dtype=torch.long)
    offsets = torch.zeros(count, 4, dtype=torch.long)
    open_, attempt = places, 0
    while len(open_):  # a number that is held out is drawn again
        bits = words(keys_of(open_, seed, part, attempt, int(compat))[:, None], torch.arange(7))
        one = (
            _of_equal_classes(labels, bits, allowed) if compat else below(bits[:, :2], len(labels))
        )
        chosen[open_], offsets[open_] = one, bits[:, 3:]
        open_ = open_[~torch.isin(_numbers(labels[one]), allowed)]
        attempt += 1
    room = torch.tensor([_SIDE - 28, _SIDE - 28, _SIDE // 2 - 28, _SIDE // 2 - 28])
    moved = below(offsets, room if compat else room + 1)
    return Composition(chosen, moved[:, :2], moved[:, 2:], _numbers(labels[chosen]))


def drawn(digits: Tensor, made: Composition) -> Tensor:
    """Images of a composition.

    Args:
        digits: uint8 ``(N, 1, 28, 28)``.
        made: of which digits at which places.

    Returns:
        uint8 ``(n, 1, 64, 64)``.
    """
    images = torch.zeros(len(made.numbers), 1, _SIDE, _SIDE, dtype=torch.uint8)
    side = torch.arange(28)
    for some in torch.arange(len(images)).split(_AT_ONCE):
        for half in (0, 1):
            rows = made.top[some, half, None, None] + side[:, None]
            columns = _SIDE // 2 * half + made.left[some, half, None, None] + side
            images[some[:, None, None], 0, rows, columns] = digits[made.digits[some, half], 0]
    return images


def _of_equal_classes(labels: Tensor, bits: Tensor, allowed: Tensor) -> Tensor:
    """A class, and then an image of each of its digits."""
    number = allowed[below(bits[:, 0], len(allowed))]
    order = torch.sort(labels, stable=True).indices
    counts = torch.bincount(labels, minlength=10)
    first = counts.cumsum(0) - counts
    digits = torch.stack([number // 10, number % 10], 1)
    return order[first[digits] + below(bits[:, 1:3], counts[digits])]


def _numbers(pairs: Tensor) -> Tensor:
    return 10 * pairs[:, 0] + pairs[:, 1]


def _held_out(given: Any) -> list[int]:
    """Two-digit numbers in order."""
    where = "data.source.holdout_classes"
    if given is None:
        return []
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"{where} must be a list of numbers from 0 to 99, got {given!r}")
    found = []
    for each in given:
        if isinstance(each, bool) or not str(each).isdecimal() or int(each) > 99:
            raise UserError(f"{where} must be numbers from 0 to 99, got {each!r}")
        found.append(int(each))
    if len(set(found)) < len(found):
        raise UserError(f"{where}={found} names a class twice; name each once")
    if len(found) == 100:
        raise UserError(f"{where} holds out all classes; leave some for training")
    return sorted(found)
