"""What a pipeline needs, against what its work is seen to take."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import pretrained_checks as checks  # noqa: E402
from pipelines import CALLS, PIPELINES, SCHEDULERS  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.laplace.gram import gram  # noqa: E402
from bayesdiff.machine.peak import Work, worked  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.uncertainty import Ensemble, Linearised  # noqa: E402


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_held_at_once_is_counted(device):
    layer = nn.Linear(100, 50, bias=False, device=device, dtype=torch.float32)
    given = torch.ones(10, 100, device=device)

    def function():
        for _ in range(3):  # what is freed does not count twice
            wide = layer(given)
            wide = wide.exp() + wide
        return wide.view(50, 10)  # a view holds nothing

    _, work = worked(function)
    assert work.operations == 3 * 2 * 10 * 100 * 50
    # The layer's output, its exponential, and their sum.
    assert work.memory in (3 * 4 * 500, 4 * 4 * 500)


def test_fused_attention_holds_its_output_alone():
    q, v = torch.zeros(2, 3, 64, 8, device="meta"), torch.zeros(2, 3, 64, 8, device="meta")

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, key=q, value=v)

    made, work = worked(attend, fused=True)
    assert made.shape == v.shape
    assert work == Work(4 * v.numel(), 4 * 2 * 3 * 64 * 64 * 8)
    assert worked(attend)[1].memory > 2 * 3 * 64 * 64 * 4


@pytest.fixture(scope="module", params=["dit", "sd"])
def fitted(request):
    pipe, call = PIPELINES[request.param](), CALLS[request.param]
    bayes, call, images = checks.fitted(pipe, call, 4)
    call.pop("num_inference_steps")
    prompt = {k: call.pop(k) for k in ("prompt", "class_labels") if k in call}
    return bayes, prompt, call, images


@pytest.mark.parametrize("derivative", ["exact", "difference", "bfloat16"])
@pytest.mark.parametrize("draws", [3, 66])
def test_evaluations_are_those_of_the_run(fitted, derivative, draws):
    bayes, prompt, call, _ = fitted
    estimator = Linearised(draws=draws, derivative=derivative)
    needs = bayes.needs(3, estimator, **call)
    out = bayes(uncertainty=estimator, num_inference_steps=3, **prompt, **call)
    assert needs.evaluations == out.record["nfe"]


def test_directions_of_a_schedulers_noise_are_evaluated_too():
    pipe = PIPELINES["unet2d"]()
    pipe.scheduler = SCHEDULERS["unet2d"][1]
    bayes, _, _ = checks.fitted(pipe, CALLS["unet2d"], 4)
    estimator = Linearised(draws=3, derivative="difference", noise_draws=2)
    out = bayes(uncertainty=estimator, num_inference_steps=3)
    assert bayes.needs(3, estimator).evaluations == out.record["nfe"]


@pytest.mark.parametrize(
    "estimator",
    [Ensemble(members=24, noise_members=0), Linearised(draws=24, derivative="difference")],
    ids=["ensemble", "difference"],
)
def test_memory_of_maps_is_what_the_run_holds(fitted, estimator):
    bayes, prompt, call, _ = fitted
    needs = bayes.needs(3, estimator, **call)
    _, seen = worked(lambda: bayes(uncertainty=estimator, num_inference_steps=3, **prompt, **call))
    # States count for much in networks as small as these, and for little in others.
    assert 0.8 < needs.maps / seen.memory < 1.8


def test_the_passs_products_are_counted(fitted):
    bayes, _, call, _ = fitted
    needs = bayes.needs(3, **call)
    model = next(iter(bayes.followed._models.values()))[0]
    head = model.net.head
    x = torch.zeros(1, *next(iter(bayes.followed._models.values()))[1].shape)
    y = torch.zeros(1, dtype=torch.long)
    features, network = worked(lambda: model.net.features(x, torch.full((1,), 0.5).double(), y))
    _, products = worked(lambda: gram(head, features))
    assert needs.pass_operations == pytest.approx(
        network.operations + products.operations, rel=0.05
    )


def test_needs_are_said_in_two_lines(fitted):
    bayes, _, call, _ = fitted
    text = str(bayes.needs(3, **call))
    assert text.count("\n") == 1 and "GiB" in text and "evaluations" in text
    more = bayes.needs(3, num_images=8, fitted_to=100, batch_size=64, **call)
    less = bayes.needs(3, num_images=1, fitted_to=100, batch_size=1, **call)
    assert more.fit > less.fit and more.maps > less.maps
    assert more.memory == more.weights + max(more.fit, more.maps)


def test_weights_are_counted_once_and_other_layouts_twice():
    pipe = PIPELINES["dit"]()
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    own = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    needs = BayesianPipeline.of(pipe).needs(3, guidance_scale=1.0)
    assert own <= needs.weights < 1.5 * own


def test_bad_counts_are_refused(fitted):
    for bad in ({"num_images": 0}, {"fitted_to": 0}, {"batch_size": 0}, {"hight": 3}):
        with pytest.raises(UserError, match=next(iter(bad))):
            fitted[0].needs(3, **bad)
