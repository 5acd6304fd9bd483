"""Networks of others: convolutions and tokens, adapted in two lines."""

from copy import deepcopy

import pytest
import torch
from hand import CPU, Noise, model_of, posterior_of, random_covariance
from own_sources import Foreign, Tokens
from torch import nn
from torch.func import functional_call

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.networks import Adapter
from bayesdiff.solvers import Euler
from bayesdiff.uncertainty import Start
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.sensitivities.linearised import Linearised

SHAPE = (1, 8, 8)
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
LABELS = torch.tensor([3, 7])
TARGET = "net._target_=bayesdiff.networks.Adapter"
FOREIGN = (TARGET, "+net.module._target_=own_sources.Foreign", "+net.head=out")
TOKENS = (TARGET, "+net.module._target_=own_sources.Tokens", "+net.head=final.linear")
FOLD = "+net.fold=unpatchify"


def foreign():
    torch.manual_seed(0)
    module = Foreign().double()
    return module, Adapter(deepcopy(module), head="out"), "out", None


def tokens():
    torch.manual_seed(0)
    module = Tokens().double()
    net = Adapter(deepcopy(module), head="final.linear", fold="unpatchify", num_classes=10)
    return module, net, "final.linear", LABELS


@pytest.fixture(params=[foreign, tokens], ids=["convolutions", "tokens"])
def pair(request):
    """The module as it was, the adapted one, the name of its last layer, labels that it takes."""
    return request.param()


def given(y):
    return () if y is None else (y,)


def test_the_adapted_network_says_what_the_module_said(pair):
    module, net, _, y = pair
    x, t = torch.randn(2, *SHAPE).double(), torch.tensor([0.1, 0.9])
    truth = module(x, t, *given(y))
    assert torch.equal(net(x, t, y), truth)
    assert torch.equal(net.fold(net.head(net.features(x, t, y))), truth)
    weights = sum(p.numel() for p in module.parameters())
    assert sum(p.numel() for p in net.parameters()) == weights
    net(x, t, y).square().sum().backward()
    truth.square().sum().backward()
    assert torch.equal(net.module.get_parameter(FIRST[type(module)]).grad, first(module).grad)


FIRST = {Foreign: "inner.weight", Tokens: "embed.weight"}


def first(module):
    return module.get_parameter(FIRST[type(module)])


def image_under(module, name, y, noise):
    """Euler's steps with the module as it was, as a function of its last layer's weights."""

    def image(weights):
        own = module.get_submodule(name)
        named = {f"{name}.weight": weights[:, :-1].view_as(own.weight)}
        named[f"{name}.bias"] = weights[:, -1]
        x = noise
        for t, after in zip(TIMES[:-1], TIMES[1:], strict=True):
            at = torch.full((len(x),), t, dtype=x.dtype)
            x = x + (after - t) * functional_call(module, named, (x, at, *given(y)))
        return x

    return image


def mapped(net, y, covariance, estimator):
    """Images with maps, and the posterior."""
    posterior = posterior_of(net.head, covariance)
    model = model_of(net, num_classes=net.num_classes)
    start = Start(model, Euler(4), y, Noise(2, SHAPE), CPU)
    with torch.no_grad():
        return estimator(start, posterior), posterior


def test_maps_are_those_of_members_one_by_one(pair):
    module, net, name, y = pair
    covariance = random_covariance(head_matrix(net.head).shape[1], 0.3)
    estimator = Ensemble(members=5, seed=3)
    found, posterior = mapped(net, y, covariance, estimator)
    with torch.no_grad():
        image = image_under(module, name, y, Noise(2, SHAPE)())
        members = torch.stack([image(own) for own in estimator.weights(posterior)])
        mean = image(head_matrix(net.head))
    torch.testing.assert_close(found.variance, members.var(0), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.images, mean, rtol=1e-6, atol=1e-9)


def test_the_linearised_map_is_that_of_the_jacobian(pair):
    module, net, name, y = pair
    covariance = random_covariance(head_matrix(net.head).shape[1], 0.3)
    found, posterior = mapped(net, y, covariance, Linearised(draws="all"))
    image = image_under(module, name, y, Noise(2, SHAPE)())
    jacobian = torch.autograd.functional.jacobian(image, head_matrix(net.head))
    rows = jacobian.flatten(0, 3)
    truth = torch.einsum("npq,qr,npr->n", rows, posterior.covariance, rows).view(2, *SHAPE)
    torch.testing.assert_close(found.variance, truth, rtol=1e-5, atol=1e-12)


def test_the_gram_matrix_of_tokens_is_the_sum_over_tokens():
    _, net, _, _ = tokens()
    model = model_of(net.float(), num_classes=10)
    images = torch.randint(0, 256, (6, *SHAPE), dtype=torch.uint8)
    labels, seen = torch.arange(6), []
    real = net.features
    net.features = lambda *inputs: (seen.append(real(*inputs)), seen[-1])[1]
    found = fit_curvature(model, images, labels, source="test", batch_size=4)
    phi = torch.cat([each.flatten(0, 1) for each in seen]).double()
    phi = torch.cat([phi, torch.ones(len(phi), 1)], 1)
    assert len(phi) == 6 * 16
    torch.testing.assert_close(found.gram, phi.T @ phi, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [(*FOREIGN, "model.num_classes=null"), (*TOKENS, FOLD, "uncertainty=linearised")],
    ids=["convolutions", "tokens"],
)
def test_a_whole_run(compose, options):
    metrics = pipeline.run(compose(*options)).metrics
    assert any(name.startswith("fid@12") for name in metrics)


REFUSED = {
    "labels": (FOREIGN, "Foreign.forward takes no third argument"),
    "layer": ((*FOREIGN, "net.head=last", "model.num_classes=null"), "Foreign has no layer last"),
    "method": ((*TOKENS, "+net.fold=image"), "Tokens has no method image"),
    "fold": (TOKENS, "net.fold"),
    "room": ((*TOKENS, FOLD, "+net.module.room=0"), "give it room for 10 \\+ 1 labels"),
    "not the last": (
        (*FOREIGN, "net.head=inner", "model.num_classes=null"),
        "Foreign does more after its last layer",
    ),
    "refined": ((*TOKENS, FOLD, "uncertainty=refined"), "use uncertainty=linearised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(compose, case):
    options, fragment = REFUSED[case]
    with pytest.raises(Exception, match=fragment) as error:
        pipeline.prepare(compose(*options))
    assert isinstance(error.value, UserError) or isinstance(error.value.__cause__, UserError)


def test_a_layer_that_is_never_called_is_named():
    module = Foreign()
    module.spare = nn.Conv2d(6, 1, 1)
    net = Adapter(module, head="spare")
    with pytest.raises(UserError, match="does not call the layer"):
        net(torch.zeros(1, *SHAPE), torch.zeros(1))
