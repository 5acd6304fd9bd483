"""The curvature of the bound of Bayesian flow networks, against autograd of the loss itself."""

from types import SimpleNamespace

import pytest
import torch
from test_bayesian_flow import DOUBLE, close, small, times
from test_likelihoods import in_channels

from bayesdiff.checks import UserError
from bayesdiff.data.one_hot import OneHot
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import apply_head, head_matrix
from bayesdiff.laplace.objective import OfBound, curved_objective
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.likelihoods import Bernoulli, Categorical, Classes, Gaussian
from bayesdiff.models import BeliefNetwork, GenerativeModel
from bayesdiff.models.objectives import BayesianFlowLoss
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, QuadraticAccuracy

# Likelihood, prediction, and the side of the patch that one position of the head says.
CASES = {
    "binary": (Bernoulli(), "data", 1),
    "binary-patch": (Bernoulli(), "data", 2),
    "classes": (Classes(3), "data", 1),
    "levels": (Categorical(3), "data", 1),
    "numbers": (Gaussian(), "v", 1),
    "data": (Gaussian(), "data", 1),
    "velocity": (Gaussian(), "velocity", 1),
}


def pictures(count, side=4):
    shape = (count, 1, side, side)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


class Wide(BeliefNetwork):
    """Its features in float64, for a head in float64."""

    def features(self, x, t, y=None):
        return super().features(x.float(), t.float(), y).to(self.head.weight.dtype)


def bfn(likelihood, prediction="data", patch=1, channels=1, **options):
    """A network of random weights, its head included, which is in float64."""
    net = small(likelihood, residual=False, channels=channels, patch=patch, kernel=1)
    net.__class__ = Wide
    model = GenerativeModel(
        net, net.path, prediction, torch.optim.SGD, likelihood=likelihood,
        objective=lambda *own: BayesianFlowLoss(*own, **options),
    )  # fmt: skip
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(2))
    net.head.double()
    return model.eval()


def encode_of(likelihood):
    of = SimpleNamespace(images=pictures(1))
    space = OneHot(of, likelihood.levels) if isinstance(likelihood, Classes) else None
    return lambda images: (images / 127.5 - 1 if space is None else space.encode(images)).double()


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_is_the_gauss_newton_one_of_the_trained_loss(name):
    """Its Hessian where the data are what the network expects, so that no error is left."""
    likelihood, prediction, patch = CASES[name]
    model, encode = bfn(likelihood, prediction, patch), encode_of(likelihood)
    images = pictures(4, 4 * patch)
    options = {"draws": 2, "encode": encode}
    found = fit_curvature(model, images, None, source="a", objective="elbo", **options)
    net, loss, mean = model.net, model.objective, head_matrix(model.net.head)
    seen = list(draws_of(model, images, None, **options))
    features = [net.features(draw.x_t, draw.time, None).detach() for draw in seen]

    def output(weights, each):
        return net.fold(apply_head(net.head, each[None], weights[None])[0])

    def bound(weights, expected=False):
        total = 0.0
        for draw, each in zip(seen, features, strict=True):
            made = loss.in_data(output(mean, each), draw.x_t, draw.time)
            x_1 = likelihood.mean(made).detach() if expected else data(draw)
            nats = loss.per_image(output(weights, each), draw.x_t, x_1, draw.time)
            total = total + nats.sum() / 2
        return total

    def data(draw):
        return loss.in_data(draw.target, draw.x_t, draw.time)

    truth = torch.func.hessian(lambda w: bound(w, expected=True))(mean)
    truth = truth.reshape(mean.numel(), -1)
    scale = float(truth.abs().max())
    close(in_channels(found) / scale, truth / scale, 1e-10)
    assert float(found.squared_error) / 2 == pytest.approx(float(bound(mean)), rel=1e-10)
    gradient = torch.func.grad(bound)(mean)
    size = float(gradient.abs().max())
    close(found.gradient / size, gradient / size, 1e-10)
    assert found.objective == "elbo" and not found.scaled and found.sigma_mle == 1


def test_blocks_at_one_output():
    t = times(0.5)
    path = QuadraticAccuracy(9.0)
    logit = times(0.3).logit().view(1, 1, 1, 1)
    bound = OfBound(Bernoulli(), BayesianFlowLoss(path, Bernoulli(), "data").weight)
    close(bound.hessian(logit, t).flatten(), [1.5876])
    close(Bernoulli().hessian(logit).flatten(), [0.21])
    p = times(0.5, 0.3, 0.2)
    bound = OfBound(Classes(3), BayesianFlowLoss(path, Classes(3), "data").weight)
    j = p.diag() - p[:, None] * p
    close(bound.hessian(p.log().view(1, 3, 1, 1), t)[0, 0, :, :, 0, 0], 2 * 3 * 9 * 0.5 * j @ j)


def test_with_v_the_bound_is_squared_error_of_one_size():
    """-2 ln sigma_1 times what a Gaussian has, its evidence but for a constant."""
    model, images = bfn(Gaussian(), "v", channels=2), pictures(4).expand(-1, 2, -1, -1)
    options = {"source": "a", "encode": encode_of(Gaussian())}
    plain = fit_curvature(model, images, None, **options)
    found = fit_curvature(model, images, None, objective="elbo", **options)
    rate = -2 * float(torch.tensor(1e-3, dtype=DOUBLE).log())
    close(found.gram, rate * plain.gram.expand(2, -1, -1), 1e-9)
    settings = {"prior_precision": 3.0, "n_eff": 2.5}
    one = HeadPosterior.fit(found, **settings)
    other = HeadPosterior.fit(plain, sigma_noise=rate**-0.5, **settings)
    close(one.covariance, other.covariance.expand(2, -1, -1), 1e-9)
    constant = torch.distributions.Normal(0.0, rate**-0.5).log_prob(torch.tensor(0.0))
    constant = 2.5 / 4 * float(constant) * plain.num_outputs
    assert one.log_evidence() == pytest.approx(other.log_evidence() - constant, abs=1e-4)


def test_a_temperature_is_a_number_of_images():
    """H = lambda + (1 / T) G for n_eff = num_images / T."""
    curvature = fit_curvature(
        bfn(Bernoulli()), pictures(4), None, source="a", objective="elbo",
        encode=encode_of(Bernoulli()),
    )  # fmt: skip
    posterior = HeadPosterior.fit(curvature, prior_precision=2.0, n_eff=4 / 5)
    truth = 2 * torch.eye(posterior.num_parameters, dtype=DOUBLE) + curvature.gram / 5
    close(posterior.precision, truth, 1e-9)


def test_one_objective_is_never_taken_for_the_other(tmp_path):
    model = bfn(Bernoulli())
    data = SimpleNamespace(images=pictures(4), labels=None, fingerprint="f")
    folder = {"folder": tmp_path}
    plain, elbo = LastLayerLaplace(**folder), LastLayerLaplace(objective="elbo", **folder)
    asked = LastLayerLaplace(objective="likelihood", **folder)
    assert plain.path == asked.path != elbo.path  # the default is as it was without the option
    assert plain.source("w", data) == asked.source("w", data) != elbo.source("w", data)
    grams = [laplace.fit(model, data).curvature.gram for laplace in (plain, elbo)]
    assert not torch.allclose(*grams)
    for laplace, gram in zip((plain, elbo), grams, strict=True):
        assert torch.equal(laplace.fit(model, data).curvature.gram, gram)  # from its own file
    assert Curvature.load(elbo.path).objective == "elbo"
    # One file for both is made anew, and one that says otherwise is refused.
    path = tmp_path / "one.safetensors"
    for options, gram in zip(({}, {"objective": "elbo"}), grams, strict=True):
        found = LastLayerLaplace(path, **options).fit(model, data)
        assert torch.equal(found.curvature.gram, gram)
    with pytest.raises(UserError, match=r"objective=elbo, not of likelihood"):
        Curvature.load(path).require_likelihood("bernoulli", "likelihood")
    with pytest.raises(UserError, match="laplace.objective=elbo has no noise level"):
        HeadPosterior.fit(Curvature.load(path), sigma_noise=0.3)


def flow():
    return GenerativeModel(UNet(1, 4, channels=(4,)), CondOT(), "velocity", torch.optim.SGD)


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (flow, {}, "this model trains on none; use model=bfn"),
        (lambda: bfn(Bernoulli(), n_steps=4), {}, r"model\.objective\.n_steps=4.*use null"),
        (lambda: bfn(Gaussian(), "noise"), {}, "no finite weight at t = 0.*model.prediction=v"),
        (lambda: bfn(Bernoulli()), {"objective": "bound"}, "unknown laplace.objective 'bound'"),
        (lambda: bfn(Gaussian(), "v"), {"sigma_noise": 0.3}, "objective=elbo has no noise level"),
        (lambda: bfn(Gaussian(), "v"), {"time_bins": 2}, "objective=elbo has none"),
        (lambda: bfn(Gaussian(), "v"), {"subset": "last_block"}, "this is laplace.objective=elbo"),
    ],
)
def test_what_has_no_such_bound_is_refused_before_any_work(model, settings, reason):
    laplace = LastLayerLaplace(**({"objective": "elbo"} | settings))
    with pytest.raises(UserError, match=reason):
        laplace.check(model(), 100, (1, 4, 4))


def test_a_module_of_ones_own_has_the_likelihoods():
    own = SimpleNamespace(net=None)
    assert curved_objective(own).likelihood.name == "gaussian"
