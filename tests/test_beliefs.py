"""What a Bayesian flow network is unsure about: closed forms, brute force, and a small run."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Compose
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import Pixels
from bayesdiff.likelihoods import Bernoulli, Classes
from bayesdiff.models import BeliefNetwork, GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import QuadraticAccuracy
from bayesdiff.solvers import BayesianUpdate, SampleNoise
from bayesdiff.studies.beliefs import results
from bayesdiff.studies.beliefs.beliefs import Beliefs, nearest
from bayesdiff.studies.beliefs.held_out import LEVELS, Teacher, calibration, spread
from bayesdiff.studies.beliefs.predictive import HeadPredictive, entropy, largest_entropy
from bayesdiff.studies.beliefs.shifts import inverted, shifted, shuffled
from bayesdiff.studies.beliefs.trajectory import commit_times, follow, maps_of
from bayesdiff.uncertainty import Start

DOUBLE = torch.float64
# E h(2 beta + 2 sqrt(beta) xi) by quadrature: entropy of a binary belief of accuracy beta.
BELIEF = {
    0.0: 0.693147, 0.09: 0.650062, 1.0: 0.356316, 2.25: 0.166370, 3.0: 0.107208, 9.0: 0.003849,
}  # fmt: skip
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(100)


def h(logits):
    p = torch.as_tensor(logits, dtype=DOUBLE).sigmoid()
    return -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)


def of_belief(beta):
    values = h(2 * beta + 2 * math.sqrt(beta) * torch.from_numpy(NODES))
    return float(torch.from_numpy(WEIGHTS / WEIGHTS.sum()) @ values)


def untrained(size=8):
    """The network that repeats the belief: the exact posterior of independent pixels."""
    path, law = QuadraticAccuracy(9.0), Bernoulli(sampled=True)
    torch.manual_seed(0)
    net = UNet(1, size, channels=(4, 8), blocks=1, attention=False)
    belief = BeliefNetwork(net, path, law, skip=True, residual=True)
    return GenerativeModel(belief, path, "data", torch.optim.SGD, likelihood=law).eval(), path, law


def silent(features):
    """A head that is certain of its weights."""
    return SimpleNamespace(epistemic=torch.zeros(len(features), 1, 1, 1))


# Entropies


@pytest.mark.parametrize("beta", BELIEF)
def test_entropy_of_beliefs_that_received_data(beta):
    assert of_belief(beta) == pytest.approx(BELIEF[beta], abs=1e-6)
    path, generator = QuadraticAccuracy(9.0), torch.Generator().manual_seed(0)
    c = path.coefficients(torch.tensor(math.sqrt(beta / 9), dtype=DOUBLE))
    noise = torch.randn(100_000, 1, dtype=DOUBLE, generator=generator)
    for x in (1, -1):  # neither black nor white matters
        logits = Bernoulli().belief_logits(c.alpha * x + c.sigma * noise, torch.tensor(beta))
        found = entropy(Bernoulli().log_probabilities(logits))
        error = float(found.std()) / math.sqrt(len(noise))
        assert float(found.mean()) == pytest.approx(BELIEF[beta], abs=4 * error + 1e-6)
        assert error <= 0.01 * BELIEF[beta] or beta == 9


def test_entropies_of_classes():
    law, logits = Classes(3), torch.tensor([[0.0, 0, 0], [3, 0, -2]], dtype=DOUBLE)[..., None]
    p = logits.softmax(1).squeeze(-1)
    found = entropy(law.log_probabilities(logits))
    torch.testing.assert_close(found.flatten(), -(p * p.log()).sum(1))
    assert float(found[0]) == pytest.approx(math.log(3)) == largest_entropy(law)
    assert largest_entropy(Bernoulli()) == pytest.approx(math.log(2))
    extreme = Bernoulli().log_probabilities(torch.tensor([[-800.0], [0], [800]]))
    assert entropy(extreme).flatten().tolist() == pytest.approx([0, math.log(2), 0])


def test_the_curvature_of_a_pixel():
    logit = torch.tensor([[math.log(0.3 / 0.7)]], dtype=DOUBLE)
    assert float(Bernoulli().hessian(logit)) == pytest.approx(0.21)


# Weights and data


class Varies:
    """A posterior with a known variance of the logit, and known draws."""

    def __init__(self, variance, weights=None):
        self.variance, self.weights = variance, weights

    def predictive_variance(self, features):
        return torch.full_like(features[:, :1], self.variance)

    def draw(self, n, generator):
        return self.weights[:n]


def network(head):
    return SimpleNamespace(head=head, fold=lambda output: output)


@pytest.mark.parametrize("mean, variance", [(0.3, 2.0), (-4.0, 1.0), (2.0, 9.0)])
def test_a_logit_is_averaged_over_the_weights(mean, variance):
    features = torch.full((1, 1, 1, 2), mean)
    found = HeadPredictive(network(nn.Identity()), Bernoulli(), Varies(variance))(features)
    generator = torch.Generator().manual_seed(0)
    z = mean + math.sqrt(variance) * torch.randn(400_000, dtype=DOUBLE, generator=generator)
    average = float(z.sigmoid().mean())
    total = float(h(math.log(average / (1 - average))))
    assert found.total.flatten().tolist() == pytest.approx([total] * 2, abs=2e-3)
    assert found.aleatoric.flatten().tolist() == pytest.approx([float(h(z).mean())] * 2, abs=2e-3)
    torch.testing.assert_close(found.total, entropy(found.log_p))
    assert (found.epistemic > 1e-3).all()


def test_certain_weights_leave_all_to_the_data():
    z = torch.linspace(-60, 60, 200).view(1, 1, 10, 20)
    for variance in (0.0, 1e-8, 3.0):
        found = HeadPredictive(network(nn.Identity()), Bernoulli(), Varies(variance))(z)
        assert (found.epistemic >= 0).all() and found.log_p.isfinite().all()
        if not variance:
            assert found.epistemic.max() < 1e-14
            torch.testing.assert_close(found.aleatoric, h(z.double()), rtol=1e-6, atol=1e-12)


def test_many_logits_are_averaged_by_draws():
    generator = torch.Generator().manual_seed(0)
    head, law = nn.Conv2d(2, 3, 1), Classes(3)
    weights = torch.randn(5, 3, 3, dtype=DOUBLE, generator=generator)
    features = torch.randn(2, 2, 4, 4, generator=generator)
    made = HeadPredictive(network(head), law, Varies(0, weights), draws=5)(features)
    p = []
    for w in weights:  # (C_out, P): two weights and the bias
        logits = torch.einsum("kd,bdhw->bkhw", w[:, :2], features.double())
        p.append((logits + w[:, 2].view(1, 3, 1, 1)).softmax(1))
    p = torch.stack(p)
    total = -(p.mean(0) * p.mean(0).log()).sum(1)
    aleatoric = -(p * p.log()).sum(2).mean(0)
    torch.testing.assert_close(made.total[:, 0], total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.aleatoric[:, 0], aleatoric, rtol=1e-4, atol=1e-6)
    assert (made.epistemic > 0).all()


# Along the sampler


def test_the_untrained_sampler_keeps_the_law_of_beliefs():
    """Its curve is the closed form at every time, and the output says what the belief does."""
    model, path, law = untrained()
    n, shape = 5, (1, 8, 8)
    data = SimpleNamespace(images=torch.zeros(1, *shape))
    start = Start(
        model, BayesianUpdate(n), None, SampleNoise(0, range(250), shape), torch.device("cpu")
    )
    times = [k / n for k in range(n + 1)]
    rows = follow(start, law, silent, Pixels(data), times, [0, n])
    torch.testing.assert_close(rows["entropy"], rows["belief"], rtol=1e-4, atol=1e-5)
    found = rows["belief"].mean(0).tolist()
    assert found == pytest.approx([of_belief(9 * t * t) for t in times], abs=0.008)
    assert found == sorted(found, reverse=True)
    assert rows["frames.belief"].shape == (250, 2, *shape) and rows["images"].unique().numel() == 2
    assert float(rows["accumulated"].mean()) == pytest.approx(sum(found[:-1]) / n, rel=1e-4)
    shares = [(2 * k + 1) / n**2 for k in range(n)]
    weighted = sum(a * e for a, e in zip(shares, found, strict=False))
    assert float(rows["weighted"].mean()) == pytest.approx(weighted, rel=1e-4)


def test_held_out_images_give_the_same_beliefs_in_any_batches():
    model, path, law = untrained()
    teacher = Teacher(model, law, path, silent, 3, torch.device("cpu"))
    x = torch.where(torch.rand(64, 1, 8, 8) < 0.3, 1.0, -1.0)
    whole = teacher.on_grid(x, range(64), [0.0, 0.5, 1.0])
    part = teacher.on_grid(x[5:7], [5, 6], [0.0, 0.5, 1.0])
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][5:7])
    truth = [of_belief(9 * t * t) for t in (0, 0.5, 1)]
    assert whole["entropy"].mean(0).tolist() == pytest.approx(truth, abs=0.02)


def test_times_of_images_fill_their_interval_evenly():
    places = spread(range(100), 3).sort().values
    assert places[0] >= 0 and places[-1] < 1 and float(places.diff().max()) < 0.03


def test_commit_times_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(6, 40, generator=generator) * torch.linspace(1, 0.4, 6)[:, None]
    times = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    found = commit_times(entropies, times, 0.3)
    for k, own in enumerate(entropies.T.tolist()):
        starts = [t for i, t in enumerate(times) if all(v < 0.3 for v in own[i:])]
        assert float(found[k]) == pytest.approx(min(starts, default=math.inf))
    assert found.isinf().any() and len(found.unique()) > 3


def test_frames_are_shown_once():
    assert nearest([0, 0.25, 0.5, 0.75, 1], [1, 0.1, 0.0, 0.4, 0.6]) == [0, 2, 4]


def test_accumulated_maps():
    entropies = torch.tensor([[4.0, 1], [2, 1], [100, 100]])  # what is left at t = 1 counts not
    found = maps_of(entropies, [0, 0.5, 1], torch.tensor([0.25, 0.75]))
    assert found["accumulated"].tolist() == [3, 1] and found["weighted"].tolist() == [2.5, 1]


# Numbers


def measured(count=30, values=40, bins=2, seed=0):
    """Rows as ``Teacher.in_bins`` gives them."""
    g = torch.Generator().manual_seed(seed)
    wrong = torch.rand(count, bins, values, generator=g) < 0.2
    rows = {"pixels.wrong": wrong}
    for name in results.SCORES:
        rows[f"pixels.{name}"] = torch.rand(wrong.shape, generator=g) + 0.5 * wrong
        rows[name] = rows[f"pixels.{name}"].mean(2)
    p = 0.5 + 0.5 * torch.rand(count, 1, 2, values, generator=g)
    log_p, index = torch.stack([p, 1 - p], 3).log(), torch.rand(count, 1, values, generator=g)
    parts = [calibration(log_p.unbind(2), (index > p[:, :, 0]).long()) for _ in range(bins)]
    rows |= {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}
    return rows | {"aleatoric": rows["entropy"]}


def test_auroc_is_that_of_scikit_learn():
    held, other = measured(), measured(seed=1)
    draw = results.Intervals(60, 0)
    bins = results.over_bins(held, other, draw)
    whole = results.figures(held, other, bins, draw)
    for score in results.SCORES:
        truths = []
        for k, row in enumerate(bins):
            wrong, own = held["pixels.wrong"][:, k].flatten(), held[f"pixels.{score}"][:, k]
            truths.append(roc_auc_score(wrong, own.flatten()))
            name = f"{score}.auroc_wrong_pixels"
            assert row[name] == pytest.approx(truths[-1])
            assert row[f"{name}_low"] < truths[-1] < row[f"{name}_high"]
        assert whole[name] == pytest.approx(sum(truths) / 2)
        assert whole[f"{name}_low"] < whole[name] < whole[f"{name}_high"]
        both = torch.cat([held[score].mean(1), other[score].mean(1)])
        truth = roc_auc_score([0] * 30 + [1] * 30, both)
        assert whole[f"{score}.auroc_shift"] == pytest.approx(truth)
    # Levels of a score in place of the scores themselves, for the intervals.
    statistic, index = results._pixels(held["pixels.entropy"][:, 0], held["pixels.wrong"][:, 0])
    assert float(statistic(index)) == pytest.approx(
        bins[0]["entropy.auroc_wrong_pixels"], abs=3e-3
    )
    ties, wrong = (4 * held["pixels.entropy"][:, 0]).round(), held["pixels.wrong"][:, 0]
    statistic, index = results._pixels(ties, wrong)
    assert float(statistic(index)) == pytest.approx(roc_auc_score(wrong.flatten(), ties.flatten()))


def test_without_wrong_pixels_there_is_no_auroc():
    held = measured() | {"pixels.wrong": torch.zeros(30, 2, 40, dtype=torch.bool)}
    bins = results.over_bins(held, None, results.Intervals(10, 0))
    found = results.figures(held, None, bins, results.Intervals(10, 0))
    assert math.isnan(found["entropy.auroc_wrong_pixels"])
    assert "entropy.auroc_shift" not in found


def test_calibration_by_hand():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(3, (4, 2, 10), generator=generator)
    log_p = torch.randn(4, 2, 3, 10, generator=generator, dtype=DOUBLE).log_softmax(2)
    found = calibration([log_p], index)
    p, true = log_p.exp().movedim(2, -1).reshape(-1, 3).numpy(), index.flatten().numpy()
    assert float(found["nll"].mean()) == pytest.approx(log_loss(true, p))
    assert float(found["brier"].mean()) == pytest.approx(
        ((p - np.eye(3)[true]) ** 2).sum(1).mean()
    )
    top, right, error = p.max(1), p.argmax(1) == true, 0.0
    level = np.minimum((top * LEVELS).astype(int), LEVELS - 1)
    for k in range(LEVELS):
        if (own := level == k).any():
            error += own.mean() * abs(top[own].mean() - right[own].mean())
    statistic, images = results._ece(found["confidence"][:, 0])
    assert float(statistic(images)) == pytest.approx(error)
    assert sum(row["values"] for row in results.reliability(found["confidence"])) == 80
    twice = statistic(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]))
    assert twice[0] == twice[1] == statistic(torch.tensor([0, 1]))


# Other data


def test_shifted_images():
    images = torch.randint(256, (5, 1, 4, 6), dtype=torch.uint8)
    assert torch.equal(inverted(inverted(images)), images)
    moved = shuffled(images)
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(shuffled(images[2:3]), moved[2:3]) and not torch.equal(moved, images)
    other = ImageData.build("other", images, None, images, None)
    found = shifted(other, images[:3], "dynamic", torch.tensor([0, 7, 2]))
    assert set(found.unique().tolist()) <= {0, 255}
    kept = shifted(other, images[:3], None, torch.tensor([0, 7, 2]))
    assert torch.equal(kept, images[[0, 2, 2]])
    for wrong, match in (
        ((3, images[:2]), "beliefs.shift=3 gives no images"),
        ((other, images[:, :, :3]), "images of 1x4x6, the model is of 1x3x6"),
        ((other, torch.cat([images] * 2)), "has 5 test images, beliefs.num_images=10"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            shifted(*wrong, None, torch.arange(2))
        assert "\n" not in str(caught.value)


# The study

SMALL = (
    *("experiment=beliefs", "model=bfn", "data=binary_digits", "uncertainty.num_images=2"),
    *("beliefs.num_images=6", "beliefs.num_samples=3", "beliefs.bootstrap=20", "beliefs.bins=2"),
)


def test_a_small_study(compose: Compose):
    result = pipeline.run(compose(*SMALL, "data.resize=8", "shift@beliefs.shift=shuffled"))
    (folder,) = result.studies
    found = json.loads((folder / "results.json").read_text())
    for score in results.SCORES:
        for what in ("wrong_pixels", "shift"):
            assert 0 <= found[f"{score}.auroc_{what}"] <= 1
            assert f"beliefs/{score}.auroc_{what}" in result.metrics
    assert found["conditions"]["shift"] == "shuffled"
    assert [row["t"] for row in found["curve"]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert found["curve"][0]["sampler.belief"] == pytest.approx(math.log(2), rel=1e-5)
    assert all(row["total"] == pytest.approx(row["aleatoric"] + row["epistemic"], abs=1e-6)
               and row["epistemic"] > 0 for row in found["bins"])  # fmt: skip
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert captions.keys() == {
        "samples_and_maps", "evolution", "over_time", "decomposition", "calibration", "detection",
    }  # fmt: skip
    assert all("seed" in str(each) for each in captions.values())


def test_classes_have_beliefs_too(compose: Compose, without_reports):
    result = pipeline.run(
        compose(
            *SMALL, "data=digits", "data_type=discrete", "model.likelihood.levels=3",
            "beliefs.draws=3", "beliefs.shift=null",
        )
    )  # fmt: skip
    found = json.loads((result.studies[0] / "results.json").read_text())
    assert found["curve"][0]["sampler.belief"] == pytest.approx(math.log(3), rel=1e-5)
    assert all(0 < row["epistemic"] < row["total"] < math.log(3) for row in found["bins"])
    assert "entropy.auroc_shift" not in found


@pytest.mark.parametrize(
    "more, match",
    [
        (["data_type=continuous"], "beliefs is about classes, likelihood=gaussian is of numbers"),
        (["model=flow"], "beliefs is about classes, likelihood=gaussian"),
        (
            ["model=flow", "likelihood=bernoulli", "model.prediction=data"],
            "Bayesian flow networks",
        ),
        (["beliefs.num_images=301"], "num_images=301 is more than the 300 held-out images"),
        (["model.num_classes=auto", "model.class_dropout=0"], "model.class_dropout=0 never"),
    ],
)
def test_what_has_no_beliefs_is_refused_before_any_work(compose: Compose, more, match):
    with pytest.raises(UserError, match=match) as caught:
        pipeline.prepare(compose(*SMALL, *more))
    assert "\n" not in str(caught.value)


class Two(BayesianUpdate):
    """Looks twice in every step."""

    name = "two"

    def steps(self, path, prediction, times):
        found = super().steps(path, prediction, times)
        twice = {"inputs": ((1.0,), (1.0, 0.0))}
        return [replace(s, times=2 * s.times, output=(*s.output, 0.0), **twice) for s in found]


def test_a_solver_of_several_evaluations_a_step_is_refused(compose: Compose):
    run, _, estimator, _ = pipeline.prepare(compose(*SMALL))
    with pytest.raises(UserError, match="one evaluation a step, solver=two .* solver=bfn"):
        run.studies["beliefs"].check(run, Two(3), estimator)


@pytest.mark.parametrize(
    "options",
    [{"num_images": 1}, {"num_samples": 0}, {"bins": 0}, {"draws": 1}, {"bootstrap": 1},
     {"batch_size": 0}, {"seed": -1}, {"times": []}, {"times": [2]}, {"times": 0.5}],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(UserError, match=f"beliefs.{next(iter(options))}") as caught:
        Beliefs(**options)
    assert "\n" not in str(caught.value)
