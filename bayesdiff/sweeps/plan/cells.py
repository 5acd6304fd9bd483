"""What a cell of a sweep needs, and what of it is there; nothing is made or written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bayesdiff.cli import mendable
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.pipeline import prepare
from bayesdiff.report.pictures import figures_of
from bayesdiff.runs.address import Address, images_at, maps_settings, scores_at
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.cell_report import is_made, plane_at
from bayesdiff.runs.fit_key import has_weights
from bayesdiff.runs.processes import check_devices
from bayesdiff.runs.setup import OF_THE_RUN, Setup, sampled_from, scored, starts, with_effect
from bayesdiff.runs.stage_costs import Kind, kinds_of, machine
from bayesdiff.runs.training import chosen, is_finished
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of, read_json, weights_key
from bayesdiff.storage.checkpoints import load_weights, read_checkpoint
from bayesdiff.studies.report_scores import kinds_of as score_kinds_of
from bayesdiff.studies.report_scores import scores_key as scores_of_report
from bayesdiff.studies.report_scores import scores_of
from bayesdiff.studies.study import Place, study_keys
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.wider import with_block

STAGES = ("training", "curvature", "block", "images", "classifier", "scores", "refiner",
          "calibration", "maps", "validation", "image_scores", "plane", "report")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One thing that a cell needs.

    Attributes:
        stage: one of ``STAGES``, or the name of a study.
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
        kinds: of its stages, for the records of finished runs.
        place: where it would run.
        folders: its own run folder and the output_dir.
        error: the one line it is refused with.
    """

    overrides: tuple[str, ...]
    works: tuple[Work, ...] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    place: dict[str, Any] = field(default_factory=dict)
    folders: tuple[Path, Path] = (Path(), Path())
    error: str = ""


def look(overrides: Iterable[str], cfg: DictConfig) -> Cell:
    """What the cell would make and what is there; a bad combination becomes one line."""
    overrides = tuple(overrides)
    try:
        run, solver, estimator, laplace = prepare(cfg)
        works = tuple(_works(run, solver, estimator, laplace))
    except Exception as error:
        line = mendable(error)
        if line is None:
            raise
        return Cell(overrides, error=line)
    place = machine(run.device, check_devices(cfg))
    folders = run.folder, Path(cfg.output_dir)
    return Cell(overrides, works, kinds_of(run, solver, estimator), place, folders)


def _works(
    run: Run, solver: Solver, estimator: Estimator, laplace: LastLayerLaplace
) -> list[Work]:
    """Everything the cell needs, with the keys that the pipeline would give it."""
    training, weights = trained(run)
    # Before the training is done its own key stands for the weights that will come of it.
    known, data = weights or run.key, run.data.data
    source = laplace.source(known, data)
    stored = {} if weights is None else laplace.stored(run.model, data)
    works = [training, Work("curvature", f"{run.folder} {source}", bool(stored.get("curvature")))]
    if laplace.beside.asked:
        key = f"{run.folder} {source} {laplace.beside.options}"
        works.append(Work("block", key, bool(stored.get("block"))))
    if run.cfg.metrics.num_images:
        works += _of_images(run, solver, known)
    posterior = None if weights is None else laplace.kept(run.model, data)
    if posterior is None:
        return works + _to_come(run, solver, estimator, known, source)
    setup = Setup(run, solver, with_block(estimator, laplace.block), posterior, known)
    return works + _of_cell(setup, posterior)


def _to_come(
    run: Run, solver: Solver, estimator: Estimator, known: str, source: str
) -> list[Work]:
    """What comes after a curvature that is not there yet."""
    parts = [*sampled_from(run, known), source, plain(run.cfg.laplace)]
    key = key_of(*parts, maps_settings(run, estimator), *estimator.sources(run))
    check = key_of(key, estimator.validate_images, estimator.validate_members)
    factor = key_of(key, _calibrated(estimator))
    shown = key if estimator.calibrate is None else factor
    images = images_at(run, solver, known).key
    studies = {name: key_of(*parts, plain(run.cfg[name])) for name in run.studies}
    keys = {
        estimator.prepares: key_of(*parts, with_effect(run.cfg.uncertainty, *OF_THE_RUN)),
        "calibration": factor,
        "maps": key,
        "validation": check,
        "image_scores": scores_of_report(run, shown),
        "plane": shown,
        **studies,
        "report": key_of(
            shown, scored(run), estimator.validate and check, images, *studies.values()
        ),
    }
    return [Work(stage, keys[stage], False) for stage in _asked(run, estimator)]


def _of_cell(setup: Setup, posterior: HeadPosterior) -> list[Work]:
    """What comes after the curvature."""
    run, estimator = setup.run, setup.estimator
    at = Address.of(setup, study_keys(setup))
    files = {
        "calibration": at.calibration,
        "maps": at.uncalibrated,
        "validation": at.checked,
        "image_scores": scores_of(at),
    }
    files["plane"] = plane_at(at)
    works = []
    for stage in _asked(run, estimator):
        if file := files.get(stage):
            key, made = file.key, file.is_made
        elif stage == "report":
            key, made = at.cell, is_made(run, at.folder, at.cell)
        elif stage == estimator.prepares:
            first = starts(run, setup.solver)([0])
            key, made = estimator.prepared(first, posterior, run.folder)
            made = made or at.uncalibrated.is_made
        else:
            place = Place.of(setup, stage, run.studies[stage])
            key, made = place.key, place.is_made
        works.append(Work(stage, key, made))
    return works


def _asked(run: Run, estimator: Estimator) -> list[str]:
    """Names of the stages after the curvature and the scores."""
    asked = {
        estimator.prepares: bool(estimator.prepares),
        "calibration": estimator.calibrate is not None,
        "maps": True,
        "validation": estimator.validate,
        # Those of maps and images take no longer than a look.
        "image_scores": bool(score_kinds_of(run) - {"map", "image"}),
        "plane": figures_of(run.data.space).measures,
        **dict.fromkeys(run.studies, True),
        "report": True,
    }
    return [stage for stage, is_asked in asked.items() if is_asked]


def _calibrated(estimator: Estimator) -> list[Any]:
    """What a calibration is asked for with."""
    times = list(estimator.times) if estimator.calibrate_per_time else []
    return [plain(estimator.calibrate), estimator.calibrate_images, times]


def _of_images(run: Run, solver: Solver, weights: str) -> list[Work]:
    """Images, their scores, and the classifier behind these."""
    images = images_at(run, solver, weights)
    works = [Work("images", f"{run.folder} {images.key}", images.is_made)]
    scores = scores_at(run, images.key)
    done = scores.is_made
    if run.cfg.metrics.features == "classifier" and run.data.space.pictures:
        from bayesdiff.metrics.classifier import kept_classifier

        cache = Path(run.cfg.output_dir) / "cache"
        path, there = kept_classifier(cache, run.data.data, run.cfg.metrics.seed)
        works.append(Work("classifier", str(path), done or there))
    return [*works, Work("scores", scores.key, done)]


def trained(run: Run) -> tuple[Work, str | None]:
    """State of the training, and the key of its weights once it is done; loads them."""
    last = run.folder / "checkpoints" / "last.ckpt"
    sampled = last.with_name(chosen(run))
    if has_weights(run.cfg):
        return Work("training", str(run.folder), True), weights_key(run.model)
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
