"""Where generated images lie among real ones: realism, rarity, density and coverage.

The real images span a manifold of balls, one around each, that reach its k-th nearest real
neighbour. A point on the surface of a ball is inside.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least

# Squared distances held at once: 64 MiB of float64.
BLOCK = 1 << 23
# Squared distances below this share of the real images' mean squared size are rounding: it keeps
# copies at distance zero and points on a surface inside, whatever the blocks and the device.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Neighbours:
    """What each generated image has to do with the balls of M real ones.

    Attributes:
        inside: bool (N,), in at least one ball; its mean is the precision.
        realism: float64 (N,), higher is more real (Kynkaanniemi et al. 2019, eq. 3): the largest
            ratio of radius to distance over the half of the balls with the smaller radii. Above
            1 inside one of these, infinite for a copy of the image at its centre.
        rarity: float64 (N,), higher is rarer (Han et al. 2022): the radius of the smallest
            ball around the image. NaN outside all balls, where it has no value; who ranks these
            images must place them, infinity puts them last.
        balls: int64 (N,), number of balls around it.
        covered: bool (M,), real images whose ball holds a generated one; its mean is the coverage.
    """

    inside: Tensor
    realism: Tensor
    rarity: Tensor
    balls: Tensor
    covered: Tensor


def neighbours(generated: Tensor, real: Tensor, k: int = 3) -> Neighbours:
    """Place generated images among real ones, each distance computed once.

    Args:
        generated: features (N, F).
        real: features of the real images (M, F), M > k.
        k: the neighbour that a ball reaches, 3 as in both papers.

    Returns:
        Numbers of each image, in float64, on the device of the features.
    """
    generated, real = features64("generated", generated), features64("real", real)
    squared_radii = radii(real, k).square()
    slack = rounding(real)
    # Pruning at the median radius: half of an even number, equal radii stay together.
    small = squared_radii <= squared_radii.quantile(0.5)
    realism, rarity, balls = [], [], []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for squared in squared_distances(generated, real):
        squared = squared.where(squared > slack, 0)
        within = squared <= squared_radii + slack
        covered |= within.any(0)
        balls.append(within.sum(1))
        rarity.append(squared_radii.where(within, torch.inf).amin(1))
        # 0 / 0, a copy of a real image that has copies itself, is as real as any copy.
        ratio = (squared_radii[small] / squared[:, small]).nan_to_num(torch.inf, torch.inf)
        realism.append(ratio.amax(1))
    smallest, count = torch.cat(rarity).sqrt(), torch.cat(balls)
    return Neighbours(
        inside=count > 0,
        realism=torch.cat(realism).sqrt(),
        rarity=smallest.where(count > 0, torch.nan),
        balls=count,
        covered=covered,
    )


def radii(real: Tensor, k: int = 3) -> Tensor:
    """Distance from each image to its k-th nearest other one, ``(M, F) -> (M,)`` float64.

    Raises:
        UserError: if there are not more than k images.
    """
    at_least("k", k)
    real = features64("real", real)
    if len(real) <= k:
        raise UserError(
            f"k must be below the number of real images, got {k} for {len(real)}; lower k"
        )
    slack = rounding(real)
    # The nearest is the image itself.
    squared = [
        part.topk(k + 1, dim=1, largest=False).values.amax(1)
        for part in squared_distances(real, real)
    ]
    found = torch.cat(squared)
    return found.where(found > slack, 0).sqrt()


def squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Squared distances of the rows of ``a`` to those of ``b``, some rows of ``a`` at a time.

    Args:
        a: float64 (N, F).
        b: float64 (M, F).

    Yields:
        Parts ``(rows, M)`` in the order of ``a``, never negative.
    """
    # Distances from the common centre are the small numbers that cancel least below.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    size = b.square().sum(1)
    for part in a.split(max(BLOCK // len(b), 1)):
        squared = torch.addmm(size, part, b.mT, alpha=-2)
        yield squared.add_(part.square().sum(1, keepdim=True)).clamp_(min=0)


def features64(name: str, features: Tensor) -> Tensor:
    """Features in float64.

    Args:
        name: of the images, for the message.
        features: (N, F), N >= 1.

    Raises:
        UserError: if the shape is another, or a feature is not finite.
    """
    if features.ndim != 2 or not features.numel():
        raise UserError(
            f"{name} features must be (N, F) with N >= 1, got {tuple(features.shape)}; "
            "give one row per image"
        )
    features = features.double()
    bad = features.isfinite().all(1).logical_not().nonzero()
    if len(bad):
        raise UserError(
            f"{name} features of image {int(bad[0])} are not finite ({len(bad)} of "
            f"{len(features)} images); leave these images out"
        )
    return features


def rounding(real: Tensor) -> Tensor:
    """Squared distance that is none, in the units of these features."""
    return ROUNDING * (real - real.mean(0)).square().sum(1).mean()
