"""Densities along the samples' own trajectories: against closed forms, and a second way."""

import math

import pytest
import torch
from conftest import Compose
from hand import FLOW, Hand, exact_probes, model_of, real_start, small_unet, start_of
from test_bad_input import check_line, refused
from test_likelihood import LONG, Formula, curved_answer, gaussian, normal

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.solvers import DDIM, DDPM, RK4, DPMSolverPP2M, Euler, Heun, integrate
from bayesdiff.uncertainty import Ensemble, Samples
from bayesdiff.uncertainty.scores.along import sample_with_density
from bayesdiff.uncertainty.scores.likelihood import log_likelihood
from bayesdiff.uncertainty.stored import stored_samples

SPREAD = 0.5


def followed(model, solver, shape=(1, 1, 2), count=9):
    start = start_of(model, solver, count, shape)
    return sample_with_density(start, exact_probes(torch.zeros(count, *shape)))


def error(path, prediction, solver, steps):
    images, along = followed(gaussian(path, prediction, SPREAD), solver(steps))
    truth = normal(images, SPREAD**2)
    return float((along.likelihood.log_density - truth).abs().max())


@pytest.mark.parametrize(
    ("path", "prediction", "solver", "order", "steps"),
    [
        (FLOW, "velocity", Euler, 1, 40),
        (FLOW, "velocity", Heun, 2, 20),
        (FLOW, "velocity", RK4, 4, 10),
        (LONG, "noise", DDIM, 1, 80),
        (LONG, "data", DDIM, 1, 80),
        (LONG, "noise", DPMSolverPP2M, 2, 10),
    ],
)
def test_gaussian_data_has_its_density_up_to_the_solvers_error(
    path, prediction, solver, order, steps
):
    errors = [error(path, prediction, solver, n) for n in (steps, 2 * steps)]
    assert math.log2(errors[0] / errors[1]) > order - 0.35, errors
    assert errors[0] < 0.6


@pytest.mark.parametrize(("path", "solver"), [(FLOW, Euler), (FLOW, Heun), (LONG, DDIM)])
def test_standard_normal_data_needs_no_steps(path, solver):
    """The rest of the derivative is zero: what is left is the solver's own map, exactly."""
    prediction = "velocity" if path is FLOW else "noise"
    model = gaussian(path, prediction, 1.0)
    start = start_of(model, solver(3), 4, (1, 1, 1))
    images, along = sample_with_density(start, exact_probes(torch.zeros(4, 1, 1, 1)))
    x_0 = along.likelihood.latents
    slope = (images[0] - images[1]) / (x_0[0] - x_0[1])  # the map is linear
    truth = normal(x_0, 1.0) - slope.abs().log().item()
    torch.testing.assert_close(along.likelihood.log_density, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", [Heun, Euler])
def test_the_score_is_that_of_the_noisy_data(solver):
    _, along = followed(gaussian(FLOW, "velocity", SPREAD), solver(20))
    assert along.time == 0.95
    # The same state once more, on the same steps without the last one.
    start = start_of(gaussian(FLOW, "velocity", SPREAD), solver(20), 9, (1, 1, 2))
    states = []
    x_0 = start.initial()
    integrate(start.field(), start.steps(), x_0, start.draw, lambda _, x: states.append(x))
    variance = (0.95 * SPREAD) ** 2 + 0.05**2
    torch.testing.assert_close(along.score, -states[-2] / variance, rtol=1e-5, atol=1e-5)


def test_it_agrees_with_the_integration_back_as_steps_grow():
    """Pixels that move together and not linearly, with labels; all directions of the trace."""
    model = model_of(Formula(curved_answer), FLOW, "velocity")
    differences = []
    for steps in (8, 16):
        images, along = followed(model, RK4(steps), (1, 2, 2), 5)
        back = log_likelihood(
            start_of(model, RK4(1), 5).field(), images, exact_probes(images), num_steps=60
        )
        gap = along.likelihood.log_density - back.log_density
        differences.append(float(gap.abs().max()))
    assert differences[1] < 1e-3 and math.log2(differences[0] / differences[1]) > 3


@pytest.mark.parametrize("probes", [1, 3])
def test_an_ensemble_carries_it_and_its_images_and_maps_stay(probes):
    net, posterior = small_unet()
    alone = Ensemble(members=3)(real_start(net, "euler"), posterior)
    both = Ensemble(members=3, likelihood_probes=probes)(real_start(net, "euler"), posterior)
    torch.testing.assert_close(both.images, alone.images)
    torch.testing.assert_close(both.variance, alone.variance)
    start = real_start(net, "euler")
    _, along = sample_with_density(start, probes)
    torch.testing.assert_close(both.bits_per_dim, along.likelihood.bits_per_dim)
    torch.testing.assert_close(both.score, along.score)
    assert float(both.score_time) == pytest.approx(along.time)
    assert both.nfe - alone.nfe == (2 * probes - 1) * start.nfe
    assert both.estimator == f"{alone.estimator}, likelihood by {probes} prob" + (
        "e" if probes == 1 else "es"
    )
    unit = both.in_unit_range()
    torch.testing.assert_close(unit.score, 2 * both.score)
    assert torch.equal(unit.bits_per_dim, both.bits_per_dim)
    joined = Samples.join([both, both])
    assert len(joined.bits_per_dim) == len(joined.score) == 2 * len(both.images)


def test_what_has_no_density_is_refused():
    net = Hand(lambda x, t, y: 0 * x, [[1.0]])
    start = start_of(model_of(net, LONG, "noise"), DDPM(4))
    with pytest.raises(UserError, match="solver=ddpm draws noise .* deterministic one"):
        sample_with_density(start)


def test_a_run_keeps_them(compose: Compose, copied, without_reports):
    given = ("metrics.num_images=0", "uncertainty.likelihood_probes=1")
    result = pipeline.run(compose(*given))
    samples = stored_samples(result.samples)
    mean = float(samples.bits_per_dim.mean())
    assert result.metrics["likelihood/bits_per_dim"] == pytest.approx(mean)
    assert samples.score.shape == samples.images.shape
    assert float(samples.score_time) == pytest.approx(2 / 3)
    torch.testing.assert_close(samples.images, stored_samples(copied.samples).images)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("uncertainty.likelihood_probes=-1", ["uncertainty.likelihood_probes", "got -1"]),
        (
            ("uncertainty=linearised", "uncertainty.likelihood_probes=1"),
            ["likelihood_probes=1", "uncertainty=linearised", "use uncertainty=ensemble"],
        ),
        (
            ("model=diffusion", "solver=ddpm", "uncertainty.likelihood_probes=1"),
            ["likelihood_probes=1", "solver=ddpm draws noise", "ddim"],
        ),
        (
            ("data=circles", "net=mlp", "uncertainty.likelihood_probes=1"),
            ["likelihood_probes=1", "8-bit pixels", "leave it at 0"],
        ),
    ],
)
def test_bad_input_is_one_line_before_any_work(compose, overrides, words):
    given = (overrides,) if isinstance(overrides, str) else overrides
    check_line(refused(compose, *given), words)
