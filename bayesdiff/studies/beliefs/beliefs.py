"""What a Bayesian flow network is unsure about: pixels and weights, of data and on its way.

The entropy of a belief ignores all other pixels, that of the output knows them; the posterior of
the head splits the latter into what the data leave open and what the weights do. On held-out
images wrong pixels and other data can be told by it, without a sample; along the sampler the same
entropies say where and when a sample was decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.likelihoods import class_likelihood_of
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.paths.bayesian_flow import accuracy_path
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.stages import made_rows
from bayesdiff.solvers import Solver, plan
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.studies.beliefs import figures, results
from bayesdiff.studies.beliefs.held_out import Teacher
from bayesdiff.studies.beliefs.predictive import HeadPredictive
from bayesdiff.studies.beliefs.shifts import Shift, name_of, shifted
from bayesdiff.studies.beliefs.trajectory import follow
from bayesdiff.studies.study import Place, Report, Study, conditions
from bayesdiff.uncertainty import Estimator

_HEADLINES = tuple(
    f"{score}.auroc_{what}" for score in results.SCORES for what in ("wrong_pixels", "shift")
)


@dataclass(frozen=True, kw_only=True)
class Beliefs(Study):
    """Which images and samples are measured, and how finely.

    Args:
        num_images: held-out images, and as many shifted ones.
        num_samples: of the model, and held-out images that their curves are compared with.
        shift: other data, an ``ImageData`` or a function of uint8 images; None for none.
        bins: equal intervals of t; every image has one time in each.
        times: at which samples are shown on their way.
        draws: of weights, where a value has more than one logit.
        bootstrap: samples of the intervals over images.
        batch_size: images at once.
        seed: of the images' choice, the beliefs' noise, draws and intervals.

    Example:
        >>> from bayesdiff.studies.beliefs.shifts import inverted
        >>> study = Beliefs(num_images=100, shift=inverted, bins=4)
        >>> name_of(study.shift)
        'inverted'
        >>> Beliefs(times=[0.5, 1.5])
        Traceback (most recent call last):
            ...
        bayesdiff.checks.UserError: beliefs.times must lie in [0, 1], got 1.5
    """

    num_images: int = 500
    num_samples: int = 64
    shift: Shift | None = None
    bins: int = 10
    times: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    draws: int = 32
    bootstrap: int = 1000
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_images", 2), ("num_samples", 2), ("bins", 1), ("draws", 2), ("bootstrap", 2),
            ("batch_size", 1),
        ):  # fmt: skip
            at_least(f"beliefs.{name}", getattr(self, name), least)
        seed_of("beliefs.seed", self.seed)
        for time in listed("beliefs.times", self.times, "[0,0.5,1]"):
            number = isinstance(time, (int, float)) and not isinstance(time, bool)
            if not number or not 0 <= time <= 1:
                raise UserError(f"beliefs.times must lie in [0, 1], got {time!r}")

    def check_data(self, data: ImageData, name: str) -> None:
        """Refuse what are no pictures; classes with channels of their own are some."""
        if not data.space.pictures:
            raise UserError(
                f"{name} is about pictures, and {data.name} has none; leave {name} out"
            )

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse models without beliefs over classes, and images that are not there.

        Raises:
            UserError: for these, and a solver of several evaluations a step.
        """
        class_likelihood_of(run.model, "beliefs")
        accuracy_path(run.model.path, "beliefs")
        if any(len(s.times) > 1 for s in plan(solver, run.model.path, run.model.prediction)):
            raise UserError(
                f"beliefs needs one evaluation a step, solver={solver.name} has more; use "
                "solver=bfn"
            )
        there = len(run.data.data.test_images)
        for name in ("num_images", "num_samples"):
            if (asked := getattr(self, name)) > there:
                raise UserError(
                    f"beliefs.{name}={asked} is more than the {there} held-out images of "
                    f"{run.data.data.name}; use fewer"
                )
        if run.model.condition is not None and not run.model.class_dropout:
            raise UserError(
                "beliefs shows images without their classes, which model.class_dropout=0 never "
                "trained; use model.num_classes=null, or class_dropout above 0"
            )
        self._shifted(run, self._chosen(run))

    def made_from(self, at: Setup) -> list[Any]:
        """The model with its posterior, and the other data."""
        return [at.made_from, getattr(self.shift, "fingerprint", None)]

    def make(self, at: Setup, place: Place) -> Report | None:
        """Measure images, kept as ``held_out.npz`` and others, and samples, as ``samples.npz``."""
        teacher, chosen = self._teacher(at), self._chosen(at.run)
        images = at.run.data.data.test_images[chosen]
        held = self._measured(at, place, teacher, images, "held_out")
        other, moved = None, self._shifted(at.run, chosen)
        if moved is not None:
            other = self._measured(at, place, teacher, moved, "shifted")
        times = [min(step.times[0], 1.0) for step in at.starts([0]).steps()]
        grid = self._on_grid(at, place, teacher, images, times)
        frames = nearest(times, self.times)
        sampled = self._sampled(at, place, teacher, times, frames)
        return None if rank() else self._report(at, held, other, grid, sampled, times, frames)

    def _chosen(self, run: Run) -> Tensor:
        """Numbers of the held-out images: any, since sets come sorted by class."""
        generator = torch.Generator().manual_seed(self.seed)
        count = max(self.num_images, self.num_samples)
        return torch.randperm(len(run.data.data.test_images), generator=generator)[:count]

    def _shifted(self, run: Run, chosen: Tensor) -> Tensor | None:
        if self.shift is None:
            return None
        chosen = chosen[: self.num_images]
        held = run.data.data.test_images[chosen]
        return shifted(self.shift, held, run.cfg.data.get("binarise"), chosen)

    def _teacher(self, at: Setup) -> Teacher:
        model = at.run.model
        likelihood = class_likelihood_of(model, "beliefs")
        head = HeadPredictive(model.net, likelihood, at.posterior, self.draws, self.seed)
        path = accuracy_path(model.path, "beliefs")
        return Teacher(model, likelihood, path, head, self.seed, at.run.device)

    def _data(self, at: Setup, teacher: Teacher, images: Tensor) -> Tensor:
        states = at.run.data.space.encode(images.to(at.run.device))
        return teacher.likelihood.values(states)

    def _measured(
        self, at: Setup, place: Place, teacher: Teacher, images: Tensor, name: str
    ) -> Rows:
        def batch(numbers: list[int]) -> Rows:
            x_1 = self._data(at, teacher, images[numbers])
            return teacher.in_bins(x_1, numbers, self.bins, pixels=name == "held_out")

        file = Artefact(place.folder / f"{name}.npz", place.key)
        what = f"beliefs of {name.replace('_', '-')} images"
        return made_rows(file, range(self.num_images), self.batch_size, batch, what, self.bins)

    def _on_grid(
        self, at: Setup, place: Place, teacher: Teacher, images: Tensor, times: list[float]
    ) -> Rows:
        def batch(numbers: list[int]) -> Rows:
            return teacher.on_grid(self._data(at, teacher, images[numbers]), numbers, times)

        file = Artefact(place.folder / "held_out_over_time.npz", place.key)
        what, size = "beliefs over time", self.batch_size
        return made_rows(file, range(self.num_samples), size, batch, what, len(times))

    def _sampled(
        self, at: Setup, place: Place, teacher: Teacher, times: list[float], frames: list[int]
    ) -> Rows:
        def batch(numbers: list[int]) -> Rows:
            own = teacher.likelihood, teacher.predictive, at.run.data.space
            return follow(at.starts(numbers), *own, times, frames)

        file = Artefact(place.folder / "samples.npz", place.key)
        what, size = "beliefs of samples", self.batch_size
        return made_rows(file, range(self.num_samples), size, batch, what, len(times))

    def _report(
        self, at: Setup, held: Rows, other: Rows | None, grid: Rows, sampled: Rows,
        times: list[float], frames: list[int],
    ) -> Report:  # fmt: skip
        draw = results.Intervals(self.bootstrap, self.seed)
        bins = results.over_bins(held, other, draw)
        found = results.figures(held, other, bins, draw) | results.of_samples(sampled)
        about = {
            "num_images": self.num_images, "num_samples": self.num_samples,
            "shift": name_of(self.shift), "solver": at.solver.name, "num_steps": len(times) - 1,
            "commit_below": "0.1 ln K", "units": "nats per value", "data": at.run.data.data.name,
        }  # fmt: skip
        record = {
            "conditions": about,
            **found,
            "bins": bins,
            "curve": results.over_time(sampled, grid, times, draw),
            "reliability": {
                name: results.reliability(held["confidence"][:, :, place])
                for place, name in enumerate(results.PREDICTIONS)
            },
        }
        shown = [times[k] for k in frames]
        made_of = conditions(
            {k: v for k, v in at.settings.items() if not k.startswith("uncertainty.")}
        )
        values = {
            name: value for name, value in found.items() if not name.endswith(("low", "high"))
        }
        rows: list[table.Row] = [
            {"figure": name, "value": value, "low": found.get(f"{name}_low"),
             "high": found.get(f"{name}_high")}
            for name, value in values.items()
        ]  # fmt: skip
        return Report(
            record,
            figures.every(record, sampled, shown, made_of),
            {"table.md": table.markdown(rows)},
            scalars=values,
            headlines={name: found[name] for name in _HEADLINES if name in found},
        )


def nearest(times: Sequence[float], shown: Sequence[float]) -> list[int]:
    """Places of the nearest times, each once and in order."""
    return sorted({min(range(len(times)), key=lambda k: abs(times[k] - t)) for t in shown})
