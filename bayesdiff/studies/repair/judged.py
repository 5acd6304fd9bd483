"""What drawing images anew does to their quality and their diversity, paired image by image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.metrics.agreement import Figures, mean, spearman, with_intervals
from bayesdiff.metrics.subsets import Pool

Row = dict[str, Any]


@dataclass(frozen=True)
class Redraws:
    """N images, each followed by n alternatives of it, as one classifier judges them.

    Attributes:
        quality: probability of the class asked for, float64 ``(N, 1 + n)``; column 0 is the image.
        right: whether that class is the likeliest, bool ``(N, 1 + n)``.
        features: ``(N, 1 + n, F)``.
        pixels: in [-1, 1], ``(N, 1 + n, D)``.
        judged: all of them, image after image.
        scores: scores ``(N, 1 + n)`` by name, the higher the more uncertain.
    """

    quality: Tensor
    right: Tensor
    features: Tensor
    pixels: Tensor
    judged: Pool
    scores: Mapping[str, Tensor]

    @property
    def inside(self) -> Tensor:
        """Whether each lies in the manifold of the real images, bool ``(N, 1 + n)``."""
        return self.judged.inside.view(self.right.shape)

    def picked(self, score: str, first: int) -> Tensor:
        """Column ``(N,)`` of the least uncertain of the columns from ``first`` on, ties the first.

        Args:
            score: its name.
            first: 0 lets the image itself be chosen, 1 does not.
        """
        return self.scores[score][:, first:].argmin(1) + first

    def best(self, score: str, first: int) -> Tensor:
        """Quality ``(N,)`` of the columns that are ``picked``."""
        return self.quality.gather(1, self.picked(score, first)[:, None]).squeeze(1)

    def fid(self, chosen: Tensor) -> float:
        """FID of one column of every image, ``(N,)``; NaN for too few images to have one."""
        rows, columns = self.right.shape
        if rows <= self.features.shape[-1]:
            return float("nan")
        places = torch.arange(rows) * columns + chosen
        return float(self.judged.figures(places[None])["fid"])


def probability(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the class asked for, float64, and whether it is the likeliest.

    Args:
        logits: ``(M, K)``.
        labels: ``(M,)``.
    """
    found = logits.double().softmax(1).gather(1, labels.view(-1, 1)).squeeze(1)
    return found, logits.argmax(1) == labels


def pair_distance(values: Tensor) -> Tensor:
    """Mean Euclidean distance over the pairs of an image's n vectors, ``(N, n, D) -> (N,)``.

    NaN for n = 1, which has no pairs.
    """
    values = values.double()
    apart = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    count = values.shape[1]
    return apart.sum((1, 2)) / (count * (count - 1) or torch.nan)


def distance_from(values: Tensor, origin: Tensor) -> Tensor:
    """Mean Euclidean distance of n vectors from another, ``(N, n, D), (N, D) -> (N,)``."""
    return (values.double() - origin.double()[:, None]).norm(dim=2).mean(1)


def rate(count: Tensor, among: Tensor) -> Tensor:
    """Sum over sum along the last axis; NaN where there is nothing to count among."""
    return count.sum(-1) / among.sum(-1)


def images_row(redraws: Redraws) -> Row:
    """Quality of the images themselves; ``wrong`` counts those taken for another class."""
    return {
        "quality": float(redraws.quality[:, 0].mean()),
        "right": float(redraws.right[:, 0].double().mean()),
        "wrong": int((~redraws.right[:, 0]).sum()),
        "precision": float(redraws.inside[:, 0].double().mean()),
        "fid": redraws.fid(torch.zeros(len(redraws.right), dtype=torch.long)),
    }


def alternatives_row(redraws: Redraws, power: Tensor, *, seed: int, resamples: int) -> Row:
    """Quality and diversity of the alternatives themselves, which is best-of-n by chance.

    Args:
        redraws: images and alternatives.
        power: of every image, summed V_c, ``(N,)``.
        seed: fixes the resampled images of the intervals.
        resamples: their number.

    Returns:
        Each with ``_low`` and ``_high``: ``quality``, ``gain`` (over the images), ``better`` (the
        share of alternatives of higher quality than their image, equal ones half), ``success``
        (of images judged wrong, the share of alternatives judged right), ``harm`` (of images
        judged right, the share judged wrong), ``precision``, ``precision_gain``,
        ``feature_distance`` and ``pixel_distance`` (between alternatives of one image, the latter
        as root mean square over the pixels), ``feature_shift`` and ``pixel_shift`` (from the
        image), ``power``, and over images the rank correlations with it of the gain,
        ``power_gain``, and of the feature distance, ``power_distance``. Then ``fid``, of the
        first alternative of each.
    """
    old, new = redraws.features[:, 0], redraws.features[:, 1:]
    scale = redraws.pixels.shape[-1] ** 0.5
    pixels, apart = redraws.pixels / scale, pair_distance(new)
    figures: Figures = _changes(redraws, redraws.quality[:, 1:], redraws.right[:, 1:])
    inside = redraws.inside.double()
    figures |= {
        "precision": (mean, (inside[:, 1:].mean(1),)),
        "precision_gain": (mean, (inside[:, 1:].mean(1) - inside[:, 0],)),
        "feature_distance": (mean, (apart,)),
        "pixel_distance": (mean, (pair_distance(pixels[:, 1:]),)),
        "feature_shift": (mean, (distance_from(new, old),)),
        "pixel_shift": (mean, (distance_from(pixels[:, 1:], pixels[:, 0]),)),
        "power": (mean, (power.double(),)),
        "power_gain": (spearman, (power, figures["gain"][1][0])),
        "power_distance": (spearman, (power, apart)),
    }
    found: Row = with_intervals(figures, seed=seed, resamples=resamples, level=0.95)
    return found | {"fid": redraws.fid(torch.ones(len(inside), dtype=torch.long))}


def pick_row(redraws: Redraws, score: str, first: int, *, seed: int, resamples: int) -> Row:
    """Quality of the least uncertain alternative of every image.

    Args:
        redraws: images and alternatives.
        score: by which is chosen.
        first: 0 lets the image itself be chosen, 1 does not.
        seed: fixes the resampled images of the intervals.
        resamples: their number.

    Returns:
        As ``alternatives_row`` has them: ``quality``, ``gain``, ``better``, ``success``, ``harm``,
        ``precision``, ``precision_gain``; further ``over_chance``, the gain over a choice by
        chance from the same candidates, each with its interval; then ``changed``, the share of
        images that are replaced, and ``fid``.
    """
    chosen = redraws.picked(score, first)
    column = chosen[:, None]
    quality, right = redraws.quality.gather(1, column), redraws.right.gather(1, column)
    figures = _changes(redraws, quality, right)
    inside = redraws.inside.double()
    own = inside.gather(1, column).squeeze(1)
    figures |= {
        "over_chance": (mean, (quality.squeeze(1) - redraws.quality[:, first:].mean(1),)),
        "precision": (mean, (own,)),
        "precision_gain": (mean, (own - inside[:, 0],)),
    }
    found: Row = with_intervals(figures, seed=seed, resamples=resamples, level=0.95)
    return found | {"changed": float((chosen > 0).double().mean()), "fid": redraws.fid(chosen)}


def beats(quality: Tensor, other: Tensor) -> Tensor:
    """1 where a quality is above another, 0.5 where they are equal, else 0; float64."""
    return (quality > other).double() + (quality == other).double() / 2


def _changes(redraws: Redraws, quality: Tensor, right: Tensor) -> Figures:
    """Before and after, for candidates ``(N, m)`` that stand for an image with equal shares."""
    before, after = redraws.right[:, 0].double(), right.double().mean(1)
    mean_quality = quality.mean(1)
    return {
        "quality": (mean, (mean_quality,)),
        "gain": (mean, (mean_quality - redraws.quality[:, 0],)),
        "better": (mean, (beats(quality, redraws.quality[:, :1]).mean(1),)),
        "right": (mean, (after,)),
        "success": (rate, ((1 - before) * after, 1 - before)),
        "harm": (rate, (before * (1 - after), before)),
    }


def over(one: Tensor, other: Tensor, *, seed: int, resamples: int) -> Row:
    """How much better one choice is than another, image by image, with its interval.

    Args:
        one: quality of every image, ``(N,)``.
        other: of the same images.
        seed: fixes the resampled images.
        resamples: their number.
    """
    figures: Figures = {"over_isotropic": (mean, (one - other,))}
    return with_intervals(figures, seed=seed, resamples=resamples, level=0.95)
