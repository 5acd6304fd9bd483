"""fit -> curvature -> images -> maps -> validation -> score -> report; nothing is made twice."""

import importlib
import logging
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.laplace.block.kinds import Beside
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.evidence_grid import evidence_curve
from bayesdiff.laplace.structures import check_settings
from bayesdiff.machine.costs import kept_by
from bayesdiff.machine.progress import stage
from bayesdiff.machine.ranks import barrier, rank
from bayesdiff.metrics.validation import reference_at_once
from bayesdiff.options.local_paths import settle
from bayesdiff.options.targets import instantiated
from bayesdiff.report import table
from bayesdiff.report.layout import estimator_of
from bayesdiff.runs import run_log
from bayesdiff.runs.address import Address
from bayesdiff.runs.build import Run, build, check_groups, is_main_process, plain
from bayesdiff.runs.calibration import check_calibration, make_calibration
from bayesdiff.runs.callback_options import check_callbacks
from bayesdiff.runs.cell_report import measured, report
from bayesdiff.runs.chosen_estimator import settle_estimator
from bayesdiff.runs.composition import compose
from bayesdiff.runs.fit_key import pass_context
from bayesdiff.runs.processes import check_devices, launch
from bayesdiff.runs.scores import check_metrics, make_scores
from bayesdiff.runs.settings import settings
from bayesdiff.runs.setup import Setup, settings_of, starts
from bayesdiff.runs.stage_costs import recorded
from bayesdiff.runs.stages import make_calibrated, make_images, make_maps, make_validation
from bayesdiff.runs.training import fit, images_seen, weights_in_words
from bayesdiff.solvers import Solver, plan
from bayesdiff.solvers.step import check_finite, check_solver
from bayesdiff.storage.locks import alone, together
from bayesdiff.studies.report_scores import check_report, report_scores
from bayesdiff.studies.study import (
    check_studies,
    headlines_of,
    make_study,
    studies_of,
    study_keys,
)
from bayesdiff.uncertainty import Estimator, Samples
from bayesdiff.uncertainty.chosen import check_samples, sample_numbers
from bayesdiff.uncertainty.members.snapshots import note_missing_snapshots
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.scores.along import check_run_along
from bayesdiff.uncertainty.wider import check_wider, with_block

__all__ = ["Result", "compose", "prepare", "run", "settings_of", "show"]
log = logging.getLogger(__name__)
SEEN = "seen"  # of laplace.n_eff: as many images as the training has seen


@dataclass(frozen=True)
class Result:
    """What one run ends with.

    Attributes:
        folder: the cell's folder, inside the run folder.
        samples: its images with their maps, which it may share with other cells.
        metrics: flat scalars; names carry their conditions.
        settings: the settings behind them, flat.
        studies: folders of the studies that were asked for.
        weights: which weights they are of, in words.
        headlines: numbers of the studies, which are among the metrics.
        curves: where each logger has what it was given.

    Example:
        >>> folder = Path("outputs/digits-flow-1a2b3c4d/euler-ensemble-0a1b2c3d")
        >>> metrics = {"nfe": 20.0, "fid@1k/classifier": 12.5}
        >>> samples = folder.parent / "samples-euler-ensemble-2b3c4d5e.npz"
        >>> result = Result(folder, samples, metrics, {"solver.name": "euler"})
        >>> result.metrics["nfe"], result.folder.parent.name
        (20.0, 'digits-flow-1a2b3c4d')
    """

    folder: Path
    samples: Path
    metrics: dict[str, float]
    settings: dict[str, Any]
    studies: tuple[Path, ...] = ()
    weights: str = ""
    headlines: dict[str, float] = field(default_factory=dict)
    curves: tuple[str, ...] = ()


def run(cfg: DictConfig) -> Result:
    """Run every stage whose artefact is missing and return the metrics.

    Raises:
        UserError: for what the user can mend, before any work where it can be known then.

    Example:
        Half a minute of training on a CPU:

        >>> result = run(compose("experiment=demo"))  # doctest: +SKIP
        >>> result.metrics["nfe"], result.folder  # doctest: +SKIP
    """
    if not isinstance(cfg, DictConfig):
        raise UserError(f"run takes what compose gives, got {cfg!r}; run(compose('data=digits'))")
    with run_log.recording(*run_log.command()), stage("run"):
        this, solver, estimator, laplace = prepare(cfg)
        if is_main_process():
            run_log.write_to(this.folder)
        with recorded(this, solver, estimator):
            return _run(this, solver, estimator, laplace)


def _run(this: Run, solver: Solver, estimator: Estimator, laplace: LastLayerLaplace) -> Result:
    """All stages, one after the other."""
    cfg = this.cfg
    weights = fit(this, laplace)
    laplace.settings["n_eff"] = n_eff_of(this)
    this.model.to(this.device).eval()
    with stage("curvature"):
        posterior = laplace.fit(this.model, this.data.data)
    estimator = with_block(estimator, laplace.block)
    standing = settings(this, posterior, solver, estimator)
    setup = Setup(this, solver, estimator, posterior, weights, standing)
    at = Address.of(setup, study_keys(setup))
    images = None
    if cfg.metrics.num_images:
        images = make_images(this, solver, cfg.metrics.num_images, at.images)
    factor = None if at.calibration is None else make_calibration(setup, at.calibration)
    samples = make_maps(setup, at.uncalibrated, numbers=sample_numbers(estimator, this))
    if factor is not None:
        samples = make_calibrated(at.maps, samples, factor)
    checked = None if at.checked is None else make_validation(setup, samples, at.checked)
    scores: dict[str, float] = {}
    if images is not None:
        with stage("scores"):
            scores = make_scores(this, images, at.scores)
    studies = make_studies(setup)
    result = Result(
        at.folder, at.maps.path, {}, setup.settings, studies, weights_in_words(this),
        headlines_of(studies),
    )  # fmt: skip
    shown, beside = report_scores(at, samples), measured(at, samples)
    if rank() == 0:
        with alone(at.folder / "metrics.json"), stage("report"):
            metrics = scores | statistics_of(samples, this.classes)
            if checked is not None:
                metrics |= checked.metrics(cfg.seed)
            metrics |= factor.metrics() if factor is not None else {}
            metrics |= laplace.statistics() | laplace.block_statistics() | result.headlines
            evidence = evidence_curve(posterior)
            loggers = report(at, metrics, samples, shown, checked, evidence, beside)
            curves = tuple(loggers.places(cfg.output_dir))
            result = replace(result, metrics=metrics, curves=curves)
        export(at, samples, images)
    barrier()
    return result


def make_studies(at: Setup) -> tuple[Path, ...]:
    """Folders of the studies that are asked for, each made once."""
    if not at.run.studies:
        return ()
    # What a study takes depends on the pools that others have left.
    with together(at.run.folder / "studies"), stage("studies"), kept_by(None):
        return tuple(make_study(at, name, study) for name, study in at.run.studies.items())


def prepare(cfg: DictConfig) -> tuple[Run, Solver, Estimator, LastLayerLaplace]:
    """Build and check everything, before any work is done; then start the other processes.

    Example:
        >>> import tempfile
        >>> words = "data=digits", "net=tiny", "uncertainty=ensemble", "metrics.num_images=0"
        >>> cfg = compose(*words, f"output_dir={tempfile.mkdtemp()}")
        >>> this, solver, estimator, laplace = prepare(cfg)  # nothing is trained yet
        >>> len(this.data.data.images), solver.name, estimator.name, laplace.posterior
        (1497, 'euler', 'ensemble', None)
    """
    importlib.invalidate_caches()  # a module written since the last run is found, as in notebooks
    check_groups(cfg)
    settle(cfg)
    devices = check_devices(cfg)
    n_eff = None if cfg.laplace.n_eff == SEEN else cfg.laplace.n_eff
    check_settings(**{k: cfg.laplace[k] for k in _POSTERIOR}, n_eff=n_eff)
    beside = Beside(**{field.name: plain(cfg.laplace)[field.name] for field in fields(Beside)})
    beside.check(cfg.laplace.structure, cfg.laplace.sigma_noise)
    seed_of("laplace.seed", cfg.laplace.seed)
    solver: Solver = instantiated(cfg.solver, "solver", Solver)
    estimator: Estimator = instantiated(cfg.uncertainty, "uncertainty", Estimator)
    at_least("solver.num_steps", solver.num_steps)
    estimator.check(solver)
    this = build(cfg)
    this = replace(this, studies=studies_of(cfg), callbacks=check_callbacks(this))
    options = plain(cfg.laplace) | {"n_eff": n_eff_of(this)}
    laplace = LastLayerLaplace(**options, folder=this.folder, context=pass_context(cfg))
    laplace.check(this.model, len(this.data.data.images), this.data.space.shape)
    this, estimator = settle_estimator(this, solver, estimator)
    if beside.asked:
        check_wider(estimator, beside.subset, *list(this.studies)[:1])
    model = this.model
    check_solver(solver, model.path, model.condition is not None and model.class_dropout > 0)
    check_finite(solver, model.prediction, plan(solver, model.path, model.prediction))
    shape = this.data.space.shape
    images_at_once(estimator, solver, model, shape)
    estimator.check_run(this)
    check_calibration(this, estimator)
    check_run_along(this, solver, estimator)
    check_samples(estimator, this)
    estimator.check_aleatoric(starts(this, solver)([0]))
    note_missing_snapshots(this.folder, plain(cfg.callbacks), cfg.trainer.get("max_epochs"))
    if estimator.validate:
        reference_at_once(estimator, solver, model, shape)
    check_metrics(this)
    check_report(this)
    check_studies(this, solver, estimator)
    laplace.check_files()
    if not cfg.get("dry_run"):
        launch(cfg, devices)
    return this, solver, estimator, laplace


def n_eff_of(run: Run) -> float | None:
    """Images that the likelihood counts, as asked for; None for those of the pass."""
    asked = run.cfg.laplace.n_eff
    return images_seen(run) if asked == SEEN else asked


_POSTERIOR = ("structure", "sigma_noise", "prior_precision", "rank", "time_bins")


def statistics_of(samples: Samples, classes: tuple[str, ...] = ()) -> dict[str, float]:
    """What the maps come to, as flat scalars."""
    from bayesdiff.metrics.agreement import variance_statistics

    samples = samples.in_model_range()  # a number means the same whatever is shown
    statistics = variance_statistics(samples.variance, samples.labels, classes)
    metrics: dict[str, float] = {"nfe": samples.nfe}
    if samples.sampler_noise is not None:
        metrics["sampler_noise/mean"] = variance_statistics(samples.sampler_noise)["mean"]
    if samples.aleatoric is not None:
        found = variance_statistics(samples.aleatoric)
        metrics |= {f"aleatoric/{name}": found[name] for name in ("mean", "negative_share")}
    if samples.bits_per_dim is not None:
        metrics["likelihood/bits_per_dim"] = float(samples.bits_per_dim.mean())
    return metrics | {f"summed_variance/{name}": value for name, value in statistics.items()}


def export(at: Address, samples: Samples, images: Tensor | None) -> None:
    """Single images and maps as files, where they are asked for; each folder is made once."""
    from bayesdiff.report.export import export_images, export_samples

    run = at.setup.run
    if at.setup.estimator.export:
        export_samples(at.folder / "png", samples, run.classes, at.maps.path.name)
    if run.cfg.metrics.export and images is not None:
        labels = at.setup.starts(range(len(images))).labels
        export_images(at.images.path.with_suffix(""), images, run.classes, labels)


def show(result: Result) -> None:
    """The closing table, short, and where to look next.

    Example:
        >>> folder = Path("outputs/digits-flow-1a2b3c4d/euler-ensemble-0a1b2c3d")
        >>> metrics = {"nfe": 20.0, "fid@1k/classifier": 12.5}
        >>> samples = folder.parent / "samples-euler-ensemble-2b3c4d5e.npz"
        >>> show(Result(folder, samples, metrics, {"uncertainty.name": "ensemble"}))
        euler-ensemble-0a1b2c3d
        ...
        │ maps by           │ ensemble                                                     │
        │ fid@1k/classifier │ 12.5                                                         │
        │ nfe               │ 20                                                           │
        ...
    """
    if rank():
        return
    made = {"weights": result.weights, "maps by": estimator_of(result.settings)}
    rows: list[table.Row] = [{"metric": k, "value": v} for k, v in made.items()]
    rows += table.summary(result.metrics, result.headlines)
    rows.append({"metric": "pictures", "value": str(result.folder / "figures")})
    rows += [{"metric": "study", "value": str(folder)} for folder in result.studies]
    rows += [{"metric": "curves", "value": place} for place in result.curves]
    table.show(result.folder.name, rows)
