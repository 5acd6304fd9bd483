"""Numbers of the study, each with its interval over images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.machine.shared_rows import Rows
from bayesdiff.metrics.agreement import bootstrap_interval, mean
from bayesdiff.metrics.selection import auroc

SCORES = ("belief", "entropy", "epistemic")
# Of the trained head, and of the average over its posterior.
PREDICTIONS = ("trained", "averaged")
CALIBRATION = ("ece", "brier", "nll")
_CUTS = 256  # levels of a score in the intervals of an AUROC over pixels
Number = dict[str, float]


@dataclass(frozen=True)
class Intervals:
    """Bootstrap over images.

    Attributes:
        resamples: their number.
        seed: of these.
    """

    resamples: int
    seed: int

    def of(
        self, name: str, statistic: Callable[..., Tensor], *values: Tensor, at: Any = None
    ) -> Number:
        """``name`` with ``_low`` and ``_high``; ``at`` is the figure, where it is known better."""
        own = float(statistic(*values)) if at is None else float(at)
        low, high = bootstrap_interval(
            statistic, *values, seed=self.seed, resamples=self.resamples
        )
        return {name: own, f"{name}_low": low, f"{name}_high": high}


def over_bins(held: Rows, other: Rows | None, draw: Intervals) -> list[dict[str, float]]:
    """A row for each interval of t.

    Args:
        held: of held-out images, see ``held_out.Teacher.in_bins``.
        other: of shifted ones, or None.
        draw: of the intervals.

    Returns:
        ``t_low``, ``t_high``; means in nats ``belief``, ``entropy``, ``total``, ``aleatoric``,
        ``epistemic``; by prediction ``<prediction>.ece``, ``.brier``, ``.nll``; and
        ``<score>.auroc_wrong_pixels``, ``<score>.auroc_shift``.
    """
    count = held["belief"].shape[1]
    held = {**held, "total": held["aleatoric"] + held["epistemic"]}
    rows = []
    for k in range(count):
        row: dict[str, float] = {"t_low": k / count, "t_high": (k + 1) / count}
        for name in ("belief", "entropy", "total", "aleatoric", "epistemic"):
            row |= draw.of(name, mean, held[name][:, k])
        for place, name in enumerate(PREDICTIONS):
            row |= draw.of(f"{name}.ece", *_ece(held["confidence"][:, k, place]))
            for figure in ("brier", "nll"):
                row |= draw.of(f"{name}.{figure}", mean, held[figure][:, k, place])
        for score in SCORES:
            row |= draw.of(
                f"{score}.auroc_wrong_pixels",
                *_pixels(held[f"pixels.{score}"][:, k], held["pixels.wrong"][:, k]),
                at=auroc(
                    held[f"pixels.{score}"][:, k].flatten(), held["pixels.wrong"][:, k].flatten()
                ),
            )
            if other is not None:
                row |= draw.of(
                    f"{score}.auroc_shift", shift_auroc, held[score][:, k], other[score][:, k]
                )
        rows.append(row)
    return rows


def figures(
    held: Rows, other: Rows | None, bins: Sequence[Mapping[str, float]], draw: Intervals
) -> dict[str, float]:
    """One number each over all intervals of t.

    Args:
        held: of held-out images.
        other: of shifted ones, or None.
        bins: of both, see ``over_bins``.
        draw: of the intervals.

    Returns:
        ``<score>.auroc_wrong_pixels``: mean over the intervals that have wrong pixels, so that
        what is ranked is pixels of like times; ``<score>.auroc_shift``: of images by their mean
        score over all times; ``<prediction>.ece``, ``.brier``, ``.nll``: means over all times.
    """
    found: dict[str, float] = {}
    for score in SCORES:
        name = f"{score}.auroc_wrong_pixels"
        known = [row[name] for row in bins if math.isfinite(row[name])]
        parts = [
            _pixels(scores, wrong)[0]
            for scores, wrong in zip(
                held[f"pixels.{score}"].unbind(1), held["pixels.wrong"].unbind(1), strict=True
            )
        ]
        found |= draw.of(
            name, _mean_of(parts), torch.arange(len(held["belief"])),
            at=sum(known) / len(known) if known else math.nan,
        )  # fmt: skip
        if other is not None:
            found |= draw.of(
                f"{score}.auroc_shift", shift_auroc, held[score].mean(1), other[score].mean(1)
            )
    for place, name in enumerate(PREDICTIONS):
        found |= draw.of(f"{name}.ece", *_ece(held["confidence"][:, :, place].sum(1)))
        for figure in ("brier", "nll"):
            found |= draw.of(f"{name}.{figure}", mean, held[figure][:, :, place].mean(1))
    return found


def over_time(
    sampled: Rows, held: Rows, times: Sequence[float], draw: Intervals
) -> list[dict[str, float]]:
    """Mean entropies along the sampler beside those of held-out images at the same times.

    Returns:
        For each time ``t``: ``sampler.<score>``, ``held_out.<score>`` and their ``difference``,
        for belief and output, in nats per value; ``sampler.epistemic``.
    """
    rows = []
    for place, time in enumerate(times):
        row: dict[str, float] = {"t": time}
        for name in ("belief", "entropy"):
            one, two = sampled[name][:, place], held[name][:, place]
            row |= draw.of(f"sampler.{name}", mean, one) | draw.of(f"held_out.{name}", mean, two)
            row |= draw.of(f"difference.{name}", _difference, one, two)
        row |= draw.of("sampler.epistemic", mean, sampled["epistemic"][:, place])
        rows.append(row)
    return rows


def of_samples(sampled: Rows) -> dict[str, float]:
    """Means of the samples' maps: nats per value, and t of those values that commit."""
    commit = sampled["commit"]
    decided = commit.isfinite()
    return {
        "samples.accumulated": float(sampled["accumulated"].mean()),
        "samples.weighted": float(sampled["weighted"].mean()),
        "samples.epistemic": float(sampled["accumulated_epistemic"].mean()),
        "samples.commit": float(commit[decided].mean()),
        "samples.undecided": 1 - float(decided.double().mean()),
    }


def reliability(confidence: Tensor) -> list[dict[str, float]]:
    """Mean confidence and the share that is right, by level of confidence.

    Args:
        confidence: ``(..., LEVELS, 3)`` sums, see ``held_out.calibration``.
    """
    count, sums, right = confidence.double().flatten(0, -3).sum(0).unbind(-1)
    return [
        {"values": n, "confidence": p / n, "right": r / n}
        for n, p, r in zip(count.tolist(), sums.tolist(), right.tolist(), strict=True)
        if n
    ]


def shift_auroc(held: Tensor, other: Tensor) -> Tensor:
    """Probability that a shifted image scores higher, ``(..., N), (..., N) -> (...)``."""
    marks = torch.cat([torch.zeros_like(held), torch.ones_like(other)], -1)
    return auroc(torch.cat([held, other], -1), marks)


def _difference(one: Tensor, two: Tensor) -> Tensor:
    return one.mean(-1) - two.mean(-1)


def _ece(confidence: Tensor) -> tuple[Callable[..., Tensor], Tensor]:
    """Expected calibration error of resampled images, and their numbers."""
    sums = confidence.double()

    def statistic(index: Tensor) -> Tensor:
        count, total, right = _summed(index, sums.flatten(1)).unflatten(-1, (-1, 3)).unbind(-1)
        return (total - right).abs().sum(-1) / count.sum(-1)

    return statistic, torch.arange(len(sums))


def _pixels(score: Tensor, wrong: Tensor) -> tuple[Callable[..., Tensor], Tensor]:
    """AUROC for wrong pixels of resampled images, and their numbers.

    Scores go to levels first, equal ones half: a sum of histograms in place of a sort each time.

    Args:
        score: ``(N, P)``.
        wrong: the same.
    """
    ordered = score.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, _CUTS + 1).long()[1:-1]
    level = torch.bucketize(score.contiguous(), ordered[places].unique())
    zeros = torch.zeros(len(score), _CUTS, dtype=torch.float64)
    marked, other = (zeros.scatter_add(1, level, w.double()) for w in (wrong, ~wrong))

    def statistic(index: Tensor) -> Tensor:
        found, rest = _summed(index, marked), _summed(index, other)
        below = rest.cumsum(-1) - rest / 2
        return (found * below).sum(-1) / (found.sum(-1) * rest.sum(-1))

    return statistic, torch.arange(len(score))


def _mean_of(parts: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    def statistic(index: Tensor) -> Tensor:
        return torch.stack([part(index) for part in parts]).nanmean(0)

    return statistic


def _summed(index: Tensor, values: Tensor) -> Tensor:
    """Sums over chosen images, ``(..., N)`` of values ``(N, M)``: ``(..., M)``."""
    weights = torch.zeros(*index.shape[:-1], len(values), dtype=values.dtype)
    return weights.scatter_add(-1, index, torch.ones_like(index, dtype=values.dtype)) @ values
