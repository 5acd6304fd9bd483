"""The factor of maps: by simulation with a known truth, on a run, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import Compose, Trained
from hand import Hand, model_of, only_bias
from test_bad_input import check_line, refused

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.held_out import held_out_gaps
from bayesdiff.runs.calibration import FIRST, calibration_numbers
from bayesdiff.sweeps.plan.cells import look
from bayesdiff.uncertainty import Ensemble, Samples
from bayesdiff.uncertainty.calibration import (
    Calibration,
    fitted,
    held_out_factor,
    pair_sizes,
    size_factor,
)
from bayesdiff.uncertainty.stored import stored_samples

pytestmark = pytest.mark.usefixtures("without_reports")

TRUTH = 16.0
DIRECTIONS = 8  # in which two networks differ, of unequal weight


def simulated(generator, networks, images, skew):
    """Sizes of maps, and networks whose variance is ``TRUTH`` times as large."""
    kind = {"generator": generator, "dtype": torch.float64}
    sizes = (skew * torch.randn(images, 1, **kind)).exp()
    variance = sizes * torch.randn(images, DIRECTIONS, **kind).softmax(1)
    drawn = torch.randn(networks, images, DIRECTIONS, **kind)
    return variance.sum(1), (TRUTH * variance).sqrt() * drawn


@pytest.mark.parametrize("skew", [0.3, 1.5])
@pytest.mark.parametrize("networks", [2, 3])
def test_a_known_factor_comes_back_within_its_interval(networks, skew):
    """One further training is one degree of freedom; intervals of more count chance twice."""
    generator = torch.Generator().manual_seed(networks)
    factors, inside = [], []
    for seed in range(200):
        maps, states = simulated(generator, networks, 64, skew)
        factor, low, high = fitted(maps, pair_sizes(states), seed=seed, resamples=300)
        factors.append(factor / TRUTH)
        inside.append(low < TRUTH < high)
    found = torch.tensor(factors)
    assert abs(float(found.mean()) - 1) < 3.5 * float(found.std()) / len(found) ** 0.5
    assert float(found.std()) < 0.12
    share = sum(inside) / len(inside)
    assert 0.88 <= share <= 0.985 if networks == 2 else share >= 0.95


def test_a_tiny_map_and_a_huge_one_have_one_voice_each():
    """Images whose maps are wrong by a factor of 100 at either end of the sizes."""
    maps = torch.cat([torch.ones(62), torch.tensor([1e-6, 1e6])]).double()
    reference = TRUTH * maps
    assert float(size_factor(maps, reference)) == pytest.approx(TRUTH, rel=1e-12)
    odd = torch.cat([torch.ones(62), torch.tensor([100.0, 0.01])]).double()
    factor = float(size_factor(maps, odd * reference))
    assert abs(factor / TRUTH - 1) < 0.04
    assert float((odd * reference / maps).mean()) / TRUTH > 2.5  # the mean of ratios
    assert float((odd * reference).sum() / maps.sum()) / TRUTH < 0.02  # the ratio of sums
    assert float(size_factor(torch.tensor([0.0, 2, -1]), torch.tensor([5.0, 6, 7]))) == 3


def test_pairs_are_the_unbiased_variance():
    states = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    truth = states.var(0).flatten(1).sum(1)
    torch.testing.assert_close(pair_sizes(states).mean(0), truth)


def test_networks_that_share_a_direction_widen_the_interval_of_three():
    """All images move alike: their number says nothing, and two networks cannot know it."""
    maps = torch.ones(64, dtype=torch.float64)
    states = torch.tensor([0.0, 1.0, 4.0]).double().view(3, 1, 1).expand(3, 64, 1)
    one, low, high = fitted(maps, pair_sizes(states[:2]), seed=0)
    assert low == pytest.approx(one) and high == pytest.approx(one)
    _, low, high = fitted(maps, pair_sizes(states), seed=0)
    assert (low, high) == pytest.approx((0.5, 8.0))


def test_maps_without_a_size_are_refused():
    with pytest.raises(UserError, match="only 3 of 64 maps .* calibrate=null"):
        fitted(torch.ones(64).index_fill(0, torch.arange(61), 0), torch.ones(1, 64), seed=0)


def linear_model(count, width, generator):
    """Errors of least squares where it was fitted and at fresh noise, and predicted variance."""
    kind = {"generator": generator, "dtype": torch.float64}
    rows = torch.randn(count, width, **kind)
    noise = 0.3 * torch.randn(2, count, **kind)
    hat = rows @ torch.linalg.pinv(rows)
    fit = hat @ noise[0]
    return (noise[1] - fit).square() - (noise[0] - fit).square(), 0.09 * hat.diagonal()


def test_the_held_out_error_gives_the_predictive_variance_of_the_linear_gaussian_model():
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(100):
        gaps, variance = linear_model(160, 60, generator)
        found.append(held_out_factor(gaps, variance / 5, seed=seed, resamples=200))
    factors = torch.tensor(found) / 5
    error = float(factors[:, 0].std()) / len(factors) ** 0.5
    assert abs(float(factors[:, 0].mean()) - 1) < 3.5 * error
    inside = (factors[:, 1] < 1) & (factors[:, 2] > 1)
    assert 0.85 <= float(inside.double().mean()) <= 1
    with pytest.raises(UserError, match=r"the gap is -.* standard error .*calibrate=1"):
        held_out_factor(-gaps, variance, seed=0)


@torch.no_grad()
def test_errors_of_training_and_held_out_images_share_their_noise():
    """Images that are the same have no gap at all; brighter ones one that can be written down."""
    model = model_of(Hand(lambda x, t, y: 0 * x, [[1.0]], 0.2))
    posterior = only_bias(model.net.head, 0.04)
    images = torch.full((6, 1, 2, 2), 127, dtype=torch.uint8)
    options = {"batch_size": 4, "draws": 2, "encode": lambda x: x.double() / 127.5 - 1}
    gaps, variance = held_out_gaps(model, posterior, (images, None), (images, None), **options)
    assert gaps.tolist() == [0] * 6
    assert variance.tolist() == pytest.approx([0.04] * 6)
    bright = torch.full((9, 1, 2, 2), 255, dtype=torch.uint8)
    gaps, _ = held_out_gaps(model, posterior, (images, None), (bright, None), **options)
    # (0.2 - (x_1 - x_0))^2 at both: noise of the same draws is left, linearly.
    dark = 127 / 127.5 - 1
    assert len(gaps) == 6
    assert float(gaps.mean()) == pytest.approx(0.8**2 - (0.2 - dark) ** 2, abs=3.0)
    assert float(gaps.std()) > 0


def record(times=(), factors=()):
    return Calibration(4.0, 3.0, 5.0, 2, 64, times, factors)


def some_samples():
    ones, time = torch.ones(2, 1, 2, 2), torch.tensor([0.25, 0.5, 1.0])
    return Samples(
        images=ones, variance=ones, labels=None, times=time, summed=torch.ones(3, 2),
        frames=ones[None], frame_variance=ones[None], frame_times=time[:1], nfe=3,
        estimator="ensemble", sampler_noise=ones, requested_times=time[1:2],
        states=ones[None], state_variance=ones[None], spatial=torch.ones(3, 2),
        latents=ones, latent_variance=ones,
    )  # fmt: skip


def test_every_variance_but_the_samplers_is_scaled_and_says_so():
    found = record().applied(some_samples())
    for name in ("variance", "summed", "frame_variance", "state_variance", "latent_variance"):
        assert set(getattr(found, name).flatten().tolist()) == {4.0}, name
    assert set(found.spatial.flatten().tolist()) == {16.0}
    for name in ("images", "frames", "states", "latents", "sampler_noise"):
        assert getattr(found, name) is getattr(some_samples(), name) or set(
            getattr(found, name).flatten().tolist()
        ) == {1.0}
    said = "ensemble, variance times 4 [3, 5] by 2 trainings on 64 images"
    assert found.estimator == said
    timed = record((0.25, 0.5), (1.0, 2.0)).applied(some_samples())
    assert timed.summed[:, 0].tolist() == pytest.approx([1, 2, 4])
    assert timed.spatial[:, 0].tolist() == pytest.approx([1, 4, 16])
    assert float(timed.state_variance[0, 0, 0, 0, 0]) == pytest.approx(2)
    assert float(timed.variance[0, 0, 0, 0]) == 4
    between = record((0.5,), (1.0,)).at(torch.tensor([0.1, 0.75, 1.0]))
    assert between.tolist() == pytest.approx([1, 2, 4])
    assert Calibration.of(json.loads(json.dumps(timed_record()))) == record((0.5,), (1.0,))


def timed_record():
    return record((0.5,), (1.0,)).record()


CALIBRATED = ("metrics.num_images=0", "uncertainty.calibrate=1", "uncertainty.calibrate_images=8")


def test_a_run_trains_one_more_network_once(copied: Trained, compose: Compose, monkeypatch):
    made = states(compose)
    assert made["calibration"] is False and made["maps"] is True
    plain = stored_samples(copied.samples)
    result = pipeline.run(compose(*CALIBRATED))
    factor = result.metrics["calibration/factor"]
    assert result.metrics["calibration/factor_low"] < factor
    assert factor < result.metrics["calibration/factor_high"]
    assert result.metrics["calibration/trainings"] == 2
    assert result.metrics["calibration/images"] == 8
    found = stored_samples(result.samples)
    torch.testing.assert_close(found.variance, factor * plain.variance)
    assert torch.equal(found.images, plain.images)
    assert found.estimator.startswith(plain.estimator) and "by 2 trainings" in found.estimator
    written = json.loads((result.folder / "metrics.json").read_text())
    assert written["estimator"] == found.estimator
    assert "calibrate_1" in result.folder.name and result.folder != copied.cell
    # The other network is one of this configuration, from another seed.
    other = copied.folder / "calibration" / "1" / "fit.json"
    before = other.read_bytes()
    own = json.loads((copied.folder / "fit.json").read_text())
    assert json.loads(before)["steps"] == own["steps"]
    assert json.loads(before)["weights"] != own["weights"]
    assert all(states(compose).values())
    for place in ("runs.trainer.train", "runs.training.train", "runs.calibration.maps_of"):
        monkeypatch.setattr(f"bayesdiff.{place}", None)
    again = pipeline.run(compose(*CALIBRATED))
    assert again.metrics == result.metrics and other.read_bytes() == before
    monkeypatch.undo()
    listed = f"uncertainty.calibrate=['{other.parent}']"
    timed = ("uncertainty.times=[0.4]", "uncertainty.calibrate_per_time=true")
    named = pipeline.run(compose(*CALIBRATED, listed, *timed))
    assert named.metrics["calibration/factor"] == pytest.approx(factor)
    assert named.metrics["calibration/factor_at_0.667"] > 0
    assert list((copied.folder / "calibration").iterdir()) == [other.parent]
    itself = refused(compose, f"uncertainty.calibrate=['{copied.folder}']")
    check_line(itself, ["uncertainty.calibrate=", "names this run itself", "other seeds alone"])
    gap = refused(compose, *CALIBRATED, "uncertainty.calibrate=held_out")
    check_line(gap, ["held-out error above", "standard error", "calibrate=1"])


def states(compose):
    return {work.stage: work.made for work in look((), compose(*CALIBRATED)).works}


def test_no_image_that_is_mapped_is_calibrated_on(compose: Compose):
    run, _, estimator, _ = pipeline.prepare(compose())
    numbers = calibration_numbers(run, estimator)
    assert numbers == list(range(FIRST, FIRST + 64))
    chosen = replace(estimator, numbers=[FIRST + 1, 3])
    assert calibration_numbers(run, chosen)[:3] == [FIRST, FIRST + 2, FIRST + 3]
    assert len(calibration_numbers(run, chosen)) == 64


HELD_OUT = "uncertainty.calibrate=held_out"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("uncertainty.calibrate=0", ["calibrate=0 trains nothing", "1 or 2"]),
        ("uncertainty.calibrate=true", ["uncertainty.calibrate True", "held_out", "null"]),
        ("uncertainty.calibrate=heldout", ["'heldout'", "held_out"]),
        ("uncertainty.calibrate=[]", ["uncertainty.calibrate []", "list of run folders"]),
        ("uncertainty.calibrate=[nowhere]", ["uncertainty.calibrate names nowhere"]),
        ("uncertainty.calibrate_images=4", ["uncertainty.calibrate_images", ">= 8", "got 4"]),
        ("uncertainty.calibrate_per_time=true", ["calibrate_per_time=true", "calibrate=1"]),
        (
            ("uncertainty.calibrate=1", "uncertainty.calibrate_per_time=true"),
            ["calibrate_per_time=true", "uncertainty.times=[0.5,0.9]"],
        ),
        (
            (
                "uncertainty.calibrate=1",
                "uncertainty.validate=true",
                "uncertainty.validate_images=4",
            ),
            ["draws of the posterior", "validate=false", "calibrate=null"],
        ),
        (("uncertainty.calibrate=1", "fit=false"), ["calibrate=1", "fit=false", "list"]),
        ((HELD_OUT, "uncertainty=mc_dropout"), ["uncertainty=mc_dropout", "calibrate=1"]),
        ((HELD_OUT, "laplace.subset=last_block"), ["laplace.subset=last_block", "calibrate=1"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(copied, compose, overrides, words):
    given = (overrides,) if isinstance(overrides, str) else overrides
    if "fit=false" in given:
        given = (*given, f"ckpt_path={copied.checkpoint}")
    check_line(refused(compose, *given), words)


def test_a_calibration_of_an_ensemble_in_python_needs_no_run():
    """The pure functions are all that Python needs: maps, networks, one factor."""
    maps, states = simulated(torch.Generator().manual_seed(1), 4, 64, 0.5)
    factor = fitted(maps, pair_sizes(states), seed=0)
    found = Calibration(*factor, trainings=4, images=64).applied(some_samples())
    assert float(found.variance.mean()) == pytest.approx(factor[0])
    assert Ensemble(calibrate=2).calibrate == 2
