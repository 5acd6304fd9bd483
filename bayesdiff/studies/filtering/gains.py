"""What a selection by a score gains over random selections of the same size, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.metrics.seeds import t_quantile
from bayesdiff.metrics.selection import (
    checked_fraction,
    checked_score,
    lowest_scores,
    random_kept,
)
from bayesdiff.metrics.subsets import Pool

Row = dict[str, Any]
Figures = dict[str, Tensor]

# By what a row is found again in the table of another seed.
NAMES = ("score", "mode", "keep", "kept")
# Scores of images that a pool may have; lower is better in these.
SCORES = ("fid", "precision", "is", "kid", "recall", "density", "coverage", "cmmd")
_LOW = ("fid", "kid", "cmmd")
# What differs between the seeds: each score, what is gained in it, and that over chance.
VALUES = tuple(
    each
    for name in SCORES
    for each in (name, f"{name}_gain", "z" if name == "fid" else f"{name}_z")
)


def gains(
    scores: Mapping[str, Tensor],
    images: Pool,
    fractions: Sequence[float],
    *,
    seed: int,
    subsets: int = 10,
    resamples: int = 0,
    level: float = 0.95,
) -> list[Row]:
    """Figures of the images that each score keeps, against random choices of the same size.

    Args:
        scores: scores by name, each (N,) in the order of the list behind the pool, see
            ``selection.kept``.
        images: the pool.
        fractions: shares that are kept.
        seed: fixes the random choices and the resampled images.
        subsets: random choices, at least 2; the same for all scores.
        resamples: bootstrap samples for the intervals over images; 0 leaves these out.
        level: of all intervals.

    Returns:
        One row for each mode (``global`` and, where the pool has groups, ``per_class``), fraction
        and score: ``score``, ``mode``, ``keep``, ``kept`` (number of images); ``fid``,
        ``fid_random`` and ``fid_random_sd`` over the random choices, ``fid_gain`` =
        ``fid_random - fid``, ``z`` = ``fid_gain / fid_random_sd`` and ``fid_chance``: the gain of
        one more random choice lies within plus and minus this (Student's t). The same for
        precision, ``precision_gain`` = ``precision - precision_random``: a positive gain is
        always the better. Of a pool with more scores, each has its value, ``_gain`` (positive is
        better) and ``_z``. With resamples also ``fid_gain_low`` to ``fid_gain_high``, the interval
        of the gain over images (its bootstrap spread, Student's t), and that of the other gains.

    Raises:
        UserError: if a fraction discards no image, or a score lacks one.
    """
    at_least("subsets", subsets, 2)
    if resamples:
        at_least("draws", resamples, 2)
    stacked = torch.stack([pool_score(name, each, images) for name, each in scores.items()])
    modes = {"global": None, "per_class": images.groups}
    rows: list[Row] = []
    for mode, groups in modes.items():
        if mode == "per_class" and groups is None:
            continue
        for fraction in fractions:
            chosen = lowest_scores(stacked, checked_fraction(fraction), groups)
            if chosen.shape[1] == len(images):
                raise UserError(
                    f"keep fraction {fraction} discards none of {len(images)} images; lower it"
                )
            chance = random_kept(len(images), fraction, seed, groups, subsets=subsets)
            own, rivals = images.figures(chosen), images.figures(chance)
            found = against(own, rivals, level)
            if resamples:
                samples = _bootstrap(
                    stacked, images, groups, fraction, seed + 1, subsets, resamples
                )
                found |= _intervals(found, samples, level)
            name = {"mode": mode, "keep": fraction, "kept": chosen.shape[1]}
            for place, score in enumerate(scores):
                values = {key: float(value[place]) for key, value in found.items()}
                rows.append({"score": score, **name, **values})
    return rows


def spread_of_one(sd: float | Tensor, count: int, level: float) -> Any:
    """Half the interval around the mean of ``count`` normal numbers where one more lies.

    Args:
        sd: standard deviation of the numbers.
        count: how many, at least 2.
        level: probability of the interval.
    """
    return sd * (1 + 1 / count) ** 0.5 * t_quantile(count, level)


def against(own: Figures, rivals: Figures, level: float) -> Figures:
    """Columns of K scores, each (K,), from their figures (K,) and those of random choices (S,)."""
    gained = _gain(own, rivals)
    found: Figures = {}
    for name, values in own.items():
        sd, mean = rivals[name].std(), rivals[name].mean()
        found |= {name: values, f"{name}_gain": gained[name]}
        found["z" if name == "fid" else f"{name}_z"] = gained[name] / sd
        if name in ("fid", "precision"):
            columns = {
                f"{name}_random": mean,
                f"{name}_random_sd": sd,
                f"{name}_chance": spread_of_one(sd, len(rivals[name]), level),
            }
            found |= {key: value.expand_as(values) for key, value in columns.items()}
    return found


def _gain(own: Figures, rivals: Figures) -> Figures:
    """Gains of K selections over the mean of the random ones, positive if better, each (K,)."""
    return {
        name: (values - rivals[name].mean()) * (-1 if name in _LOW else 1)
        for name, values in own.items()
    }


def _bootstrap(
    scores: Tensor,
    images: Pool,
    groups: Tensor | None,
    fraction: float,
    seed: int,
    subsets: int,
    resamples: int,
) -> Figures:
    """Gains on resampled images, each (R, K), for scores (K, N).

    Images are drawn with replacement, within their classes where the selection is. All scores and
    the random choices select from the same ones, so what these have in common cancels. There are
    as many random choices as behind the gain itself; a single one would add its own spread.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    for _ in range(resamples):
        index = _resampled(len(images), groups, generator)
        lots = torch.rand(subsets, len(images), generator=generator, dtype=torch.float64)
        rivals = images.figures(index[lowest_scores(lots, fraction, groups)])
        own = images.figures(index[lowest_scores(scores[:, index], fraction, groups)])
        for name, gain in _gain(own, rivals).items():
            found.setdefault(name, []).append(gain)
    return {name: torch.stack(parts) for name, parts in found.items()}


def _resampled(count: int, groups: Tensor | None, generator: torch.Generator) -> Tensor:
    """Images drawn with replacement; the class of every place stays."""
    if groups is None:
        return torch.randint(count, (count,), generator=generator)
    index = torch.empty(count, dtype=torch.long)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        index[members] = members[torch.randint(len(members), members.shape, generator=generator)]
    return index


def _intervals(found: Figures, samples: Figures, level: float) -> Figures:
    """Ends of the interval of each gain, (K,), from resamples (R, K).

    Only the spread of the samples is used, their centre is wrong: images drawn twice raise the
    FID, and those that a score keeps are few already, so they pay twice and random choices once.
    Where the FID is mostly that of few images, the spread is too wide, up to 1.4 times.
    """
    columns: Figures = {}
    for name, values in samples.items():
        gain, half = found[f"{name}_gain"], t_quantile(len(values), level) * values.std(0)
        columns |= {f"{name}_gain_low": gain - half, f"{name}_gain_high": gain + half}
    return columns


def pool_score(name: str, score: Tensor, images: Pool) -> Tensor:
    """One score ``(N,)`` of a pool, float64, in the pool's own order.

    Raises:
        UserError: if it lacks an image.
    """
    score = checked_score(score, f"score {name!r}")
    if len(score) != len(images):
        raise UserError(
            f"score {name!r} has {len(score)} numbers for {len(images)} images; "
            "score every image of the pool"
        )
    return score.double()[images.order]
