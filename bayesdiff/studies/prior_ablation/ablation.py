"""What sigma_noise and prior_precision do to the maps: a whole grid from one training, one pass.

Every map is that of the first-order variance; the sensitivities of the images are followed once
for all cells of a structure (``uncertainty/bands.py``).
"""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from bayesdiff.machine.progress import track
from bayesdiff.machine.ranks import barrier, gather_rows, rank, world_size
from bayesdiff.metrics.agreement import agreement, pixel_ranks, spearman
from bayesdiff.report import board
from bayesdiff.report.loggers import Loggers
from bayesdiff.runs.build import Run
from bayesdiff.runs.stages import starts
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import finite, write_arrays
from bayesdiff.studies.prior_ablation import figures as pictures
from bayesdiff.studies.prior_ablation.maps import Ablation, GridMaps
from bayesdiff.studies.study import Study, conditions, configured, pdf
from bayesdiff.uncertainty.memory import images_at_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def check_ablation(run: Run, solver: Solver) -> None:
    """Refuse a grid that could not be made, before any work; nothing where none is asked for."""
    ablation = configured(run, "ablation")
    if ablation is not None:
        _batch_size(run, solver, ablation)


def ablate(run: Run, solver: Solver, posterior: HeadPosterior, made_from: str) -> Path | None:
    """The configured grid's maps and numbers, in a folder of their own; results.json comes last.

    Args:
        run: with its trained model.
        solver: of the samples.
        posterior: the run's own setting.
        made_from: key of samples and posterior.

    Returns:
        The folder, None where no grid is asked for.
    """
    ablation = configured(run, "ablation")
    if ablation is None:
        return None
    study = Study.of(run, "ablation", solver.name, made_from)
    if study.is_made:
        return study.folder
    results, arrays = make(run, solver, ablation, posterior)
    if rank() == 0:
        write_arrays(study.folder / "maps.npz", study.key, arrays)
        made = pictures.every(results, arrays, conditions(run, solver, posterior))
        report(study.folder, results, made, pdf(run), study.loggers)
        study.close(results, headlines(results))
    barrier()
    log.info("ablation: %d cells in %s", math.prod(ablation.shape), study.folder)
    return study.folder


def _batch_size(run: Run, solver: Solver, ablation: Ablation) -> int:
    shape = run.data.data.images.shape[1:]
    return images_at_once(ablation.estimator, solver, run.model, shape, "lower ablation.draws")


def make(
    run: Run, solver: Solver, ablation: Ablation, posterior: HeadPosterior
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers, plain, and arrays: the images, and maps ``(S, T, N, C, H, W)`` by structure."""
    size, cells = _batch_size(run, solver, ablation), math.prod(ablation.shape)
    results = _describe(ablation, posterior)
    arrays: dict[str, Tensor] = {}
    reference = None
    for name in dict.fromkeys([posterior.structure, *ablation.structures]):
        one = (
            posterior
            if name == posterior.structure
            else _with_structure(posterior, name, ablation.rank)
        )
        way = GridMaps(starts(run, solver), ablation, one)
        images, maps, single = _batched(way, ablation.num_images, size, name)
        reference = maps[:, cells] if reference is None else reference
        numbers = _numbers(ablation, one, maps.transpose(0, 1), reference)
        alone = agreement(maps[:, cells], single, seed=ablation.seed)
        numbers |= {f"cell_{statistic}": value for statistic, value in alone.items()}
        results["structures"][name] = numbers | way.measured()
        grid = maps[:, :cells].transpose(0, 1).unflatten(0, ablation.shape)
        arrays |= {"images": images, name: grid.float()}
    own = results["structures"][posterior.structure]
    results["grid_cost_ratio"] = own["grid_seconds"] / own["cell_seconds"]
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
    batches = torch.arange(count).split(size)
    mine = list(batches[rank() :: world_size()])
    made = [make(each.tolist()) for each in track(mine, f"ablation, {what}", "images", len)]
    if not made:
        image, maps, single = make([0])
        made = [(image[:0], maps[:0], single[:0])]
    place = torch.cat(mine) if mine else torch.zeros(0, dtype=torch.long)
    return [gather_rows(torch.cat(parts), place, count) for parts in zip(*made, strict=True)]


def _numbers(
    ablation: Ablation, posterior: HeadPosterior, maps: Tensor, reference: Tensor
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


def _describe(ablation: Ablation, posterior: HeadPosterior) -> dict[str, Any]:
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


def report(
    folder: Path,
    results: Mapping[str, Any],
    made: Iterable[tuple[str, "Figure"]],
    as_pdf: bool,
    loggers: Loggers | None = None,
) -> None:
    """Every figure of the study, as files and in TensorBoard, beside the curves."""
    own = results["structures"][results["structure"]]["curve"]
    taus = own["prior_precision"]
    curves = {
        f"ablation/{name}": list(zip(taus, own[name], strict=True))
        for name in own
        if name != "prior_precision"
    }
    scalars = {"ablation/grid_cost_ratio": results["grid_cost_ratio"]}
    own_setting = results["own"]
    board.write_study(
        folder / "tensorboard", scalars, curves, made, loggers, own_setting, pdf=as_pdf
    )
