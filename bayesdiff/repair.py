"""Are images mended, or varied, by drawing them anew from the middle of their trajectory?

All images of the run in order, none picked; the alternatives of every way come from the same noise
and are finished by the trained sampler. One classifier chooses among them, another judges.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.artefacts import write_text
from bayesdiff.build import Run, plain
from bayesdiff.checks import UserError
from bayesdiff.distributed import barrier, rank
from bayesdiff.doubts import doubts_of_images
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.metrics.pool import pool
from bayesdiff.metrics.redraws import (
    Redraws,
    Row,
    draws_row,
    images_row,
    over,
    pick_row,
    probability,
)
from bayesdiff.pools import ImagePool
from bayesdiff.report import board, table
from bayesdiff.report import repair as pictures
from bayesdiff.solvers import Solver, time_grid
from bayesdiff.stages import Rows, judge, made_rows, starts
from bayesdiff.study import Study, check_judge, configured, with_effect
from bayesdiff.uncertainty import Ensemble, Estimator, Samples
from bayesdiff.uncertainty.members import Members
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.redraw import AMONG, SCORES, Repair, redraw
from bayesdiff.uncertainty.resample import Origin, weight_draws

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
    _check_times(wanted, run, solver, own)
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
    of_maps, of_scores = with_effect(run.cfg.uncertainty), plain(run.cfg.metrics)
    study = Study.of(run, "repair", solver.name, made_from, of_maps, own.sources(run), of_scores)
    if study.is_made:
        return study.folder
    timed = replace(own, times=sorted(wanted.from_time), validate=False)
    made = ImagePool(
        run, solver, posterior, wanted.num_images, run.cfg.seed, run.folder / "pools", made_from
    )
    samples = made.maps(timed).in_model_range()
    drawn = _redrawn(run, solver, own, posterior, wanted, samples, study)
    if rank() == 0:
        results = _results(run, wanted, samples, drawn)
        _report(study.folder, wanted, results, drawn)
        study.close(results)
    barrier()
    log.info("repair: %d images in %s", wanted.num_images, study.folder)
    return study.folder


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

    def batch(numbers: list[int]) -> Rows:
        return redraw(Origin.of(start_of(numbers)), weights, wanted, samples, numbers)

    size = images_at_once(_batches(wanted, own), solver, run.model, samples.images.shape[1:])
    path, images = study.folder / "draws.npz", range(wanted.num_images)
    return made_rows(path, study.key, images, size, batch, "repair")


def _results(
    run: Run, wanted: Repair, samples: Samples, drawn: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Numbers of the images, of the alternatives and of the best ones, by time and way."""
    assert samples.requested_times is not None
    images, draws, labels = drawn["images"], drawn["draws"], samples.labels
    assert labels is not None  # checked before any work
    rows: list[Row] = []
    picks: list[Row] = []
    first: Redraws | None = None
    for number, time in enumerate(samples.requested_times.tolist()):
        found = {
            way: _judged(run, images, draws[:, number, place], labels)
            for place, way in enumerate(wanted.ways)
        }
        for way, redraws in found.items():
            log.info("repair: from %.3g, %s", time, way)
            first = first or redraws
            name = {"time": round(time, 6), "way": way}
            more = _rows(wanted, redraws, found.get("isotropic"), drawn["power"][:, number])
            before, after = drawn["evaluations"][0, number].tolist()
            cost = {"nfe": after + before * (way == "coherent")}
            rows.append(name | cost | more[0])
            picks += [name | row for row in more[1:]]
    assert first is not None  # a Repair has a time and a way
    return {
        "conditions": _conditions(wanted, samples, drawn),
        "original": images_row(first),
        "draws": rows,
        "picks": picks,
    }


def _rows(wanted: Repair, redraws: Redraws, control: Redraws | None, power: Tensor) -> list[Row]:
    """The row of the alternatives, then one for every score and candidates to choose from."""
    chance = {"seed": wanted.seed, "draws": wanted.bootstrap}
    control = None if control is redraws else control
    row = draws_row(redraws, power, **chance)
    if control is not None:
        own, other = (each.quality[:, 1:].mean(1) for each in (redraws, control))
        row |= over(own, other, **chance)
    rows = [row]
    for score in SCORES:
        for among, first in AMONG.items():
            row = pick_row(redraws, score, first, **chance)
            if control is not None:
                row |= over(redraws.best(score, first), control.best(score, first), **chance)
            rows.append({"score": score, "among": among, **row})
    return rows


def _judged(run: Run, images: Tensor, draws: Tensor, labels: Tensor) -> Redraws:
    """What the run's classifier says of images and alternatives, and another one's doubts.

    Args:
        run: gives the data and the classifiers.
        images: uint8 ``(N, C, H, W)``.
        draws: uint8 ``(N, n, C, H, W)``.
        labels: ``(N,)``.
    """
    from bayesdiff.metrics.features import extract

    size, shape = run.cfg.metrics.batch_size, (len(images), 1 + draws.shape[1])
    stacked = torch.cat([images[:, None], draws], 1)
    flat, asked = stacked.flatten(0, 1), labels.repeat_interleave(shape[1])
    extractor, reference = judge(run)
    read = extract(extractor, flat, size)
    quality, right = probability(read.logits, asked)
    scorer, _ = judge(run, run.cfg.metrics.seed + 1)
    logits, seen = extract(scorer, flat, size).logits, flat.float() / 127.5 - 1
    doubts = doubts_of_images(seen, logits, asked)
    return Redraws(
        quality=quality.view(shape),
        right=right.view(shape),
        features=read.features.view(*shape, -1),
        pixels=seen.view(*shape, -1),
        judged=pool(read.features, reference),
        doubts={name: value.view(shape) for name, value in doubts.items()},
    )


def _conditions(wanted: Repair, samples: Samples, drawn: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "num_images": wanted.num_images,
        "draws": wanted.draws,
        "region": wanted.region if wanted.box is None else list(wanted.box),
        "region_share": float(drawn["region"].double().mean()),
        "score": wanted.score,
        "estimator": samples.estimator,
        "seed": wanted.seed,
    }


def _report(
    folder: Path, wanted: Repair, results: Mapping[str, Any], drawn: Mapping[str, Tensor]
) -> None:
    """Tables, figures and TensorBoard."""
    picks = [row for row in results["picks"] if row["score"] == wanted.score]
    original = results["original"]
    title = f"The images themselves, {original['wrong']} of {wanted.num_images} judged wrong"
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
    made = pictures.every(results, drawn, wanted.ways, wanted.score)
    board.write_study(folder / "tensorboard", scalars, {}, made)
