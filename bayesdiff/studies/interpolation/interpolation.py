"""What lies between two samples, and does uncertainty rise there?

The starting noises of two samples are joined by an arc, and the trained sampler makes an image of
every point on it. Noise on the arc between two independent noises is itself standard normal in
law, so that without anything special between samples the maps are as large there as at the ends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.metrics.agreement import Figures, mean, with_intervals
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.stages import made_rows
from bayesdiff.solvers import Solver, plan
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.studies.interpolation import figures as pictures
from bayesdiff.studies.study import Place, Report, Study, conditions
from bayesdiff.uncertainty import Estimator, Samples, Starts
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.restart import with_state

_HEADLINES = ("rise", "rise_relative", "highest_inside")


@dataclass(frozen=True, kw_only=True)
class Interpolation(Study):
    """Which samples are joined, and how finely.

    Args:
        pairs: how many pairs of neighbouring samples of one class, or the pairs themselves by
            sample number, ``[[0, 10], [3, 13]]``; the two of a pair must be of the same class.
        points: images along an arc, both ends and the middle among them.
        bootstrap: samples of the intervals over pairs.
        seed: of these.

    Example:
        >>> study = Interpolation(pairs=2, points=5)
        >>> study.numbers(num_classes=10)  # neighbours of one class
        [(0, 10), (1, 11)]
        >>> a, b = torch.randn(2, 1, 1, 64, 64).unbind()
        >>> [round(float(arc(a, b, place).std()), 1) for place in study.places]
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    pairs: int | Sequence[Sequence[int]] = 32
    points: int = 9
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if at_least("interpolation.points", self.points, 3) % 2 == 0:
            raise UserError(
                f"interpolation.points={self.points} has none in the middle; give an odd number"
            )
        at_least("interpolation.bootstrap", self.bootstrap, 2)
        seed_of("interpolation.seed", self.seed)
        if isinstance(self.pairs, int):
            at_least("interpolation.pairs", self.pairs)
            return
        for pair in listed("interpolation.pairs", self.pairs, "[[0,10],[3,13]]"):
            for number in listed("interpolation.pairs", pair, "[[0,10],[3,13]]"):
                at_least("interpolation.pairs", number, 0)
            if len(pair) != 2:
                raise UserError(f"interpolation.pairs must hold two numbers each, got {pair}")

    @property
    def places(self) -> list[float]:
        """Where on the arc, from 0 to 1."""
        return [k / (self.points - 1) for k in range(self.points)]

    def numbers(self, num_classes: int | None) -> list[tuple[int, int]]:
        """Sample numbers of the pairs.

        Args:
            num_classes: that samples have in turn; None for an unconditional model.

        Raises:
            UserError: for a pair of two classes.
        """
        count = num_classes or 1
        if isinstance(self.pairs, int):
            blocks = (divmod(k, count) for k in range(self.pairs))
            return [(2 * b * count + k, (2 * b + 1) * count + k) for b, k in blocks]
        for one, other in self.pairs:
            if one % count != other % count:
                raise UserError(
                    f"interpolation.pairs=[[{one},{other}]] are of classes {one % count} and "
                    f"{other % count}, and no image between has both; give two of one class, "
                    f"such as [{one},{one + count}]"
                )
        return [(one, other) for one, other in self.pairs]

    @property
    def map_count(self) -> int:
        """Points on all arcs."""
        pairs = self.pairs if isinstance(self.pairs, int) else len(self.pairs)
        return pairs * self.points

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what has nothing between.

        Raises:
            UserError: for a stochastic solver, whose images its later noise decides as well, and
                samples of which each has an embedding of its own.
        """
        self.numbers(run.model.num_classes)
        if run.model.condition is not None and not run.model.num_classes:
            raise UserError(
                "interpolation needs two samples of one condition, and here every sample has an "
                "embedding of its own; use condition=labels, or leave interpolation out"
            )
        if any(step.stochastic for step in plan(solver, run.model.path, run.model.prediction)):
            raise UserError(
                f"interpolation needs a deterministic solver, solver={solver.name} adds noise on "
                "the way; use solver=ddim, or another without noise"
            )

    def made_from(self, at: Setup) -> list[Any]:
        """The maps."""
        return [at.made_from, at.of_maps]

    def make(self, at: Setup, place: Place) -> Report | None:
        """Images and maps between samples, which are kept as ``path.npz``."""
        own = at.estimator.for_run(at.run).fit(at.starts, at.posterior, at.run.folder)
        ready = replace(own, times=())
        pairs = self.numbers(at.run.model.num_classes)

        def batch(rows: list[int]) -> Rows:
            chosen = [pairs[row] for row in rows]
            made = [along(at.starts, ready, at.posterior, chosen, x) for x in self.places]
            return {
                "images": torch.stack([each.images for each in made], 1),
                "variance": torch.stack([each.variance for each in made], 1),
            }

        size = images_at_once(ready, at.solver, at.run.model, at.run.data.space.shape)
        file = Artefact(place.folder / "path.npz", place.key)
        drawn = made_rows(file, range(len(pairs)), size, batch, "interpolation")
        if rank():
            return None
        results = results_of(self, pairs, drawn["variance"])
        results["conditions"] |= {"solver": at.solver.name, "estimator": at.estimator.name}
        rows = [
            {"figure": name, "value": results[name], "low": results[f"{name}_low"],
             "high": results[f"{name}_high"]}
            for name in _HEADLINES
        ]  # fmt: skip
        shown = {name: results[name] for name in _HEADLINES}
        made_of = conditions(at.settings)
        return Report(
            results,
            pictures.every(results, drawn["images"], drawn["variance"], made_of),
            {"table.md": table.markdown(rows)},
            scalars=shown,
            headlines=shown,
        )


def along(
    start_of: Starts,
    estimator: Estimator,
    posterior: HeadPosterior,
    pairs: Sequence[tuple[int, int]],
    place: float,
) -> Samples:
    """Images with their maps at one place between the samples of pairs; the ends are the samples.

    Args:
        start_of: gives the start of samples by their numbers.
        estimator: of the maps, made ready.
        posterior: of the head.
        pairs: numbers of the samples.
        place: from 0, the first sample, to 1.
    """
    first, second = ([pair[end] for pair in pairs] for end in (0, 1))
    if place in (0, 1):
        return estimator(start_of(second if place else first), posterior)
    start = start_of(first)  # whose noise an estimator draws what it needs beside x_0 from
    x_0 = arc(start.draw(), start_of(second).draw(), place)
    return estimator(with_state(start, x_0), posterior)


def arc(a: Tensor, b: Tensor, place: float) -> Tensor:
    """A point on the quarter of an ellipse from one noise to another.

    Its weights' squares add to 1: of independent standard normal ends it is standard normal too.

    Args:
        a: ``(B, ...)``.
        b: of the same shape.
        place: from 0, which is a, to 1, which is b.
    """
    angle = math.pi / 2 * place
    return math.cos(angle) * a + math.sin(angle) * b


def results_of(
    options: Interpolation, pairs: Sequence[tuple[int, int]], variance: Tensor
) -> dict[str, Any]:
    """How the maps' sums change along the arcs, with intervals over pairs.

    Args:
        options: for the places and the intervals.
        pairs: sample numbers.
        variance: maps ``(N, S, C, H, W)``.

    Returns:
        ``rise``: mean over pairs of the mean sum at the inner places minus that of both ends,
        ``rise_relative``: that over the ends' mean sum, 0 where nothing rises; ``highest_inside``:
        share of pairs whose middle is above both ends, 1/3 if all three are alike in law; each
        with ``_low`` and ``_high``; ``curve``: mean sum at every place, with its interval.
    """
    sums = variance.double().flatten(2).sum(2)
    ends, inside = (sums[:, 0] + sums[:, -1]) / 2, sums[:, 1:-1].mean(1)
    middle = sums[:, sums.shape[1] // 2]
    above = (middle > torch.maximum(sums[:, 0], sums[:, -1])).double()
    figures: Figures = {
        "rise": (mean, (inside - ends,)),
        "rise_relative": (_relative, (inside, ends)),
        "highest_inside": (mean, (above,)),
    }
    chance: dict[str, Any] = {"seed": options.seed, "resamples": options.bootstrap, "level": 0.95}
    curve = []
    for place, own in zip(options.places, sums.unbind(1), strict=True):
        row = with_intervals({"sum": (mean, (own,))}, **chance)
        curve.append({"place": place, **row})
    return {
        "conditions": {"pairs": [list(pair) for pair in pairs], "points": options.points},
        **with_intervals(figures, **chance),
        "curve": curve,
        "sums": sums.tolist(),
    }


def _relative(inside: Tensor, ends: Tensor) -> Tensor:
    return inside.mean(-1) / ends.mean(-1) - 1
