"""Are images mended, or varied, by drawing them anew from the middle of their trajectory?

All images of the run in order, none picked; the alternatives of every way come from the same noise
and are finished by the trained sampler. One classifier chooses among them, another judges.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup, scored
from bayesdiff.runs.stages import made_rows, make_maps
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.own_scores import try_scores
from bayesdiff.studies.repair import figures as pictures
from bayesdiff.studies.repair.alternatives import Origin, weight_draws
from bayesdiff.studies.repair.redraw import FRESH, RedrawOptions, redraw
from bayesdiff.studies.repair.results import results_of
from bayesdiff.studies.study import Place, Report, Study, check_judge, conditions
from bayesdiff.uncertainty import Ensemble, Estimator, Samples
from bayesdiff.uncertainty.members.base import Members
from bayesdiff.uncertainty.memory import images_at_once


@dataclass(frozen=True, kw_only=True)
class Repair(RedrawOptions, Study):
    """Images resampled, and what that does to them.

    Example:
        >>> study = Repair(images=[3, 17], draws=8, ways=["fresh"], score="map.sum")
        >>> study.numbers, study.map_count  # of each image and of its eight alternatives
        ([3, 17], 18)
    """

    @property
    def map_count(self) -> int:
        """One of each image and, where candidates are chosen by them, theirs."""
        each = len(self.rewinding) * self.draws + 1
        candidates = len(self.times) * each + self.draws * (FRESH in self.ways)
        return self.count * (1 + candidates * self.reads_maps)

    @property
    def settled(self) -> dict[str, Any]:
        """Boxes of single images, which may come from a file."""
        if not isinstance(self.region, Mapping):
            return {}
        return {"region": {number: list(box) for number, box in self.region.items()}}

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what could not be drawn or judged.

        Raises:
            UserError: for a model or data without labels, a region beyond the image, or times at
                which there is no step.
        """
        check_judge(run, "repair")
        if not run.model.num_classes:
            raise UserError(
                "repair judges images by the class they were asked to show; use "
                "model.num_classes=auto"
            )
        if not run.model.path.ends_in_data and self.rewinding:
            raise UserError(
                "repair goes on from the middle of trajectories to data, and those of a "
                f"{run.model.path.family} model end in a belief; use repair.ways=[fresh]"
            )
        shape = run.data.space.shape
        self.check_size(*shape[1:])
        try_scores([*self.own_of_maps.values(), *self.own_of_images.values()], run)
        if self.rewinding:
            self._check_times(run, solver, estimator)
        if self.reads_maps and self.rewinding and not estimator.restarts:
            raise UserError(
                f"repair.score={self.score} needs maps from the middle of trajectories on, which "
                f"uncertainty={estimator.name} with what it fits to whole ones has not; use "
                "uncertainty=ensemble, or repair.ways=[fresh]"
            )
        images_at_once(self._batches(estimator), solver, run.model, shape, "lower repair.draws")

    def _check_times(self, run: Run, solver: Solver, own: Estimator) -> None:
        """Refuse times that leave nothing to finish, or fall on the same step."""
        skip = own.skip_interval if isinstance(own, Members) else 1  # they record at their steps
        ends = solver.times(run.model.path, skip)[1:]
        found = [next(end for end in ends if time <= end + 1e-9) for time in self.from_time]
        for time, end in zip(self.from_time, found, strict=True):
            if end == ends[-1]:
                raise UserError(
                    f"repair.from_time={time} has only the finished image behind it at "
                    f"solver.num_steps={solver.num_steps}; give an earlier time, or more steps"
                )
        if len(set(found)) < len(found):
            raise UserError(
                f"repair.from_time={list(self.from_time)} has times in one step of the solver, "
                f"solver.num_steps={solver.num_steps}; leave one out, or give more steps"
            )

    def made_from(self, at: Setup) -> list[Any]:
        """The maps, and what judges the alternatives."""
        return [at.made_from, at.of_maps, scored(at.run)]

    def make(self, at: Setup, place: Place) -> Report | None:
        """Alternatives of the run's images."""
        samples = self._samples(at, place)
        drawn = self._redrawn(at, place, samples)
        if rank():
            return None
        results = results_of(at.run, self, samples, drawn)
        made_of = conditions(at.settings)
        picks = [row for row in results["picks"] if row["score"] == self.score]
        return Report(
            results,
            pictures.every(results, drawn, self.rewinding, self.score, made_of),
            {"table.md": self._table(results, picks)},
            {
                f"{row['way']}/{row['time']:.3g}/{row['among']}/{name}": row[name]
                for row in picks
                for name in ("gain", "success", "harm")
            },
            _headlines(results["draws"], picks),
        )

    def _samples(self, at: Setup, place: Place) -> Samples:
        """The images with their maps, and their variances at the times."""
        timed = replace(at.estimator, times=self.times)
        if self.numbers is None:
            return ImagePool(at, self.num_images, at.run.cfg.seed).maps(timed).in_model_range()
        file = Artefact(place.folder / "maps.npz", place.key)
        return make_maps(replace(at, estimator=timed), file, numbers=self.numbers).in_model_range()

    def _batches(self, own: Estimator) -> Ensemble:
        """As many trajectories of an image at once as there are alternatives."""
        return Ensemble(
            members=max(self.draws, 2),
            noise_members=0,
            batch_size=own.batch_size,
            max_memory=own.max_memory,
        )

    def _redrawn(self, at: Setup, place: Place, samples: Samples) -> dict[str, Tensor]:
        """``draws.npz``: images and alternatives."""
        weights = weight_draws(at.posterior, self.draws, self.seed)
        numbers = self.numbers or range(self.count)
        own = at.estimator.for_run(at.run)
        ready = own.fit(at.starts, at.posterior, at.run.folder) if self.reads_maps else own
        ready = replace(ready, times=())

        def batch(places: list[int]) -> Rows:
            origin = Origin.of(at.starts([numbers[place] for place in places]))
            mapper = lambda start: ready(start, at.posterior)  # noqa: E731
            return redraw(origin, weights, self, samples, places, mapper)

        shape = samples.images.shape[1:]
        size = images_at_once(self._batches(own), at.solver, at.run.model, shape)
        if self.reads_maps:
            size = min(size, images_at_once(ready, at.solver, at.run.model, shape))
        file = Artefact(place.folder / "draws.npz", place.key)
        return made_rows(file, range(self.count), size, batch, "repair")

    def _table(self, results: Mapping[str, Any], picks: list[dict[str, Any]]) -> str:
        """The images, the alternatives, and the best by the score."""
        original = results["original"]
        title = f"The images themselves, {original['wrong']} of {self.count} judged wrong"
        draws = "The alternatives, which is best-of-n by chance"
        shown = [
            (title, [original], list(original)),
            (draws, results["draws"], pictures.OF_DRAWS),
            (f"The best by {self.score}", picks, pictures.OF_PICKS),
        ]
        return "\n".join(
            f"{title}:\n\n{table.markdown([pictures.line(row, names) for row in rows])}"
            for title, rows, names in shown
        )


def _headlines(
    draws: list[dict[str, Any]], picks: list[dict[str, Any]]
) -> dict[str, float | None]:
    """Of every way at every time: the alternatives' mean gain, and that of the best of all."""
    numbers = {f"{row['way']}/gain@{row['time']:.3g}": row.get("gain") for row in draws}
    return numbers | {
        f"{row['way']}/best_gain@{row['time']:.3g}": row.get("gain")
        for row in picks
        if row["among"] == "all"
    }
