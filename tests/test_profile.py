"""What a score follows: errors, busy images, or classes."""

import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from bayesdiff.studies.filtering.profile import PROFILE, profile


def case(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 3, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    variation = torch.rand(count, generator=generator).double()
    return logits, labels, variation, torch.rand(count, generator=generator).round(decimals=1)


def rows_of(table, logits, labels, variation):
    return {row["score"]: row for row in profile(table, logits, labels, variation)}


def test_every_figure_equals_a_slow_one():
    logits, labels, variation, score = case()
    row = rows_of({"a": score, "b": -score}, logits, labels, variation)["a"]
    wrong = (logits.argmax(1) != labels).numpy()
    assert row["auroc"] == pytest.approx(roc_auc_score(wrong, score))
    within = torch.zeros(len(score), dtype=torch.float64)
    ranks = torch.from_numpy(rankdata(score))
    between = 0.0
    for label in range(3):
        own = labels == label
        within[own] = torch.from_numpy(rankdata(score[own]) - 0.5) / int(own.sum())
        between += int(own.sum()) * float(ranks[own].mean() - ranks.mean()) ** 2
    assert row["auroc_within"] == pytest.approx(roc_auc_score(wrong, within))
    off = 1 - logits.double().softmax(1)[range(len(labels)), labels]
    assert row["rank_off_label"] == pytest.approx(spearmanr(score, off).statistic)
    assert row["rank_total_variation"] == pytest.approx(spearmanr(score, variation).statistic)
    share = between / float((ranks - ranks.mean()).square().sum())
    assert row["class_share"] == pytest.approx(share)


def test_a_score_that_names_the_class_finds_nothing_within_it():
    logits, labels, variation, _ = case()
    row = rows_of({"class": labels.double()}, logits, labels, variation)["class"]
    assert row["class_share"] == pytest.approx(1)
    assert row["auroc_within"] == pytest.approx(0.5, abs=0.02)  # classes differ in size


def test_certain_classifiers_keep_their_order():
    labels = torch.zeros(4, dtype=torch.long)
    logits = torch.tensor([[60.0, 0], [80.0, 0], [100.0, 0], [-5.0, 0]])
    table = {"a": torch.tensor([3.0, 2.0, 1.0, 4.0])}
    row = rows_of(table, logits, labels, torch.arange(4.0))["a"]
    assert row["rank_off_label"] == pytest.approx(1)
    assert row["auroc"] == 1


def test_there_is_nothing_to_find_where_all_is_right():
    labels = torch.zeros(4, dtype=torch.long)
    table = {"a": torch.arange(4.0)}
    row = rows_of(table, torch.eye(2)[labels], labels, torch.arange(4.0))["a"]
    assert set(row) == {"score", *PROFILE}
    assert math.isnan(row["auroc"]) and math.isnan(row["auroc_within"])
