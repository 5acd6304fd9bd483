"""What sigma_noise and prior_precision do to the maps: a whole grid from one training, one pass.

Every map is that of the first-order variance; the sensitivities of the images are followed once
for all cells of a structure (``uncertainty/bands.py``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.evidence_grid import (
    best_settings,
    evidence_curve,
    evidence_grid,
    separate_priors,
)
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import check_noise_level
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows, shared_rows
from bayesdiff.metrics.agreement import agreement, pixel_ranks, spearman
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import finite, write_arrays
from bayesdiff.studies.prior_ablation import figures as pictures
from bayesdiff.studies.prior_ablation.maps import GridMaps, GridOptions
from bayesdiff.studies.study import Place, Report, Study, conditions, without
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.memory import images_at_once


@dataclass(frozen=True, kw_only=True)
class Ablation(GridOptions, Study):
    """Maps and numbers over a grid of settings.

    Example:
        >>> study = Ablation(sigma_noise=[0.1, 1.0], prior_precision=[1.0, 10.0, 100.0], draws=32)
        >>> study.shape, study.estimator.draws  # all six cells are of these directions
        ((2, 3), 32)
    """

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse a grid that memory does not hold, and a likelihood without a noise level."""
        check_noise_level(
            run.model, "prior_ablation", run.cfg.laplace.get("objective", "likelihood")
        )
        self._at_once(run, solver)

    def make(self, at: Setup, place: Place) -> Report | None:
        """The numbers; the maps lie beside them, as ``maps.npz``."""
        results, arrays = self._maps(at)
        if rank():
            return None
        write_arrays(place.folder / "maps.npz", place.key, arrays)
        made_of = conditions(without(at.settings, "uncertainty."))
        curve = results["structures"][results["structure"]]["curve"]
        taus = curve["prior_precision"]
        return Report(
            results,
            pictures.every(results, arrays, made_of),
            scalars={"grid_cost_ratio": results["grid_cost_ratio"]},
            headlines=headlines(results),
            curves={
                name: list(zip(taus, values, strict=True))
                for name, values in curve.items()
                if name != "prior_precision"
            },
        )

    def _at_once(self, run: Run, solver: Solver) -> int:
        shape = run.data.space.shape
        return images_at_once(self.estimator, solver, run.model, shape, "lower ablation.draws")

    def _maps(self, at: Setup) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers, and arrays: the images, and maps ``(S, T, N, C, H, W)`` by structure."""
        own, cells, size = at.posterior, math.prod(self.shape), self._at_once(at.run, at.solver)
        results = _describe(self, own)
        arrays: dict[str, Tensor] = {}
        reference = None
        for name in dict.fromkeys([own.structure, *self.structures]):
            one = own if name == own.structure else _with_structure(own, name, self.rank)
            way = GridMaps(at.starts, self, one)
            images, maps, single = _batched(way, self.num_images, size, name)
            reference = maps[:, cells] if reference is None else reference
            numbers = _numbers(self, one, maps.transpose(0, 1), reference)
            alone = agreement(maps[:, cells], single, seed=self.seed)
            numbers |= {f"cell_{statistic}": value for statistic, value in alone.items()}
            results["structures"][name] = numbers | way.measured()
            grid = maps[:, :cells].transpose(0, 1).unflatten(0, self.shape)
            arrays |= {"images": images, name: grid.float()}
        found = results["structures"][own.structure]
        results["grid_cost_ratio"] = found["grid_seconds"] / found["cell_seconds"]
        return finite(results), arrays


def _with_structure(posterior: HeadPosterior, structure: str, rank: int | None) -> HeadPosterior:
    return HeadPosterior.fit(
        posterior.curvature,
        structure=structure,
        sigma_noise=posterior.sigma_noise,
        prior_precision=posterior.prior_precision,
        n_eff=posterior.n_eff,
        rank=rank if structure == "subspace" else None,
    )


def _batched(make: GridMaps, count: int, size: int, what: str) -> list[Tensor]:
    """Rows of all images; batches are shared by all processes."""

    def batch(numbers: list[int]) -> Rows:
        return dict(zip(("images", "maps", "single"), make(numbers), strict=True))

    return list(shared_rows(range(count), size, batch, f"ablation, {what}").values())


def _numbers(
    ablation: GridOptions, posterior: HeadPosterior, maps: Tensor, reference: Tensor
) -> dict[str, Any]:
    """Total variance, ranks against the reference, evidence: over the grid and along the curve."""
    sums = maps.flatten(2).sum(2)
    of_maps = {
        "total_variance": sums.mean(1),
        "image_rank": spearman(sums, reference.flatten(1).sum(1).expand_as(sums)),
        "pixel_rank": torch.stack([pixel_ranks(each, reference).nanmean() for each in maps]),
    }
    cells, taus = math.prod(ablation.shape), ablation.curve_priors.tolist()
    grid = evidence_grid(posterior, ablation.sigma_noise, ablation.prior_precision)
    curve = evidence_grid(posterior, [posterior.sigma_noise], taus)
    return {
        "effective_parameters": grid.effective_parameters,
        "evidence": grid.log_evidence,
        **{name: v[:cells].unflatten(0, ablation.shape) for name, v in of_maps.items()},
        "curve": {
            "prior_precision": ablation.curve_priors,
            "effective_parameters": curve.effective_parameters[0],
            "evidence": curve.log_evidence[0],
            **{name: value[cells + 1 :] for name, value in of_maps.items()},
        },
    }


def _describe(ablation: GridOptions, posterior: HeadPosterior) -> dict[str, Any]:
    """The run's own setting, what the evidence would choose, and the axes of the grid."""
    curve = evidence_curve(posterior)
    best: dict[str, Any] = {}
    if curve is not None:
        best["prior_precision"] = curve.best[0]
    for name, choose in (("joint", best_settings), ("separate", separate_priors)):
        try:
            chosen: Any = choose(posterior)
        except UserError:
            continue
        words = {"joint": ("sigma_noise", "prior_precision"), "separate": ("weights", "bias")}
        best[name] = {word: getattr(chosen, word) for word in words[name]}
    return {
        "structure": posterior.structure,
        "own": {
            "sigma_noise": posterior.sigma_noise,
            "prior_precision": posterior.prior_precision,
            "n_eff": posterior.n_eff,
        },
        "best": best,
        "parameters": posterior.num_parameters,
        "eigenvalues": list(posterior.eigenvalue_range),
        "sigma_noise": list(ablation.sigma_noise),
        "prior_precision": list(ablation.prior_precision),
        "num_images": ablation.num_images,
        "structures": {},
    }


def headlines(results: Mapping[str, Any]) -> dict[str, float | None]:
    """What the evidence would choose, and how much of the maps' order the grid leaves."""
    best = results["best"]
    numbers: dict[str, float | None] = {"evidence/prior_precision": best.get("prior_precision")}
    numbers |= {f"evidence/joint/{k}": v for k, v in best.get("joint", {}).items()}
    for name, found in results["structures"].items():
        for kind in ("image_rank", "pixel_rank"):
            known = [value for row in found[kind] for value in row if value is not None]
            numbers[f"{name}/{kind}/least"] = min(known, default=None)
    return numbers
