"""Likelihood of images under the model's probability-flow equation, against closed forms (T15)."""

import math
from types import SimpleNamespace

import pytest
import torch
from hand import FLOW, LINEAR, Hand, exact_probes, model_of, small_unet
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import Inflation, VariancePreserving, convert
from bayesdiff.solvers import Field, SampleNoise
from bayesdiff.uncertainty.scores.likelihood import (
    Probes,
    log_likelihood,
    random_probes,
)

# Ends with so little noise and so little signal that its ends are data and N(0, I).
LONG = VariancePreserving(beta_start=1e-7, beta_end=4e-2)


class Formula(Hand):
    """A network of one formula, which sees its time unrounded."""

    def __init__(self, formula):
        super().__init__(formula, [[1.0]])
        self.head = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def features(self, x, t, y=None):
        self.calls.append(float(t[0]))
        return self.formula(x, t.double().view(-1, 1, 1, 1), y)


def exact(model, images, labels=None, **settings):
    field = Field(model, labels, len(images))
    return log_likelihood(field, images, exact_probes(images), **settings)


def gaussian(path, prediction, spread):
    """The best prediction for data N(0, spread^2)."""

    def answer(x, t, y):
        c = path.coefficients(t)
        total = c.alpha**2 * spread**2 + c.sigma**2
        if prediction == "noise":
            return c.sigma * x / total
        if prediction == "data":
            return c.alpha * spread**2 * x / total
        # d ln(total) / dt / 2, the velocity that keeps x / sqrt(total).
        return (c.alpha * c.d_alpha * spread**2 + c.sigma * c.d_sigma) * x / total

    return model_of(Formula(answer), path, prediction)


def normal(x, variance):
    return -0.5 * (x**2 / variance + math.log(2 * math.pi * variance)).flatten(1).sum(1)


VALUES = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("spread", [0.05, 0.5, 2.0])
@pytest.mark.parametrize(
    ("path", "prediction"), [(FLOW, "velocity"), (LONG, "noise"), (LONG, "data")]
)
def test_gaussian_data_has_its_own_density(path, prediction, spread):
    found = exact(gaussian(path, prediction, spread), spread * VALUES, num_steps=80)
    truth = normal(spread * VALUES, spread**2)
    torch.testing.assert_close(found.log_density, truth, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.latents, VALUES, rtol=0, atol=2e-4)
    assert found.nfe == 2 * 4 * 80  # one probe: an evaluation and a derivative at four stages


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_early_has_the_density_of_slightly_noisy_data(schedule, spread):
    path = VariancePreserving(schedule)
    c = path.coefficients(torch.tensor([path.last_time, 0.0]))
    last, first = (c.alpha**2 * spread**2 + c.sigma**2).tolist()
    found = exact(gaussian(path, "noise", spread), spread * VALUES, num_steps=80).log_density
    truth = normal(spread * VALUES, last / first)  # N(0, 1) carried by the equation
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize(("path", "prediction"), [(FLOW, "velocity"), (LINEAR, "noise")])
def test_the_error_falls_with_the_order_of_the_solver(path, prediction, solver, order):
    model, x = gaussian(path, prediction, 0.5), 0.5 * VALUES
    settings = {"solver": solver, "grid": "uniform"}
    finest = exact(model, x, num_steps=100).log_density
    errors = [
        float((exact(model, x, num_steps=n, **settings).log_density - finest).abs().max())
        for n in (10, 20)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.7


def curved_answer(x, t, y):
    """Every pixel moves with all others, not linearly; labels turn it."""
    pixels = x.flatten(1)
    size = pixels.shape[1]
    mixing = torch.sin(torch.arange(1.0, size**2 + 1).double()).view(size, size)
    label = 0 if y is None else y.double().view(-1, 1)
    moved = torch.tanh(pixels @ mixing + t.view(-1, 1) + label) + 0.3 * pixels
    return moved.view(x.shape)


@pytest.mark.parametrize(("path", "prediction"), [(FLOW, "velocity"), (LINEAR, "v")])
def test_the_density_of_one_value_integrates_to_one(path, prediction):
    model = model_of(Formula(curved_answer), path, prediction)
    x = torch.linspace(-12, 12, 601, dtype=torch.float64).view(-1, 1, 1, 1)
    density = exact(model, x, num_steps=30).log_density.exp()
    assert abs(float(torch.trapezoid(density, x.flatten())) - 1) < 1e-5


def slow_samples(model, latents, labels, times):
    """The model's own equation from noise to data, by many small steps of t."""
    x = latents.view(1, 1, 2, 2)

    def slope(x, t):
        c = model.path.coefficients(torch.tensor(t, dtype=torch.float64))
        p, q = (float(v) for v in convert(model.prediction, "velocity", c))
        return p * x + q * model.net.formula(x, torch.tensor([[[[t]]]]).double(), labels)

    for start, end in zip(times[:-1], times[1:], strict=True):
        # One-sided slopes at the ends: a schedule's derivative jumps at its indices.
        h, inset = end - start, 1e-4 * (end - start)
        k_1 = slope(x, start + inset)
        k_2 = slope(x + h / 2 * k_1, start + h / 2)
        k_3 = slope(x + h / 2 * k_2, start + h / 2)
        k_4 = slope(x + h * k_3, end - inset)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x.flatten()


@pytest.mark.parametrize(
    ("path", "prediction", "count"),
    [(FLOW, "velocity", 40), (VariancePreserving(timesteps=200), "noise", 200)],
)
def test_the_density_is_that_of_the_sampled_images(path, prediction, count):
    """Sampling is a map z -> x, and p(x) = N(z) / |det dx/dz|."""
    model = model_of(Formula(curved_answer), path, prediction)
    latents = torch.tensor([0.3, -1.1, 0.8, -0.2], dtype=torch.float64)
    times = [k / count for k in range(count + 1) if k / count <= path.last_time]
    for label in (None, torch.tensor([1])):

        def images(z, label=label):
            x = slow_samples(model, z, label, times)
            return x, x

        jacobian, x = torch.func.jacfwd(images, has_aux=True)(latents)
        truth = normal(latents[None], 1.0) - torch.linalg.slogdet(jacobian).logabsdet
        found = exact(model, x.detach().view(1, 1, 2, 2), label, num_steps=100)
        torch.testing.assert_close(found.latents.flatten(), latents, rtol=0, atol=2e-4)
        torch.testing.assert_close(found.log_density, truth.detach(), rtol=0, atol=1e-3)


def test_the_network_is_asked_from_data_to_noise():
    net = Formula(lambda x, t, y: -x)
    exact(model_of(net), VALUES, num_steps=4, solver="heun", grid="uniform")
    assert net.calls == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0])
    net = Formula(lambda x, t, y: x)
    exact(model_of(net, LINEAR, "noise"), VALUES, num_steps=4)
    assert net.calls[0] == pytest.approx(LINEAR.last_time) and abs(net.calls[-1]) < 1e-6
    assert net.calls == sorted(net.calls, reverse=True)


def test_random_probes_are_exact_for_a_diagonal_derivative_and_unbiased_for_others():
    images = 0.5 * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    noise = SampleNoise(0, range(2), (1, 2, 2))
    diagonal = model_of(Formula(lambda x, t, y: torch.sin(2 * x) - t * x))
    field = Field(diagonal, None, 2)
    one = log_likelihood(field, images, random_probes(noise), num_steps=10)
    assert one.nfe == field.evaluations == 10 * 4 * 2
    torch.testing.assert_close(one.log_density, exact(diagonal, images, num_steps=10).log_density)
    mixed = model_of(Formula(curved_answer))
    truth = exact(mixed, images, num_steps=5).log_density
    single = log_likelihood(Field(mixed, None, 2), images, random_probes(noise), num_steps=5)
    assert (single.log_density - truth).abs().max() > 0.1
    probes = random_probes(noise, 4000)
    assert set(probes.vectors.unique().tolist()) == {-1.0, 1.0}
    many = log_likelihood(Field(mixed, None, 2), images, probes, num_steps=5).log_density
    torch.testing.assert_close(many, truth, rtol=0, atol=0.15)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_in_channels_last_gives_the_trace_of_its_jacobian(channels):
    torch.manual_seed(0)
    net = UNet(channels, 4, channels=(8, 16), blocks=1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    model = model_of(net)
    images = torch.randn(2, channels, 4, 4)
    found = exact(model, images, num_steps=1, solver="heun")
    slopes, traces = [], []
    for t in (1.0, 0.0):
        state = images - slopes[0] if slopes else images
        time = torch.full((1,), t)
        jacobians = [
            torch.autograd.functional.jacobian(lambda x, time=time: model(x, time), x[None])
            for x in state
        ]
        traces.append(torch.stack([j.reshape(16 * channels, -1).trace() for j in jacobians]))
        slopes.append(model(state, torch.full((2,), t)).detach())
    latents = images - (slopes[0] + slopes[1]) / 2
    total = -(traces[0] + traces[1]) / 2
    expected = normal(latents.double(), 1.0) + total
    torch.testing.assert_close(found.latents, latents.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_density, expected.double(), rtol=1e-4, atol=1e-3)


def test_an_image_keeps_its_likelihood_in_any_batch():
    net, _ = small_unet()
    model = GenerativeModel(net, FLOW, "velocity", torch.optim.SGD, 3).eval()
    images = 0.5 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 1, 0])

    def of(numbers):
        noise = SampleNoise(5, numbers, (1, 8, 8))
        field = Field(model, labels[numbers], len(numbers))
        return log_likelihood(field, images[numbers], random_probes(noise, 2), num_steps=3)

    together = of([0, 1, 2, 3])
    for numbers in ([3, 1], [2]):
        alone = of(numbers)
        expected = together.log_density[numbers]
        torch.testing.assert_close(alone.log_density, expected, rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        again = of([0, 1, 2, 3])
    torch.testing.assert_close(again.log_density, together.log_density, rtol=1e-5, atol=1e-4)


def test_a_likelier_image_has_fewer_bits():
    model = gaussian(FLOW, "velocity", 0.3)
    images = torch.tensor([0.0, 0.9]).double().view(2, 1, 1, 1).expand(2, 1, 3, 3)
    likely, unlikely = exact(model, images).bits_per_dim
    assert unlikely > likely
    turned = images + 0.1 * torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = [exact(model, x).bits_per_dim for x in (turned, turned.rot90(1, (-2, -1)))]
    torch.testing.assert_close(*found)


def test_bits_are_those_of_all_256_values():
    """Every value's probability is 2^-bits, and they sum up to 1."""
    model = gaussian(FLOW, "velocity", 0.15)
    levels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = to_model_range(levels).double()
    inside = (torch.rand(256, generator=torch.Generator().manual_seed(1)) - 0.5) / 127.5
    for spread, error in ((0 * inside, 1e-5), (inside, 0.05)):
        found = exact(model, images + spread.view(-1, 1, 1, 1)).bits_per_dim
        assert abs(float((2.0**-found).sum()) - 1) < error


def test_bits_per_dimension_have_the_scale_of_eight_bits():
    model = gaussian(FLOW, "velocity", 0.5)
    images = torch.full((1, 1, 2, 3), 0.2).double()
    nats = -float(normal(images, 0.25)) / 6
    found = float(exact(model, images, num_steps=80).bits_per_dim)
    assert found == pytest.approx(nats / math.log(2) + 6.994353, abs=1e-6)


def refuse(**settings):
    images = torch.zeros(1, 1, 1, 1).double()
    prediction = settings.pop("prediction", "velocity")
    model = model_of(Formula(lambda x, t, y: x), FLOW, prediction)
    probes = Probes(torch.ones(1, 1, 1, 1, 1), 1.0)
    log_likelihood(Field(model, None, 1), images, probes, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refuse(solver="dopri5"), "unknown likelihood solver 'dopri5'; choose from rk4"),
        (lambda: refuse(num_steps=0), "num_steps must be a whole number >= 1"),
        (lambda: refuse(grid="fine"), "unknown solver.grid 'fine'"),
        (lambda: refuse(prediction="noise"), "leaves the velocity at t=0 open"),
        (lambda: refuse(prediction="data"), "leaves the velocity at t=1 open"),
        (lambda: random_probes(SampleNoise(0, [0], (1,)), 0), "probes must be a whole number"),
    ],
)
def test_what_has_no_likelihood_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_path_with_noise_left_at_the_end_takes_images_as_means():
    """Without a slope, states stay what they are: data are those of t = 0 over alpha."""
    xi = torch.tensor([[[2.0, 1.0], [0.5, 0.1]]], dtype=torch.float64)
    path = Inflation(gamma_0=0.3).for_space(SimpleNamespace(variances=xi, shape=xi.shape))
    images = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    found = exact(model_of(Formula(lambda x, t, y: 0 * x), path, "v"), images, num_steps=2)
    variance = 1 / path.coefficients(torch.ones(())).alpha ** 2
    expected = torch.distributions.Normal(0, variance.sqrt()).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(found.log_density, expected)
