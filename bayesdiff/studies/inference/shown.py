"""What the figures of latent inference are drawn from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayesdiff.studies.inference.simplex import GridPosterior


@dataclass(frozen=True)
class Shown:
    """Numbers and draws.

    Attributes:
        results: as in results.json.
        draws: of the weights, ``(C, N, K)``.
        grid: the referee.
        latents: ``(N, D)``.
        observed: ``(N, D)``.
        component: that each latent is from, ``(N,)``.
    """

    results: Mapping[str, Any]
    draws: Tensor
    grid: GridPosterior
    latents: Tensor
    observed: Tensor
    component: Tensor
