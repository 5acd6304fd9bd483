"""The threshold that holds: exact tails, valid by simulation, whatever the scores are worth."""

import math
from fractions import Fraction

import pytest
import torch

from bayesdiff.checks import UserError
from bayesdiff.studies.filtering.guarantee import (
    fewest_images,
    guaranteed,
    interval,
    loosest,
    p_values,
    proposing,
    require_enough,
    risk,
    thresholds,
)


def tail(bad: int, kept: int, allowed: Fraction) -> Fraction:
    """P(Bin(kept, allowed) <= bad), exactly."""
    terms = (math.comb(kept, k) * allowed**k * (1 - allowed) ** (kept - k) for k in range(bad + 1))
    return sum(terms, Fraction(0))


def pool(count, generator, curve, levels=None):
    """Scores in [0, 1], rounded to so many levels, and whether each image is bad."""
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    if levels:
        scores = (scores * levels).floor() / levels
    bad = torch.rand(count, generator=generator, dtype=torch.float64) < curve(scores)
    return scores, bad


def test_tails_are_the_exact_sums():
    generator = torch.Generator().manual_seed(0)
    scores, bad = pool(70, generator, lambda s: 0.4 * s, levels=9)
    at = torch.tensor([-1.0, 0.0, 0.3, 0.5, torch.inf], dtype=torch.float64)
    found = p_values(scores, bad, at, 0.125).tolist()
    for threshold, p in zip(at.tolist(), found, strict=True):
        keep = [value <= threshold for value in scores.tolist()]
        wrong = sum(k and b for k, b in zip(keep, bad.tolist(), strict=True))
        assert p == pytest.approx(float(tail(wrong, sum(keep), Fraction(1, 8))), rel=1e-12)
    assert found[0] == 1.0  # nothing kept shows nothing


def test_by_hand():
    scores = torch.arange(10.0)
    bad = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 1, 1]).bool()
    at = torch.tensor([3.0, 7.0, 9.0]).double()
    # Were half of the images bad: 1/16, 9/256 and 176/1024.
    assert p_values(scores, bad, at, 0.5).tolist() == pytest.approx([1 / 16, 9 / 256, 176 / 1024])
    assert loosest(scores, bad, at, 0.5, 0.0625) == 7.0
    assert loosest(scores, bad, at, 0.5, 0.18) == 9.0
    # The second would pass; the walk does not get there.
    assert loosest(scores, bad, at, 0.5, 0.05) is None
    # 0.04 at the first, 0.02 in the middle, 0.02 at the end: lost, lost again, and too little.
    assert loosest(scores, bad, at, 0.5, 0.08, (0.5, 0.25, 0.25)) is None
    # 0.1, then 0.1 + 0.05, then 0.1 + 0.05 + 0.05: all that there is at the end.
    assert loosest(scores, bad, at, 0.5, 0.2, (0.5, 0.25, 0.25)) == 9.0
    # 0.05 lost at the first, 0.05 wins in the middle, 0.05 is too little at the end.
    assert loosest(scores, bad, at, 0.5, 0.1, (0.5, 0.5, 0.0)) == 7.0
    found = risk(scores, bad, 7.0)
    assert (found.images, found.kept, found.bad, found.risk) == (10, 8, 1, 1 / 8)
    assert risk(scores, bad, None).kept == 0 and math.isnan(risk(scores, bad, None).risk)


def test_thresholds_are_scores_from_strict_to_loose_and_every_image():
    scores = torch.tensor([5.0, 1, 2, 2, 3, 4, torch.nan, 1, 1, 2])
    assert thresholds(scores, 0.5).tolist() == [2, 3, 4, 5, torch.inf]
    assert thresholds(scores, 0.0).tolist() == [1, 2, 3, 4, 5, torch.inf]
    assert thresholds(scores, 1.0).tolist() == [5, torch.inf]
    assert thresholds(torch.full((3,), torch.nan)).tolist() == [torch.inf]
    keep = torch.tensor([0.0, torch.nan, torch.inf])
    assert risk(keep, torch.zeros(3).bool(), torch.inf).kept == 2  # NaN never


def violations(curve, true_risk, allowed, level, *, count=300, pools=1000, levels=None):
    """Shares of pools whose threshold has too high a risk on the population, and that hold one."""
    generator = torch.Generator().manual_seed(1)
    found = [
        guaranteed(*pool(count, generator, curve, levels), allowed, level) for _ in range(pools)
    ]
    held = [value for value in found if value is not None]
    return sum(true_risk(value) > allowed for value in held) / pools, len(held) / pools


def mean_up_to(curve, levels):
    """Risk of what is kept, by the threshold, for scores that are uniform over these levels."""

    def of(threshold):
        grid = (torch.arange(levels, dtype=torch.float64) / levels)[None]
        kept = grid[grid <= threshold]
        return float(curve(kept).mean())

    return of


NOISE = (lambda s: torch.full_like(s, 0.101), "all of a risk just above")
RISING = (lambda s: s.pow(2) * 0.6, "informative")
HUMP = (lambda s: torch.where((s - 0.35).abs() < 0.1, 0.6, 0.02), "up and down")


@pytest.mark.parametrize("levels", [7, 4000])
@pytest.mark.parametrize(
    "curve", [NOISE[0], RISING[0], HUMP[0]], ids=[NOISE[1], RISING[1], HUMP[1]]
)
def test_the_risk_is_too_high_in_no_more_pools_than_allowed(curve, levels):
    pools, level = 1000, 0.1
    share, held = violations(curve, mean_up_to(curve, levels), 0.1, level, levels=levels)
    # Three standard errors of a share that is exactly the level.
    assert share <= level + 3 * (level * (1 - level) / pools) ** 0.5
    # Not by holding nothing: the tests are worth their images.
    assert held > (0.02 if curve is NOISE[0] else 0.4)


def test_the_loosest_threshold_whose_found_risk_is_low_enough_would_not_do():
    generator = torch.Generator().manual_seed(1)
    true_risk, high = mean_up_to(RISING[0], 4000), 0
    for _ in range(200):
        scores, bad = pool(300, generator, RISING[0])
        values, order = scores.sort()
        low = bad[order].cumsum(0) / torch.arange(1, 301) <= 0.1
        high += true_risk(values[low][-1]) > 0.1
    assert high / 200 > 0.3


def test_a_risk_at_the_limit_is_missed_as_often_as_the_exact_tail_says():
    # One threshold: the share of pools that pass is the binomial probability itself.
    generator = torch.Generator().manual_seed(2)
    every = torch.tensor([torch.inf]).double()
    most = max(k for k in range(41) if tail(k, 40, Fraction(1, 5)) <= Fraction(1, 10))
    exact = float(tail(most, 40, Fraction(1, 5)))
    passed = 0
    for _ in range(4000):
        scores, bad = pool(40, generator, lambda s: torch.full_like(s, 0.2))
        passed += loosest(scores, bad, every, 0.2, 0.1) is not None
    assert passed / 4000 == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)


def test_classes_in_fixed_numbers_do_no_harm():
    # Half of the images are all good and kept; of the others a share is kept, all bad.
    generator = torch.Generator().manual_seed(3)
    share, count, pools = 0.11 / 0.89, 300, 1000
    at, bad = torch.tensor([0.5]).double(), torch.arange(count) % 2 == 1
    passed = 0
    for _ in range(pools):
        lot = torch.rand(count, generator=generator, dtype=torch.float64)
        scores = torch.where(bad & (lot >= share), 1.0, 0.0).double()
        passed += loosest(scores, bad, at, 0.1, 0.1) is not None
    assert passed / pools <= 0.1


def test_a_looser_level_or_risk_gives_a_looser_threshold():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores, bad = pool(400, generator, RISING[0])
        at = thresholds(scores[:60])

        def reached(allowed, level, given=(scores[60:], bad[60:], at)):
            value = loosest(*given, allowed, level, (0.5, 0.25, 0.25))
            return -math.inf if value is None else value

        by_level = [reached(0.1, level) for level in (0.001, 0.01, 0.1, 0.3)]
        by_risk = [reached(allowed, 0.1) for allowed in (0.01, 0.05, 0.1, 0.3, 0.9)]
        assert by_level == sorted(by_level) and by_risk == sorted(by_risk)
        assert by_risk[0] < by_risk[-1] == math.inf


def test_nothing_is_kept_where_all_is_bad_and_everything_where_nothing_is():
    scores = torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert guaranteed(scores, torch.ones(300).bool(), 0.1, 0.1) is None
    assert guaranteed(scores, torch.zeros(300).bool(), 0.1, 0.1) == math.inf
    # Equal scores: all or nothing.
    equal, some = torch.zeros(300), torch.arange(300) % 10 == 0
    assert guaranteed(equal, some, 0.3, 0.1) == math.inf
    assert guaranteed(equal, some, 0.1, 0.1) is None


def test_too_few_images_are_refused():
    for allowed, level in ((0.1, 0.1), (0.02, 0.05), (0.5, 0.5)):
        least = fewest_images(allowed, level)
        assert (1 - allowed) ** least <= level * (1 + 1e-12) < (1 - allowed) ** (least - 1)
    assert [proposing(n) for n in (10, 80, 400, 1000)] == [5, 40, 50, 100]
    assert require_enough(58, 0.1, 0.1) == 29
    with pytest.raises(
        UserError, match="56 calibration images test 28, .* of 0.9 at level 0.1 takes 29"
    ):
        require_enough(56, 0.1, 0.1)


def test_intervals_are_where_the_tails_are():
    low, high = interval(3, 40)
    assert float(1 - tail(2, 40, Fraction(low))) == pytest.approx(0.025, rel=1e-6)
    assert float(tail(3, 40, Fraction(high))) == pytest.approx(0.025, rel=1e-6)
    assert interval(0, 5)[0] == 0.0 and interval(5, 5)[1] == 1.0
    assert all(math.isnan(end) for end in interval(0, 0))
