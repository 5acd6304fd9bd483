"""How far two sets of points are apart, where no encoder is needed to tell."""

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.metrics.scores import size_name

_DIRECTIONS = 128
_QUANTILES = 2000


def distances(points: Tensor, reference: Tensor, *, seed: int) -> dict[str, float]:
    """Both distances of the points from a reference, named with their conditions.

    Args:
        points: ``(N, ...)``, N >= 2.
        reference: ``(M, ...)`` of the same size, M >= 2.
        seed: of the directions.

    Returns:
        Such as ``sliced_wasserstein@2000``; smaller is better, 0 where the sets are equal.
    """
    suffix = f"@{size_name(len(points))}"
    return {
        f"sliced_wasserstein{suffix}": sliced_wasserstein(points, reference, seed=seed),
        f"energy_distance{suffix}": energy_distance(points, reference),
    }


def sliced_wasserstein(a: Tensor, b: Tensor, *, seed: int = 0) -> float:
    """Root mean square, over 128 random directions, of the 2-Wasserstein distances along them.

    Along a direction it is the distance of the sorted values (Bonneel et al. 2015); sets of other
    sizes are compared at 2,000 quantiles.
    """
    a, b = _rows(a, b)
    generator = torch.Generator().manual_seed(seed)
    along = torch.randn(a.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64)
    along = (along / along.norm(dim=0)).to(a.device)
    first, second = (a @ along).sort(0).values, (b @ along).sort(0).values
    if len(a) != len(b):
        first, second = _quantiles(first), _quantiles(second)
    return float((first - second).square().mean().sqrt())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased, so it may be below 0 (Szekely and Rizzo 2013).

    A maximum mean discrepancy with the kernel -|a - b|: nothing to choose.
    """
    a, b = _rows(a, b)
    own = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - own[0] - own[1])


def _quantiles(values: Tensor) -> Tensor:
    """The sorted rows ``(N, K)`` at the middles of 2,000 equal shares."""
    places = (torch.arange(_QUANTILES, device=values.device) + 0.5) / _QUANTILES * len(values)
    return values[places.long().clamp(max=len(values) - 1)]


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if len(a) < 2 or len(b) < 2 or a.shape[1:] != b.shape[1:]:
        raise UserError(
            f"two sets of points of one size are compared, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}; give 2 or more of each"
        )
    return a.flatten(1).double(), b.flatten(1).double()
