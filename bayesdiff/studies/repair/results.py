"""What images drawn anew come to: judged by one classifier, the best chosen by every score."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.metrics.subsets import pool
from bayesdiff.runs.build import Run
from bayesdiff.runs.stages import judge
from bayesdiff.studies.repair.judged import (
    Redraws,
    Row,
    draws_row,
    images_row,
    over,
    pick_row,
    probability,
)
from bayesdiff.studies.repair.redraw import AMONG, FRESH, OF_MAPS, Repair
from bayesdiff.studies.scoring import doubts_of_images
from bayesdiff.uncertainty import Samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """Alternatives of one way from one time.

    Attributes:
        time: where the images were left; 0 for fresh samples.
        way: by which they were drawn.
        draws: uint8 ``(N, n, C, H, W)``.
        power: of every image, summed V_c, ``(N,)``; NaN for fresh samples.
        nfe: network evaluations per alternative.
        scores: of the maps, ``(N, 1 + n, K)``, None without.
    """

    time: float
    way: str
    draws: Tensor
    power: Tensor
    nfe: int
    scores: Tensor | None


def cells_of(
    wanted: Repair, samples: Samples, drawn: Mapping[str, Tensor], nfe: int
) -> Iterator[list[Cell]]:
    """Cells, those of one time together; ``nfe`` is that of a whole trajectory.

    Yields:
        Cells by all ways.
    """
    if FRESH in wanted.ways:
        power = torch.full((wanted.count,), torch.nan)
        yield [Cell(0.0, FRESH, drawn["fresh"], power, nfe, drawn.get("fresh_scores"))]
    times = [] if samples.requested_times is None else samples.requested_times.tolist()
    for number, time in enumerate(times):
        before, after = drawn["evaluations"][0, number].tolist()
        scores = drawn["scores"][:, number].unbind(1) if "scores" in drawn else None
        yield [
            Cell(
                round(time, 6),
                way,
                drawn["draws"][:, number, place],
                drawn["power"][:, number],
                after + before * (way == "coherent"),
                None if scores is None else scores[place],
            )
            for place, way in enumerate(wanted.rewinding)
        ]


def results_of(
    run: Run, wanted: Repair, samples: Samples, drawn: Mapping[str, Tensor], nfe: int
) -> dict[str, Any]:
    """Numbers of the images, of the alternatives and of the best ones, by time and way."""
    images, labels = drawn["images"], samples.labels
    assert labels is not None  # checked before any work
    rows: list[Row] = []
    picks: list[Row] = []
    first: Redraws | None = None
    for cells in cells_of(wanted, samples, drawn, nfe):
        judged = {cell.way: _judged(run, images, cell, labels) for cell in cells}
        for cell in cells:
            log.info("repair: from %.3g, %s", cell.time, cell.way)
            redraws = judged[cell.way]
            first = first or redraws
            name = {"time": cell.time, "way": cell.way}
            more = _rows(wanted, redraws, judged.get("isotropic"), cell.power)
            rows.append(name | {"nfe": cell.nfe} | more[0])
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
    for score in redraws.doubts:
        for among, first in AMONG.items():
            row = pick_row(redraws, score, first, **chance)
            if control is not None:
                row |= over(redraws.best(score, first), control.best(score, first), **chance)
            rows.append({"score": score, "among": among, **row})
    return rows


def _judged(run: Run, images: Tensor, cell: Cell, labels: Tensor) -> Redraws:
    """What the run's classifier says of images and alternatives, and another one's doubts.

    Args:
        run: gives the data and the classifiers.
        images: uint8 ``(N, C, H, W)``.
        cell: alternatives.
        labels: ``(N,)``.
    """
    from bayesdiff.metrics.features import extract

    size, shape = run.cfg.metrics.batch_size, (len(images), 1 + cell.draws.shape[1])
    stacked = torch.cat([images[:, None], cell.draws], 1)
    flat, asked = stacked.flatten(0, 1), labels.repeat_interleave(shape[1])
    extractor, reference = judge(run)
    read = extract(extractor, flat, size)
    quality, right = probability(read.logits, asked)
    scorer, _ = judge(run, run.cfg.metrics.seed + 1)
    logits, seen = extract(scorer, flat, size).logits, flat.float() / 127.5 - 1
    doubts = {k: v.view(shape) for k, v in doubts_of_images(seen, logits, asked).items()}
    if cell.scores is not None:
        doubts |= dict(zip(OF_MAPS, cell.scores.unbind(-1), strict=True))
    return Redraws(
        quality=quality.view(shape),
        right=right.view(shape),
        features=read.features.view(*shape, -1),
        pixels=seen.view(*shape, -1),
        judged=pool(read.features, reference),
        doubts=doubts,
    )


def _conditions(wanted: Repair, samples: Samples, drawn: Mapping[str, Tensor]) -> dict[str, Any]:
    region: Any = wanted.region
    if isinstance(region, Mapping):
        region = {str(number): list(box) for number, box in region.items()}
    share = float(drawn["region"].double().mean()) if "region" in drawn else 1.0
    return {
        "num_images": wanted.count,
        "images": wanted.numbers,
        "draws": wanted.draws,
        "region": list(region) if isinstance(region, tuple) else region,
        "region_share": share,
        "score": wanted.score,
        "estimator": samples.estimator,
        "seed": wanted.seed,
    }
