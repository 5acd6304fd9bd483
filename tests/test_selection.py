import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from bayesdiff.checks import UserError
from bayesdiff.metrics import subsets as pool_module
from bayesdiff.metrics.agreement import with_intervals
from bayesdiff.metrics.cmmd import cmmd
from bayesdiff.metrics.features import Features
from bayesdiff.metrics.scores import reference_statistics, scores
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.selection import auroc, kept, random_kept, top_recall
from bayesdiff.metrics.subsets import pool
from bayesdiff.studies.filtering import gains as gains_module
from bayesdiff.studies.filtering.gains import NAMES, VALUES, gains
from bayesdiff.studies.sample_sizes import sample_size_curve


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Thousands of tiny problems gain nothing from threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(count, *, dims=3, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, dims, generator=generator)


def uniform(count, *, seed=0, levels=None):
    found = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return found if levels is None else (found * levels).floor() / levels


def permutation(count, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def reference_of(real):
    return reference_statistics(lambda: Features(real, real), key="", cache_dir=None, seed=0)


def assert_equal_rows(row, expected):
    """Equal up to the rounding of rows of one batch."""
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        exact = isinstance(value, str)
        assert row[name] == (value if exact else pytest.approx(value, rel=1e-8, abs=1e-12))


def slow_kept(score, fraction, groups, numbers):
    """Numbers that are kept, class by class, from sorted lists; equal table by lot."""
    found = []
    lots = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(len(numbers)))
    order = sorted(numbers)
    lot = {order[place]: turn for turn, place in enumerate(lots.tolist())}
    for group in set(groups):
        members = zip(score, numbers, groups, strict=True)
        rows = sorted((d, lot[n], n) for d, n, g in members if g == group)
        size = max(math.floor(fraction * len(rows) + 0.5 + 1e-9), 1)
        found += [n for *_, n in rows[:size]]
    return sorted(found)


# which images


def test_a_score_that_says_nothing_keeps_no_balanced_set():
    classes = torch.arange(1000) % 10
    left = classes[kept(torch.zeros(1000), 0.5)].bincount()
    assert left.sum() == 500 and left.max() - left.min() > 5


@pytest.mark.parametrize("fraction", [0.01, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("levels", [None, 4])
def test_kept_against_sorted_lists(fraction, grouped, levels):
    score, numbers = uniform(90, levels=levels), 3 * permutation(90) + 5
    groups = torch.tensor([7, 2, 2, 90, 2]).repeat(18) if grouped else torch.zeros(90).long()
    found = kept(score, fraction, groups if grouped else None, numbers)
    expected = slow_kept(score.tolist(), fraction, groups.tolist(), numbers.tolist())
    assert numbers[found].tolist() == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_t16_kept_set_does_not_depend_on_the_listing(grouped):
    """Shuffled order, gaps in the numbering and a rejected first file, with equal table."""
    table = dict(zip(range(2, 400, 3), uniform(133, levels=10).tolist(), strict=True))
    del table[2]  # the first file was rejected, so places and numbers differ
    labels = {number: number % 5 for number in table}
    listings = [list(table), list(table)[::-1]]
    listings += [[list(table)[i] for i in permutation(132, seed)] for seed in range(8)]
    kept_sets, random_sets = [], []
    for numbers in listings:
        score = torch.tensor([table[n] for n in numbers])
        groups = torch.tensor([labels[n] for n in numbers]) if grouped else None
        listed = torch.tensor(numbers)
        kept_sets.append(listed[kept(score, 0.7, groups, listed)].tolist())
        random_sets.append(listed[random_kept(132, 0.7, 4, groups, listed)].tolist())
    expected = slow_kept(
        table.values(), 0.7, labels.values() if grouped else [0] * 132, list(table)
    )
    assert all(found == expected for found in kept_sets)
    assert all(found == random_sets[0] for found in random_sets)


def test_an_infinite_score_is_discarded_first():
    score = torch.tensor([1.0, math.inf, -math.inf, 0.0, math.inf])
    assert kept(score, 0.6).tolist() == [0, 2, 3]
    assert kept(score, 0.8).tolist() == [0, 1, 2, 3]


def test_shares_that_rounding_would_miss():
    # 0.35 * 90 is 31.499999999999996, half an image below which is rounded up.
    assert len(kept(uniform(90), 0.35)) == 32
    assert len(kept(uniform(3), 0.01)) == 1
    groups = torch.tensor([0] * 10 + [1] * 30 + [2])
    found = groups[kept(uniform(41), 0.25, groups)].bincount()
    assert found.tolist() == [3, 8, 1]


@pytest.mark.parametrize("grouped", [False, True])
def test_random_choices_have_the_same_sizes_and_are_fair(grouped):
    groups = torch.tensor([0, 0, 1, 0]).repeat(10) if grouped else None
    chosen = random_kept(40, 0.6, 3, groups, subsets=2000)
    mine = kept(uniform(40), 0.6, groups)
    assert chosen.shape == (2000, len(mine))
    assert (chosen.diff(dim=1) > 0).all()
    if grouped:
        assert (groups[chosen].sum(1) == groups[mine].sum()).all()
    times = chosen.flatten().bincount(minlength=40) / 2000
    assert (times - 0.6).abs().max() < 4.5 * (0.24 / 2000) ** 0.5
    assert torch.equal(chosen, random_kept(40, 0.6, 3, groups, subsets=2000))
    assert not torch.equal(chosen, random_kept(40, 0.6, 4, groups, subsets=2000))
    more = random_kept(40, 0.8, 3, groups, subsets=2000)
    assert set(chosen[0].tolist()) < set(more[0].tolist())


def test_unusable_scores_are_refused_in_one_line():
    good = uniform(4)
    for arguments, message in [
        ((torch.tensor([0.0, math.nan, 1.0, math.nan]), 0.5), r"image 1 is NaN \(2 of 4 images\)"),
        ((torch.arange(4), 0.5), "must be floating numbers .* got torch.int64"),
        ((good > 0.5, 0.5), "must be floating numbers .* got torch.bool"),
        ((good[None], 0.5), r"got torch.float32 \(1, 4\)"),
        ((good[:0], 0.5), "N >= 1"),
        ((good, 0), "keep fraction must be above 0 and at most 1, got 0"),
        ((good, 80), "keep fraction must be above 0 and at most 1, got 80"),
        ((good, math.nan), "keep fraction must be above 0"),
        ((good, "most"), "keep fraction must be a number, got 'most'"),
        ((good, 0.5, good), "groups must be whole numbers, one for each of 4 images"),
        ((good, 0.5, torch.arange(3)), "groups must be whole numbers, one for each of 4 images"),
        ((good, 0.5, None, torch.tensor([1, 2, 9, 2])), "must be distinct, got 2 more than once"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            kept(*arguments)
        assert "\n" not in str(refusal.value)


# finding marked images


@pytest.mark.parametrize("levels", [None, 5, 1])
def test_auroc_against_sklearn(levels):
    marked = uniform(300, seed=1) < 0.2
    score = uniform(300, levels=levels) + (0.3 * marked if levels != 1 else 0)
    expected = roc_auc_score(marked, score)
    assert float(auroc(score, marked)) == pytest.approx(expected, rel=1e-12)
    assert float(auroc(-score, marked)) == pytest.approx(1 - expected, rel=1e-12)
    assert levels != 1 or expected == 0.5
    both = auroc(torch.stack([score, -score]), torch.stack([marked, marked]))
    np.testing.assert_allclose(both, [expected, 1 - expected], rtol=1e-12)


def test_auroc_of_one_kind_alone_is_nan():
    assert auroc(uniform(5), torch.ones(5)).isnan() and auroc(uniform(5), torch.zeros(5)).isnan()


def detection(score, marked, seed, draws=1000):
    return with_intervals(
        {"auroc": (auroc, (score, marked))}, seed=seed, resamples=draws, level=0.95
    )


def test_detection_interval_equals_a_loop_over_resampled_images():
    marked = uniform(60, seed=1) < 0.2
    score = uniform(60, levels=20) + 0.3 * marked
    found = detection(score, marked, seed=5, draws=300)
    index = torch.randint(60, (300, 60), generator=torch.Generator().manual_seed(5))
    loop = [roc_auc_score(marked[i], score[i]) for i in index]
    expected = np.quantile(loop, [0.025, 0.975])
    np.testing.assert_allclose([found["auroc_low"], found["auroc_high"]], expected, rtol=1e-10)
    assert found["auroc_low"] < found["auroc"] < found["auroc_high"]


def test_top_recall_counts_what_is_discarded():
    score = torch.tensor([0.1, 0.9, 0.7, 0.2, 0.8])
    marked = torch.tensor([False, True, False, True, True])
    assert top_recall(score, marked, 0.2) == pytest.approx(1 / 3)
    assert top_recall(score, marked, 0.4) == pytest.approx(2 / 3)
    assert top_recall(score, marked, 0.6) == pytest.approx(2 / 3)
    for nothing in (torch.zeros(5), torch.ones(5)):
        with pytest.raises(UserError, match="marked must name some of the 5 images"):
            top_recall(score, nothing.bool(), 0.2)


def test_t16_an_oracle_finds_injected_corruptions():
    """Distance to the clean image, seen through a little noise, in a pool with a tenth broken."""
    clean = normal(1000, dims=16, seed=1)
    marked = torch.zeros(1000, dtype=torch.bool)
    marked[permutation(1000)[:100]] = True
    images = clean + marked[:, None] * normal(1000, dims=16, seed=2)
    error = (images - clean).norm(dim=1) + 0.1 * normal(1000, dims=1, seed=3)[:, 0]
    found = detection(error, marked, seed=0)
    assert top_recall(error, marked, 0.1) > 0.95 and found["auroc"] > 0.99
    blind = uniform(1000, seed=4)
    chance = detection(blind, marked, seed=0)
    assert chance["auroc_low"] < 0.5 < chance["auroc_high"]
    assert top_recall(blind, marked, 0.1) < 0.25
    images_pool = pool(images, reference_of(normal(2000, dims=16)))
    (row,) = gains({"oracle": error}, images_pool, [0.9], seed=0, resamples=30)
    assert row["z"] > 3 and row["fid_gain_low"] > row["fid_chance"] > 0


# figures of a selection


def fidelity_fid(features, reference):
    own = fid_features_to_statistics(features.double())
    real = {"mu": reference.mean, "sigma": reference.covariance}
    return fid_statistics_to_metric(own, real, verbose=False)["frechet_inception_distance"]


def fidelity_precision(features, reference):
    return prc_features_to_metric(
        features, torch.from_numpy(reference.subset), prc_neighborhood=3, prc_batch_size=500,
        save_cpu_ram=True, verbose=False,
    )["precision"]  # fmt: skip


@pytest.mark.parametrize("dims", [3, 40])
def test_figures_of_subsets_are_those_of_torch_fidelity(dims, monkeypatch):
    features, reference = (
        normal(120, dims=dims, seed=1, shift=0.3),
        reference_of(normal(300, dims=dims)),
    )
    images = pool(features, reference)
    # 30 images of 40 features have a singular covariance.
    subsets = torch.stack([permutation(120, seed)[:30] for seed in range(5)])
    found = images.figures(subsets)
    for place, subset in enumerate(subsets):
        part = features[subset]
        fid = fidelity_fid(part, reference)
        # Their eigenvalues of a singular product are off by the root of the rounding.
        assert float(found["fid"][place]) == pytest.approx(fid, rel=1e-9 if dims == 3 else 1e-5)
        precision = fidelity_precision(part, reference)
        assert float(found["precision"][place]) == pytest.approx(precision, abs=1e-6)
    everything = images.figures(torch.arange(120)[None])
    theirs = scores(Features(features, features), reference, seed=0, extractor="x")
    for name, values in everything.items():
        assert float(values[0]) == pytest.approx(theirs[f"{name}@120/x"], rel=1e-7)
    monkeypatch.setattr(pool_module, "BLOCK", 1)  # one subset at a time
    torch.testing.assert_close(images.figures(subsets), found, rtol=1e-10, atol=0)


def test_gains_by_hand():
    features, reference = normal(80, seed=1, scale=1.5), reference_of(normal(100))
    labels = torch.tensor([0, 1, 1, 2]).repeat(20)
    table = {"far": features.norm(dim=1), "dice": uniform(80, levels=3)}
    images = pool(features, reference, groups=labels)
    rows = gains(table, images, [0.5, 0.8], seed=9, subsets=6)
    expected = itertools.product(("global", "per_class"), (0.5, 0.8), table)
    assert [(r["mode"], r["keep"], r["score"]) for r in rows] == list(expected)
    t = scipy.stats.t.ppf(0.975, 5)
    for row in rows:
        groups = labels if row["mode"] == "per_class" else None
        own = kept(table[row["score"]], row["keep"], groups)
        rivals = random_kept(80, row["keep"], 9, groups, subsets=6)
        assert row["kept"] == len(own)
        for name, figure, sign, z in [
            ("fid", fidelity_fid, -1, "z"),
            ("precision", fidelity_precision, 1, "precision_z"),
        ]:
            value = figure(features[own], reference)
            chance = [figure(features[rival], reference) for rival in rivals]
            gain, sd = sign * (value - np.mean(chance)), np.std(chance, ddof=1)
            assert row[name] == pytest.approx(value, rel=1e-6)
            assert row[f"{name}_random"] == pytest.approx(np.mean(chance), rel=1e-6)
            assert row[f"{name}_random_sd"] == pytest.approx(sd, rel=1e-5)
            assert row[f"{name}_gain"] == pytest.approx(gain, rel=1e-5, abs=1e-7)
            assert row[z] == pytest.approx(gain / sd, rel=1e-4, abs=1e-5)
            assert row[f"{name}_chance"] == pytest.approx(t * sd * (7 / 6) ** 0.5, rel=1e-5)
    assert rows[2]["z"] > 3  # far images are discarded


def test_t16_gains_do_not_depend_on_the_listing():
    features, score = normal(60, seed=1, shift=0.4), uniform(60, levels=6)
    labels, numbers = torch.arange(60) % 3, 7 * torch.arange(60) + 2
    reference = reference_of(normal(50))
    tables = []
    for order in (torch.arange(60), torch.arange(60).flip(0), permutation(60)):
        images = pool(features[order], reference, groups=labels[order], numbers=numbers[order])
        tables.append(gains({"a": score[order]}, images, [0.7], seed=0, resamples=5))
        curve = sample_size_curve(images, reference, [10, 30], encoder="x", seed=0)
        tables[-1] = tables[-1] + curve
    for table in tables[1:]:
        for row, first in zip(table, tables[0], strict=True):
            assert_equal_rows(row, first)


def test_a_score_that_removes_a_class_is_caught_per_class():
    centres = 4 * torch.eye(3)
    labels = torch.arange(300) % 3
    features = centres[labels] + normal(300, seed=1)
    reference = reference_of(centres[torch.arange(600) % 3] + normal(600))
    images = pool(features, reference, groups=labels)
    score = labels + 0.1 * uniform(300)
    whole, within = gains({"class": score}, images, [0.7], seed=0, subsets=20)
    assert whole["z"] < -10 and abs(within["z"]) < 4
    assert within["kept"] == whole["kept"] == 210


def test_t16_a_random_score_lies_where_random_choices_lie():
    """In at least 93 of 100 pools the gain is inside its 95 % interval around no gain, and the
    interval of the gain over images holds zero."""
    reference = reference_of(normal(1000))
    inside = {"chance": 0, "bootstrap": 0}
    for seed in range(100):
        images = pool(normal(150, seed=seed, scale=1.3, shift=0.6), reference)
        score = uniform(150, seed=1000 + seed)
        (row,) = gains({"dice": score}, images, [0.8], seed=2000 + seed, resamples=40)
        assert row["z"] == row["fid_gain"] / row["fid_random_sd"]
        inside["chance"] += abs(row["fid_gain"]) < row["fid_chance"]
        inside["bootstrap"] += row["fid_gain_low"] < 0 < row["fid_gain_high"]
    assert min(inside.values()) >= 93, inside
    assert inside["chance"] < 100  # an interval that always holds zero says nothing


def test_bootstrap_has_the_spread_of_a_random_choice_and_the_gain_as_centre():
    features = normal(300, dims=2, scale=1.3, shift=1.0)
    images = pool(features, reference_of(normal(1000, dims=2)))
    many = gains({"dice": uniform(300)}, images, [0.8], seed=0, subsets=300)[0]
    row = gains({"dice": uniform(300)}, images, [0.8], seed=0, resamples=400, level=0.68)[0]
    for name in ("fid", "precision"):
        low, high = row[f"{name}_gain_low"], row[f"{name}_gain_high"]
        expected = 1.1**0.5 * many[f"{name}_random_sd"]
        assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
        assert (low + high) / 2 == pytest.approx(row[f"{name}_gain"], abs=0.15 * expected)


def test_bootstrap_resamples_within_classes_and_pairs_the_scores():
    labels = torch.tensor([5, 3, 3, 8]).repeat(25)
    generator = torch.Generator().manual_seed(0)
    index = gains_module._resampled(100, labels, generator)
    assert torch.equal(labels[index], labels) and 50 < len(index.unique()) < 80
    features = normal(100, seed=1)
    images = pool(features, reference_of(normal(200)), groups=labels)
    score = features.norm(dim=1)
    alone = gains({"a": score}, images, [0.8], seed=0, resamples=10)
    table = {"a": score, "same": 3 * score - 1, "b": -score}
    together = gains(table, images, [0.8], seed=0, resamples=10)
    assert len(alone) == 2 and len(together) == 6
    for row in together:
        if row["score"] != "b":
            (first,) = [r for r in alone if r["mode"] == row["mode"]]
            assert_equal_rows({**row, "score": "a"}, first)


def test_unusable_gains_are_refused_in_one_line():
    images = pool(normal(10), reference_of(normal(20)))
    for table, fraction, options, message in [
        ({"a": uniform(9)}, 0.5, {}, "score 'a' has 9 numbers for 10 images"),
        ({"a": torch.arange(10)}, 0.5, {}, "score 'a' must be floating numbers"),
        ({"a": uniform(10) / 0 * 0}, 0.5, {}, "score 'a' of image 0 is NaN"),
        ({"a": uniform(10)}, 0.99, {}, "keep fraction 0.99 discards none of 10 images"),
        ({"a": uniform(10)}, 0.1, {}, "kept images for the FID must be .* >= 2, got 1"),
        ({"a": uniform(10)}, 0.5, {"subsets": 1}, "subsets must be a whole number >= 2"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            gains(table, images, [fraction], seed=0, **options)
        assert "\n" not in str(refusal.value)


# several seeds, several sizes


def test_seeds_are_combined_with_the_interval_of_student():
    reference = reference_of(normal(100))
    tables = []
    for seed in range(4):
        features = normal(60, seed=seed + 1, shift=0.4)
        table = {"far": features.norm(dim=1), "dice": uniform(60, seed=seed)}
        tables.append(gains(table, pool(features, reference), [0.5, 0.8], seed=seed))
    rows = over_seeds([tables[0], tables[1][::-1], *tables[2:]], NAMES, VALUES)
    assert [(r["score"], r["keep"]) for r in rows] == [(r["score"], r["keep"]) for r in tables[0]]
    for place, row in enumerate(rows):
        assert row["seeds"] == 4
        for name in ("fid", "fid_gain", "z", "precision", "precision_gain", "precision_z"):
            values = [table[place][name] for table in tables]
            half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(values)
            ends = (np.mean(values) - half, np.mean(values) + half)
            assert row[name] == pytest.approx(np.mean(values))
            assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(ends)
    (one, *_) = over_seeds(tables[:1], NAMES, VALUES)
    assert one["z"] == tables[0][0]["z"] and math.isnan(one["z_low"])
    for uneven in ([], [tables[0], tables[1][:-1]]):
        with pytest.raises(UserError, match="must hold the same scores"):
            over_seeds(uneven, NAMES, VALUES)


def test_what_a_seed_lacks_does_not_count():
    tables = [[{"way": "a", "success": value}] for value in (0.5, None, 0.7)]
    (row,) = over_seeds(tables, ["way"], ["success", "harm"])
    half = scipy.stats.t.ppf(0.975, 1) * scipy.stats.sem([0.5, 0.7])
    expected = {"success": 0.6, "success_low": 0.6 - half, "success_high": 0.6 + half}
    assert row == pytest.approx({"way": "a", "seeds": 3, **expected})
    (none,) = over_seeds([[{"success": None}]], [], ["success"])
    assert math.isnan(none["success"]) and math.isnan(none["success_low"])


def test_sample_size_curve_holds_the_figures_of_its_subsets():
    features, real = normal(90, seed=1, shift=0.4), normal(70)
    reference = reference_of(real)
    images = pool(features, reference)
    rows = sample_size_curve(images, reference, [20, 45, 90], encoder="me", seed=3, subsets=4)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(90, generator=generator) for _ in range(4)]
    for row, size in zip(rows, [20, 45, 90], strict=True):
        assert (row["images"], row["encoder"]) == (size, "me")
        fids = [fidelity_fid(features[order[:size]], reference) for order in orders]
        cmmds = [cmmd(features[o[:size]], real, encoder="")[f"cmmd@{size}/"] for o in orders]
        for name, values in (("fid", fids), ("cmmd", cmmds)):
            assert row[name] == pytest.approx(np.mean(values), rel=1e-7)
            assert row[f"{name}_sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-7)
            if size == 90:
                assert math.isnan(row[f"{name}_low"]) and math.isnan(row[f"{name}_high"])
                continue
            half = scipy.stats.t.ppf(0.975, 3) * np.std(values, ddof=1) * 1.25**0.5
            half /= (1 - size / 90) ** 0.5
            assert row[f"{name}_low"] == pytest.approx(row[name] - half, rel=1e-5)
            assert row[f"{name}_high"] == pytest.approx(row[name] + half, rel=1e-5)
    # FID falls with the size while CMMD is unbiased.
    assert rows[0]["fid"] > rows[1]["fid"] > rows[2]["fid"]
    for sizes, message in [([91], "at most 90, .* got 91"), ([1], ">= 2, got 1")]:
        with pytest.raises(UserError, match=message):
            sample_size_curve(images, reference, sizes, encoder="me", seed=3)


@pytest.mark.parametrize("size", [40, 200])
def test_fresh_sets_lie_in_the_interval_of_the_curve(size):
    """Half of the pool shares images with half of the pool; a fresh set does not."""
    reference = reference_of(normal(500))
    inside = {"fid": 0, "cmmd": 0}
    for seed in range(60):
        images = pool(normal(400, seed=seed, scale=1.2, shift=0.6), reference)
        (row,) = sample_size_curve(images, reference, [size], encoder="x", seed=seed)
        fresh = normal(size, seed=seed + 1000, scale=1.2, shift=0.6)
        fid = pool(fresh, reference).figures(torch.arange(size)[None])["fid"]
        own = {"fid": float(fid), "cmmd": cmmd(fresh, normal(500), encoder="x").popitem()[1]}
        for name, value in own.items():
            inside[name] += row[f"{name}_low"] < value < row[f"{name}_high"]
    assert min(inside.values()) >= 48, inside
