"""What a score follows: the images that are wrong, or merely the busy ones, or their class."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdiff.metrics.agreement import ranks, ranks_within, spearman
from bayesdiff.metrics.selection import auroc, checked_score

Row = dict[str, Any]

# Figures of every row.
PROFILE = ("auroc_within", "auroc", "rank_off_label", "rank_total_variation", "class_share")


def profile(
    scores: Mapping[str, Tensor],
    logits: Tensor,
    labels: Tensor,
    total_variation: Tensor,
) -> list[Row]:
    """What each score follows.

    Args:
        scores: scores by name, each ``(N,)``.
        logits: of the images by the classifier that judges, ``(N, K)``.
        labels: classes that the images were asked to show, ``(N,)``.
        total_variation: of the images, ``(N,)``.

    Returns:
        One row for each score: ``auroc``, how well it finds the images that the judge takes for
        another class, and ``auroc_within``, the same with scores replaced by their ranks in their
        class (NaN where none or all are wrong); ``rank_off_label`` and ``rank_total_variation``,
        Spearman correlations with the judge's 1 - p(class) and with the steps between neighbouring
        pixels; ``class_share``, the part of the ranks' variance that lies between the classes.
    """
    stacked = torch.stack([checked_score(each, name).double() for name, each in scores.items()])
    wrong = (logits.argmax(1) != labels).expand_as(stacked)
    # 1 - p loses what is close to 0; its logarithm's order is that of the odds.
    log_p = logits.double().log_softmax(1)
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    others = log_p.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    found = {
        "auroc": auroc(stacked, wrong),
        "auroc_within": auroc(ranks_within(stacked, labels), wrong),
        "rank_off_label": spearman(stacked, (others - own).expand_as(stacked)),
        "rank_total_variation": spearman(stacked, total_variation.expand_as(stacked)),
        "class_share": _class_share(stacked, labels),
    }
    columns = {name: values.tolist() for name, values in found.items()}
    return [
        {"score": name} | {key: values[place] for key, values in columns.items()}
        for place, name in enumerate(scores)
    ]


def _class_share(scores: Tensor, labels: Tensor) -> Tensor:
    """Variance between classes over the whole variance, of the ranks, ``(K, N) -> (K,)``."""
    place = ranks(scores)
    place = place - place.mean(1, keepdim=True)
    between = torch.zeros(len(scores), dtype=torch.float64)
    for label in labels.unique():
        own = labels == label
        between += place[:, own].mean(1).square() * own.sum()
    return between / place.square().sum(1)
