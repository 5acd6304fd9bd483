"""A dry run: what every cell would make, what is there, and what it takes; nothing is written."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bayesdiff.checks import UserError
from bayesdiff.cli import mendable
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.progress import duration
from bayesdiff.pipeline import prepare
from bayesdiff.report import table
from bayesdiff.runs.address import Address, images_at, maps_settings, scores_at
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.cell_report import is_made
from bayesdiff.runs.setup import OF_THE_RUN, Setup, sampled_from, scored, starts, with_effect
from bayesdiff.runs.training import chosen, is_finished
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of, read_json
from bayesdiff.storage.checkpoints import load_weights, read_checkpoint
from bayesdiff.studies.report_scores import kinds_of, scores_of
from bayesdiff.studies.report_scores import scores_key as scores_of_report
from bayesdiff.studies.study import study_keys
from bayesdiff.sweeps.plan.estimate import Estimates, schedule
from bayesdiff.sweeps.report import flatten, swept_keys
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.members.block_ensemble import with_block
from bayesdiff.uncertainty.sensitivities.refined import Refined
from bayesdiff.uncertainty.sensitivities.refiner_file import load, path_of

STAGES = ("training", "curvature", "images", "classifier", "scores", "refiner", "maps",
          "validation", "image_scores", "report")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One thing that a cell needs.

    Attributes:
        stage: one of ``STAGES``.
        key: the same for all cells that share it.
        made: whether it is there.
        share: of it that is still to be made, below 1 for a training to be continued.
    """

    stage: str
    key: str
    made: bool
    share: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One combination of settings.

    Attributes:
        overrides: that made it.
        works: what it needs, in order; empty if it is refused.
        made_with: run, solver and estimator, None if it is refused.
        error: the one line it is refused with.
    """

    overrides: tuple[str, ...]
    works: tuple[Work, ...] = ()
    made_with: tuple[Run, Solver, Estimator] | None = None
    error: str = ""


def look(overrides: Iterable[str], cfg: DictConfig) -> Cell:
    """What the cell would make and what is there; a bad combination becomes one line."""
    overrides = tuple(overrides)
    try:
        run, solver, estimator, laplace = prepare(cfg)
        _check_known(run)
        works = tuple(_works(run, solver, estimator, laplace))
    except Exception as error:
        line = mendable(error)
        if line is None:
            raise
        return Cell(overrides, error=line)
    return Cell(overrides, works, (run, solver, estimator))


def _check_known(run: Run) -> None:
    """Refuse what probes know nothing of, before they end in the middle of a plan.

    Raises:
        UserError: for anything but images, labels and numbers along the path.
    """
    space, condition = run.data.space, run.model.condition
    half = torch.tensor(0.5)
    for name, strange in (
        ("data", not space.pictures or space.decoded),
        ("condition", condition is not None and condition.num_classes is None),
        ("path", run.model.path.coefficients(half).alpha.dim() > 0),
    ):
        if strange:
            raise UserError(f"dry_run=true knows no times of this {name}; run it without dry_run")


def _works(
    run: Run, solver: Solver, estimator: Estimator, laplace: LastLayerLaplace
) -> list[Work]:
    """Everything the cell needs, with the keys that the pipeline would give it."""
    training, weights = trained(run)
    posterior = None if weights is None else laplace.kept(run.model, run.data.data)
    # Before the training is done its own key stands for the weights that will come of it.
    known = weights or run.key
    source = laplace.source(known, run.data.data)
    works = [training, Work("curvature", f"{run.folder} {source}", posterior is not None)]
    if run.cfg.metrics.num_images:
        works += _of_images(run, solver, known)
    if posterior is None:
        parts = [*sampled_from(run, known), source, plain(run.cfg.laplace)]
        key = key_of(*parts, maps_settings(run, estimator), *estimator.sources(run))
        refiner = key_of(*parts, with_effect(run.cfg.uncertainty, *OF_THE_RUN))
        check = key_of(key, estimator.validate_images, estimator.validate_members)
        studies = [
            images_at(run, solver, known).key,
            *(plain(run.cfg[name]) for name in run.studies),
        ]
        report = key_of(key, scored(run), estimator.validate and check, studies)
        made = dict.fromkeys(("refiner", "maps", "validation", "image_scores", "report"), False)
    else:
        estimator = with_block(estimator, laplace.block)
        setup = Setup(run, solver, estimator, posterior, known)
        at = Address.of(setup, study_keys(setup))
        key, refiner, report = at.maps.key, at.maps.key, at.cell
        check = "" if at.checked is None else at.checked.key
        made = {
            "maps": at.maps.is_made,
            "validation": at.checked is not None and at.checked.is_made,
            "report": is_made(run, at.folder, at.cell),
            "image_scores": scores_of(at).is_made,
        }
        if isinstance(estimator, Refined):
            refiner = estimator.key(starts(run, solver)([0]), posterior)
            made["refiner"] = load(path_of(run.folder, refiner), refiner) is not None
    if isinstance(estimator, Refined):
        works.append(Work("refiner", refiner, made["refiner"] or made["maps"]))
    works.append(Work("maps", key, made["maps"]))
    if estimator.validate:
        works.append(Work("validation", check, made["validation"]))
    if kinds_of(run) - {"map", "image"}:  # the others take longer than a look
        works.append(Work("image_scores", scores_of_report(run, key), made["image_scores"]))
    return [*works, Work("report", report, made["report"])]


def _of_images(run: Run, solver: Solver, weights: str) -> list[Work]:
    """Images, their scores, and the classifier behind these."""
    images = images_at(run, solver, weights)
    works = [Work("images", f"{run.folder} {images.key}", images.is_made)]
    scores = scores_at(run, images.key)
    done = scores.is_made
    if run.cfg.metrics.features == "classifier":
        from bayesdiff.metrics.classifier import _epochs, _read_cache, cache_path

        data, cache = run.data.data, Path(run.cfg.output_dir) / "cache"
        epochs = _epochs(len(data.images))
        path = cache_path(cache, data.fingerprint, run.cfg.metrics.seed, epochs)
        works.append(Work("classifier", str(path), done or _read_cache(path) is not None))
    return [*works, Work("scores", scores.key, done)]


def trained(run: Run) -> tuple[Work, str | None]:
    """State of the training, and the key of its weights once it is done; loads them."""
    last = run.folder / "checkpoints" / "last.ckpt"
    sampled = last.with_name(chosen(run))
    if not run.cfg.fit:
        path = sampled if run.cfg.ckpt_path == "last" else Path(run.cfg.ckpt_path)
        return Work("training", str(run.folder), True), load_weights(run.model, path)
    record = read_json(run.folder / "fit.json") or {}
    if record.get("key") == run.key and last.is_file() and sampled.is_file():
        return Work("training", str(run.folder), True), load_weights(run.model, sampled)
    share = 1.0
    if last.is_file():
        kept = read_checkpoint(last)
        share -= 1 if is_finished(kept) else kept["global_step"] / run.length[0]
    return Work("training", str(run.folder), False, min(max(share, 0.0), 1.0)), None


def show(
    given: Sequence[tuple[Sequence[str], DictConfig]], workers: int | None = None
) -> list[str]:
    """Print the plan: a row for each cell, then the totals.

    Args:
        given: overrides and configuration of every cell.
        workers: of the last total; None for as many as there are cores.

    Returns:
        One line for each cell that is refused.
    """
    estimates, totals = Estimates(), _Totals()
    rough = [{"overrides": overrides, "status": "", "seconds": 0} for overrides, _ in given]
    keys = swept_keys(rough) if len(given) > 1 else []
    rows, errors = [], []
    for place, (overrides, cfg) in enumerate(given):
        cell = look(overrides, cfg)  # one at a time: each holds its data
        flat = flatten(rough[place], keys)
        rows.append({"cell": place} | {key: flat[key] for key in keys})
        rows[-1] |= totals.add(cell, estimates)
        errors += [f"cell {place}: {cell.error}"] if cell.error else []
    there = {name for row in rows for name in row}
    columns = ["cell", *keys, *(stage for stage in STAGES if stage in there), "time", "memory"]
    columns += ["refused"] if errors else []
    table.show("plan: nothing is made or written", rows, columns)
    table.show("in all", totals.rows(workers or os.cpu_count() or 1))
    return errors


class _Totals:
    """What the cells have in common, cell by cell."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}  # cell that makes it
        self.works: list[tuple[Work, ...]] = []
        self.costs: list[list[tuple[str, float]]] = []
        self.peak, self.refused = 0.0, 0
        self.studies: set[str] = set()

    def add(self, cell: Cell, estimates: Estimates) -> dict[str, Any]:
        """Columns of the cell's row."""
        place = len(self.works)
        self.works.append(cell.works)
        if cell.made_with is None:
            self.refused += 1
            self.costs.append([])
            return {"time": "", "memory": "", "refused": cell.error}
        cost = costs_of(cell, estimates)
        row = {work.stage: self._state(work, place, cost[work.stage]) for work in cell.works}
        self.costs.append([(_name(work), cost[work.stage]) for work in cell.works])
        own = sum(cost[w.stage] for w in cell.works if self.first[_name(w)] == place)
        memory = estimates.memory(*cell.made_with)
        self.peak = max(self.peak, memory)
        self.studies |= cell.made_with[0].studies.keys()
        return row | {"time": duration(own), "memory": f"{memory:.2g} GiB", "refused": ""}

    def _state(self, work: Work, place: int, seconds: float) -> str:
        """``made``, made by an earlier cell, or the time it takes."""
        first = self.first.setdefault(_name(work), place)
        if work.made:
            return "made"
        if first != place:
            return f"with cell {first}"
        return duration(seconds) + (" to go" if work.share < 1 else "")

    def rows(self, workers: int) -> list[dict[str, Any]]:
        """The closing table."""
        made = sum(bool(works) and all(work.made for work in works) for works in self.works)
        trainings = {w.key: w.made for works in self.works for w in works if w.stage == "training"}
        missing = len(trainings) - sum(trainings.values())
        told = {
            "cells": f"{len(self.works)}: {made} made before, {self.refused} refused",
            "trainings": f"{len(trainings)}: {missing} to be made",
            "time, 1 worker": duration(schedule(self.costs, 1)),
        }
        for count in sorted({2, workers} - {1}) if len(self.works) > 1 else ():
            known = duration(schedule(self.costs, count))
            told[f"time, {count} workers"] = f"{known}, each with a core or device of its own"
        told["memory of a worker"] = f"{self.peak:.2g} GiB"
        if self.studies:
            told["not estimated"] = ", ".join(sorted(self.studies))
        return [{"what": name, "value": value} for name, value in told.items()]


def _name(work: Work) -> str:
    """Keys of different stages never meet."""
    return f"{work.stage} {work.key}"


def costs_of(cell: Cell, estimates: Estimates) -> dict[str, float]:
    """Seconds of each of the cell's stages, 0 for what is made."""
    if cell.made_with is None:
        return {}
    return {
        work.stage: 0.0
        if work.made
        else work.share * estimates.seconds(work.stage, *cell.made_with)
        for work in cell.works
    }
