"""States with a channel for each of K classes of a value."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.data.spaces import to_uint8

if TYPE_CHECKING:
    from bayesdiff.data.images import ImageData


class OneHot:
    """States have a channel for each of K classes of a value, (K e_x - 1) / sqrt(K).

    uint8 values go to the nearest of K levels between black and white; see
    ``likelihoods.Classes``, whose states these are.

    Args:
        data: of uint8 images.
        levels: K.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> data = digits()
        >>> space = OneHot(data, levels=4)
        >>> states = space.encode(data.images[:2])
        >>> space.shape, states[0, :, 0, 0]  # a black pixel is of the first class
        ((4, 8, 8), tensor([ 1.5000, -0.5000, -0.5000, -0.5000]))
        >>> space.values(states)[0, 0, 0, 0]
        tensor(-1.)
    """

    pictures, decoded = True, True
    figures = decoded_figures = "bayesdiff.report.pictures.DecodedPictures"
    scores = "bayesdiff.runs.scores.FeatureScores"
    fingerprint = ""

    def __init__(self, data: "ImageData", levels: int) -> None:
        self.levels = at_least("data.space.levels", levels, 2)
        channels, *size = data.images.shape[1:]
        self.shape = (channels * levels, *size)

    def encode(self, data: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` to ``(N, C K, H, W)``."""
        index = (data.float() * ((self.levels - 1) / 255)).round().long()
        return embedded(index, self.levels).flatten(1, 2)

    def values(self, states: Tensor) -> Tensor:
        """Expected level in [-1, 1], of states that embed probabilities; linear."""
        each = states.unflatten(1, (-1, self.levels))
        levels = torch.linspace(-1, 1, self.levels, dtype=each.dtype, device=each.device)
        weights = levels / self.levels**0.5  # sum_k c_k p_k, for the c_k add up to 0
        return torch.einsum("nck...,k->nc...", each, weights)

    def decode(self, states: Tensor) -> Tensor:
        """Nearest grey of the expected level, uint8."""
        return to_uint8(self.values(states))


def embedded(index: Tensor, levels: int) -> Tensor:
    """(K e_x - 1) / sqrt(K) of classes ``(B, C, ...)``, float32 ``(B, C, K, ...)``."""
    one_hot = F.one_hot(index, levels).movedim(-1, 2).float()
    return (levels * one_hot - 1) / math.sqrt(levels)
