"""Likelihoods that bend: their law, the curvature and posterior of a head under them, the maps."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose
from hand import FLOW, Noise, start_of
from hydra.errors import InstantiationException
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.sources import digits
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.coupled import check_coupled, groups_of
from bayesdiff.laplace.curvature import batches, fit_curvature
from bayesdiff.laplace.head import apply_head, head_matrix
from bayesdiff.laplace.objective import OfLikelihood
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.report import board
from bayesdiff.runs.setup import starts
from bayesdiff.solvers import Euler, Field
from bayesdiff.storage.checkpoints import load_weights
from bayesdiff.uncertainty import Ensemble, Linearised, Published

LIKELIHOODS = {"gaussian": Gaussian(), "bernoulli": Bernoulli(), "categorical": Categorical(5)}
BENT = {"bernoulli": Bernoulli(), "categorical": Categorical(5)}
every = pytest.mark.parametrize("name", LIKELIHOODS)
bent = pytest.mark.parametrize("name", BENT)


def example(likelihood, count=3, channels=2, size=(2, 3)):
    generator = torch.Generator().manual_seed(1)
    shape = (count, likelihood.channels(channels), *size)
    output = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    data = torch.rand(count, channels, *size, generator=generator, dtype=torch.float64)
    return output, likelihood.values(2 * data - 1)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The law of a value.


@every
def test_residual_and_hessian_are_derivatives_of_half_the_deviance(name):
    likelihood = LIKELIHOODS[name]
    output, target = example(likelihood, count=1)
    half = lambda o: 0.5 * likelihood.deviance(o, target).sum()  # noqa: E731
    close(likelihood.residual(output, target), torch.func.grad(half)(output))
    truth = torch.func.hessian(half)(output)
    own = likelihood.hessian(output)
    if own is None:
        close(truth.reshape(output.numel(), -1), torch.eye(output.numel(), dtype=torch.float64))
        return
    k = likelihood.channels(1)
    dense = torch.zeros_like(truth)
    for c in range(2):
        for y in range(2):
            for x in range(3):
                rows = slice(c * k, (c + 1) * k)
                dense[0, rows, y, x, 0, rows, y, x] = own[0, c, :, :, y, x]
    close(dense, truth)


@every
def test_log_probabilities_deviance_and_loss_are_of_one_law(name):
    likelihood = LIKELIHOODS[name]
    output, target = example(likelihood)
    log_prob = likelihood.log_prob(output, target)
    constant = 0.5 * math.log(math.tau) if likelihood.scaled else 0.0
    sums = -2 * (log_prob + constant).flatten(1).sum(1)
    close(likelihood.deviance(output, target), sums)
    scale = 1 if likelihood.scaled else 0.5  # squared error, and not half of it, is trained
    close(likelihood.loss(output, target), scale * sums.sum() / target.numel())
    if likelihood.scaled:
        wide = likelihood.log_prob(output, target, sigma_noise=0.3)
        close(wide, torch.distributions.Normal(output, 0.3).log_prob(target))
        return
    levels = torch.linspace(-1, 1, getattr(likelihood, "levels", 2), dtype=torch.float64)
    each = [likelihood.log_prob(output, torch.full_like(target, v)).exp() for v in levels]
    close(sum(each), torch.ones_like(target))
    close(likelihood.emit(output), sum(p * v for p, v in zip(each, levels, strict=True)))


@every
def test_slope_is_the_derivative_of_the_emission(name):
    likelihood = LIKELIHOODS[name]
    output, _ = example(likelihood)
    directions = torch.stack([example(likelihood)[0].roll(k, 0) for k in (1, 2)])
    for direction, slope in zip(directions, likelihood.slope(output, directions), strict=True):
        close(slope, torch.func.jvp(likelihood.emit, (output,), (direction,))[1])


@bent
def test_a_sampled_emission_follows_the_odds_and_the_noise(name):
    mean = BENT[name]
    drawn = Bernoulli(sampled=True) if name == "bernoulli" else Categorical(5, sampled=True)
    output = example(mean, 1)[0].expand(20_000, -1, -1, -1)
    noise = torch.randn(20_000, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    values = drawn.emit(output, noise)
    assert torch.equal(values, drawn.values(values))
    # Five standard errors.
    assert (values.mean(0) - mean.emit(output[:1])[0]).abs().max() < 5 / math.sqrt(20_000)
    with pytest.raises(ValueError, match="noise"):
        drawn.emit(output[:1])


def test_values_are_the_nearest_that_can_be_said():
    x = torch.tensor([-1.0, -0.51, -0.01, 0.0, 0.4, 1.0])
    assert Bernoulli().values(x).tolist() == [-1, -1, -1, 1, 1, 1]
    assert Categorical(3).values(x).tolist() == [-1, -1, 0, 0, 0, 1]
    grey = torch.linspace(-1, 1, 256)
    assert (Categorical(16).values(grey) - grey).abs().max() <= 1 / 15 + 1e-6
    close(Categorical(256).values(grey), grey, 1e-6)
    assert Gaussian().values(x) is x


# The head's curvature and posterior.


class Wide(nn.Module):
    """A single-precision body whose features, and everything above, are in double precision."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head, self.fold = net, net.head.double(), net.fold

    def features(self, x, t, y=None):
        return self.net.features(x.float(), t, y).double()


class Tokens(nn.Module):
    """A linear head that reads a formula of every pixel."""

    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(3, outputs).double()

    def features(self, x, t, y=None):
        x, t = x.double(), t.double().view(-1, 1, 1, 1)
        return torch.cat([torch.tanh(2 * x + t), torch.sin(3 * x), x * t], 1).movedim(1, -1)

    def fold(self, output):
        return output.movedim(-1, 1)


def model_of(net, likelihood):
    prediction = likelihood.predictions[0]
    kind = net, FLOW, prediction, torch.optim.SGD
    return GenerativeModel(*kind, likelihood=likelihood).eval()


def tiny(likelihood, patch=1, kernel=3, channels=(8, 16)):
    torch.manual_seed(0)
    shape = {"channels": channels, "blocks": 1, "patch": patch, "head_kernel": kernel}
    net = UNet(1, 8, out_channels=likelihood.channels(1), **shape)
    return model_of(Wide(net), likelihood)


def tokens(likelihood):
    torch.manual_seed(0)
    return model_of(Tokens(likelihood.channels(1)), likelihood)


IMAGES = digits().images
HEADS = {
    "bernoulli": lambda: tiny(Bernoulli(), channels=(4, 8)),
    "bernoulli-patch": lambda: tiny(Bernoulli(), patch=2, channels=(2, 4)),
    "categorical": lambda: tiny(Categorical(16), kernel=1),
    "categorical-patch": lambda: tiny(Categorical(3), patch=2, kernel=1, channels=(4, 8)),
    "tokens": lambda: tokens(Categorical(4)),
}


def fitted(model, count=6, **options):
    return fit_curvature(model, IMAGES[:count], None, source="a-b-c", **options)


def negative_log_likelihood(model, count=6, draws=1):
    """Of the head's weights ``(C_out, P)``, by cross entropies of torch on all logits."""
    seen = list(batches(model, IMAGES[:count], None, draws))
    features = torch.cat([batch.features for batch in seen]).detach()
    target = torch.cat([batch.target for batch in seen]).double()
    levels = getattr(model.likelihood, "levels", None)

    def value(weights):
        logits = model.net.fold(apply_head(model.net.head, features[None], weights[None])[0])
        if levels is None:
            kind = {"reduction": "sum"}
            return F.binary_cross_entropy_with_logits(logits, (target + 1) / 2, **kind) / draws
        index = ((target[:, 0] + 1) / 2 * (levels - 1)).round().long()
        return F.cross_entropy(logits, index, reduction="sum") / draws

    return value


def in_channels(curvature):
    """The blocks as one matrix ``(C_out P, C_out P)`` in the order of the head's weights."""
    count = curvature.mean.numel()
    dense = torch.block_diag(*curvature.gram)
    order = curvature.blocks(torch.arange(count).view(curvature.mean.shape)).flatten()
    matrix = torch.empty_like(dense)
    matrix[order[:, None], order] = dense
    return matrix


@pytest.mark.parametrize("head", HEADS)
def test_curvature_is_the_hessian_of_the_negative_log_likelihood(head):
    model = HEADS[head]()
    curvature = fitted(model, draws=2)
    loss = negative_log_likelihood(model, draws=2)
    mean = head_matrix(model.net.head)
    assert 0.5 * curvature.squared_error == pytest.approx(float(loss(mean)), rel=1e-10)
    gradient = torch.func.grad(loss)(mean)
    close(curvature.gradient, gradient, 1e-10)
    truth = torch.func.hessian(loss)(mean).reshape(mean.numel(), -1)
    scale = float(truth.abs().max())
    close(in_channels(curvature) / scale, truth / scale, 1e-10)
    assert float(truth.abs().max()) > 1
    bins = fitted(model, draws=2, time_bins=3).bins
    close(bins.gram.sum(0) / scale, curvature.gram / scale, 1e-12)


@pytest.mark.slow
def test_curvature_of_sixteen_levels_under_a_kernel_of_three():
    model = tiny(Categorical(16))
    truth = torch.func.hessian(negative_log_likelihood(model, 3))(head_matrix(model.net.head))
    truth = truth.reshape(16 * 73, -1)
    scale = float(truth.abs().max())
    close(in_channels(fitted(model, 3)) / scale, truth / scale, 1e-10)


@pytest.fixture
def double():
    """The library multiplies its GGN with an identity of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TwoLogits(nn.Module):
    """Log-odds as a softmax of two."""

    def forward(self, z):
        return torch.cat([torch.zeros_like(z), z], 1)


def library(model, likelihood, rows, index):
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    inside = [model.net.head] if likelihood.channels(1) > 1 else [model.net.head, TwoLogits()]
    kind = {"subset_of_weights": "all", "hessian_structure": "full", "prior_precision": 2.0}
    found = Laplace(nn.Sequential(*inside), "classification", **kind)
    found.fit(DataLoader(TensorDataset(rows, index), batch_size=50))
    return found


@bent
def test_posterior_is_the_librarys_classification(name, double):
    likelihood = BENT[name]
    model, levels = tokens(likelihood), max(2, likelihood.channels(1))
    curvature = fitted(model, 4)
    posterior = HeadPosterior.fit(curvature, prior_precision=2.0)
    seen = next(batches(model, IMAGES[:4], None))
    rows = seen.features.flatten(0, -2)
    index = ((seen.target.flatten() + 1) / 2 * (levels - 1)).round().long()
    theirs = library(model, likelihood, rows, index)
    # All weights, then all biases.
    order = torch.arange(curvature.mean.numel()).view(curvature.mean.shape)
    order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
    precision = torch.block_diag(*posterior.precision)
    close(precision[order][:, order], theirs.posterior_precision, 1e-8)
    close(posterior.covariance[0][order][:, order], theirs.posterior_covariance, 1e-8)
    evidence = float(theirs.log_marginal_likelihood())
    assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-8)
    if name == "categorical":
        some = rows[:6]
        probabilities = theirs(some, link_approx="probit")
        variance = posterior.predictive_variance(some)
        own = (model.net.head(some) / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
        close(own.detach(), probabilities, 1e-8)


def test_the_best_prior_has_the_highest_evidence():
    curvature = fitted(HEADS["bernoulli"]())
    best = HeadPosterior.fit(curvature, prior_precision="evidence")
    assert best.sigma_noise == 1
    for factor in (0.98, 1.02):
        prior = best.prior_precision * factor
        other = HeadPosterior.fit(curvature, prior_precision=prior)
        assert other.log_evidence() < best.log_evidence()
    assert 0 < best.effective_parameters < best.num_parameters == 37


@pytest.mark.parametrize("head", ["bernoulli-patch", "categorical-patch", "tokens"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_draws_columns_and_variances_are_those_of_the_precision(head, structure):
    model = HEADS[head]()
    curvature = fitted(model)
    posterior = HeadPosterior.fit(curvature, structure=structure, prior_precision=3.0)
    hessian = in_channels(curvature)
    hessian = hessian.diag().diag() if structure == "diag" else hessian
    covariance = torch.linalg.inv(hessian + 3 * torch.eye(len(hessian), dtype=torch.float64))
    columns = posterior.columns().flatten(1)
    close(columns.T @ columns, covariance, 1e-10)
    drawn = posterior.draw(5, torch.Generator().manual_seed(3)) - curvature.mean
    noise = torch.empty(5, *curvature.shape, dtype=torch.float64)
    noise.normal_(generator=torch.Generator().manual_seed(3))
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()) @ vectors.T
    close(drawn.flatten(1), curvature.channels(noise).flatten(1) @ root, 1e-10)
    features = next(batches(model, IMAGES[:6], None)).features
    rows = curvature.mean.shape
    basis = torch.eye(rows[1], dtype=torch.float64)[:, None].expand(-1, *rows)
    unit = [apply_head(model.net.head, features[None], one[None])[0] for one in basis]
    phi = torch.stack(unit)  # every channel says the same entry of phi
    axis = 2 if posterior.curvature.geometry.kernel_size else -1
    phi = phi.movedim(axis, 1)[:, 0]
    own = covariance.view(*rows, *rows)
    truth = [torch.einsum("p...,pq,q...->...", phi, own[c, :, c], phi) for c in range(rows[0])]
    found = posterior.predictive_variance(features)
    close(found.movedim(1 if axis == 2 else -1, 0), torch.stack(truth), 1e-9)


@bent
def test_a_file_keeps_the_likelihood(name, tmp_path):
    model = tokens(BENT[name])
    curvature = fitted(model, 4)
    curvature.save(tmp_path / "c.safetensors")
    loaded = Curvature.load(tmp_path / "c.safetensors")
    assert loaded.likelihood == BENT[name].name and torch.equal(loaded.gram, curvature.gram)
    assert torch.equal(loaded.groups, curvature.groups) and not loaded.scaled
    settings = {"prior_precision": 2.0}
    same = [HeadPosterior.fit(each, **settings).log_evidence() for each in (loaded, curvature)]
    assert same[0] == same[1]


def test_a_file_of_format_three_is_gaussian(tmp_path, monkeypatch):
    from bayesdiff.laplace import record

    curvature = fitted(tokens(Gaussian()), 4, time_bins=2)
    real = record.save_checked

    def older(path, kind, tensors, facts):
        assert facts.pop("likelihood") == "gaussian" and facts.pop("objective") == "likelihood"
        real(path, "bayesdiff-curvature-3", tensors, facts)

    monkeypatch.setattr(record, "save_checked", older)
    curvature.save(tmp_path / "c.safetensors")
    loaded = Curvature.load(tmp_path / "c.safetensors")
    assert loaded.likelihood == "gaussian" and loaded.scaled
    assert torch.equal(loaded.gram, curvature.gram)
    assert torch.equal(loaded.bins.gram, curvature.bins.gram)


def test_a_curvature_of_another_likelihood_is_refused(tmp_path):
    one, other = tokens(Bernoulli()), tokens(Gaussian())
    other.load_state_dict(one.state_dict())
    data = SimpleNamespace(images=IMAGES[:4], labels=None, fingerprint="f")
    LastLayerLaplace(path=tmp_path / "c.safetensors").fit(one, data)
    laplace = LastLayerLaplace(path=tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"of a bernoulli likelihood.*gaussian"):
        laplace.fit(other, data)


# What has no meaning is refused.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sigma_noise": 0.3}, "no noise level"),
        ({"sigma_noise": "mle_per_time", "time_bins": 2}, "no noise level"),
        ({"time_bins": 2}, "noise levels over time"),
        ({"structure": "kron"}, "Gaussian likelihood"),
        ({"structure": "empirical_fisher_published"}, "Gaussian likelihood"),
        ({"subset": "last_block"}, "Gaussian likelihood"),
    ],
)
def test_settings_of_a_gaussian_are_refused_before_any_work(settings, reason):
    model = tiny(Bernoulli())
    with pytest.raises(UserError, match=reason):
        LastLayerLaplace(**settings).check(model, 100, (1, 8, 8))
    LastLayerLaplace().check(model, 100, (1, 8, 8))


def test_matrices_that_do_not_fit_are_refused():
    assert check_coupled(OfLikelihood(Categorical(16)), 16, 73) == 16 * 73
    assert check_coupled(OfLikelihood(Gaussian()), 16, 73) == 73
    with pytest.raises(UserError, match=r"categorical-256.*fewer model\.likelihood\.levels"):
        check_coupled(OfLikelihood(Categorical(256)), 768, 577)


def test_other_predictions_and_folds_that_mix_positions_are_refused():
    net = Tokens(1)
    with pytest.raises(UserError, match=r"model\.prediction=data"):
        GenerativeModel(net, FLOW, "velocity", torch.optim.SGD, likelihood=Bernoulli())
    with pytest.raises(UserError, match="likelihood=bernoulli"):
        GenerativeModel(net, FLOW, "data", torch.optim.SGD, likelihood="bernoulli")

    class Mixing(Tokens):
        def fold(self, output):
            return output.movedim(-1, 1).reshape(len(output), 2, 8, 8).roll(1, -1)

    class Rolled(Mixing):
        def fold(self, output):
            return torch.stack([super().fold(output)[:, 0], super().fold(output)[:, 1].mT], 1)

    shape, curved = IMAGES.shape[1:], OfLikelihood(Categorical(2))
    assert groups_of(model_of(Mixing(2), Categorical(2)), shape, curved).tolist() == [[0, 1]]
    with pytest.raises(UserError, match="several positions"):
        groups_of(model_of(Rolled(2), Categorical(2)), shape, curved)

    class Twice(Tokens):
        def fold(self, output):
            return super().fold(output)[:, :1].expand(-1, 2, -1, -1)

    model = model_of(Twice(2), Categorical(2))
    with pytest.raises(UserError, match="not at all or for several"):
        LastLayerLaplace().check(model, 100, IMAGES.shape[1:])


def test_estimators_that_cannot_serve_say_so():
    run = SimpleNamespace(model=tokens(Bernoulli()))
    drawn = SimpleNamespace(model=tokens(Bernoulli(sampled=True)))
    with pytest.raises(UserError, match="linear in the head"):
        Published().check_run(run)
    Linearised().check_run(run)
    with pytest.raises(UserError, match=r"sampled=false"):
        Linearised().check_run(drawn)
    Ensemble().check_run(drawn)


# Maps.


def images_by_hand(model, weights, x, times, y=None):
    """Euler's steps of the flow to the data that a head of these weights expects."""
    for t, end in zip(times[:-1], times[1:], strict=True):
        features = model.net.features(x, torch.full((len(x),), t), y)
        logits = model.net.fold(apply_head(model.net.head, features[None], weights[None])[0])
        if logits.shape[1] > 1:
            levels = torch.linspace(-1, 1, logits.shape[1], dtype=torch.float64)
            expected = (logits.softmax(1) * levels[:, None, None]).sum(1, keepdim=True)
        else:
            expected = 2 * logits.sigmoid() - 1
        x = x + (end - t) * (expected - x) / (1 - t)
    return x


@bent
def test_maps_are_those_of_members_followed_by_hand(name):
    model, times = tokens(BENT[name]), [0.0, 0.25, 0.5, 0.75, 1.0]
    posterior = HeadPosterior.fit(fitted(model, 20), prior_precision=2.0)
    start = lambda: start_of(model, Euler(4), 2, (1, 8, 8))  # noqa: E731
    x = Noise(2, (1, 8, 8))()
    ensemble = Ensemble(members=4)
    made = ensemble(start(), posterior)
    members = [images_by_hand(model, w, x, times) for w in ensemble.weights(posterior)]
    close(made.variance, torch.stack(members).var(0).detach(), 1e-10)
    mean = posterior.curvature.mean
    close(made.images, images_by_hand(model, mean, x, times).detach(), 1e-10)
    assert made.images.abs().max() <= 1

    slopes = torch.func.jacfwd(lambda w: images_by_hand(model, w, x, times))(mean)
    along = torch.einsum("bchwkp,mkp->mbchw", slopes, posterior.columns())
    linear = Linearised(draws="all")(start(), posterior)
    close(linear.variance, along.square().sum(0).detach(), 1e-8)


def test_a_drawn_emission_is_the_same_whoever_asks():
    model = tokens(Categorical(5, sampled=True))
    noise = Noise(2, (1, 8, 8))
    field = Field(model, None, 2, noise=noise)
    x = noise()
    once, again = field(x, 0.5), field(x.repeat(3, 1, 1, 1), 0.5)
    assert torch.equal(once.repeat(3, 1, 1, 1), again)
    assert torch.equal(once, Categorical(5).values(once))
    assert not torch.equal(once, field(x, 0.25))
    with pytest.raises(UserError, match="sampled=false"):
        Field(model, None, 2)(x, 0.5)
    posterior = HeadPosterior.fit(fitted(model, 20), prior_precision=2.0)
    made = Ensemble(members=4)(start_of(model, Euler(4), 2, (1, 8, 8)), posterior)
    assert torch.equal(made.images, Categorical(5).values(made.images))


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])


def test_a_whole_run_of_bernoulli(compose: Compose, undrawn):
    settings = "likelihood=bernoulli", "laplace.prior_precision=evidence", "metrics.num_images=0"
    cfg = compose(*settings)
    found = pipeline.run(cfg)
    record = json.loads((found.folder / "metrics.json").read_text())
    assert record["settings"]["likelihood"] == "bernoulli"
    assert record["metrics"]["laplace/log_evidence"] < 0
    assert "laplace/sigma_noise" not in record["metrics"]
    assert "likelihood_bernoulli" in found.folder.parent.name

    this, solver, estimator, laplace = pipeline.prepare(cfg)
    checkpoint = found.folder.parent / "checkpoints" / "last.ckpt"
    load_weights(this.model.eval(), checkpoint)
    posterior = laplace.fit(this.model, this.data.data)
    start = starts(this, solver)(range(4))
    x, weights = start.draw(), estimator.weights(posterior).float()
    times = torch.linspace(0, 1, 4).tolist()
    with torch.no_grad():
        members = [images_by_hand(this.model, w, x, times, start.labels) for w in weights]
    with np.load(found.samples) as kept:
        close(torch.tensor(kept["variance"]), torch.stack(members).var(0), 1e-4)

    other = pipeline.run(compose(*settings, "uncertainty=linearised"))
    assert other.folder.parent == found.folder.parent
    drawn = pipeline.prepare(compose(*settings, "model.likelihood.sampled=true"))[3]
    assert drawn.context == laplace.context, "no pass over the data for another emission"
    gaussian = "model.prediction=data", "fit=false", f"ckpt_path={checkpoint}"
    with pytest.raises(UserError, match=r"trained with model\.likelihood"):
        pipeline.run(compose(*gaussian))


def test_a_whole_run_of_levels(compose: Compose, undrawn):
    settings = "likelihood=categorical", "model.likelihood.levels=4", "metrics.num_images=0"
    found = pipeline.run(compose(*settings, "model=diffusion"))
    record = json.loads((found.folder / "metrics.json").read_text())
    assert record["settings"]["likelihood"] == "categorical"
    assert record["metrics"]["laplace/parameters"] == 4 * 73
    assert record["metrics"]["summed_variance/mean"] > 0


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("+model.likelihood.level=4", r"likelihood\.level is no option"),
        ("model.likelihood.levels=1", "levels"),
        ("model.likelihood.sampled=1", "true or false"),
        ("model.likelihood=bernoulli", "likelihood=bernoulli"),
        ("model.prediction=v", r"model\.prediction=data"),
        ("uncertainty=published", "linear in the head"),
        ("laplace.sigma_noise=0.2", "no noise level"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_any_work(override, reason, compose: Compose):
    with pytest.raises((UserError, InstantiationException), match=reason):
        pipeline.prepare(compose("likelihood=categorical", override))
