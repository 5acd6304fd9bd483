"""What images resampled come to: judged by one classifier, the best chosen by every score."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.metrics.subsets import pool
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import judge
from bayesdiff.studies.repair.judged import (
    Redraws,
    Row,
    alternatives_row,
    images_row,
    over,
    pick_row,
    probability,
)
from bayesdiff.studies.repair.redraw import AMONG, FRESH, RedrawOptions
from bayesdiff.studies.scoring import scores_of_images
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
        nfe: network evaluations per alternative, with its map where it has one.
        scores: of the maps, ``(N, 1 + n, K)``, None without.
    """

    time: float
    way: str
    draws: Tensor
    power: Tensor
    nfe: int
    scores: Tensor | None


def cells_of(
    options: RedrawOptions, samples: Samples, drawn: Mapping[str, Tensor]
) -> Iterator[list[Cell]]:
    """Cells, those of one time together.

    Yields:
        Cells by all ways.
    """
    if FRESH in options.ways:
        power, nfe = torch.full((options.count,), torch.nan), int(drawn["fresh_evaluations"][0])
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
            for place, way in enumerate(options.rewinding)
        ]


def results_of(
    run: Run, options: RedrawOptions, samples: Samples, drawn: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Numbers of the images, of the alternatives and of the best ones, by time and way."""
    labels = samples.labels
    assert labels is not None  # checked before any work
    judges = Judges(run, options, drawn["images"], labels)
    rows: list[Row] = []
    picks: list[Row] = []
    first: Redraws | None = None
    for cells in cells_of(options, samples, drawn):
        judged = {cell.way: judges(cell) for cell in cells}
        for cell in cells:
            log.info("repair: from %.3g, %s", cell.time, cell.way)
            redraws = judged[cell.way]
            first = first or redraws
            name = {"time": cell.time, "way": cell.way}
            more = _rows(options, redraws, judged.get("isotropic"), cell.power)
            rows.append(name | {"nfe": cell.nfe} | more[0])
            picks += [name | row for row in more[1:]]
    assert first is not None  # a Repair has a time and a way
    return {
        "conditions": _conditions(options, samples, drawn),
        "original": images_row(first),
        "draws": rows,
        "picks": picks,
    }


def _rows(
    options: RedrawOptions, redraws: Redraws, control: Redraws | None, power: Tensor
) -> list[Row]:
    """The row of the alternatives, then one for every score and candidates to choose from."""
    chance = {"seed": options.seed, "resamples": options.bootstrap}
    control = None if control is redraws else control
    row = alternatives_row(redraws, power, **chance)
    if control is not None:
        own, other = (each.quality[:, 1:].mean(1) for each in (redraws, control))
        row |= over(own, other, **chance)
    rows = [row]
    for score in redraws.scores:
        for among, first in AMONG.items():
            row = pick_row(redraws, score, first, **chance)
            if control is not None:
                row |= over(redraws.best(score, first), control.best(score, first), **chance)
            rows.append({"score": score, "among": among, **row})
    return rows


class Judges:
    """What the run's classifier says of images and alternatives, and scores by another one.

    Args:
        run: gives the data and the classifiers.
        options: gives the scores of the user's own.
        images: the images themselves, uint8 ``(N, C, H, W)``.
        labels: ``(N,)`` that were asked for.
    """

    def __init__(self, run: Run, options: RedrawOptions, images: Tensor, labels: Tensor) -> None:
        self.options, self.labels, self.size = options, labels, run.cfg.metrics.batch_size
        self.extractor, self.reference = judge(run)
        self.scorer, _ = judge(run, run.cfg.metrics.seed + 1)
        self.images = self._read(images[:, None])

    def __call__(self, cell: Cell) -> Redraws:
        """Images and alternatives, each image before its own."""
        drawn = self._read(cell.draws)
        read = {name: torch.cat([own, drawn[name]], 1) for name, own in self.images.items()}
        named = ("quality", "right", "features", "pixels")
        scores = {name: value for name, value in read.items() if name not in named}
        if cell.scores is not None:
            scores |= dict(zip(self.options.of_maps, cell.scores.unbind(-1), strict=True))
        judged = pool(read["features"].flatten(0, 1), self.reference)
        return Redraws(**{name: read[name] for name in named}, judged=judged, scores=scores)

    def _read(self, images: Tensor) -> dict[str, Tensor]:
        """Columns ``(N, n, ...)`` of images ``(N, n, C, H, W)``."""
        from bayesdiff.metrics.features import extract

        flat, asked = images.flatten(0, 1), self.labels.repeat_interleave(images.shape[1])
        read = extract(self.extractor, flat, self.size)
        quality, right = probability(read.logits, asked)
        scored, seen = extract(self.scorer, flat, self.size), flat.float() / 127.5 - 1
        found = {"quality": quality, "right": right, "features": read.features}
        found |= {"pixels": seen.flatten(1), **scores_of_images(seen, scored.logits, asked)}
        given = {"images": seen, "labels": asked}
        given |= {"features": scored.features, "logits": scored.logits}
        found |= {name: own(given) for name, own in self.options.own_of_images.items()}
        return {name: value.unflatten(0, images.shape[:2]) for name, value in found.items()}


def _conditions(
    options: RedrawOptions, samples: Samples, drawn: Mapping[str, Tensor]
) -> dict[str, Any]:
    region: Any = options.region
    if isinstance(region, Mapping):
        region = {str(number): list(box) for number, box in region.items()}
    share = float(drawn["region"].double().mean()) if "region" in drawn else 1.0
    return {
        "num_images": options.count,
        "images": options.numbers,
        "draws": options.draws,
        "region": list(region) if isinstance(region, tuple) else region,
        "region_share": share,
        "score": options.score,
        "estimator": samples.estimator,
        "seed": options.seed,
    }
