"""Toy data: curves and sheets in the plane and in space, with noise, scaled by exact moments.

The recipes are those of inflationary flows (de Albuquerque and Pearson, NeurIPS 2024). Points are
standardised by the mean and the variance of the distribution, noise included, never by those of a
draw: every draw, of whatever size, is of the same distribution.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.data.points import PointData

Drawn = tuple[np.ndarray, np.ndarray | None]
_TRAINING, _TESTS = range(2)


class Options(TypedDict, total=False):
    """What all sets take.

    Attributes:
        name: short name of the data set.
        points: for training.
        test_points: held out, from a stream of their own.
        labels: whether the parts that a set consists of are classes.
        augment_to: dimensions D' of a space that the points are put into by y -> Q y, with the
            orthonormal columns of a random Q; None for their own.
        augment_seed: of Q.
        seed: of the points.
    """

    name: str
    points: int
    test_points: int
    labels: bool
    augment_to: int | None
    augment_seed: int
    seed: int


@dataclass(frozen=True)
class Toy:
    """A distribution of points with its moments.

    Attributes:
        name: of the set.
        draw: so many points without noise, ``(n, D)``, and the class of each or None.
        mean: of each coordinate.
        variance: of each coordinate, without noise.
        noisy: coordinates that noise is added to.
        classes: names of the classes.
        depth: standard deviation of a normal that takes the middle coordinate's place when all
            are scaled; None for none.
    """

    name: str
    draw: Callable[[int, np.random.RandomState], Drawn]
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    noisy: tuple[int, ...]
    classes: tuple[str, ...] = ()
    depth: float | None = None

    def standard(self, count: int, noise: float, rng: np.random.RandomState) -> Drawn:
        """Points of mean 0 and variance 1 per coordinate, in random order, and their classes.

        Args:
            count: how many.
            noise: its standard deviation, before scaling.
            rng: where they come from.
        """
        clean, kinds = self.draw(count, rng)
        order, sd = rng.permutation(count), np.zeros(clean.shape[1])
        sd[list(self.noisy)] = noise
        scale = np.hypot(np.sqrt(self.variance), sd)
        points = (clean[order] - self.mean) / scale
        points += sd / scale * rng.standard_normal(clean.shape)
        if self.depth is not None:
            points[:, 1] = self.depth * rng.standard_normal(count)
        return points, None if kinds is None else kinds[order]


def circles(noise: float = 0.08, **options: Unpack[Options]) -> PointData:
    """Two circles about 0, of radius 1 and 0.5, which are its classes.

    Example:
        >>> data = circles(points=1000, labels=True)
        >>> data.images.shape, data.classes
        (torch.Size([1000, 2]), ('outer circle', 'inner circle'))
        >>> radius = data.images.norm(dim=1)  # in units of the standard deviation, 0.5647
        >>> [round(float(radius[data.labels == k].mean()), 1) for k in (0, 1)]
        [1.8, 0.9]
    """
    return _points(CIRCLES, noise, **options)


def sine2(noise: float = 0.15, **options: Unpack[Options]) -> PointData:
    """Four periods of a sine; noise moves points up and down.

    Example:
        >>> data = sine2(points=1000)
        >>> data.images.shape, data.images.std(0).round(decimals=1)
        (torch.Size([1000, 2]), tensor([1., 1.]))
    """
    return _points(SINE2, noise, **options)


def moons(noise: float = 0.08, **options: Unpack[Options]) -> PointData:
    """Two half circles of radius 1 that reach into each other, which are its classes.

    Example:
        >>> data = moons(points=1000, labels=True)
        >>> torch.bincount(data.labels), data.classes
        (tensor([500, 500]), ('upper', 'lower'))
    """
    return _points(MOONS, noise, **options)


def s_curve(noise: float = 0.2, **options: Unpack[Options]) -> PointData:
    """A sheet in space, bent like an S.

    Example:
        >>> data = s_curve(points=1000, augment_to=8)  # the sheet in a space of 8 dimensions
        >>> data.images.shape, int((torch.linalg.svdvals(data.images) > 0.1).sum())
        (torch.Size([1000, 8]), 3)
    """
    return _points(S_CURVE, noise, **options)


def swirl(noise: float = 1.25, **options: Unpack[Options]) -> PointData:
    """A Swiss roll: a sheet in space, rolled up.

    Example:
        >>> one, other = swirl(points=1000), swirl(points=1000, seed=1)
        >>> one.images.shape, torch.equal(one.images, other.images)
        (torch.Size([1000, 3]), False)
    """
    return _points(SWIRL, noise, **options)


def alt_s_curve(noise: float = 0.2, **options: Unpack[Options]) -> PointData:
    """The S with a normal of standard deviation 0.5 in place of the sheet's width.

    Example:
        >>> alt_s_curve(points=1000).images.std(0).round(decimals=1)  # the width is the middle one
        tensor([1.0000, 0.5000, 1.0000])
    """
    return _points(ALT_S_CURVE, noise, **options)


def alt_swirl(noise: float = 1.25, **options: Unpack[Options]) -> PointData:
    """The roll with a normal of standard deviation 0.5 in place of the sheet's width.

    Example:
        >>> alt_swirl(points=1000).images.std(0).round(decimals=1)  # the width is the middle one
        tensor([1.0000, 0.5000, 1.0000])
    """
    return _points(ALT_SWIRL, noise, **options)


def embedding(dimensions: int, more: int, seed: int) -> Tensor:
    """A random matrix ``(more, dimensions)``, float64, of orthonormal columns.

    Args:
        dimensions: of the points.
        more: of the space that they are put into, at least as many.
        seed: of the columns.
    """
    normal = np.random.RandomState(seed).standard_normal((more, dimensions))
    orthogonal, triangle = np.linalg.qr(normal)
    # Signs that make the decomposition unique, as Gram and Schmidt's is.
    return torch.from_numpy(orthogonal * np.sign(triangle.diagonal()))


def _points(
    toy: Toy,
    noise: float,
    name: str | None = None,
    points: int = 70_000,
    test_points: int = 10_000,
    labels: bool = False,
    augment_to: int | None = None,
    augment_seed: int = 0,
    seed: int = 0,
) -> PointData:
    """The data set of a distribution."""
    at_least("data.source.points", points, 2)
    at_least("data.source.test_points", test_points, 2)
    positive("data.source.noise", noise)
    seed_of("data.source.seed", seed)
    if not isinstance(labels, bool):
        raise UserError(f"data.source.labels must be true or false, got {labels!r}")
    if labels and not toy.classes:
        raise UserError(f"data.source.labels=true, and {toy.name} has no classes; leave it out")
    turn = _embedding_of(toy, augment_to, augment_seed)
    parts: list[Tensor | None] = []
    for part, count in ((_TRAINING, points), (_TESTS, test_points)):
        drawn, kinds = toy.standard(count, noise, np.random.RandomState([seed, part]))
        states = torch.from_numpy(drawn)
        parts.append((states if turn is None else states @ turn.T).float())
        parts.append(torch.from_numpy(kinds) if labels and kinds is not None else None)
    x, y, test_x, test_y = parts
    assert x is not None and test_x is not None
    classes = toy.classes if labels else ()
    return PointData.of(name or toy.name, x, y, test_x, test_y, classes=classes)


def _embedding_of(toy: Toy, augment_to: int | None, seed: int) -> Tensor | None:
    seed_of("data.source.augment_seed", seed)
    if augment_to is None:
        return None
    own = len(toy.mean)
    if at_least("data.source.augment_to", augment_to) < own:
        raise UserError(
            f"data.source.augment_to={augment_to} is fewer than the {own} dimensions of "
            f"{toy.name}; give {own} or more, or null"
        )
    return embedding(own, augment_to, seed)


def _halves(count: int) -> tuple[int, int, np.ndarray]:
    """Sizes of two parts, and the part that each point is of."""
    first = count // 2
    return first, count - first, np.repeat([0, 1], [first, count - first])


def _circles(count: int, rng: np.random.RandomState) -> Drawn:
    *sizes, kinds = _halves(count)
    angle = np.concatenate([np.linspace(0, 2 * pi, n, endpoint=False) for n in sizes])
    radius = np.where(kinds == 0, 1.0, 0.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), kinds


def _sine2(count: int, rng: np.random.RandomState) -> Drawn:
    x = rng.uniform(-1, 1, count)
    return np.stack([x, np.sin(4 * pi * x) / 4], 1), None


def _moons(count: int, rng: np.random.RandomState) -> Drawn:
    *sizes, kinds = _halves(count)
    angle = np.concatenate([np.linspace(0, pi, n) for n in sizes])
    cos, sin = np.cos(angle), np.sin(angle)
    upper = kinds == 0
    return np.stack([np.where(upper, cos, 1 - cos), np.where(upper, sin, 0.5 - sin)], 1), kinds


def _s_curve(count: int, rng: np.random.RandomState) -> Drawn:
    t, width = 3 * pi * (rng.uniform(size=count) - 0.5), 2 * rng.uniform(size=count)
    return np.stack([np.sin(t), width, np.sign(t) * (np.cos(t) - 1)], 1), None


def _swirl(count: int, rng: np.random.RandomState) -> Drawn:
    t, width = 1.5 * pi * (1 + 2 * rng.uniform(size=count)), 21 * rng.uniform(size=count)
    return np.stack([t * np.cos(t), width, t * np.sin(t)], 1), None


# Moments are integrals over the angle; a test has them from sums.
CIRCLES = Toy(
    "circles", _circles, (0.0, 0.0), (5 / 16, 5 / 16), (0, 1), ("outer circle", "inner circle")
)
SINE2 = Toy("sine2", _sine2, (0.0, 0.0), (1 / 3, 1 / 32), (1,))
MOONS = Toy("moons", _moons, (1 / 2, 1 / 4), (3 / 4, 9 / 16 - 1 / pi), (0, 1), ("upper", "lower"))
S_CURVE = Toy(
    "s_curve", _s_curve, (0.0, 1.0, 0.0), (1 / 2, 1 / 3, 3 / 2 + 4 / (3 * pi)), (0, 1, 2)
)
SWIRL = Toy(
    "swirl",
    _swirl,
    (2.0, 21 / 2, 2 / (3 * pi)),
    (39 / 8 * pi**2 - 17 / 4, 21**2 / 12, 39 / 8 * pi**2 + 1 / 4 - 4 / (9 * pi**2)),
    (0, 1, 2),
)
ALT_S_CURVE = replace(S_CURVE, name="alt_s_curve", depth=0.5)
ALT_SWIRL = replace(SWIRL, name="alt_swirl", depth=0.5)
