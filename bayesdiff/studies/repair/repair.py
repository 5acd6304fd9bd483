"""Are images mended, or varied, by drawing them anew from the middle of their trajectory?

All images of the run in order, none picked; the alternatives of every way come from the same noise
and are finished by the trained sampler. One classifier chooses among them, another judges.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.ranks import barrier, rank
from bayesdiff.report import board, table
from bayesdiff.runs.build import Run
from bayesdiff.runs.stages import Rows, made_rows, make_maps, starts
from bayesdiff.solvers import Solver, time_grid
from bayesdiff.storage.artefacts import write_text
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.repair import figures as pictures
from bayesdiff.studies.repair.alternatives import Origin, weight_draws
from bayesdiff.studies.repair.redraw import Repair, redraw
from bayesdiff.studies.repair.results import results_of
from bayesdiff.studies.study import (
    Study,
    check_judge,
    conditions,
    configured,
    pdf,
    scored,
    with_effect,
)
from bayesdiff.uncertainty import Ensemble, Estimator, Samples
from bayesdiff.uncertainty.members.base import Members
from bayesdiff.uncertainty.memory import images_at_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def check_repair(run: Run, solver: Solver, own: Estimator) -> None:
    """Refuse before any work what could not be drawn or judged; nothing where it is not asked for.

    Raises:
        UserError: for a model or data without labels, a region beyond the image, or times at
            which there is no step.
    """
    wanted: Repair | None = configured(run, "repair")
    if wanted is None:
        return
    check_judge(run, "repair")
    if not run.model.num_classes:
        raise UserError(
            "repair judges images by the class they were asked to show; use model.num_classes=auto"
        )
    shape = run.data.data.images.shape[1:]
    wanted.check_size(*shape[1:])
    if wanted.rewinding:
        _check_times(wanted, run, solver, own)
    if wanted.reads_maps and wanted.rewinding and not own.restarts:
        raise UserError(
            f"repair.score={wanted.score} needs maps from the middle of trajectories on, which "
            f"uncertainty={own.name} with what it fits to whole ones has not; use "
            "uncertainty=ensemble, or repair.ways=[fresh]"
        )
    images_at_once(_batches(wanted, own), solver, run.model, shape, "lower repair.draws")


def _check_times(wanted: Repair, run: Run, solver: Solver, own: Estimator) -> None:
    """Refuse times that leave nothing to finish, or fall on the same step.

    Raises:
        UserError: one line with the cure.
    """
    skip = own.skip_interval if isinstance(own, Members) else 1  # they record at their own steps
    ends = time_grid(solver.grid, run.model.path, solver.num_steps, skip)[1:]
    found = [next(end for end in ends if time <= end + 1e-9) for time in wanted.from_time]
    for time, end in zip(wanted.from_time, found, strict=True):
        if end == ends[-1]:
            raise UserError(
                f"repair.from_time={time} has only the finished image behind it at "
                f"solver.num_steps={solver.num_steps}; give an earlier time, or more steps"
            )
    if len(set(found)) < len(found):
        raise UserError(
            f"repair.from_time={list(wanted.from_time)} has times in one step of the solver, "
            f"solver.num_steps={solver.num_steps}; leave one out, or give more steps"
        )


def repair_images(
    run: Run, solver: Solver, own: Estimator, posterior: HeadPosterior, made_from: str
) -> Path | None:
    """Alternatives of the run's images, tables and figures, in a folder; results.json last.

    Args:
        run: with its trained model.
        solver: of the samples.
        own: the run's estimator; gives the variances.
        posterior: of the head.
        made_from: key of the network, the solver and the posterior.

    Returns:
        The folder, None where no repair is asked for.
    """
    wanted: Repair | None = configured(run, "repair")
    if wanted is None:
        return None
    of_maps, of_scores = with_effect(run.cfg.uncertainty), scored(run)
    parts: list[Any] = [made_from, of_maps, own.sources(run), of_scores]
    if isinstance(wanted.region, Mapping):  # may come from a file
        parts.append([[number, *box] for number, box in sorted(wanted.region.items())])
    study = Study.of(run, "repair", solver.name, *parts)
    if study.is_made:
        return study.folder
    samples = _samples(run, solver, own, posterior, wanted, made_from, study)
    drawn = _redrawn(run, solver, own, posterior, wanted, samples, study)
    if rank() == 0:
        nfe = Origin.of(starts(run, solver)([0])).evaluations(-1)[1]
        results = results_of(run, wanted, samples, drawn, nfe)
        made_of = conditions(run, solver, posterior, own)
        made = pictures.every(results, drawn, wanted.rewinding, wanted.score, made_of)
        _report(study, wanted, results, made, pdf(run))
        study.close(results, _headlines(wanted, results))
    barrier()
    log.info("repair: %d images in %s", wanted.count, study.folder)
    return study.folder


def _samples(
    run: Run,
    solver: Solver,
    own: Estimator,
    posterior: HeadPosterior,
    wanted: Repair,
    made_from: str,
    study: Study,
) -> Samples:
    """The images with their maps, and their variances at the times."""
    timed = replace(own, times=wanted.times, validate=False)
    if wanted.numbers is None:
        folder, seed = run.folder / "pools", run.cfg.seed
        pool = ImagePool(run, solver, posterior, wanted.num_images, seed, folder, made_from)
        return pool.maps(timed).in_model_range()
    path, key = study.folder / "maps.npz", study.key
    made = make_maps(run, solver, timed, posterior, path, key, numbers=wanted.numbers)
    return made.in_model_range()


def _batches(wanted: Repair, own: Estimator) -> Ensemble:
    """As many trajectories of an image at once as there are alternatives."""
    return Ensemble(
        members=max(wanted.draws, 2),
        noise_members=0,
        batch_size=own.batch_size,
        max_memory=own.max_memory,
    )


def _redrawn(
    run: Run,
    solver: Solver,
    own: Estimator,
    posterior: HeadPosterior,
    wanted: Repair,
    samples: Samples,
    study: Study,
) -> dict[str, Tensor]:
    """``draws.npz``: images and alternatives."""
    start_of = starts(run, solver)
    weights = weight_draws(posterior, wanted.draws, wanted.seed)
    numbers = wanted.numbers or range(wanted.count)
    ready = own.fit(start_of, posterior, run.folder) if wanted.reads_maps else own
    ready = replace(ready, times=())

    def batch(places: list[int]) -> Rows:
        origin = Origin.of(start_of([numbers[place] for place in places]))
        return redraw(origin, weights, wanted, samples, places, lambda s: ready(s, posterior))

    shape = samples.images.shape[1:]
    size = images_at_once(_batches(wanted, own), solver, run.model, shape)
    if wanted.reads_maps:
        size = min(size, images_at_once(ready, solver, run.model, shape))
    path = study.folder / "draws.npz"
    return made_rows(path, study.key, range(wanted.count), size, batch, "repair")


def _headlines(wanted: Repair, results: Mapping[str, Any]) -> dict[str, float | None]:
    """Of every way at every time: the alternatives' mean gain, and that of the best of all."""
    numbers = {f"{row['way']}/gain@{row['time']:.3g}": row.get("gain") for row in results["draws"]}
    return numbers | {
        f"{row['way']}/best_gain@{row['time']:.3g}": row.get("gain")
        for row in results["picks"]
        if (row["score"], row["among"]) == (wanted.score, "all")
    }


def _report(
    study: Study,
    wanted: Repair,
    results: Mapping[str, Any],
    made: Iterable[tuple[str, "Figure"]],
    as_pdf: bool,
) -> None:
    """Tables, figures and loggers."""
    folder = study.folder
    picks = [row for row in results["picks"] if row["score"] == wanted.score]
    original = results["original"]
    title = f"The images themselves, {original['wrong']} of {wanted.count} judged wrong"
    shown = [
        (title, [original], list(original)),
        ("The alternatives, which is best-of-n by chance", results["draws"], pictures.OF_DRAWS),
        (f"The best by {wanted.score}", picks, pictures.OF_PICKS),
    ]
    text = "\n".join(
        f"{title}:\n\n{table.markdown([pictures.line(row, names) for row in rows])}"
        for title, rows, names in shown
    )
    write_text(folder / "table.md", text)
    scalars = {
        f"repair/{row['way']}/{row['time']:.3g}/{row['among']}/{name}": row[name]
        for row in picks
        for name in ("gain", "success", "harm")
    }
    told = study.loggers, results["conditions"]
    board.write_study(folder / "tensorboard", scalars, {}, made, *told, pdf=as_pdf)
