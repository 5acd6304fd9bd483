"""Maps over a grid of sigma_noise and prior_precision, beside those of one setting on its own."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, positive
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.structures import STRUCTURES
from bayesdiff.studies.prior_ablation.bands import Bands
from bayesdiff.uncertainty.sensitivities.linearised import Linearised, directions, follow
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS
from bayesdiff.uncertainty.start import Starts

_TURN = 64  # directions followed at once
_CURVE = 46  # values of prior_precision along the curve at the run's own sigma_noise


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """A grid of settings, and how its maps are made.

    Args:
        sigma_noise: noise levels, in units of the network's output.
        prior_precision: prior precisions.
        structures: posteriors beside the run's own.
        rank: of the structure subspace.
        draws: weight directions followed for all cells together, and for a single cell.
        num_images: images that get maps.
        derivative: of the network along a direction: exact, difference or bfloat16.
        batch_size: images at once.
        max_memory: GiB that the network's evaluations for one batch may take.
        seed: of the directions.
    """

    sigma_noise: Sequence[float]
    prior_precision: Sequence[float]
    structures: Sequence[str] = ("full", "diag")
    rank: int | None = None
    draws: int = 64
    num_images: int = 16
    derivative: str = "exact"
    batch_size: int = 16
    max_memory: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sigma_noise", "prior_precision"):
            for value in listed(f"ablation.{name}", getattr(self, name), "[0.1,1]"):
                positive(f"ablation.{name}", value, "give numbers above 0")
        if isinstance(self.structures, str) or not isinstance(self.structures, Sequence):
            raise UserError(
                f"ablation.structures must be a list such as [full,diag], got {self.structures!r}"
            )
        for structure in self.structures:
            if structure not in STRUCTURES:
                raise UserError(
                    f"ablation.structures must be among {', '.join(STRUCTURES)}; got {structure!r}"
                )
        if "subspace" in self.structures and self.rank is None:
            raise UserError("ablation.structures=[subspace] needs ablation.rank, such as 16")
        if self.rank is not None:
            at_least("ablation.rank", self.rank, 0)
        at_least("ablation.draws", self.draws, 4)
        at_least("ablation.num_images", self.num_images, 3)
        _ = self.estimator

    @property
    def estimator(self) -> Linearised:
        """What a single cell is: the same directions for one setting."""
        return Linearised(
            draws=self.draws,
            derivative=self.derivative,
            noise_draws=0,
            num_images=self.num_images,
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            seed=self.seed,
        )

    def bands(self, posterior: HeadPosterior) -> Bands:
        """For the grid, row by row, the run's own setting, and the curve over prior_precision."""
        axes = self.sigma_noise, self.prior_precision
        sigma, tau = (torch.tensor(list(values), dtype=torch.float64) for values in axes)
        priors = torch.tensor([posterior.prior_precision], dtype=torch.float64)
        extra = torch.cat([priors, self.curve_priors])
        own = torch.full_like(extra, posterior.sigma_noise)
        sigmas = torch.cat([sigma.repeat_interleave(len(tau)), own])
        taus = torch.cat([tau.repeat(len(sigma)), extra])
        return Bands.fit(posterior, sigmas, taus, self.draws, self.seed)

    @property
    def curve_priors(self) -> Tensor:
        """Values of prior_precision along the curve, evenly in the logarithm."""
        low, high = math.log10(min(self.prior_precision)), math.log10(max(self.prior_precision))
        return torch.logspace(low, high, _CURVE, dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells of the grid."""
        return len(self.sigma_noise), len(self.prior_precision)


class GridMaps:
    """Maps of a structure under all settings, beside those of one setting made on its own.

    The two follow as many directions, independent of each other: how far the maps agree at the
    run's own setting is the noise of both.
    """

    def __init__(self, start_of: Starts, ablation: GridOptions, posterior: HeadPosterior) -> None:
        self.start_of, self.product = start_of, PRODUCTS[ablation.derivative]
        self.bands = ablation.bands(posterior)
        self.alone = directions(posterior, len(self.bands.deltas), ablation.seed + 1)
        self.cell_seconds = self.grid_seconds = 0.0

    def __call__(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(N, C, H, W)``, maps ``(N, K, C, H, W)``, and one setting's."""
        if not self.cell_seconds:  # what runs first pays for the libraries
            follow(self.start_of(numbers[:1]), self.alone[:1], 1.0, self.product)
        begun = time.perf_counter()
        turns = self.alone.split(_TURN)
        found = [follow(self.start_of(numbers), turn, 1.0, self.product) for turn in turns]
        single = sum((each.variance[-1].cpu() for each in found), torch.zeros(()))
        between = time.perf_counter()
        image, squares = self.bands.follow(self.start_of(numbers), self.product, _TURN)
        maps = self.bands.variance(squares)
        self.cell_seconds += between - begun
        self.grid_seconds += time.perf_counter() - between
        return image, maps, single / len(self.alone)

    def measured(self) -> dict[str, float]:
        """Seconds of a single cell and of the grid, and what the grid was made of."""
        return {
            "cell_seconds": self.cell_seconds,
            "grid_seconds": self.grid_seconds,
            "directions": len(self.bands.deltas),
            "bands": self.bands.weights.shape[1],
            "band_spread": float(self.bands.spread.max()),
        }
