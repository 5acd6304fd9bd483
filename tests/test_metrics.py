import logging
import math
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import TensorDataset

from bayesdiff.checks import UserError
from bayesdiff.metrics import scores as score_module
from bayesdiff.metrics.agreement import (
    agreement,
    bootstrap_interval,
    image_rank,
    pixel_rank,
    spearman,
    spread_ratio,
    variance_statistics,
)
from bayesdiff.metrics.classifier import Classifier, save_classifier
from bayesdiff.metrics.features import (
    CLASSIFIER,
    INCEPTION_FILE,
    Features,
    Inception,
    build_extractor,
    classifier_extractor,
    extract,
    inception_extractor,
    weights_hash,
)
from bayesdiff.metrics.scores import conditions, reference_statistics, scores, size_name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Small problems gain nothing from threads and lose much when the cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def random_images(count, *, channels=1, side=12, seed=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, side, side)
    return torch.randint(0, high, shape, generator=generator).to(torch.uint8)


def random_features(count, *, dims=6, classes=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(9))
    features = torch.randn(count, dims, generator=generator) @ mix + shift
    return Features(features, 2 * torch.randn(count, classes, generator=generator))


def reference_of(features, **changes):
    options = {"key": "k", "cache_dir": None, "seed": 0, **changes}
    return reference_statistics(lambda: features, **options)


def network(*, channels=1, classes=4, seed=0):
    """An untrained classifier with the running statistics of a trained one."""
    torch.manual_seed(seed)
    made = Classifier(channels, classes)
    for _ in range(20):
        made(random_images(64, channels=channels, seed=seed))
    return made.eval()


# features


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size(batch_size):
    extractor = classifier_extractor(network())
    images = random_images(33)
    whole = extract(extractor, images, batch_size=33)
    parts = extract(extractor, images, batch_size=batch_size)
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-5, atol=1e-5)
    first = extract(extractor, images[:1])
    torch.testing.assert_close(first.features, whole.features[:1], rtol=1e-5, atol=1e-5)


def test_extraction_is_the_network_in_eval_mode():
    made = network()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    images = random_images(9)
    found = extract(classifier_extractor(made.train()), images)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, made.eval()(images), rtol=1e-5, atol=1e-5)
    assert found.features.shape == (9, 128) and len(found) == 9
    assert found.features.dtype == found.logits.dtype == torch.float32
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize(
    "images", [torch.rand(3, 1, 8, 8), random_images(3)[0], random_images(3)[:0]]
)
def test_only_batches_of_bytes_are_extracted(images):
    with pytest.raises(ValueError, match="uint8"):
        extract(classifier_extractor(network()), images)


def test_weights_hash_follows_every_weight():
    first, again, other = network(), network(), network(seed=1)
    assert weights_hash(classifier_extractor(first)) == weights_hash(classifier_extractor(again))
    assert weights_hash(classifier_extractor(first)) != weights_hash(classifier_extractor(other))
    with torch.no_grad():
        again.head.bias[0] += 1e-6
    assert weights_hash(classifier_extractor(first)) != weights_hash(classifier_extractor(again))


def test_scores_equal_torch_fidelity_on_the_registered_extractor(tmp_path):
    from torch_fidelity import calculate_metrics

    class Images(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    fake, real = random_images(300), random_images(300, seed=1, high=200)
    made = network()
    save_classifier(made, tmp_path / "classifier-1.safetensors")
    theirs = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        feature_extractor=CLASSIFIER,
        feature_extractor_weights_path=tmp_path / "classifier-1.safetensors",
        **dict(fid=True, isc=True, kid=True, prc=True, isc_splits=3, kid_subset_size=300),
        **dict(cuda=False, verbose=False, save_cpu_ram=True, cache=False, rng_seed=5),
    )
    extractor = classifier_extractor(made)
    reference = reference_of(extract(extractor, real))
    ours = scores(extract(extractor, fake), reference, seed=5, extractor="classifier")
    names = {
        "fid": "frechet_inception_distance",
        "is": "inception_score_mean",
        "is_sd": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, their_name in names.items():
        # Their covariance is that of float32 features.
        expected = pytest.approx(theirs[their_name], rel=1e-3, abs=1e-4)
        assert ours[f"{name}@300/classifier"] == expected


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file in torch-fidelity's layout with random weights."""
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inception, "load_state_dict", lambda self, state: None)
        empty = Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    torch.save(empty.state_dict(), path)
    return path


def test_inception_takes_grey_images_as_rgb(inception_file):
    extractor = build_extractor(
        "inception", None, cache_dir="", seed=0, weights_path=inception_file
    )
    grey = random_images(2)
    found = extract(extractor, grey, batch_size=1)
    rgb = extract(extractor, grey.repeat(1, 3, 1, 1), batch_size=2)
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    torch.testing.assert_close(found.features, rgb.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, rgb.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("invalid hash")])
def test_inception_without_network_names_the_cure(monkeypatch, failure):
    def fail(*args, **kwargs):
        assert kwargs["weights_only"] and kwargs["check_hash"]
        raise failure

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=f"metrics.weights_path.*{INCEPTION_FILE}") as refusal:
        inception_extractor()
    assert "\n" not in str(refusal.value)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.parametrize("content", ["missing", "text", "other tensors", "a list", "code"])
def test_wrong_weights_file_is_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("hello")
    elif content != "missing":
        values = {"other tensors": {"a": torch.zeros(1)}, "a list": [1], "code": {"a": Bomb()}}
        torch.save(values[content], path)
    with pytest.raises(UserError, match="metrics.weights_path=.*weights.pth") as refusal:
        inception_extractor(path)
    assert "\n" not in str(refusal.value) and INCEPTION_FILE in str(refusal.value)
    assert not (tmp_path / "exploded").exists()


def test_build_extractor_refuses_unknown_names_and_unlabelled_data(tmp_path):
    with pytest.raises(UserError, match="unknown metrics.features 'vgg'.*inception, clip, dinov2"):
        build_extractor("vgg", None, cache_dir=tmp_path, seed=0)
    data = SimpleNamespace(name="folder", labels=None, num_classes=0)
    with pytest.raises(UserError, match="folder.*metrics.features=inception"):
        build_extractor("classifier", data, cache_dir=tmp_path, seed=0)


# scores


def slow_fid(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def slow_kid(a, b):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = a.double(), b.double()
    n, m = len(a), len(b)
    aa = (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (n * (n - 1))
    bb = (kernel(b, b).sum() - kernel(b, b).diagonal().sum()) / (m * (m - 1))
    return float(aa + bb - 2 * kernel(a, b).mean())


def slow_coverage(points, centres, k):
    """Share of points inside the k-nearest-neighbour ball of any centre, point by point."""
    points, centres = points.double().numpy(), centres.double().numpy()
    inside = 0
    radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[k] for centre in centres]
    for point in points:
        distances = np.linalg.norm(centres - point, axis=1)
        inside += any(d <= r for d, r in zip(distances, radii, strict=True))
    return inside / len(points)


def test_scores_against_slow_formulas():
    fake, real = random_features(120), random_features(120, seed=1, shift=0.7)
    found = scores(fake, reference_of(real), seed=0, extractor="classifier")
    assert set(found) == {
        f"{name}@120/classifier"
        for name in ("fid", "is", "is_sd", "kid", "kid_sd", "precision", "recall")
    }
    plain = {name.split("@")[0]: value for name, value in found.items()}
    assert plain["fid"] == pytest.approx(slow_fid(fake.features, real.features), rel=1e-9)
    assert plain["kid"] == pytest.approx(slow_kid(fake.features, real.features), rel=1e-9)
    assert plain["kid_sd"] == pytest.approx(0, abs=1e-9)  # every subset is the whole set
    precision = slow_coverage(fake.features, real.features, 3)
    recall = slow_coverage(real.features, fake.features, 3)
    assert plain["precision"] == pytest.approx(precision, abs=1e-6)
    assert plain["recall"] == pytest.approx(recall, abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1

    p = fake.logits.double().softmax(1)  # 120 images: one split, exp of the mutual information
    divergence = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert plain["is"] == pytest.approx(float(divergence.exp()), rel=1e-9)
    assert plain["is_sd"] == 0


def test_inception_score_averages_its_splits():
    fake = random_features(250)
    found = scores(fake, reference_of(fake), seed=3, extractor="inception")
    order = np.random.RandomState(3).permutation(250)
    parts = []
    for half in np.split(order, 2):
        p = fake.logits[half].double().softmax(1)
        parts.append(float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp()))
    assert found["is@250/inception"] == pytest.approx(np.mean(parts), rel=1e-9)
    assert found["is_sd@250/inception"] == pytest.approx(np.std(parts), rel=1e-9)


def test_equal_sets_score_best():
    features = random_features(200)
    found = scores(features, reference_of(features), seed=0, extractor="classifier")
    assert found["fid@200/classifier"] == pytest.approx(0, abs=1e-6)
    assert found["kid@200/classifier"] <= 0  # unbiased, so the equal pairs push it below 0
    assert found["precision@200/classifier"] == found["recall@200/classifier"] == 1


def test_fid_of_equal_images_is_zero_over_batch_sizes():
    extractor = classifier_extractor(network())
    images = random_images(200)
    reference = reference_of(extract(extractor, images, batch_size=200))
    for batch_size in (3, 64):
        found = extract(extractor, images, batch_size=batch_size)
        fid = scores(found, reference, seed=0, extractor="classifier")["fid@200/classifier"]
        assert fid == pytest.approx(0, abs=1e-5 * np.trace(reference.covariance))


def test_scores_are_silent_and_repeat_with_their_seed(capfd, monkeypatch):
    monkeypatch.setattr(score_module, "KID_SUBSET_SIZE", 50)
    fake, real = random_features(300), random_features(300, seed=1)
    reference = reference_of(real)
    runs = [scores(fake, reference, seed=s, extractor="classifier") for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("generated", "real"), [(2, 2), (3, 40), (40, 3), (5, 5)])
def test_few_images_lower_the_conditions_and_record_it(generated, real):
    fake, reference = random_features(generated), reference_of(random_features(real, seed=1))
    found = scores(fake, reference, seed=0, extractor="classifier")
    assert all(math.isfinite(value) for value in found.values())
    used = conditions(generated, reference)
    least = min(generated, real)
    assert (used.kid_subset_size, used.prc_neighbours) == (least, min(3, least - 1))
    assert used.is_splits == 1 and used.fid_rank_deficient == (least <= 6)


def test_full_sizes_use_the_protocol_of_the_papers():
    used = conditions(50_000, reference_of(random_features(12_000)))
    assert (used.is_splits, used.kid_subset_size, used.kid_subsets) == (10, 1000, 100)
    assert (used.prc_generated, used.prc_reference, used.prc_neighbours) == (10_000, 10_000, 3)
    assert used.reference_images == 12_000 and not used.fid_rank_deficient


@pytest.mark.parametrize("sizes", [(1, 9), (9, 1)])
def test_one_image_is_refused(sizes):
    with pytest.raises(UserError, match=">= 2, got 1"):
        fake, real = (random_features(size) for size in sizes)
        scores(fake, reference_of(real), seed=0, extractor="classifier")


def test_subset_of_the_reference_is_a_seeded_permutation():
    real = random_features(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    reference = reference_of(real, seed=4, subset=20)
    np.testing.assert_array_equal(reference.subset, real.features[order[:20]].numpy())
    np.testing.assert_allclose(reference.mean, real.features.double().mean(0).numpy())
    assert reference.size == 50 and reference.covariance.dtype == np.float64


def test_generated_images_of_precision_and_recall_are_bounded(monkeypatch):
    monkeypatch.setattr(score_module, "SUBSET", 30)
    fake, real = random_features(80), random_features(80, seed=1, shift=0.7)
    reference = reference_of(real, subset=30)
    part = fake.features[torch.randperm(80, generator=torch.Generator().manual_seed(2))[:30]]
    found = scores(fake, reference, seed=2, extractor="classifier")
    expected = slow_coverage(part, torch.from_numpy(reference.subset), 3)
    assert found["precision@80/classifier"] == pytest.approx(expected, abs=1e-6)
    assert conditions(80, reference).prc_generated == 30


@pytest.mark.parametrize("damage", [None, b"no zip", b"", "truncated", "pickle", "no key"])
def test_reference_is_cached_by_content(tmp_path, caplog, damage):
    calls = []

    def compute():
        calls.append(1)
        return random_features(30)

    options = {"key": "digits/0", "cache_dir": tmp_path, "seed": 0}
    first = reference_statistics(compute, **options)
    (file,) = tmp_path.glob("[!.]*")
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage:
        arrays = {"size": 3} if damage == "no key" else dict.fromkeys(("mean", "size"), [None])
        np.savez(file, **{name: np.array(value, dtype=object) for name, value in arrays.items()})
    with caplog.at_level(logging.WARNING):
        again = reference_statistics(compute, **options)
    assert len(calls) == (1 if damage is None else 2)
    assert ("computing it again" in caplog.text) == (damage is not None)
    for name in ("mean", "covariance", "subset", "size"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert list(tmp_path.glob("[!.]*")) == [file] and file.match("reference-*.npz")

    before = len(calls)
    for changed in ({"key": "digits/1"}, {"seed": 1}, {"subset": 5}):
        reference_statistics(compute, **{**options, **changed})
    assert len(calls) == before + 3


@pytest.mark.parametrize(
    ("size", "name"), [(10_000, "10k"), (5024, "5024"), (512, "512"), (1000, "1k"), (0, "0")]
)
def test_size_names(size, name):
    assert size_name(size) == name


# uncertainty


def maps(count=12, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 3, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize("levels", [None, 3, 2])
def test_spearman_against_scipy_with_and_without_ties(levels):
    a, b = (torch.rand(5, 40, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, rtol=1e-12, atol=1e-15)


def test_spearman_of_constants_and_nans_is_nan():
    a = torch.arange(7.0)
    assert spearman(a, torch.full((7,), 0.1)).isnan()
    assert spearman(a, a.where(a != 3, torch.nan)).isnan()
    assert spearman(a, a) == 1 and spearman(a, -a) == -1


def test_image_and_pixel_rank_against_loops():
    a, b = maps(), maps() + 0.5 * maps(seed=1)
    a[3], b[4, 0] = a[3].round(), b[4, 0].round()  # ties
    expected = scipy.stats.spearmanr(a.sum((1, 2, 3)), b.sum((1, 2, 3))).statistic
    assert image_rank(a, b) == pytest.approx(expected, rel=1e-12)
    per_image = [
        scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic
        for x, y in zip(a, b, strict=True)
    ]
    assert pixel_rank(a, b) == pytest.approx(np.mean(per_image), rel=1e-12)
    a[0] = 1.0  # a constant map has no ranks
    assert pixel_rank(a, b) == pytest.approx(np.mean(per_image[1:]), rel=1e-12)


def test_spread_ratio_is_the_median_and_leaves_impossible_images_out():
    b = maps(5)
    factors = torch.tensor([0.5, 2.0, 8.0, 0.25, 1.0], dtype=torch.float64).view(5, 1, 1, 1)
    assert spread_ratio(factors * b, b) == pytest.approx(1.0)
    assert spread_ratio(b / 60, b) == pytest.approx(1 / 60)
    a = factors * b
    a[2] *= -1
    a[4] = 0
    assert spread_ratio(a, b) == pytest.approx(0.5)
    assert math.isnan(spread_ratio(-b, b))


@pytest.mark.parametrize("figure", [image_rank, pixel_rank, spread_ratio])
def test_maps_of_different_images_are_refused(figure):
    with pytest.raises(ValueError, match="equal shapes"):
        figure(maps(4), maps(5))


def test_bootstrap_equals_a_loop_and_is_seeded(monkeypatch):
    a, b = maps(15).sum((1, 2, 3)), maps(15, seed=1).sum((1, 2, 3))
    index = torch.randint(15, (200, 15), generator=torch.Generator().manual_seed(7))
    slow = [scipy.stats.spearmanr(a[i], b[i]).statistic for i in index]
    expected = np.quantile(slow, [0.05, 0.95])
    found = bootstrap_interval(spearman, a, b, seed=7, resamples=200, level=0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # Blocks only bound the memory.
    monkeypatch.setattr("bayesdiff.metrics.agreement.BLOCK", 15 * 64)
    assert bootstrap_interval(spearman, a, b, seed=7, resamples=200, level=0.9) == found
    assert bootstrap_interval(spearman, a, b, seed=8, resamples=200, level=0.9) != found


def test_bootstrap_interval_of_a_mean_has_the_textbook_width():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(lambda v: v.mean(-1), values, seed=0, resamples=4000)
    width = 2 * 1.96 * float(values.std()) / 20
    assert high - low == pytest.approx(width, rel=0.05)
    assert low < float(values.mean()) < high


def test_agreement_holds_each_figure_with_its_interval():
    a, b = maps(40, dtype=torch.float32), maps(40, dtype=torch.float32) + maps(40, seed=1).float()
    found = agreement(a, b, seed=0, resamples=200)
    for name, figure in [
        ("image_rank", image_rank),
        ("pixel_rank", pixel_rank),
        ("spread_ratio", spread_ratio),
    ]:
        assert found[name] == pytest.approx(figure(a, b))
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert len(found) == 9 and found == agreement(a, b, seed=0, resamples=200)


def test_variance_statistics_against_loops():
    variance = maps(10, dtype=torch.float32) - 0.1
    labels = torch.tensor([0, 0, 2, 2, 2, 5, 5, 5, 5, 5])
    sums = variance.double().sum((1, 2, 3)).numpy()
    found = variance_statistics(variance, labels)
    assert found["mean"] == pytest.approx(sums.mean())
    assert found["sd"] == pytest.approx(sums.std())
    assert found["negative_share"] == pytest.approx((variance.numpy() < 0).mean())
    assert 0 < found["negative_share"] < 1
    for k in (0, 2, 5):
        assert found[f"class_{k}"] == pytest.approx(sums[labels.numpy() == k].mean())
    named = variance_statistics(variance, labels, ("cat/top", "dog", "99999"))
    assert [named[f"class_{name}"] for name in ("cat-top", "99999", "5")] == [
        found[f"class_{k}"] for k in (0, 2, 5)
    ]
    assert len(found) == 6 and len(variance_statistics(variance)) == 3
    assert "sd" not in variance_statistics(variance[:1])
