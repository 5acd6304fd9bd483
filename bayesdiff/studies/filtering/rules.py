"""Rules that discard by a threshold: every image whose score is more than mean + k sd."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.metrics.subsets import Pool
from bayesdiff.studies.filtering.gains import Row, against, pool_score

# By what a row is found again in the table of another seed.
RULE_NAMES = ("score", "mode", "rule")
_FIGURES = ("fid", "fid_gain", "z", "precision", "precision_gain", "precision_z")
_RULE = re.compile(r"mean\+(\d*\.?\d+)?sd")


def factor_of(rule: Any) -> float:
    """The number of sd in ``mean+1sd``; ``mean+sd`` is 1.

    Raises:
        UserError: for any other rule.
    """
    found = _RULE.fullmatch(rule.replace(" ", "")) if isinstance(rule, str) else None
    if not found:
        raise UserError(
            f"unknown filtering.rules {rule!r}; give mean+1sd, or another number of sd, 0 or more"
        )
    return float(found[1] or 1)


def kept_by_rule(score: Tensor, factor: float, groups: Tensor | None = None) -> Tensor:
    """Whether a score is at most mean + k sd, bool ``(N,)``.

    Args:
        score: ``(N,)``; an infinite one is discarded and not counted in mean and sd.
        factor: k.
        groups: classes ``(N,)``, each with its own mean and sd; None for one of all.
    """
    if groups is not None:
        keep = torch.zeros(len(score), dtype=torch.bool)
        for group in groups.unique():
            own = groups == group
            keep[own] = kept_by_rule(score[own], factor)
        return keep
    values = score.double()
    finite = values[values.isfinite()]
    if not len(finite):
        return torch.ones(len(score), dtype=torch.bool)  # nothing tells them apart
    # From the least one on, so that equal scores have exactly no spread.
    finite = finite - finite.min()
    spread = finite.std() if len(finite) > 1 else finite.new_zeros(())
    return values - values[values.isfinite()].min() <= finite.mean() + factor * spread


def rule_gains(
    scores: Mapping[str, Tensor],
    images: Pool,
    rules: Sequence[str],
    *,
    seed: int,
    subsets: int = 10,
    level: float = 0.95,
) -> list[Row]:
    """Figures of the images that each rule keeps by each score, against as many random ones.

    Args:
        scores: scores by name, each ``(N,)`` in the order of the list behind the pool.
        images: the pool.
        rules: such as ``mean+1sd``.
        seed: fixes the random choices.
        subsets: random choices for each rule and score, of as many images (of every class, where
            the rule is taken within classes) as the rule keeps.
        level: of the interval of chance.

    Returns:
        One row for each rule, mode and score, as ``gains`` has them, with ``rule``, and ``keep``,
        the share that was kept. A rule that discards none gains 0, with None for z; one that keeps
        fewer than two has None for all figures.
    """
    at_least("subsets", subsets, 2)
    images = replace(images, more=None)  # FID and precision alone
    rows: list[Row] = []
    for mode, groups in {"global": None, "per_class": images.groups}.items():
        if mode == "per_class" and groups is None:
            continue
        for rule in rules:
            for score, each in scores.items():
                values = pool_score(score, each, images)
                keep = kept_by_rule(values, factor_of(rule), groups)
                count = int(keep.sum())
                name = {"score": score, "mode": mode, "rule": rule}
                row = name | {"keep": count / len(keep), "kept": count}
                rows.append(row | _against_chance(images, keep, groups, seed, subsets, level))
    return rows


def _against_chance(
    images: Pool, keep: Tensor, groups: Tensor | None, seed: int, subsets: int, level: float
) -> Row:
    """Figures of the images that are kept, against random choices of as many."""
    count = int(keep.sum())
    if count < 2:
        return dict.fromkeys(_FIGURES)
    own = images.figures(keep.nonzero().flatten()[None])
    chance = images.figures(_as_many(keep, groups, seed, subsets))
    row: Row = {key: float(value[0]) for key, value in against(own, chance, level).items()}
    if count == len(keep):
        # Every choice is all images: what they differ by, and its sd, is rounding.
        row |= {"fid_gain": 0.0, "z": None, "precision_gain": 0.0, "precision_z": None}
    return row


def _as_many(keep: Tensor, groups: Tensor | None, seed: int, subsets: int) -> Tensor:
    """Random choices ``(S, n)`` of as many images as are kept, of as many of every class."""
    generator = torch.Generator().manual_seed(seed)
    lots = torch.rand(subsets, len(keep), generator=generator, dtype=torch.float64)
    all_one = torch.zeros(len(keep), dtype=torch.long)
    parts = []
    for group in (all_one if groups is None else groups).unique():
        members = ((all_one if groups is None else groups) == group).nonzero().flatten()
        order = lots[:, members].argsort(1)[:, : int(keep[members].sum())]
        parts.append(members[order])
    return torch.cat(parts, 1)
