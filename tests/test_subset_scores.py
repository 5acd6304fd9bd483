"""Scores of subsets from shared kernels and neighbours, against torch-fidelity and slow loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand import density_coverage
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from bayesdiff.metrics import subset_scores
from bayesdiff.metrics.cmmd import cmmd_of_subsets
from bayesdiff.metrics.features import Features
from bayesdiff.metrics.scores import reference_statistics
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.selection import random_kept
from bayesdiff.metrics.subset_scores import SubsetScores
from bayesdiff.metrics.subsets import pool
from bayesdiff.studies.filtering.gains import NAMES, VALUES, gains
from bayesdiff.studies.sample_sizes import fid_of_infinity


def normal(count, dims=3, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, dims, generator=generator)


def reference_of(real):
    return reference_statistics(lambda: Features(real, real), key="", cache_dir=None, seed=0)


GENERATED, REAL = normal(120, seed=1, scale=1.2, shift=0.3), normal(90, seed=2)
LOGITS = 3 * normal(120, dims=4, seed=3)
SUBSETS = random_kept(120, 0.6, seed=4, subsets=5)


@pytest.fixture(scope="module")
def found():
    return SubsetScores.of(GENERATED, REAL, LOGITS)(SUBSETS)


def test_inception_score_is_that_of_one_split(found):
    for place, subset in enumerate(SUBSETS):
        theirs = isc_features_to_metric(LOGITS[subset].double(), splits=1)
        expected = theirs["inception_score_mean"]
        assert float(found["is"][place]) == pytest.approx(expected, rel=1e-9)


def test_recall_is_torch_fidelitys(found):
    for place, subset in enumerate(SUBSETS):
        theirs = prc_features_to_metric(GENERATED[subset], REAL, prc_neighborhood=3, verbose=False)
        assert float(found["recall"][place]) == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0.2 < float(found["recall"].mean()) < 1


def test_density_coverage_and_cmmd_are_those_of_the_subsets_alone(found):
    torch.testing.assert_close(found["cmmd"], cmmd_of_subsets(GENERATED, REAL, SUBSETS))
    for place, subset in enumerate(SUBSETS):
        density, coverage = density_coverage(GENERATED[subset], REAL)
        assert float(found["density"][place]) == pytest.approx(density, rel=1e-9)
        assert float(found["coverage"][place]) == pytest.approx(coverage, rel=1e-9)
    assert len(set(found["coverage"].tolist())) > 1


def slow_kid(generated, real):
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def between(rows):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in generated for b in real]
    return between(generated) + between(real) - 2 * sum(across) / len(across)


def test_kid_is_over_all_pairs(found):
    for place in (0, 3):
        truth = slow_kid(GENERATED[SUBSETS[place]].double(), REAL.double())
        assert float(found["kid"][place]) == pytest.approx(truth, rel=1e-8)
    # torch-fidelity averages over random parts instead: the same on average.
    part = GENERATED[SUBSETS[0]]
    theirs = kid_features_to_metric(
        part.double(), REAL.double(), kid_subsets=400, kid_subset_size=40, verbose=False
    )
    spread = theirs["kernel_inception_distance_std"] / 400**0.5
    assert abs(theirs["kernel_inception_distance_mean"] - float(found["kid"][0])) < 6 * spread


def test_an_image_that_is_in_twice_counts_twice_but_makes_no_pair_with_itself():
    scores = SubsetScores.of(GENERATED, REAL, LOGITS)
    twice, once = torch.arange(40).repeat(2)[None], torch.arange(40)[None]
    one, two = scores(once), scores(twice)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-12)
    uneven = scores(torch.tensor([[*range(40), 0, 0]]))
    for name in ("is", "density", "kid", "cmmd"):
        assert abs(float(uneven[name] - one[name])) > 1e-6


def test_scores_do_not_depend_on_how_the_work_is_cut_up(found, monkeypatch):
    for module in (subset_scores, __import__("bayesdiff.metrics.neighbours").metrics.neighbours):
        monkeypatch.setattr(module, "BLOCK", 1000)
    again = SubsetScores.of(GENERATED, REAL, LOGITS)(SUBSETS)
    for name, values in found.items():
        torch.testing.assert_close(again[name], values, rtol=1e-9, atol=1e-11)


def test_balls_reach_no_further_than_the_nearest_that_are_looked_at(monkeypatch):
    monkeypatch.setattr(subset_scores, "NEAREST", 3)
    few = SubsetScores.of(GENERATED, REAL)(SUBSETS)
    assert "is" not in few
    whole = torch.arange(120)[None]
    theirs = prc_features_to_metric(GENERATED, REAL, prc_neighborhood=3, verbose=False)
    of_all = SubsetScores.of(GENERATED, REAL)(whole)["recall"]
    assert float(of_all) == pytest.approx(theirs["recall"], abs=1e-6)
    monkeypatch.undo()
    assert (few["recall"] < SubsetScores.of(GENERATED, REAL)(SUBSETS)["recall"]).all()


def test_copies_of_an_image_are_its_neighbours():
    generated = GENERATED.clone()
    generated[5:9] = generated[5]
    subset = torch.arange(60)[None]
    theirs = prc_features_to_metric(generated[:60], REAL, prc_neighborhood=3, verbose=False)
    found = SubsetScores.of(generated, REAL)(subset)["recall"]
    assert float(found) == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_score_has_its_gain_with_an_interval(shuffled):
    reference = reference_of(REAL)
    order = torch.randperm(120) if shuffled else torch.arange(120)
    images = pool(GENERATED[order], reference, numbers=order, more=True, logits=LOGITS[order])
    score = GENERATED.norm(dim=1)
    (row,) = gains({"far": score[order]}, images, [0.6], seed=0, subsets=6, resamples=8)
    chance = random_kept(120, 0.6, seed=0, subsets=6)
    kept = score.argsort()[:72].sort().values[None]
    scores = SubsetScores.of(GENERATED, REAL, LOGITS)
    own, rivals = scores(kept), scores(chance)
    for name in ("is", "kid", "recall", "density", "coverage", "cmmd"):
        sign = -1 if name in ("kid", "cmmd") else 1
        gain = sign * float(own[name][0] - rivals[name].mean())
        assert row[name] == pytest.approx(float(own[name][0]), rel=1e-8)
        assert row[f"{name}_gain"] == pytest.approx(gain, rel=1e-7)
        assert row[f"{name}_z"] == pytest.approx(gain / float(rivals[name].std()), rel=1e-7)
        assert row[f"{name}_gain_low"] < row[f"{name}_gain"] < row[f"{name}_gain_high"]
    assert row["density_gain"] > 0 > row["recall_gain"]  # the outer ones are gone
    (mean,) = over_seeds([[row], [row]], NAMES, VALUES)
    assert mean["kid_gain"] == row["kid_gain"] and mean["kid_gain_low"] == row["kid_gain"]
    plain = gains(
        {"far": score}, pool(GENERATED, reference), [0.6], seed=0, subsets=6, resamples=8
    )
    for name, value in plain[0].items():
        assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-8))


def test_logits_without_classes_leave_the_inception_score_out():
    images = pool(GENERATED, reference_of(REAL), more=True, logits=torch.zeros(120, 0))
    assert "is" not in images.figures(SUBSETS)
    assert set(pool(GENERATED, reference_of(REAL)).figures(SUBSETS)) == {"fid", "precision"}


def exact_fid(dims, shift, scale):
    """Of N(shift, scale^2 I) from N(0, I)."""
    return dims * (shift**2 + (scale - 1) ** 2)


def test_fid_of_infinity_is_the_distance_of_the_distributions():
    """The reference's own few images shift it a little, so it has very many here."""
    reference = reference_of(normal(200_000, dims=4))
    # The precision of each pool, which nobody reads here, would compare it with all of these.
    reference = replace(reference, subset=reference.subset[:50])
    truth = exact_fid(4, 0.3, 1.1)
    inside, biased = 0, []
    for seed in range(25):
        images = pool(normal(500, dims=4, seed=100 + seed, scale=1.1, shift=0.3), reference)
        found = fid_of_infinity(images, seed=seed)
        inside += found["fid_infinity_low"] < truth < found["fid_infinity_high"]
        parts = random_kept(500, 0.2, seed=seed, subsets=20)
        at_100 = float(images.figures(parts)["fid"].mean())
        biased.append([found["fid_infinity"] - truth, at_100 - truth, found["fid_slope"] / 100])
    infinity, at_100, slope = np.mean(biased, 0)
    assert inside >= 21
    assert abs(infinity) < 0.3 * at_100 and slope == pytest.approx(at_100, rel=0.5)


def test_the_line_goes_through_whole_halves_and_thirds(monkeypatch):
    """With FIDs that are a + b / N exactly, these are found exactly."""
    images = pool(normal(60), reference_of(REAL))
    asked = []

    def figures(self, subsets):
        asked.append(subsets)
        return {"fid": torch.full((len(subsets),), 2.0 + 7.0 / subsets.shape[1]).double()}

    monkeypatch.setattr(type(images), "figures", figures)
    found = fid_of_infinity(images, seed=0, splits=3, repeats=2, parts=4)
    assert found["fid_infinity"] == pytest.approx(2) and found["fid_slope"] == pytest.approx(7)
    assert found["fid_infinity_sd"] < 1e-9
    whole, halves, thirds = asked[:3]
    assert [each.shape for each in (whole, halves, thirds)] == [(1, 60), (4, 30), (6, 20)]
    for each in (halves, thirds):  # every image once in each of the two splits
        assert each.flatten().bincount().tolist() == [2] * 60
    assert {each.unique().numel() for each in asked[3::3]} == {45}


def test_fid_of_infinity_needs_images_for_its_parts():
    images = pool(normal(19), reference_of(REAL))
    with pytest.raises(ValueError, match="needs 20 images, got 19"):
        fid_of_infinity(images, seed=0)
    assert math.isfinite(
        fid_of_infinity(pool(normal(20), reference_of(REAL)), seed=0)["fid_slope"]
    )
