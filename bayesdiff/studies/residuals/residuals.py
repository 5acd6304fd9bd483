"""Is the error of a network along its own trajectories noise, or does it persist?

Who treats the error of a score as white noise, drawn anew at every step, counts on it to average
out on the way; an error that stays the same adds up instead. The exact prediction for a finite set
of states tells the error at every state that a trajectory passes, and the correlation over all
pairs of times tells which of both it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.machine.ranks import rank
from bayesdiff.models.exact import exact_model
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver, encode
from bayesdiff.solvers.encode import backward
from bayesdiff.studies.residuals import figures
from bayesdiff.studies.residuals.predictions import (
    known_times,
    published_residuals,
    trajectory_errors,
)
from bayesdiff.studies.residuals.summary import STATISTICS, curves_of, summary_of
from bayesdiff.studies.study import Place, Report, Study, check_unconditional, conditions
from bayesdiff.uncertainty import Estimator

STARTS = ("latents", "held_out")
_AT_ONCE = 4096
# Of the size of states; errors below are rounding, whose correlation says nothing.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class ErrorsInTime(Study):
    """Which trajectories are followed, and what their predictions are compared with.

    Args:
        points: trajectories.
        start: ``latents`` draws their starts from the prior; ``held_out`` takes those that
            held-out data come from, by the same solver.
        references: training data whose exact prediction is the truth, and as many others whose
            own distance from it is the floor; at most half of the training data each.
        batch_size: points at once.
        seed: of the latents, the choice of references and the noise on clean data.

    Example:
        >>> times, white = [0.0, 0.25, 0.5, 0.75], torch.randn(4, 200_000, 1)
        >>> fresh = summary_of(white, times)  # errors that are drawn afresh at every time
        >>> same = summary_of(white[:1].expand(4, -1, -1), times)  # and one that stays
        >>> round(fresh["persistent_share"], 2), round(same["persistent_share"], 2)
        (0.25, 1.0)
    """

    points: int = 1000
    start: str = "latents"
    references: int = 5000
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("residuals.points", self.points, 2)
        if self.start not in STARTS:
            raise UserError(
                f"unknown residuals.start {self.start!r}; choose from {', '.join(STARTS)}"
            )
        at_least("residuals.references", self.references, 2)
        at_least("residuals.batch_size", self.batch_size, 1)
        seed_of("residuals.seed", self.seed)

    def check_data(self, data: ImageData, name: str) -> None:
        """Refuse data too few to compare two sets of them; states may be anything.

        Raises:
            UserError: for fewer than four training data, or two held-out ones to start from.
        """
        used = {"training": (data.images, 4)}  # two of each set of references, to correlate over
        if self.start == "held_out":
            used["held-out"] = data.test_images, 2
        for part, (x, least) in used.items():
            if len(x) < least:
                raise UserError(
                    f"{name} needs {least} {part} data or more, and {data.name} has {len(x)}; "
                    "give more, or leave it out"
                )

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what has no trajectories of its own, or no exact prediction along them.

        Raises:
            UserError: for a conditional model, a path that does not end in data, predictions that
                are drawn, a solver that draws noise, or fewer than two times to compare.
        """
        model = run.model
        check_unconditional(run, "residuals has the exact prediction of one distribution")
        if not model.path.ends_in_data:
            raise UserError(
                f"residuals follows states that become data, and those of path="
                f"{model.path.family} are beliefs; use model=inflation, flow or diffusion"
            )
        if likelihood_of(model).draws:
            raise UserError(
                "residuals compares predictions, not draws; use model.likelihood.sampled=false "
                "and model.likelihood.final=mean"
            )
        if solver.stochastic:
            raise UserError(
                f"residuals needs trajectories that the model alone decides, solver={solver.name} "
                "draws noise on the way; use solver=ddim, or another without noise"
            )
        if self.start == "held_out":
            backward(solver, model.path, model.prediction)
        times = known_times(solver, model.path, model.prediction)
        if len(times) < 2:
            raise UserError(
                f"solver.num_steps={solver.num_steps} leaves {len(times)} time with noise, and "
                "residuals correlates two or more; give more steps"
            )

    def made_from(self, at: Setup) -> list[Any]:
        """The network and the solver."""
        return [at.made_from]

    @torch.inference_mode()
    def make(self, at: Setup, place: Place) -> Report | None:
        """Errors along the trajectories; small enough for one process."""
        if rank():
            return None
        training = at.run.model.training
        try:
            at.run.model.eval()
            results = self._results(at)
        finally:
            at.run.model.train(training)
        settings = {k: v for k, v in at.settings.items() if k != "uncertainty.name"}
        headlines = {name: results[name] for name in STATISTICS}
        return Report(
            results,
            figures.every(results, conditions(settings)),
            {"table.md": table.markdown(results["rows"])},
            scalars={k: v for k, v in headlines.items() if v is not None},
            headlines=headlines,
        )

    def _results(self, at: Setup) -> dict[str, Any]:
        model, solver, device = at.run.model, at.solver, at.run.device
        states = self._references(at.run)
        exact = tuple(
            exact_model(model.path, "data", own.double()).to(device) for own in states.chunk(2)
        )
        # The exact prediction is one of these data alone: of others its residuals say no more.
        clean = states[: len(states) // 2][: self.points].to(device)
        starts = self._starts(at)
        errors, floor = trajectory_errors(
            model, solver, (exact[0], exact[1]), starts, self.batch_size
        )
        times = known_times(solver, model.path, model.prediction)
        least = _ROUNDING * float(states.double().square().mean().sqrt())
        results, of_floor = (summary_of(each, times, least) for each in (errors, floor))
        del errors, floor
        published = published_residuals(
            model, exact[0], times, clean, self.batch_size, self.seed + 1
        )
        correlations = [summary_of(each, times, least)["correlation"] for each in published]
        return {
            **results,
            "floor": {name: of_floor[name] for name in (*STATISTICS, "bias_share", "by_lag")},
            **curves_of(times, results, of_floor, *correlations),
            "conditions": {
                "points": len(starts), "start": self.start, "references": len(states) // 2,
                "clean": len(clean), "times": len(times), "solver": solver.name,
                "seed": self.seed,
            },
        }  # fmt: skip

    def _references(self, run: Run) -> Tensor:
        """States of two disjoint sets of training data, one after the other."""
        images = run.data.data.images
        count = min(self.references, len(images) // 2)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(images), generator=generator)[: 2 * count]
        return _states(run, images[chosen])

    def _starts(self, at: Setup) -> Tensor:
        """States at t = 0, ``(N, *shape)``."""
        model = at.run.model
        if self.start == "held_out":
            data = _states(at.run, at.run.data.data.test_images[: self.points])
            parts = data.to(at.run.device).split(self.batch_size)
            return torch.cat([encode(model, at.solver, part) for part in parts])
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.points, *at.run.data.space.shape, generator=generator)
        return model.path.initial_state(noise.to(at.run.device))


def _states(run: Run, images: Tensor) -> Tensor:
    """Data as the model is to predict them."""
    parts = [run.data.space.encode(part).float() for part in images.split(_AT_ONCE)]
    return likelihood_of(run.model).values(torch.cat(parts))
