"""CMMD (Jayasumana et al. 2024): maximum mean discrepancy of features as directions.

The paper's encoder is CLIP. Any other gives a number on its own scale, so the encoder is part of
the number's name. The estimate is the unbiased one: it has no equal pairs in it, its expectation
is zero for equal distributions, and it may be negative.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.metrics.neighbours import features64, squared_distances
from bayesdiff.metrics.scores import size_name

# Of the paper: the width of the kernel exp(-|x - y|^2 / (2 * 10^2)), and the unit of the result.
WIDTH = 10.0
SCALE = 1000.0


def cmmd(generated: Tensor, real: Tensor, *, encoder: str) -> dict[str, float]:
    """CMMD of generated images, named with its conditions.

    Args:
        generated: features (N, F), N >= 2.
        real: features of the real images (M, F), M >= 2, of the same encoder.
        encoder: what gave the features, such as ``classifier`` or ``clip-vit-b-32``.

    Returns:
        One number under a name such as ``cmmd@10k/classifier``.
    """
    everything = torch.arange(len(generated)).unsqueeze(0)
    value = float(cmmd_of_subsets(generated, real, everything)[0])
    return {f"cmmd@{size_name(len(generated))}/{encoder}": value}


def cmmd_of_subsets(
    generated: Tensor, real: Tensor, subsets: Tensor | Sequence[Tensor], width: float = WIDTH
) -> Tensor:
    """CMMD of many parts of the generated images, each distance computed once.

    Args:
        generated: features (N, F).
        real: features of the real images (M, F), M >= 2.
        subsets: indices of the generated images of each of S parts, each at least 2, no image
            twice in a part; (S, n), or S tensors of any lengths.
        width: of the kernel.

    Returns:
        Unbiased squared discrepancies times 1000, ``(S,)`` float64.

    Raises:
        UserError: if a part or the real images are fewer than 2.
    """
    generated, real = directions("generated", generated), directions("real", real)
    weights = torch.zeros(len(generated), len(subsets), dtype=torch.float64)
    for place, subset in enumerate(subsets):
        weights[subset.cpu(), place] = 1
    weights = weights.to(generated.device)
    n, m = weights.sum(0), len(real)
    least = min(int(n.min()), m)
    if least < 2:
        raise UserError(f"CMMD needs at least 2 images on each side, got {least}; give more")
    ones = torch.ones(m, 1, dtype=torch.float64, device=real.device)
    # With the kernel minus 1 an image and itself add nothing, and the three ones cancel.
    own = (weights * _sums(generated, generated, weights, width)).sum(0) / (n * (n - 1))
    across = (weights * _sums(generated, real, ones, width)).sum(0) / (n * m)
    reference = _sums(real, real, ones, width).sum() / (m * (m - 1))
    return SCALE * (own + reference - 2 * across)


def _sums(a: Tensor, b: Tensor, weights: Tensor, width: float) -> Tensor:
    """Sum over ``b`` of weight times kernel minus 1: (N, F), (M, F), (M, S) -> (N, S)."""
    # The kernel is almost 1, and what we look for lies in the digits behind: never form the 1.
    parts = [squared.div_(-2 * width**2).expm1_() @ weights for squared in squared_distances(a, b)]
    return torch.cat(parts)


def directions(name: str, features: Tensor) -> Tensor:
    """Features of length 1, in float64.

    Args:
        name: of the images, for the message.
        features: (N, F).

    Raises:
        UserError: if one is all zero.
    """
    features = features64(name, features)
    length = features.norm(dim=1, keepdim=True)
    if not length.all():
        raise UserError(
            f"{name} features of image {int(length.flatten().argmin())} are all zero and have no "
            "direction; leave it out or take another encoder"
        )
    return features / length
