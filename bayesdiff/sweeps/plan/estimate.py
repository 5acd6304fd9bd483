"""Seconds and memory of every stage of a cell, from counts and a short probe."""

import math
import resource
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.report.options import options_of
from bayesdiff.report.sample_grid import SampleGrid
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.callback_options import callbacks_of
from bayesdiff.runs.setup import with_effect
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of
from bayesdiff.studies.report_scores import JUDGED, kinds_of
from bayesdiff.sweeps.plan.probe import Counts, Probe, count, seconds_of
from bayesdiff.uncertainty import Estimator, Samples
from bayesdiff.uncertainty.memory import GIB, activation_bytes, images_at_once
from bayesdiff.uncertainty.sensitivities.refined import Refined

Value = TypeVar("Value")

# Weights, gradients, AdamW's two moments, and the average.
_COPIES = 5
_VALIDATED = 1024  # images per validation epoch, at most


class Estimates:
    """Times and memory of cells; what cells have in common is probed once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value made for this key, by the first who asks."""
        if key not in self._known:
            self._known[key] = make()
        found: Value = self._known[key]
        return found

    def probe(self, run: Run) -> Probe:
        """Timings of the run's network."""
        data = run.data.data
        key = key_of(plain(run.cfg.net), list(data.images.shape), run.model.num_classes,
                     plain(run.cfg.data.batch_size), plain(run.cfg.trainer))  # fmt: skip
        return self.once(("probe", key), lambda: Probe(run))

    def counts(self, run: Run, solver: Solver, estimator: Estimator) -> Counts:
        """Network evaluations of the cell's images and maps."""
        cfg = run.cfg
        options = plain(cfg.solver), plain(cfg.path), with_effect(cfg.uncertainty)
        size = HeadGeometry.of(run.model.net.head).size
        key = key_of(*options, estimator.validate_members, size, run.model.num_classes)
        return self.once(("counts", key), lambda: count(run, solver, estimator))

    def evaluation(self, run: Run, size: int) -> float:
        """Seconds per image of a network evaluation in batches of ``size``."""
        probe = self.probe(run)
        return self.once((id(probe), "evaluation", size), lambda: probe.evaluation(size))

    def seconds(self, stage: str, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Of one stage, made from nothing.

        Args:
            stage: such as ``maps``; each is a method of this class.
            run: of the cell.
            solver: of the cell.
            estimator: of the cell.
        """
        call: Callable[[Run, Solver, Estimator], float] = getattr(self, stage)
        return call(run, solver, estimator)

    def training(self, run: Run, *_: Any) -> float:
        """All optimiser steps, the validation after every epoch, and the grids of samples."""
        cfg, data = run.cfg, run.data
        steps, epochs = run.length
        batch, test = int(cfg.data.batch_size), len(data.data.test_images)
        seconds = steps * self.probe(run).training_step
        checked = min(_VALIDATED, test)
        limit = cfg.trainer.get("limit_val_batches")
        if limit is not None:
            checked = min(checked, limit * batch if isinstance(limit, int) else limit * checked)
        every = cfg.trainer.get("check_val_every_n_epoch") or 1
        per_image = self.evaluation(run, batch)
        seconds += epochs / every * checked * per_image
        for grid in callbacks_of(run):
            if isinstance(grid, SampleGrid):
                images = grid.size(run.model.num_classes)
                seconds += min(grid.grids, epochs) * grid.num_steps * images * per_image
        return seconds

    def curvature(self, run: Run, *_: Any) -> float:
        """The one pass over the data."""
        options, images = run.cfg.laplace, len(run.data.data.images)
        size = options.get("batch_size") or 256
        seen = (options.get("num_images") or images) * (options.get("draws") or 1)
        probe = self.probe(run)
        return seen * self.once((id(probe), "pass", size), lambda: probe.curvature(size))

    def images(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """The model's own samples for the scores."""
        cfg = run.cfg.metrics
        evaluations = self.counts(run, solver, estimator).image
        return cfg.num_images * evaluations * self.evaluation(run, cfg.batch_size)

    def classifier(self, run: Run, *_: Any) -> float:
        """Training it, and its features of all training images."""
        training, extracting = self.probe(run).classifier
        return training + extracting * len(run.data.data.images)

    def scores(self, run: Run, *_: Any) -> float:
        """Features of the images and of as many real ones, then the formulas.

        Those of other extractors than ours are not probed.
        """
        cfg = run.cfg.metrics
        if cfg.features != "classifier":
            return 0.0
        seen = cfg.num_images + min(cfg.num_images, len(run.data.data.test_images))
        return seen * self.probe(run).classifier[1] + self.once(
            ("fid", cfg.num_images), lambda: _formulas(cfg.num_images)
        )

    def refiner(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Its images' sensitivities and its own training."""
        if not isinstance(estimator, Refined):
            return 0.0
        evaluations = self.counts(run, solver, estimator).fit
        own = self.once(
            ("refiner", run.folder, estimator.train_images),
            lambda: _refiner(run, solver, estimator),
        )
        return evaluations * self.evaluation(run, 64) + own

    def maps(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Images with their maps, after any preparation that has no stage of its own."""
        counts, probe = self.counts(run, solver, estimator), self.probe(run)
        held = estimator.copies(solver) * estimator.batch_size
        key = id(probe), estimator.name, getattr(estimator, "derivative", ""), held
        rate = self.once(key, lambda: probe.estimator(estimator, held))
        fit = 0 if isinstance(estimator, Refined) else counts.fit
        return (fit + counts.map * estimator.map_count) * rate

    def validation(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Trajectories of the reference's members."""
        evaluations = self.counts(run, solver, estimator).check
        return estimator.validate_images * evaluations * self.evaluation(run, 64)

    def image_scores(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Members, the likelihood and the classifier behind the report's scores.

        The classifier is of another seed than the one that judges.
        """
        shown, kinds = options_of(run.cfg), kinds_of(run)
        seconds, evaluations = 0.0, 0
        if "members" in kinds:
            evaluations += shown.members * self.counts(run, solver, estimator).image
        if "likelihood" in kinds:
            # Of four stages each, and a derivative takes about as long as two evaluations.
            evaluations += 3 * 4 * shown.likelihood_steps
        if kinds & {*JUDGED}:
            seen = 1 + shown.members * ("members" in kinds)
            seconds += self.classifier(run)
            seconds += seen * estimator.map_count * self.probe(run).classifier[1]
        return seconds + estimator.map_count * evaluations * self.evaluation(run, 64)

    def report(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """Pictures and events, drawn once for samples of this size and thrown away."""
        shape, shown = run.data.space.shape, options_of(run.cfg)
        size = min(estimator.map_count, 64)
        key = "report", shape, size, solver.num_steps, shown.pdf, len(shown.sorted_by)
        return self.once(key, lambda: _pictures(run, solver, estimator))

    def memory(self, run: Run, solver: Solver, estimator: Estimator) -> float:
        """GiB of the largest stage; on a CPU with what this process holds already.

        Training keeps the outputs of all layers, sampling those of all inputs held at once, as in
        ``images_at_once``.
        """
        shape = run.data.space.shape
        layers = self.once(
            ("layers", id(self.probe(run))), lambda: activation_bytes(run.model, shape)
        )
        weights = 4 * sum(p.numel() for p in run.model.parameters())
        size = run.cfg.laplace.get("batch_size") or 256
        held = images_at_once(estimator, solver, run.model, shape) * estimator.copies(solver)
        stages = (
            _COPIES * weights + int(run.cfg.data.batch_size) * layers,
            weights
            + min(size, 256) * layers
            + 6 * 8 * HeadGeometry.of(run.model.net.head).size ** 2,
            weights + held * (layers + 8 * 4 * math.prod(shape)),
        )
        own = 0 if run.device.type == "cuda" else 1024 * _resident()
        return (max(stages) + own) / GIB


def _resident() -> int:
    """KiB that this process has held at most: libraries and data are in every worker."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _formulas(images: int) -> float:
    """Seconds of FID and its kin on features of this number of images."""
    from bayesdiff.metrics.features import Features
    from bayesdiff.metrics.scores import reference_statistics, scores

    size = min(images, 2000)
    drawn = Features(torch.randn(size, 128), torch.randn(size, 10))
    reference = reference_statistics(lambda: drawn, key="", cache_dir=None, seed=0)
    call = lambda: scores(drawn, reference, seed=0, extractor="classifier")  # noqa: E731
    return 2 * seconds_of(call, torch.device("cpu"), 1)


def _refiner(run: Run, solver: Solver, estimator: Refined) -> float:
    """Seconds of the refiner's own training."""
    from bayesdiff.uncertainty.sensitivities.refiner import Evidence, train_refiner

    shape, geometry = run.data.space.shape, HeadGeometry.of(run.model.net.head)
    evaluations = solver.stages * solver.num_steps
    nodes = len(estimator.nodes(evaluations) | {evaluations - 1})
    images = 64
    patch = int(getattr(run.model.net, "patch", 1))
    place = shape[1] // patch, shape[2] // patch
    seen = Evidence(
        images=torch.randn(images, *shape),
        features=torch.randn(images, nodes * geometry.features, *place).half(),
        variance=torch.rand(images, *shape),
        overlap=torch.rand(images),
    )
    target = torch.randn(images, 2, *shape)
    call = lambda: train_refiner(seen, target, patch=patch, epochs=1, seed=0)  # noqa: E731
    return seconds_of(call, run.device, 1) / images * estimator.train_images * estimator.epochs


def _pictures(run: Run, solver: Solver, estimator: Estimator) -> float:
    """Seconds of a cell's report."""
    from bayesdiff.report import board

    shape, size = run.data.space.shape, min(estimator.map_count, 64)
    steps, frames = solver.num_steps, min(9, solver.num_steps)
    values = torch.rand(size, *shape)
    samples = Samples(
        images=values,
        variance=values,
        labels=torch.arange(size) % run.model.num_classes if run.model.num_classes else None,
        times=torch.linspace(0, 1, steps),
        summed=torch.rand(steps, size),
        frames=values[None, :8].expand(frames, -1, *shape),
        frame_variance=values[None, :8].expand(frames, -1, *shape),
        frame_times=torch.linspace(0, 1, frames),
        nfe=1,
        estimator="",
    )
    with TemporaryDirectory() as folder:
        place = Path(folder) / "tensorboard"
        shown = options_of(run.cfg)
        scores = {name: torch.rand(size) for name in shown.scores}
        given: dict[str, Any] = {"scores": scores, "options": shown}
        call = lambda: board.write(place, samples, {}, {}, run.classes, **given)  # noqa: E731
        return seconds_of(call, torch.device("cpu"), 1)


def schedule(cells: Sequence[Sequence[tuple[str, float]]], workers: int) -> float:
    """Seconds until the last of ``workers`` is done with cells taken in order.

    Args:
        cells: key and seconds of everything a cell needs; what several need is made once, by the
            first, and the others wait for it.
        workers: at once, each as fast as one alone.
    """
    free = [0.0] * workers
    ready: dict[str, float] = {}
    for works in cells:
        first = free.index(min(free))
        now = free[first]
        for key, seconds in works:
            now = max(now, ready[key]) if key in ready else now + seconds
            ready[key] = now
        free[first] = now
    return max(free, default=0.0)
