"""The rule mean + k sd against slow loops, and the sampler's noise as a score."""

import statistics

import pytest
import torch

from bayesdiff.checks import UserError
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.subsets import Pool
from bayesdiff.studies.filtering.choice import OTHERS
from bayesdiff.studies.filtering.rules import RULE_NAMES, factor_of, kept_by_rule, rule_gains


def pool_of(count=60, dims=3, groups=None):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, dims, generator=generator, dtype=torch.float64)
    none = torch.zeros(dims, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    inside = features[:, 0] > 0
    return Pool(features, inside, none, torch.eye(dims).double(), groups, order)


def scores(count=60, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64) ** 3


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0])
def test_what_is_kept_equals_a_slow_loop(k):
    values = scores().tolist()
    limit = statistics.mean(values) + k * statistics.stdev(values)
    keep = kept_by_rule(scores(), k)
    assert keep.tolist() == [value <= limit for value in values]
    assert not keep.all()
    groups = torch.arange(60) % 3
    scaled = scores() * torch.tensor([1.0, 10.0, 100.0]).double()[groups]
    within = kept_by_rule(scaled, k, groups)
    for group in range(3):
        own = [v for v, g in zip(scaled.tolist(), groups.tolist(), strict=True) if g == group]
        limit = statistics.mean(own) + k * statistics.stdev(own)
        assert within[groups == group].tolist() == [value <= limit for value in own]


def test_equal_scores_are_all_kept_and_infinite_ones_never():
    assert kept_by_rule(torch.full((7,), 0.1), 0.0).all()
    assert kept_by_rule(torch.tensor([0.1, torch.inf, 0.1]), 1.0).tolist() == [True, False, True]
    assert kept_by_rule(torch.full((3,), torch.inf), 1.0).all()


def test_the_gain_is_over_random_choices_of_that_size():
    images = pool_of()
    score = scores()
    rows = rule_gains({"one": score}, images, ["mean+1sd"], seed=3, subsets=400)
    (row,) = rows
    keep = kept_by_rule(score, 1.0)[images.order]  # the scores come in the order of the list
    assert row["kept"] == int(keep.sum()) and row["keep"] == pytest.approx(row["kept"] / 60)
    own = images.features[keep]

    def fid(features):
        roots = torch.linalg.eigvalsh(features.T.cov()).sqrt().sum()
        size = features.mean(0).square().sum()
        return float(size + features.T.cov().trace() + 3 - 2 * roots)

    assert row["fid"] == pytest.approx(fid(own))
    generator = torch.Generator().manual_seed(9)
    chance = [
        fid(images.features[torch.randperm(60, generator=generator)[: row["kept"]]])
        for _ in range(400)
    ]
    spread = statistics.stdev(chance) / 400**0.5
    assert abs(row["fid_random"] - statistics.mean(chance)) < 6 * spread
    assert row["fid_gain"] == pytest.approx(row["fid_random"] - row["fid"])
    assert row["z"] == pytest.approx(row["fid_gain"] / row["fid_random_sd"])


def test_random_choices_have_as_many_of_every_class(monkeypatch):
    groups = torch.arange(60) % 2
    images = pool_of(groups=groups)
    seen = []
    watched = type(
        "W", (Pool,), {"figures": lambda self, s: seen.append(s) or Pool.figures(self, s)}
    )
    images = watched(**{f: getattr(images, f) for f in Pool.__dataclass_fields__})
    rows = rule_gains({"one": scores()}, images, ["mean+sd"], seed=0, subsets=5)
    assert [row["mode"] for row in rows] == ["global", "per_class"]
    assert rows[0]["kept"] != rows[1]["kept"]  # so that selections are known by their size
    (own,) = [s for s in seen if s.shape == (1, rows[1]["kept"])]
    (chance,) = [s for s in seen if s.shape == (5, rows[1]["kept"])]
    for choice in chance:
        assert len(choice.unique()) == len(choice)
        assert groups[choice].bincount().tolist() == groups[own[0]].bincount().tolist()


@pytest.mark.parametrize(
    "rule", ["mean", "mean-1sd", "median+1sd", "mean+sd2", 1, None, "mean+.sd"]
)
def test_other_rules_are_refused_in_one_line(rule):
    with pytest.raises(UserError, match=r"filtering.rules .*mean\+1sd"):
        factor_of(rule)


def test_rules_are_read():
    assert [factor_of(r) for r in ("mean+sd", "mean+1sd", "mean + 2.5 sd", "mean+.5sd")] == [
        *(1.0, 1.0, 2.5, 0.5)
    ]


def test_the_choice_is_never_the_samplers_noise():
    assert "sampler_noise" in OTHERS


def test_a_rule_that_discards_nothing_has_no_z_and_gains_nothing():
    """Every random choice is all images: what is left of their spread is rounding."""
    images = pool_of()
    (row,) = rule_gains({"one": scores()}, images, ["mean+100sd"], seed=3)
    assert row["kept"] == 60 and row["fid"] == pytest.approx(float(images.figures(
        torch.arange(60)[None])["fid"]))  # fmt: skip
    assert row["fid_gain"] == row["precision_gain"] == 0
    assert row["z"] is None and row["precision_z"] is None
    # Over seeds it does not count, nor does a rule that keeps too few.
    (few,) = rule_gains({"one": scores()}, images, ["mean+1sd"], seed=3)
    for one in (row, row | dict.fromkeys(("fid", "fid_gain", "z"))):
        (over,) = over_seeds([[few], [one]], RULE_NAMES[:2], ["fid", "z"])
        assert over["z"] == few["z"]
    spike = torch.cat([torch.full((59,), torch.inf, dtype=torch.float64), torch.zeros(1).double()])
    (alone,) = rule_gains({"one": spike}, images, ["mean+1sd"], seed=3)
    assert alone["kept"] == 1 and alone["fid"] is None and alone["z"] is None
