"""Nats per image against what is known of images without structure."""

import math

import pytest
import torch
from test_bayesian_flow import small

from bayesdiff.checks import UserError
from bayesdiff.data.binarised import Intensities
from bayesdiff.likelihoods import Bernoulli, Classes, Discretised, Gaussian
from bayesdiff.models import GenerativeModel
from bayesdiff.models.objectives import BayesianFlowLoss
from bayesdiff.paths import BayesianFlow
from bayesdiff.studies.code_length.code_length import CodeLength
from bayesdiff.studies.code_length.nats import independent_pixels, nats_of


def model_of(likelihood, prediction="data", **path):
    made = BayesianFlow(**path).for_likelihood(likelihood)
    net = small(likelihood, made, residual=prediction == "data")
    given = {"likelihood": likelihood, "objective": BayesianFlowLoss}
    return GenerativeModel(net, made, prediction, torch.optim.SGD, **given).eval()


def length(model, x_1, n_steps=(2, 50, None), **options):
    options = {"draws": 10, "seed": 0, "spread": 1e-3} | options
    return nats_of(model, x_1, None, range(len(x_1)), n_steps, **options)


NOISE = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Classes(3)], ids=["binary", "classes"])
def test_independent_even_pixels_take_their_entropy(likelihood):
    """An untrained residual network is their exact posterior: the bound is tight for any n."""
    if isinstance(likelihood, Bernoulli):
        states, truth = torch.where(NOISE < 0.5, 1.0, -1.0), 64 * math.log(2)
    else:
        from bayesdiff.data.one_hot import embedded

        states, truth = embedded((NOISE * 3).long(), 3).flatten(1, 2), 64 * math.log(3)
    nats = length(model_of(likelihood), states)
    for name in ("n=2", "n=50", "n=inf"):
        whole = nats[name] + nats["final"]
        error = float(whole.std()) / math.sqrt(len(whole))
        assert abs(float(whole.mean()) - truth) < 4 * error < 1.5, name


def test_numbers_of_a_wide_gaussian_cost_its_entropy_of_levels():
    """N(0, 1/16) on 256 levels, ln(s sqrt(2 pi e) / gap), by a belief that expects N(0, 1)."""
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 4
    law = Discretised(levels=256)
    nats = length(model_of(law, sigma_1=1e-3), x, n_steps=(None,), draws=20)
    whole = float((nats["n=inf"] + nats["final"]).mean()) / 64
    entropy = math.log(0.25 * math.sqrt(math.tau * math.e) / (2 / 255))
    assert entropy < whole < entropy + 1.5


def test_bounds_depend_on_seed_and_number_alone():
    model, states = model_of(Bernoulli()), torch.where(NOISE[:6] < 0.5, 1.0, -1.0)
    whole, _options = length(model, states), {"draws": 10, "seed": 0, "spread": 1.0}
    parts = [
        nats_of(
            model, states[i : i + 2], None, [i, i + 1], (2, 50, None), draws=10, seed=0, spread=1.0
        )
        for i in (0, 2, 4)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value)


def test_v_of_numbers_and_their_last_bits():
    model = model_of(Gaussian(), "v", sigma_1=1e-3)
    nats = length(model, NOISE[:4] * 2 - 1, n_steps=(5, None))
    assert all(value.isfinite().all() and (value >= 0).all() for value in nats.values())


def test_pixels_alone():
    images = torch.tensor([0, 255, 255, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    p = (3 + 0.5) / 5
    truth = -(math.log(p) + math.log(1 - p)) / 2
    assert abs(independent_pixels(images, images[:2]) - truth) < 1e-12


def test_no_model_says_the_binarisation_itself_with_less():
    grey = torch.tensor([0, 255, 51, 51], dtype=torch.uint8).view(2, 1, 1, 2)
    truth = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert abs(Intensities(grey, grey).entropy() - truth) < 1e-12  # 0 and 2 h(0.2), on average


def test_options_that_cannot_work_are_refused():
    for options, named in (
        ({"num_images": 1}, "num_images"), ({"n_steps": [0]}, "n_steps"),
        ({"n_steps": 10}, "n_steps"), ({"draws": 0}, "draws"), ({"spread": 0}, "spread"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"code_length.{named}"):
            CodeLength(**options)


def test_models_of_few_transmissions_are_measured_in_continuous_time_as_well():
    """Whatever bound they were trained on: untrained, all are the exact posterior."""
    model, states = model_of(Bernoulli()), torch.where(NOISE[:100] < 0.5, 1.0, -1.0)
    truth = length(model, states)
    model.objective = BayesianFlowLoss(model.path, model.likelihood, "data", n_steps=2)
    for name, value in length(model, states).items():
        torch.testing.assert_close(value, truth[name])
