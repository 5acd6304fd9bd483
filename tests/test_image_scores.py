"""Scores of images from maps, members, a classifier and the image alone; higher is worse (T15)."""

import math
import zlib
from dataclasses import replace

import pytest
import torch
from hand import FLOW, LINEAR, Hand, Noise, curved, model_of, plain, start_of
from torch.nn.functional import one_hot

from bayesdiff.checks import UserError
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise, integrate
from bayesdiff.uncertainty.scores.aleatoric import _FORK, aleatoric, answer_spread
from bayesdiff.uncertainty.scores.of_maps_and_images import (
    FLOOR,
    IMAGE_SCORES,
    MAP_SCORES,
    foreground_mean,
    otsu_mask,
    patch_max,
    percentile,
    top_mean,
)
from bayesdiff.uncertainty.scores.of_members import (
    CONFIDENCE_SCORES,
    FEATURE_FLOOR,
    MEMBER_SCORES,
    log_det,
    mutual_information,
    semantic_entropy,
    semantic_variance,
    unconfidence,
)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found, expected, rtol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected.view(found.shape), rtol=rtol, atol=1e-12)


# A map with four doubtful pixels in a corner, one in the opposite corner, and a negative one.
MAP = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
MAP[..., :2, :2], MAP[..., 7, 7], MAP[..., 4, 4] = 4, 1, -3
# Six bright pixels, of which the four doubtful ones.
IMAGE = torch.full_like(MAP, -1)
IMAGE[..., :2, :3] = 0.7
LOG = (4 * math.log(4 + FLOOR) + math.log(1 + FLOOR) + 59 * math.log(FLOOR)) / 64
BY_HAND = {
    "sum": 17,
    "mean": 17 / 64,
    "mean_deviation": 9 / 64,
    "mean_log": LOG,
    "patch_max": 4,
    "foreground_mean": 16 / 6,
    "percentile_50": 0,
    "percentile_90": 0,
    "percentile_99": 4,
    "map_variance": 65 / 64 - (17 / 64) ** 2,
    "top_mean": 4,
}


@pytest.mark.parametrize("name", MAP_SCORES)
def test_a_map_made_by_hand_has_known_scores(name):
    close(MAP_SCORES[name](MAP, IMAGE), BY_HAND[name])


def test_an_image_without_foreground_counts_as_a_whole():
    for image, mask in ((IMAGE, torch.zeros_like(MAP)), (torch.full_like(IMAGE, 0.3), None)):
        close(foreground_mean(MAP, image, mask), 17 / 64)


def test_a_mask_of_ones_own_is_used_for_every_channel():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 7, 6:] = True
    both = torch.cat([MAP, 3 * MAP], 1)
    close(foreground_mean(both, both, mask), (1 + 3) / 4)
    close(foreground_mean(both, both, mask.double() / 4), (1 + 3) / 4)
    with pytest.raises(UserError, match=r"is \(N, 1, H, W\), got \(1, 2, 8, 8\)"):
        foreground_mean(both, both, mask.expand(1, 2, 8, 8))


def test_cells_shares_and_percentages_are_settings():
    close(patch_max(MAP, 8), 17 / 64)
    close(patch_max(MAP, 3), 16 / 9)
    corner = MAP.clone()
    corner[..., :2, :2] = 0
    close(patch_max(corner, 3), 1 / 4)  # the last cell has 2 x 2 pixels
    close(percentile(MAP, 93), 0.93 * 63 - 58)
    close(percentile(MAP, 100), 4)
    close(top_mean(MAP, 0.1), 17 / 7)
    for call, message in (
        (lambda: patch_max(MAP, 9), "patch=9 is more than the image's 8 x 8"),
        (lambda: patch_max(MAP, 0), "patch must be a whole number >= 1"),
        (lambda: percentile(MAP, 101), "percent must be between 0 and 100, got 101"),
        (lambda: top_mean(MAP, 1.0), "part must be a number from 0 to below 1"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def slow_map_scores(variance, image):
    """One image's scores, value by value."""
    values = [max(float(v), 0.0) for v in variance.flatten()]
    size, ordered = len(values), sorted(values)
    average = sum(values) / size
    side = variance.shape[-1]
    cell = -(-side // 4)
    starts = range(0, side, cell)
    cells = []
    for row in starts:
        for column in starts:
            part = variance[:, row : row + cell, column : column + cell].clamp(min=0)
            cells.append(float(part.sum()) / part.numel())
    mask = slow_otsu(image)
    inside = [float(variance[(c, *at)].clamp(min=0)) for at in mask for c in range(len(variance))]

    def at(percent):
        place = percent / 100 * (size - 1)
        low = int(place)
        high = min(low + 1, size - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    count = max(1, math.ceil(size / 100))
    return {
        "sum": sum(values),
        "mean": average,
        "mean_deviation": sum(v**0.5 for v in values) / size,
        "mean_log": sum(math.log(v + FLOOR) for v in values) / size,
        "patch_max": max(cells),
        "foreground_mean": sum(inside) / len(inside),
        "percentile_50": at(50),
        "percentile_90": at(90),
        "percentile_99": at(99),
        "map_variance": sum((v - average) ** 2 for v in values) / size,
        "top_mean": sum(ordered[-count:]) / count,
    }


def slow_otsu(image):
    """Pixels of the brighter part, by trying every grey as a threshold."""
    grey = image.mean(0)
    best, chosen = math.inf, None
    for threshold in grey.unique()[1:]:
        parts = [grey[grey < threshold], grey[grey >= threshold]]
        within = sum(float(((part - part.mean()) ** 2).sum()) for part in parts)
        if within < best - 1e-12:
            best, chosen = within, threshold
    return [tuple(place) for place in (grey >= chosen).nonzero().tolist()]


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 10), (2, 13)])
def test_every_map_score_equals_a_slow_loop(channels, side):
    variance = random(4, channels, side, side).exp() - 0.3
    image = random(4, channels, side, side, seed=1).clamp(-1, 1)
    slow = [slow_map_scores(v, x) for v, x in zip(variance, image, strict=True)]
    for name, score in MAP_SCORES.items():
        close(score(variance, image), [found[name] for found in slow], rtol=1e-10)


def test_the_foreground_does_not_depend_on_brightness_or_contrast():
    image = (random(5, 3, 9, 9).sign() + 0.2 * random(5, 3, 9, 9, seed=1)).round(decimals=1)
    assert 0 < otsu_mask(image).double().mean() < 1
    assert torch.equal(otsu_mask(image), otsu_mask(0.25 * image - 0.5))


def corrupted():
    """Maps and images of two kinds: the second is more doubtful by every score of maps."""
    quiet = 0.01 + 0.001 * random(1, 1, 8, 8).abs()
    bad = 3 * quiet
    bad[..., :2, :3] += 0.5
    return torch.cat([quiet, bad]), IMAGE.expand(2, -1, -1, -1)


@pytest.mark.parametrize("name", MAP_SCORES)
def test_a_more_doubtful_map_scores_higher(name):
    low, high = MAP_SCORES[name](*corrupted())
    assert high > low


CLEAN = torch.zeros(1, 1, 8, 8)
NOISY = random(1, 1, 8, 8).clamp(-0.9, 0.9).float()
WORSE = {  # the less and the more doubtful image
    "total_variation": (CLEAN, NOISY),
    "opposite_total_variation": (NOISY, CLEAN),
    "compressed_size": (CLEAN, NOISY),
    "opposite_compressed_size": (NOISY, CLEAN),
    "saturation": (CLEAN, CLEAN + 1),
    "opposite_saturation": (CLEAN + 1, CLEAN),
}


@pytest.mark.parametrize("name", IMAGE_SCORES)
def test_scores_of_the_image_alone_discard_the_named_end_first(name):
    better, worse = (float(IMAGE_SCORES[name](image)) for image in WORSE[name])
    assert worse > better


def test_scores_of_the_image_alone_equal_slow_loops():
    images = 0.9 * random(4, 3, 5, 6)
    bytes_ = [
        [round((min(max(float(v), -1), 1) + 1) * 127.5) for v in image.flatten()]
        for image in images
    ]
    seen = images.clamp(-1, 1)
    variation = [
        sum(
            float((image[c, i, j] - image[c, k, n]).abs())
            for c in range(3)
            for i in range(5)
            for j in range(6)
            for k, n in ((i + 1, j), (i, j + 1))
            if k < 5 and n < 6
        )
        for image in seen
    ]
    expected = {
        "total_variation": variation,
        "saturation": [sum(v in (0, 255) for v in row) / 90 for row in bytes_],
        "compressed_size": [len(zlib.compress(bytes(row), 9)) for row in bytes_],
    }
    for name, values in expected.items():
        close(IMAGE_SCORES[name](images), values)
        close(IMAGE_SCORES[f"opposite_{name}"](images), [-v for v in values])


def drawn(n=3, m=5, seed=0):
    """What every score of members reads."""
    return {
        "images": random(n, m, 2, 4, 4, seed=seed),
        "features": random(n, m, 7, seed=seed + 1),
        "logits": 2 * random(n, m, 4, seed=seed + 2),
    }


@pytest.mark.parametrize("name", MEMBER_SCORES)
def test_members_that_differ_more_score_higher(name):
    score = MEMBER_SCORES[name]
    values = drawn(1, 6)[score.reads]
    nearer = values.mean(1, keepdim=True) + 0.01 * values
    low, high = score.of(torch.cat([nearer, values]))
    assert high > low


@pytest.mark.parametrize("name", MEMBER_SCORES)
def test_members_have_no_order(name):
    score = MEMBER_SCORES[name]
    values = drawn()[score.reads]
    close(score.of(values.flip(1)), score.of(values), rtol=1e-9)
    with pytest.raises(UserError, match="needs 2 or more of them, got 1"):
        score.of(values[:, :1])


def test_semantic_entropy_has_the_closed_form_of_one_feature_moved():
    same = random(1, 1, 512).expand(1, 2, -1).clone()
    expected = 256 * (math.log(FEATURE_FLOOR) + math.log(2 * math.pi) + 1)
    assert abs(expected + 1041.88882) < 5e-6
    close(semantic_entropy(same), expected)
    d = 0.37
    same[0, 0, 3] += d
    same[0, 1, 3] -= d
    close(semantic_entropy(same), expected + 0.5 * math.log(1 + d**2 / FEATURE_FLOOR), rtol=1e-11)
    close(semantic_variance(same), d**2, rtol=1e-9)
    close(semantic_variance(same, correction=1), 2 * d**2, rtol=1e-9)


def test_small_differences_of_large_single_precision_features_are_not_lost():
    features = torch.tensor([[[1000.0], [1000.0625]]])
    close(semantic_variance(features), 0.03125**2)


def test_features_of_unit_length_have_no_size():
    features = drawn()["features"]
    for score in (semantic_entropy, semantic_variance):
        close(score(7 * features, unit=True), score(features, unit=True), rtol=1e-9)
        assert not torch.allclose(score(7 * features), score(features))


def test_the_low_rank_determinant_is_that_of_the_whole_matrix():
    images = drawn()["images"]
    for floor in (FLOOR, 0.5):
        dense = [
            float(torch.logdet(image.flatten(1).T.cov() + floor * torch.eye(32).double()))
            for image in images
        ]
        close(log_det(images, floor), dense, rtol=1e-9)
    close(log_det(images[:, :1].expand(-1, 5, -1, -1, -1)), 3 * [32 * math.log(FLOOR)])
    with pytest.raises(UserError, match="floor must be positive"):
        log_det(images, 0.0)


def test_the_determinant_tells_correlated_pixels_from_independent_ones():
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]]).double().T
    together = signs[:, :1].expand(4, 2).reshape(1, 4, 1, 1, 2)
    apart = signs.reshape(1, 4, 1, 1, 2)
    close(together.var(1), apart.var(1))
    assert log_det(apart) > log_det(together) + 5


def slow_softmax(logits):
    exponentials = [math.exp(v) for v in logits]
    return [e / sum(exponentials) for e in exponentials]


def slow_entropy(probability):
    return -sum(p * math.log(p) for p in probability if p > 0)


def test_member_scores_equal_slow_loops():
    values = drawn()
    spread, entropy, information, against, score = [], [], [], [], []
    for features, logits in zip(values["features"], values["logits"], strict=True):
        variance = [float(column.var(correction=0)) for column in features.T]
        spread.append(sum(variance))
        entropy.append(
            sum(0.5 * math.log(2 * math.pi * math.e * (v + FEATURE_FLOOR)) for v in variance)
        )
        members = [slow_softmax(row.tolist()) for row in logits]
        mean = [sum(column) / 5 for column in zip(*members, strict=True)]
        score.append(slow_entropy(mean))
        information.append(slow_entropy(mean) - sum(map(slow_entropy, members)) / 5)
        votes = [max(range(4), key=member.__getitem__) for member in members]
        against.append(1 - max(votes.count(k) for k in range(4)) / 5)
    expected = {
        "semantic_entropy": entropy,
        "semantic_variance": spread,
        "predictive_entropy": score,
        "mutual_information": information,
        "dissent": against,
    }
    for name, numbers in expected.items():
        score = MEMBER_SCORES[name]
        close(score.of(values[score.reads]), numbers, rtol=1e-10)


def test_the_pixel_variance_of_members_is_the_sum_of_an_ensembles_map():
    images = drawn()["images"]
    slow = [
        sum(float(torch.stack(values).var()) for values in zip(*members.flatten(1), strict=True))
        for members in images
    ]
    close(MEMBER_SCORES["pixel_variance"].of(images), slow, rtol=1e-10)


def test_unsure_members_that_agree_share_no_information():
    certain = 1000.0 * one_hot(torch.tensor([[0, 1, 0, 1]]), 3)
    close(mutual_information(certain), math.log(2))
    close(MEMBER_SCORES["dissent"].of(certain), 0.5)
    unsure = torch.tensor([[[0.3, 0.2, 0.1]]]).expand(1, 4, 3)
    for name in ("mutual_information", "dissent"):
        close(MEMBER_SCORES[name].of(unsure), 0)


def test_confidence_scores_equal_slow_loops():
    logits, labels = 2 * random(5, 4), torch.tensor([0, 3, 1, 2, 0])
    rows = [slow_softmax(row) for row in logits.tolist()]
    expected = {
        "unconfidence": [1 - max(row) for row in rows],
        "class_entropy": [slow_entropy(row) for row in rows],
        "off_label": [1 - row[y] for row, y in zip(rows, labels.tolist(), strict=True)],
    }
    assert set(expected) == set(CONFIDENCE_SCORES)
    for name, numbers in expected.items():
        close(CONFIDENCE_SCORES[name](logits, labels), numbers, rtol=1e-10)
    with pytest.raises(UserError, match="off_label needs labels"):
        CONFIDENCE_SCORES["off_label"](logits, None)


@pytest.mark.parametrize("name", CONFIDENCE_SCORES)
def test_an_unsure_classifier_scores_higher(name):
    logits = torch.tensor([[9.0, 0, 0], [0.4, 0.1, 0]])
    low, high = CONFIDENCE_SCORES[name](logits, torch.tensor([0, 0]))
    assert high > low


def test_an_image_of_another_class_is_doubtful_however_sure_the_classifier_is():
    logits = torch.tensor([[0.0, 9, 0], [1, 0, 0]])
    wrong, right = CONFIDENCE_SCORES["off_label"](logits, torch.tensor([0, 0]))
    assert wrong > right
    assert unconfidence(logits)[0] < unconfidence(logits)[1]


def test_nearly_certain_images_are_still_ranked():
    found = unconfidence(torch.tensor([[60.0, 0, 0], [70.0, 0, 0]]))
    close(found, [2 * math.exp(-60), 2 * math.exp(-70)])
    assert found[0] > found[1] > 0


def all_scores():
    """Name and a function of image numbers to scores, for every score there is."""
    variance, images = random(6, 2, 8, 8).exp(), random(6, 2, 8, 8, seed=1)
    values, logits, labels = drawn(6), random(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    for name, score in MAP_SCORES.items():
        yield name, lambda i, score=score: score(variance[i], images[i])
    for name, score in IMAGE_SCORES.items():
        yield name, lambda i, score=score: score(images[i])
    for name, score in MEMBER_SCORES.items():
        yield name, lambda i, score=score: score.of(values[score.reads][i])
    for name, score in CONFIDENCE_SCORES.items():
        yield name, lambda i, score=score: score(logits[i], labels[i])


@pytest.mark.parametrize(("name", "score"), all_scores())
def test_a_score_does_not_depend_on_the_other_images_of_the_batch(name, score):
    everything = score(torch.arange(6))
    assert everything.dtype == torch.float64 and everything.shape == (6,)
    assert len(set(everything.tolist())) > 1
    order = torch.tensor([3, 0, 5])
    close(score(order), everything[order])
    close(score(order[:1]), everything[3:4])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_image_keeps_its_scores(turns):
    variance, images = random(3, 2, 8, 8).exp(), random(3, 2, 8, 8, seed=1)

    def turned(x):
        return x.rot90(turns, (-2, -1))

    for score in MAP_SCORES.values():
        close(score(turned(variance), turned(images)), score(variance, images), rtol=1e-10)
    for name in ("total_variation", "saturation"):
        close(IMAGE_SCORES[name](turned(images)), IMAGE_SCORES[name](images), rtol=1e-10)
    members = drawn()["images"]
    close(log_det(turned(members)), log_det(members), rtol=1e-10)


def linear_noise(kap):
    return model_of(Hand(lambda x, t, y: kap * x, [[1.0]]), LINEAR, "noise")


@torch.no_grad()
def test_aleatoric_spread_of_a_linear_network_has_a_closed_form():
    kap, x, t, draws = 0.7, 1.6, 0.5, 100_000
    sigma = float(LINEAR.coefficients(torch.tensor(t, dtype=torch.float64)).sigma)
    state = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    noise = random(draws, 1, 1, 1, 1)
    found = answer_spread(Field(linear_noise(kap), None, 1), state, t, noise)
    size, answer = (kap * sigma) ** 2, kap * x
    close(found[0], size * (noise - answer).square().mean(), rtol=1e-9)
    close(found[1], size * noise.var(), rtol=1e-9)
    for value, mean in zip(found, (size * (1 + answer**2), size), strict=True):
        assert abs(float(value) / mean - 1) < 0.02


def slow_answers(net, prediction, x, t, noise):
    """Answers at x and at states of the same predicted data, one draw after the other."""
    c = (LINEAR if prediction != "velocity" else FLOW).coefficients(
        torch.tensor(t, dtype=torch.float64)
    )
    alpha, sigma = float(c.alpha), float(c.sigma)

    def ask(state):
        raw = net.head(net.features(state, torch.full((len(state),), t)))
        if prediction == "velocity":
            return raw, state + (1 - t) * raw
        if prediction == "noise":
            return raw, (state - sigma * raw) / alpha
        return sigma * state + alpha * raw, alpha * state - sigma * raw

    answer, data = ask(x)
    return answer, torch.stack([ask(alpha * data + sigma * z)[0] for z in noise])


@pytest.mark.parametrize("prediction", ["velocity", "noise", "v"])
@torch.no_grad()
def test_aleatoric_spread_equals_a_slow_loop(prediction):
    net, _, _ = curved()
    path = FLOW if prediction == "velocity" else LINEAR
    x, noise = random(3, 1, 4, 4), random(6, 3, 1, 4, 4, seed=1)
    found = answer_spread(Field(model_of(net, path, prediction), None, 3), x, 0.6, noise)
    own, answers = slow_answers(net, prediction, x, 0.6, noise)
    close(found[0], sum((a - own) ** 2 for a in answers) / 6, rtol=1e-9)
    mean = sum(answers) / 6
    close(found[1], sum((a - mean) ** 2 for a in answers) / 5, rtol=1e-9)


CASES = {
    "flow": (FLOW, "velocity", Euler(10)),
    "ddim": (LINEAR, "noise", DDIM(10)),
    "ddim-eta": (LINEAR, "noise", DDIM(10, eta=0.8)),
}


def aleatoric_start(case, numbers=(0, 1, 2)):
    path, prediction, solver = CASES[case]
    start = start_of(model_of(curved()[0], path, prediction), solver, shape=(1, 4, 4))
    return replace(start, noise=SampleNoise(3, numbers, (1, 4, 4)))


@torch.no_grad()
def slow_aleatoric(case, numbers, draws):
    """Both forms over the numbered steps, one step and draw after the other."""
    start = aleatoric_start(case)
    net, prediction = start.model.net, CASES[case][1]
    fresh = start.noise.fork(_FORK)
    x, centred, variance = start.draw(), 0, 0
    states = []
    integrate(start.field(), start.steps(), x, start.draw, lambda step, x: states.append(x))
    for number in numbers:
        x = states[number - 1].double()
        noise = [fresh().double() for _ in range(draws)]
        own, answers = slow_answers(net, prediction, x, number / 10, noise)
        centred = centred + sum((a - own) ** 2 for a in answers) / draws
        mean = sum(answers) / draws
        variance = variance + sum((a - mean) ** 2 for a in answers) / (draws - 1)
    return centred, variance


@pytest.mark.parametrize("case", CASES)
def test_aleatoric_uncertainty_adds_up_the_last_fifth_of_the_steps(case):
    found = aleatoric(aleatoric_start(case), draws=4)
    assert torch.equal(found.images, plain(aleatoric_start(case)))
    assert found.times == pytest.approx((0.8, 0.9))
    assert found.nfe == 10 + 2 * (1 + 4)
    centred, variance = slow_aleatoric(case, (8, 9), 4)
    for name, maps, slow in (
        ("centred", found.centred, centred),
        ("variance", found.variance, variance),
    ):
        torch.testing.assert_close(maps.double(), slow, rtol=1e-4, atol=1e-7)
        close(found.scores[f"aleatoric_{name}"], maps.double().sum((1, 2, 3)))


@pytest.mark.parametrize("case", CASES)
def test_aleatoric_uncertainty_does_not_depend_on_the_batch(case):
    together = aleatoric(aleatoric_start(case), window=(0.0, 1.0))
    assert together.times == pytest.approx([k / 10 for k in range(10)])
    for numbers in ((2, 0), (1,)):
        alone = aleatoric(aleatoric_start(case, numbers), window=(0.0, 1.0))
        for name in ("images", "centred", "variance"):
            expected = getattr(together, name)[list(numbers)]
            torch.testing.assert_close(getattr(alone, name), expected, rtol=1e-6, atol=1e-7)
    other = aleatoric(aleatoric_start(case), seed=1)
    assert not torch.equal(other.variance, aleatoric(aleatoric_start(case)).variance)


def test_aleatoric_uncertainty_of_a_linear_network_ranks_by_the_answer_only_when_centred():
    start = start_of(linear_noise(0.5), DDIM(5), count=2)
    start = replace(start, noise=Signed(2, (1, 1, 1)))
    scores = aleatoric(start, draws=2000, window=(0.0, 0.2)).scores
    large, small = scores["aleatoric_centred"]
    assert large > 3 * small
    ratio = scores["aleatoric_variance"][0] / scores["aleatoric_variance"][1]
    assert abs(float(ratio) - 1) < 0.2


class Signed(Noise):
    """Starts one sample far out and one at 0."""

    def __call__(self):
        noise = super().__call__()
        if self.first is None:
            self.first, noise = False, torch.tensor([8.0, 0]).double().view(2, 1, 1, 1)
        return noise

    def fork(self, number):
        return Noise(len(self.indices), self.shape, seed=number)


@pytest.mark.parametrize("window", [(0.8, 0.8), (0.5, 0.52), (-0.1, 0.5), (0.5, 1.1)])
def test_a_window_without_steps_is_refused(window):
    with pytest.raises(UserError, match="holds none of the 10 steps"):
        aleatoric(aleatoric_start("flow"), window=window)
    with pytest.raises(UserError, match="draws must be a whole number >= 2"):
        aleatoric(aleatoric_start("flow"), draws=1)
