"""Deterministic samplers from data to noise and back."""

import math

import pytest
import torch
from hand import CPU, FLOW, LINEAR, SampleNoise, curved, model_of
from sklearn.datasets import load_digits

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, VariancePreserving, VPPerPixel
from bayesdiff.solvers import (
    DDIM,
    DDPM,
    RK4,
    DPMSolver1,
    DPMSolver2,
    DPMSolverPP2M,
    Euler,
    Heun,
    Midpoint,
    ProbabilityFlow,
    SDEEuler,
    decode,
    encode,
)
from bayesdiff.solvers.encode import backward
from bayesdiff.uncertainty import Ensemble, starts_of
from bayesdiff.uncertainty.restart import Restart, with_state

COSINE = VariancePreserving("cosine")
SPEEDS = torch.logspace(-0.4, 0.5, 16, dtype=torch.float64).view(1, 4, 4)


@pytest.fixture(scope="module")
def flow():
    """A tiny flow of digits after 60 steps."""
    images = to_model_range((torch.tensor(load_digits().images)[:, None] * 255 / 16).byte())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(1, 8, num_classes=10, channels=(8, 16), blocks=1, attention=False)
        model = GenerativeModel(net, FLOW, "velocity", torch.optim.Adam, 10)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        labels = torch.tensor(load_digits().target)
        for _ in range(60):
            chosen = torch.randint(len(images), (32,))
            t, x_1 = torch.rand(32), images[chosen]
            x_t, target = model.corrupt(x_1, torch.randn_like(x_1), t)
            loss = (model(x_t, t, labels[chosen]) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, images[:8], labels[:8]


def gap(model, solver, images, labels=None):
    """Largest error of a round trip."""
    again = decode(model, solver, encode(model, solver, images, labels), labels)
    return float((again - images).abs().max())


def test_digits_come_back_from_the_noise_of_a_trained_flow(flow):
    """To 1e-4 with 50 steps of Heun; measured: 3.3e-4 with 25, 6.1e-5 with 50."""
    gaps = [gap(flow[0], Heun(n), *flow[1:]) for n in (25, 50)]
    assert gaps[1] < 1e-4 and gaps[0] / gaps[1] > 3.5


def test_the_network_is_asked_without_dropout_and_left_as_it_was(flow):
    model, images, labels = flow
    evaluated = encode(model.eval(), Heun(4), images, labels)
    trained = encode(model.train(), Heun(4), images, labels)
    assert model.training and torch.equal(trained, evaluated)
    assert not trained.requires_grad


def round_trips(path, prediction, solver, counts, shape=(1, 4, 4)):
    net, _, _ = curved()
    model = model_of(net, path, prediction)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)).double() / 2
    return [gap(model, solver(n), images) for n in counts]


@pytest.mark.parametrize(
    ("solver", "order"), [(Euler, 1), (Heun, 2), (Midpoint, 2), (RK4, 4)], ids=str
)
@pytest.mark.parametrize("per_pixel", [False, True])
def test_latents_and_round_trips_are_of_the_order_of_the_solver(solver, order, per_pixel):
    path, prediction = (VPPerPixel(speeds=SPEEDS), "v") if per_pixel else (FLOW, "velocity")
    net, _, _ = curved()
    model = model_of(net, path, prediction)
    # Times without the rounding that suits the indices of a discrete schedule.
    net.features = lambda x, t, y=None: net.formula(x, t.double().view(-1, 1, 1, 1), y)
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double() / 2
    gaps = [gap(model, solver(n), images) for n in (16, 32)]
    # What an even order adds on the way there, it takes off on the way back.
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(order + 1 - order % 2, abs=0.4)
    truth = encode(model, RK4(200), images)
    errors = [(encode(model, solver(n), images) - truth).abs().max() for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("solver", [DDIM, ProbabilityFlow, DPMSolver1, DPMSolver2, DPMSolverPP2M])
def test_diffusion_comes_back_up_to_the_error_of_its_steps(solver, path):
    """Data stands for the state at the least noise that the network has learnt."""
    coarse, fine = round_trips(path, "v", solver, (25, 250))
    assert fine < max(0.01, coarse / 3)


def test_times_go_from_the_least_noise_to_the_most():
    steps = backward(DDIM(4), COSINE, "v")
    assert [step.times[0] for step in steps] == [0.999, 0.75, 0.5, 0.25]
    assert [step.end for step in steps] == [0.75, 0.5, 0.25, 0.0]
    steps = backward(DDIM(1000), COSINE, "v")
    assert len(steps) == 999 and all(step.end < step.times[0] for step in steps)
    assert [step.times for step in backward(Heun(2), FLOW, "velocity")] == [(1.0, 0.5), (0.5, 0.0)]


def test_unit_gaussian_data_stay_where_they_are_but_for_the_steps():
    """The exact v is 0, so that Heun stays; a step of DDIM multiplies by cos of the angle."""
    net, _, _ = curved()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    path = VPPerPixel(speeds=SPEEDS)
    model, grid = model_of(net, path, "v"), [k / 7 for k in range(8)]
    torch.testing.assert_close(encode(model, Heun(7), images), images)
    c = path.coefficients(torch.tensor(grid, dtype=torch.float64))
    angles = torch.atan2(c.sigma, c.alpha).diff(dim=0)
    truth = images * angles.cos().prod(0)
    torch.testing.assert_close(encode(model, DDIM(7), images), truth)
    torch.testing.assert_close(decode(model, DDIM(7), images), truth)


@pytest.mark.parametrize("solver", [DDPM(5), SDEEuler(5), DDIM(5, eta=0.1)])
def test_a_stochastic_solver_does_not_go_back(solver):
    model = model_of(curved()[0], COSINE, "v")
    images = torch.zeros(1, 1, 4, 4).double()
    with pytest.raises(UserError, match=f"solver={solver.name} draws noise and") as refused:
        encode(model, solver, images)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="give decode its noise"):
        decode(model, solver, images)
    noise = SampleNoise(0, [3], (1, 4, 4))
    assert decode(model, solver, images, noise=noise).isfinite().all()


def test_what_a_prediction_leaves_open_at_data_is_refused():
    net, images = curved()[0], torch.zeros(1, 1, 4, 4).double()
    for solver in (Heun(3), DDIM(3)):
        with pytest.raises(UserError, match="model.prediction=data"):
            path = VPPerPixel(speeds=SPEEDS)
            encode(model_of(net, path, "data"), solver, images)


class Wide(CondOT):
    """Straight lines that begin with noise of sd 3."""

    noise_scale = 3.0


def test_a_path_says_how_its_samples_begin():
    model = model_of(curved()[0], Wide())
    start_of = starts_of(model, Euler(3), 0, (1, 4, 4), CPU)
    noise = start_of([0, 1]).draw()
    assert noise.shape == (2, 1, 4, 4)
    assert torch.equal(start_of([0, 1]).initial(), 3 * noise)
    assert torch.equal(with_state(start_of([0, 1]), noise).initial(), 3 * noise)
    state = Restart.of(start_of([0, 1]), [0.5, 1.0], noise, start_of([0, 1]).noise)
    assert torch.equal(state.initial(), noise)


def test_latents_have_maps_of_their_own():
    """From data to noise any estimator follows the weights: each member encodes the image."""
    net, posterior, _ = curved()
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)).double() / 2
    start = starts_of(model_of(net), Heun(5), 0, (1, 4, 4), CPU)([0, 1])
    times = Heun(5).times(FLOW)[::-1]
    ensemble = Ensemble(members=3)
    samples = ensemble(Restart.of(start, times, images, start.noise), posterior)
    latents = []
    for weights in ensemble.weights(posterior):
        with torch.no_grad():
            net.head.weight.copy_(weights[:, :-1].view_as(net.head.weight))
            net.head.bias.copy_(weights[:, -1])
        latents.append(encode(model_of(net), Heun(5), images))
    torch.testing.assert_close(samples.variance, torch.stack(latents).var(0))
