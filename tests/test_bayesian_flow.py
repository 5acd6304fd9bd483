"""Bayesian flow networks against closed forms, quadrature and brute force, in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.data.one_hot import embedded
from bayesdiff.likelihoods import (
    Bernoulli,
    Categorical,
    Classes,
    Discretised,
    Gaussian,
)
from bayesdiff.likelihoods.discretised import log_mass
from bayesdiff.models import BeliefNetwork, GenerativeModel
from bayesdiff.models.objectives import BayesianFlowLoss
from bayesdiff.networks import UNet
from bayesdiff.paths import BayesianFlow, CondOT, GeometricAccuracy, QuadraticAccuracy, convert
from bayesdiff.solvers import BayesianUpdate, integrate, plan
from bayesdiff.uncertainty import starts_of
from bayesdiff.uncertainty.members.ensemble import Ensemble

NODES, WEIGHTS = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(100))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
DOUBLE = torch.float64


def close(found, truth, error=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=DOUBLE), torch.as_tensor(truth, dtype=DOUBLE),
        rtol=error, atol=error,
    )  # fmt: skip


def times(*values):
    return torch.tensor(values, dtype=DOUBLE)


# Schedules


@pytest.mark.parametrize("n", [1, 7, 100])
def test_accuracies_of_the_steps_add_up(n):
    grid = torch.linspace(0, 1, n + 1, dtype=DOUBLE)
    for path, whole in ((GeometricAccuracy(1e-3), 1e6 - 1), (QuadraticAccuracy(9.0), 9.0)):
        close(path.accuracy(grid).diff().sum(), whole)
    quadratic = QuadraticAccuracy(9.0).accuracy(grid).diff()
    close(quadratic, [9.0 * (2 * i - 1) / n**2 for i in range(1, n + 1)])


@pytest.mark.parametrize("path", [GeometricAccuracy(0.03), QuadraticAccuracy(9.0)])
def test_coefficients_and_their_derivatives(path):
    t = torch.linspace(0.05, 1, 20, dtype=DOUBLE, requires_grad=True)
    c = path.coefficients(t)
    close(c.alpha.square() + c.sigma.square(), torch.ones_like(t))
    close((c.alpha / c.sigma).square().detach(), path.accuracy(t).detach(), 1e-10)
    for value, slope in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (found,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        close(slope.detach(), found, 1e-9)
    (rate,) = torch.autograd.grad(path.accuracy(t).sum(), t)
    close(path.accuracy_rate(t).detach(), rate, 1e-9)


def test_gamma_is_precise_for_small_times():
    alpha = GeometricAccuracy(1e-3).coefficients(times(1e-6)).alpha
    close(alpha.square(), [-math.expm1(2e-6 * math.log(1e-3))], 1e-14)


def test_the_likelihood_chooses_the_schedule():
    path = BayesianFlow(beta_1=3.0, sigma_1=0.1)
    assert path.for_likelihood(Bernoulli()).beta_1 == path.for_likelihood(Classes(3)).beta_1 == 3
    assert path.for_likelihood(Gaussian()).sigma_1 == path.for_likelihood(Categorical(4)).sigma_1
    with pytest.raises(UserError, match="sigma_1 must lie between 0 and 1, got 2"):
        BayesianFlow(sigma_1=2.0)
    with pytest.raises(UserError, match="beta_1 must be .*-1"):
        BayesianFlow(beta_1=-1.0)


# Beliefs are the posterior given all that was received


def received(path, x, t, generator):
    """States of the path for data, and the transmissions behind them."""
    c = path.coefficients(torch.tensor(t, dtype=DOUBLE))
    return c.alpha * x + c.sigma * torch.randn(x.shape, dtype=DOUBLE, generator=generator)


@pytest.mark.parametrize("levels", [2, 5])
def test_the_belief_of_a_state_is_that_of_its_transmissions(levels):
    """T2: updates one after the other, all at once, and Bayes' rule by the senders' densities."""
    generator = torch.Generator().manual_seed(levels)
    accuracies = torch.rand(8, dtype=DOUBLE, generator=generator)
    index = torch.randint(levels, (1, 6), generator=generator)
    one_hot = nn.functional.one_hot(index, levels).movedim(-1, 2).double()  # (1, 6, K)
    noise = torch.randn(8, *one_hot.shape, dtype=DOUBLE, generator=generator)
    a = accuracies.view(-1, 1, 1, 1)
    y = a * (levels * one_hot - 1) + (a * levels).sqrt() * noise
    log_theta = torch.full_like(one_hot, -math.log(levels))
    for each in y:
        log_theta = (log_theta + each).log_softmax(2)
    close(log_theta, y.sum(0).log_softmax(2))
    brute = torch.zeros(1, 6, levels, dtype=DOUBLE)
    for k in range(levels):
        mean = a * (
            levels * nn.functional.one_hot(torch.tensor(k), levels).double().view(1, 1, -1) - 1
        )
        brute[:, :, k] = (-(y - mean).square() / (2 * a * levels)).sum((0, 3))
    close(log_theta, brute.log_softmax(2), 1e-10)
    beta = accuracies.sum()
    z = y.sum(0) / (beta * levels * (1 + beta)).sqrt()  # the state of the path
    found = Classes(levels).belief_logits(z.flatten(1, 2)[..., None, None], beta.view(1, 1, 1, 1))
    close(found.flatten(1).unflatten(1, (-1, levels)), log_theta)
    if levels == 2:
        odds = Bernoulli().belief_logits((z[..., 1] - z[..., 0]) / math.sqrt(2), beta)
        close(odds, log_theta[..., 1] - log_theta[..., 0])


def test_updates_of_a_gaussian_belief_add_up():
    """T1: two updates are one of their summed accuracy, in either order, and that is the state."""
    y, a, rho = times(0.3, -1.2), times(2.0, 5.0), 1.0

    def update(mean, rho, y, a):
        return (rho * mean + a * y) / (rho + a), rho + a

    one = update(*update(0.0, rho, y[0], a[0]), y[1], a[1])
    other = update(*update(0.0, rho, y[1], a[1]), y[0], a[0])
    whole = update(0.0, rho, (a * y).sum() / a.sum(), a.sum())
    close(one[0], other[0]), close(one[0], whole[0])
    beta = a.sum()
    z = (a * y).sum() / beta * (beta / (1 + beta)).sqrt()  # x and eps / sqrt(beta), scaled
    close(Gaussian().belief(z, beta), one[0])


def test_embedded_classes_have_the_accuracy_as_their_signal_to_noise_ratio():
    index = torch.arange(5)[None]
    states = embedded(index, 5).double()
    found = states.square().sum(2)
    close(found, torch.full_like(found, 4.0), 1e-6)  # |K e - 1|^2 / K = K - 1
    assert Classes(5).values(states.flatten(1, 2)[..., None]).shape == (1, 25, 1)


# The steps of the sampler have the law of the path (T3)


class Knows:
    """A field whose prediction is the data themselves."""

    def __init__(self, data):
        self.data = data

    def __call__(self, x, t):
        return self.data.expand_as(x)


def chain(path, data, n, generator):
    """States after every step, each with its time; the last is the sample."""
    steps, states = plan(BayesianUpdate(n), path, "data"), []
    integrate(
        Knows(data), steps, torch.randn(data.shape, dtype=DOUBLE, generator=generator),
        lambda: torch.randn(data.shape, dtype=DOUBLE, generator=generator),
        lambda step, x: states.append((step.end, x)),
    )  # fmt: skip
    return states


def test_a_chain_of_transmissions_has_the_law_of_one():
    generator = torch.Generator().manual_seed(0)
    path, data = QuadraticAccuracy(9.0), torch.ones(200_000, 1, 1, 1, dtype=DOUBLE)
    states = chain(path, data, 10, generator)
    assert len(states) == 11
    for i, mean, variance in ((5, 4.5, 9.0), (10, 18.0, 36.0)):
        t, z = states[i - 1]
        odds = Bernoulli().belief_logits(z, path.accuracy(torch.tensor(t, dtype=DOUBLE)))
        assert abs(float(odds.mean()) - mean) < 0.06
        assert abs(float(odds.var()) - variance) < 0.5
    assert torch.equal(states[-1][1], data)


def test_a_chain_of_gaussian_beliefs_has_the_law_of_one():
    generator = torch.Generator().manual_seed(1)
    path, data = GeometricAccuracy(0.1), torch.full((200_000, 1, 1, 1), 0.7, dtype=DOUBLE)
    for number, (t, z) in enumerate(chain(path, data, 5, generator)[:-1], start=1):
        gamma = 1 - 0.1 ** (2 * number / 5)
        mean = Gaussian().belief(z, path.accuracy(torch.tensor(t, dtype=DOUBLE)))
        close(mean.mean(), gamma * 0.7, 0.01), close(mean.var(), gamma * (1 - gamma), 0.01)


def test_the_steps_are_those_of_the_update():
    """mu' = c mu + (1 - c) x + sqrt((1 - c) sigma_1^(2 i / n)) xi, in coordinates of beliefs."""
    n, sigma_1 = 7, 1e-3
    path, c = GeometricAccuracy(sigma_1), sigma_1 ** (2 / n)
    for i, step in enumerate(plan(BayesianUpdate(n), path, "data")[:-1], start=1):
        before, after = (path.coefficients(times(t)).alpha[0] for t in ((i - 1) / n, i / n))
        a, b = step.output
        if i > 1:
            close(a * after / before, c, 1e-9)
        close(b * after, 1 - c, 1e-9)
        close(step.noise * after, math.sqrt((1 - c) * sigma_1 ** (2 * i / n)), 1e-9)


# The bound (T4 to T9)


def bound(path, likelihood, predict, x, n=None, count=200):
    """L^n or L^inf of scalar data x by quadrature over states; predict(state, t) -> output."""
    loss = BayesianFlowLoss(path, likelihood, "data", n_steps=n)
    if n is None:
        points, weights = np.polynomial.legendre.leggauss(count)
        grid, weights = (points + 1) / 2, weights / 2
    else:
        grid, weights = np.arange(n) / n, np.full(n, 1 / n)
    total = 0.0
    for t, weight in zip(grid.tolist(), weights.tolist(), strict=True):
        c = path.coefficients(times(t))
        x_t = (c.alpha * x + c.sigma * NODES).view(-1, 1, 1, 1)
        output = predict(x_t, t)
        data, at = torch.full_like(x_t, x), torch.full((len(x_t),), t, dtype=DOUBLE)
        total += weight * float(WEIGHTS @ loss.per_image(output, x_t, data, at))
    return total


def test_continuous_bound_of_known_errors():
    """T4: errors of constant size, and of the size of the belief's own spread."""
    path = GeometricAccuracy(0.1)
    for n in (None, 1, 10):
        close(bound(path, Gaussian(), lambda x, t: torch.ones_like(x), 0.0, n), 49.5, 1e-9)
    shrinking = {1: 49.5, 10: 2.924466, 100: 2.356427, None: 2.302585}
    for n, truth in shrinking.items():
        found = bound(path, Gaussian(), lambda x, t: torch.full_like(x, 0.1**t), 0.0, n)
        close(found, truth, 1e-6)


UNIFORM = {1: 0.689298, 2: 1.206853, 5: 2.134099, 10: 2.893860, 100: 4.250899, None: 4.5}


@pytest.mark.parametrize("n", UNIFORM)
def test_discrete_bound_of_even_odds(n):
    """T5: the receiver is one mixture over both coordinates of a transmission."""
    found = bound(QuadraticAccuracy(9.0), Bernoulli(), lambda x, t: torch.zeros_like(x), 1.0, n)
    close(found, UNIFORM[n], 1e-5)


def test_a_receiver_of_each_coordinate_alone_is_another_bound():
    """The released loss, for the record: 3.514 nats at n = 10, and 1.295 > ln 2 at n = 1."""

    def apart(n):
        total, draws = (
            0.0,
            torch.randn(400_000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)),
        )
        for i in range(1, n + 1):
            a = 9.0 * (2 * i - 1) / n**2
            means = torch.tensor([a, -a], dtype=DOUBLE)  # a (K e_x - 1), K = 2
            y = means + math.sqrt(2 * a) * draws
            own = -(y - means).square() / (4 * a)
            mixed = torch.stack([-(y - a).square(), -(y + a).square()]).div(4 * a).logsumexp(0)
            total += float((own - mixed + math.log(2)).sum(1).mean())
        return total

    assert abs(apart(10) - 3.514) < 0.02 and abs(apart(1) - 1.295) < 0.01
    assert apart(1) > math.log(2) > UNIFORM[1]


@pytest.mark.parametrize("levels", [2, 5])
def test_draws_of_a_transmission_agree_with_quadrature(levels):
    generator = torch.Generator().manual_seed(0)
    shape = (20_000, levels, 1, 1)
    logits = torch.linspace(-1, 1, levels, dtype=DOUBLE).view(1, -1, 1, 1).expand(shape)
    data = embedded(torch.zeros(20_000, 1, 1, 1, dtype=torch.long), levels).double().flatten(1, 2)
    for accuracy in (0.05, 0.8, 6.0):
        a = torch.tensor(accuracy, dtype=DOUBLE)
        drawn = Classes(levels).step_divergence(logits, data, a, generator).flatten()
        error = float(drawn.std()) / math.sqrt(len(drawn))
        log_p = float(-logits[0].flatten().log_softmax(0)[0])
        assert float(drawn.mean()) <= log_p + 4 * error  # never more than -ln p_x
        if levels == 2:
            odds = logits[:1, :1] - logits[:1, 1:]  # of the right one
            truth = Bernoulli().step_divergence(odds, torch.ones_like(odds), a, None)
            assert abs(float(drawn.mean()) - float(truth)) < 4 * error


def test_levels_told_as_numbers_by_draws():
    """One sure level: half the accuracy times the squared distance, whatever is drawn."""
    logits = torch.full((3, 4, 1, 1), -1e3, dtype=DOUBLE)
    logits[:, 2] = 0
    data = times(-1, -1 / 3, 1 / 3).view(3, 1, 1, 1)
    a = torch.tensor(7.0, dtype=DOUBLE)
    found = Categorical(4).step_divergence(logits, data, a, torch.Generator().manual_seed(0))
    close(found, a / 2 * (data - 1 / 3).square(), 1e-9)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


TIGHT = {0.5: (0.135838, 0.364565), 3.0: (0.417856, 0.082546)}


@pytest.mark.parametrize("beta_1", TIGHT)
@pytest.mark.parametrize("n", [1, 3, 10, None])
def test_the_bound_of_the_exact_posterior_is_the_entropy(beta_1, n):
    """T6: one pixel, white with probability 0.2."""
    path = QuadraticAccuracy(beta_1)

    def posterior(x, t):
        odds = Bernoulli().belief_logits(x, path.accuracy(times(t)).view(1, 1, 1, 1))
        return odds + math.log(0.25)

    of_steps = sum(
        share * bound(path, Bernoulli(), posterior, x, n) for share, x in ((0.2, 1.0), (0.8, -1.0))
    )
    c = path.coefficients(times(1.0))
    rest = 0.0
    for share, x in ((0.2, 1.0), (0.8, -1.0)):
        x_1 = (c.alpha * x + c.sigma * NODES).view(-1, 1, 1, 1)
        log_p = Bernoulli().log_prob(posterior(x_1, 1.0), torch.full_like(x_1, x))
        rest -= share * float(WEIGHTS @ log_p.flatten())
    close([of_steps, rest], TIGHT[beta_1], 2e-6)
    close(of_steps + rest, entropy(0.2), 1e-6)


class Exact:
    """The exact posterior of pixels whose prior odds are known, as a field that draws."""

    def __init__(self, path, likelihood, odds, generator, shared=False):
        self.path, self.likelihood, self.odds, self.generator = path, likelihood, odds, generator
        self.shared = shared

    def __call__(self, x, t):
        accuracy = self.path.accuracy(torch.tensor(t, dtype=DOUBLE))
        logits = self.likelihood.belief_logits(x, accuracy)
        if self.shared:
            logits = logits.sum(-1, keepdim=True).expand_as(logits)
        noise = torch.randn(x.shape, dtype=DOUBLE, generator=self.generator)
        return self.likelihood.emit(logits + self.odds, noise, t > 1)


def samples(path, field, n, shape):
    def draw():
        return torch.randn(shape, dtype=DOUBLE, generator=field.generator)

    return integrate(field, plan(BayesianUpdate(n), path, "data"), draw(), draw)


def test_samples_of_one_pixel_have_its_probability():
    """T7: drawn at the end, whatever n; the mode has another law."""
    generator, path = torch.Generator().manual_seed(0), QuadraticAccuracy(0.5)
    law, odds = Bernoulli(sampled=True), math.log(0.25)
    drawn = samples(path, Exact(path, law, odds, generator), 3, (400_000, 1, 1, 1))
    assert abs(float((drawn > 0).double().mean()) - 0.2) < 0.002
    law = Bernoulli(sampled=True, final="mode")
    likely = samples(path, Exact(path, law, odds, generator), 3, (400_000, 1, 1, 1))
    assert abs(float((likely > 0).double().mean()) - 0.1151) < 0.002


def test_two_copies_of_a_bit():
    """T8: the bound falls to the mutual information, and pixels drawn alone disagree."""
    path = QuadraticAccuracy(1.0)
    first, second = torch.meshgrid(NODES, NODES, indexing="ij")
    weights = (WEIGHTS[:, None] * WEIGHTS).flatten()
    truths = {1: 0.673662, 2: 0.596977, 5: 0.540965, 20: 0.510401}
    for n, truth in truths.items():
        loss = BayesianFlowLoss(path, Bernoulli(), "data", n_steps=n)
        found = 0.0
        for i in range(n):
            c = path.coefficients(times(i / n))
            x = (c.alpha + c.sigma * torch.stack([first, second], -1)).view(-1, 1, 1, 2)
            odds = Bernoulli().belief_logits(x, path.accuracy(times(i / n)).view(1, 1, 1, 1))
            output = odds.sum(-1, keepdim=True).expand_as(odds)
            at = torch.full((len(x),), i / n, dtype=DOUBLE)
            found += float(weights @ loss.per_image(output, x, torch.ones_like(x), at)) / n
        close(found, truth, 1e-5)
    generator = torch.Generator().manual_seed(0)
    for n, truth in ((1, 0.1778), (50, 0.117)):
        field = Exact(path, Bernoulli(sampled=True), 0.0, generator, shared=True)
        made = samples(path, field, n, (100_000, 1, 1, 2))
        assert abs(float((made[..., 0] != made[..., 1]).double().mean()) - truth) < 0.005


# What is shared with diffusion (T10)


def test_gaussian_data_and_the_sampler_of_their_best_predictor():
    path, generator = GeometricAccuracy(0.1), torch.Generator().manual_seed(0)

    def best(x, t):  # the belief's mean, of data N(0, 1)
        return Gaussian().belief(x, path.accuracy(torch.tensor(t, dtype=DOUBLE)))

    def draw():
        return torch.randn(200_000, 1, 1, 1, dtype=DOUBLE, generator=generator)

    for n, truth in ((1, 0.0099), (10, 0.624648), (100, 0.945443)):
        made = integrate(best, plan(BayesianUpdate(n), path, "data"), draw(), draw)
        close(made.var(), truth, 0.01 * truth)


def test_the_continuous_bound_is_that_of_diffusion_and_of_v_plain_squared_error():
    path, generator = GeometricAccuracy(1e-3), torch.Generator().manual_seed(0)
    x, eps, guess = torch.randn(3, 16, 1, 2, 2, dtype=DOUBLE, generator=generator)
    t = torch.rand(16, dtype=DOUBLE, generator=generator)
    c = path.coefficients(t)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in (c.alpha, c.sigma))
    x_t, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    output = v + guess
    found = BayesianFlowLoss(path, Gaussian(), "v").per_image(output, x_t, x, t)
    p, q = (w.view(-1, 1, 1, 1) for w in convert("v", "data", c))
    snr_rate = -2 * math.log(1e-3) * (1e-3) ** (-2 * t)  # of sigma_1^(-2 t) - 1
    close(found, snr_rate / 2 * (x - p * x_t - q * output).square().flatten(1).sum(1), 1e-9)
    close(found, -math.log(1e-3) * guess.square().flatten(1).sum(1), 1e-9)


# Networks


def small(likelihood, path=None, residual=True, skip=True, channels=1, patch=1, kernel=3):
    path = path or BayesianFlow().for_likelihood(likelihood)
    states = channels * (likelihood.channels(1) if likelihood.discrete else 1)
    torch.manual_seed(0)
    net = UNet(
        states, 8, channels=(4, 8), blocks=1, attention=False, patch=patch, head_kernel=kernel,
        out_channels=likelihood.channels(channels),
    )  # fmt: skip
    return BeliefNetwork(net, path, likelihood, skip=skip, residual=residual)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Classes(3), Discretised(levels=16)])
def test_an_untrained_residual_network_repeats_the_belief(likelihood, patch):
    net = small(likelihood, patch=patch)
    x, t = torch.randn(4, net.net.stem.in_channels // patch**2, 8, 8), torch.rand(4)
    accuracy = net.path.accuracy(t).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(net(x, t), likelihood.belief_logits(x, accuracy))


LAWS = [Bernoulli(), Classes(3), Categorical(4), Gaussian(), Discretised(levels=16)]


@pytest.mark.parametrize("likelihood", LAWS)
@pytest.mark.parametrize("skip", [True, False])
def test_networks_say_as_much_as_the_likelihood_needs(likelihood, skip):
    net = small(likelihood, residual=False, skip=skip, channels=3)
    states = 3 * (likelihood.channels(1) if likelihood.discrete else 1)
    x = torch.randn(2, states, 8, 8)
    for t in (torch.zeros(2), torch.full((2,), 1e-6), torch.ones(2)):
        output = net(x, t)
        assert output.shape == (2, likelihood.channels(3), 8, 8)
        assert output.isfinite().all()


def test_the_first_evaluation_sees_nothing_of_the_noise():
    net = small(Bernoulli(), residual=False)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, torch.zeros(2))[0], net(-x, torch.zeros(2))[0])


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="residual=true is for classes"):
        small(Gaussian())
    with pytest.raises(UserError, match="model.wrapper is about Bayesian flow networks"):
        small(Bernoulli(), path=CondOT())
    with pytest.raises(UserError, match="n_steps"):
        BayesianFlowLoss(QuadraticAccuracy(), Bernoulli(), "data", n_steps=0)
    with pytest.raises(UserError, match="likelihood.final 'best'; choose"):
        Bernoulli(final="best")


@pytest.mark.parametrize("n", [None, 4])
def test_training_minimises_the_bound(n):
    path, law = QuadraticAccuracy(9.0), Bernoulli()
    model = GenerativeModel(
        small(law), path, "data", torch.optim.SGD, likelihood=law,
        objective=lambda *own: BayesianFlowLoss(*own, n_steps=n),
    )  # fmt: skip
    model._trainer = SimpleNamespace(world_size=1)
    x = torch.where(
        torch.rand(512, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0
    )
    found = float(model._loss(x, None, 0, slice(None)).detach())

    def repeats(x_t, t):
        return law.belief_logits(x_t, path.accuracy(times(t)).view(1, 1, 1, 1))

    assert abs(found - bound(path, law, repeats, 1.0, n)) < 0.03


# Levels with the mass of a Gaussian (T11)


def test_masses_of_levels_are_precise_in_the_tails():
    def official(mu, spread, k, levels):
        edges = [2 * j / levels - 1 for j in range(levels + 1)]
        edges[0], edges[-1] = -math.inf, math.inf
        return log_mass(
            *(torch.tensor(v, dtype=DOUBLE) for v in (edges[k], edges[k + 1], mu, spread))
        )

    close(official(0.0, 10.0, 0, 16).exp(), 0.465137, 1e-6)
    close(official(-0.9, 0.05, 243, 256), -651.3814, 1e-6)
    for levels in (2, 16, 256):
        law = Discretised(levels=levels)
        values = torch.linspace(-1, 1, levels, dtype=DOUBLE).view(-1, 1, 1, 1)
        for mu in (-5.0, 0.0, 0.3, 5.0):
            for spread in (1e-3, 0.1, 10.0):
                output = torch.tensor([mu, math.log(spread)], dtype=DOUBLE).view(1, 2, 1, 1)
                p = law.log_prob(output.expand(levels, 2, 1, 1), values).exp()
                close(p.sum(), 1.0), close(law.mean(output).sum(), (p * values).sum(), 1e-12)


def test_slopes_of_levels_against_autograd():
    law, generator = Discretised(levels=7), torch.Generator().manual_seed(0)
    output = torch.randn(5, 4, 2, 2, dtype=DOUBLE, generator=generator).requires_grad_()
    target = law.values(torch.rand(5, 2, 2, 2, dtype=DOUBLE, generator=generator) * 2 - 1)
    (slope,) = torch.autograd.grad(-law.log_prob(output, target).sum(), output)
    close(law.residual(output.detach(), target), slope, 1e-9)
    direction = torch.randn(output.shape, dtype=DOUBLE, generator=generator)
    _, found = torch.func.jvp(law.mean, (output.detach(),), (direction,))
    close(law.slope(output.detach(), direction), found, 1e-9)
    values = torch.linspace(-1, 1, 7, dtype=DOUBLE)
    truth = torch.zeros(5, 2, 2, 2, 2, 2, dtype=DOUBLE)
    for value in values:
        data = torch.full_like(target, float(value))
        log_p = law.log_prob(output, data)
        (g,) = torch.autograd.grad(log_p.sum(), output)
        g = g.unflatten(1, (2, 2))
        truth += log_p.detach().exp()[:, :, None, None] * g[:, :, :, None] * g[:, :, None]
    close(law.hessian(output.detach()), truth, 1e-9)


def test_sure_levels_cost_their_distance_whatever_the_steps():
    law = Discretised(levels=16)
    output = torch.tensor([1 / 15, math.log(1e-4)], dtype=DOUBLE).view(1, 2, 1, 1)
    data, a = torch.full((1, 1, 1, 1), -3 / 15, dtype=DOUBLE), torch.tensor(3.0, dtype=DOUBLE)
    found = law.step_divergence(output, data, a, torch.Generator().manual_seed(0))
    close(found.flatten(), [3.0 / 2 * (4 / 15) ** 2], 1e-9)


def test_eight_bits_of_a_sure_number_cost_nothing():
    grey = torch.arange(256, dtype=DOUBLE).view(-1, 1, 1, 1) / 127.5 - 1
    assert float(Gaussian().code_length(grey, grey, 1e-4).max()) < 1e-8
    close(Discretised().values(grey), grey)


def test_grey_data_of_a_binary_model_are_refused_and_rounding_is_said(caplog):
    grey = torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
    loss = BayesianFlowLoss(QuadraticAccuracy(), Bernoulli(), "data")
    loss.check_data(grey.sign().where(grey != 0, torch.ones(())), "letters")
    with pytest.raises(UserError, match=r"letters is not black and white.*data.binarise=dynamic"):
        loss.check_data(grey, "letters")
    path = GeometricAccuracy()
    BayesianFlowLoss(path, Categorical(5), "data").check_data(grey, "letters")
    assert "letters is told as categorical-5: values are off by up to 0.25" in caplog.text
    caplog.clear()
    for likelihood in (Categorical(9), Discretised(levels=9), Gaussian()):
        BayesianFlowLoss(path, likelihood, "data").check_data(grey, "letters")
    assert caplog.text == ""


def test_states_of_another_number_of_classes_are_refused():
    loss = BayesianFlowLoss(QuadraticAccuracy(), Classes(5), "data")
    with pytest.raises(UserError, match="7 channels, and likelihood=classes-5 takes 5"):
        loss.check_data(embedded(torch.zeros(1, 1, 2, 2, dtype=torch.long), 7).flatten(1, 2), "x")


def test_the_sampler_noise_of_drawn_classes_is_that_of_other_draws():
    """From one start, under fixed weights: the spread over noise members is that of whole runs."""
    path, law = QuadraticAccuracy(9.0), Bernoulli(sampled=True)
    net = small(law, residual=True)
    model = GenerativeModel(net, path, "data", torch.optim.SGD, likelihood=law).eval()
    start = starts_of(model, BayesianUpdate(2), 0, (1, 8, 8), torch.device("cpu"))([0, 1])
    estimator = Ensemble(members=2, noise_members=400)
    found = estimator._sampler_noise(start.field(), start, start.initial())
    # Untrained, a pixel is drawn from even odds whatever came before: variance 1.
    assert abs(float(found.mean()) - 1) < 0.03
