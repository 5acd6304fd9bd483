"""Multistep solvers of one's own that reach back several outputs, against loops by hand."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hand import CPU, FLOW, M, Noise, affine_flow, curved, model_of, small_unet
from scipy.linalg import hadamard

from bayesdiff.checks import UserError
from bayesdiff.paths import VPPerPixel, convert
from bayesdiff.solvers import Euler, Field, Solver, Step, integrate, plan
from bayesdiff.solvers.integrate import held_after
from bayesdiff.solvers.step import check_solver
from bayesdiff.uncertainty import Ensemble, Linearised, Start, TotalVariance
from bayesdiff.uncertainty.memory import images_at_once

# Weights of the slopes, the latest first, of the methods of order 1 to 3.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12))


@dataclass(frozen=True)
class AdamsBashforth3(Solver):
    """x' = x + h (23 v - 16 v_before + 5 v_earlier) / 12; lower orders begin."""

    name: ClassVar[str] = "ab3"

    def check(self, path):
        if not path.smooth:
            raise UserError("solver=ab3 needs a smooth path; use solver=ddim")

    def steps(self, path, prediction, times):
        c = path.coefficients(torch.tensor(times[:-1], dtype=torch.float64))
        found = []
        for k, (p, q) in enumerate(zip(*convert(prediction, "velocity", c), strict=True)):
            h = times[k + 1] - times[k]
            first, *others = (h * w for w in ADAMS[min(k, 2)])
            p, q = (float(v) if v.numel() == 1 else v for v in (p, q))
            output = (1 + first * p, first * q)
            # What is kept is the slope itself, p x + q g.
            step = Step((times[k],), ((1.0,),), output, 0.0, times[k + 1], ((p, q),))
            found.append(replace(step, history=tuple(others)))
        return found


@dataclass(frozen=True)
class Momentum(Solver):
    """m' = m / 2 + v / 2, x' = x + h m': what is kept depends on what was kept."""

    name: ClassVar[str] = "momentum"

    def steps(self, path, prediction, times):
        found = []
        for k, (start, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
            h, past = end - start, (0.5,) if k else ()
            output = (1.0, h / 2)
            kept = ((0.0, 0.5, *past),)
            history = tuple(h * r for r in past)
            found.append(Step((start,), ((1.0,),), output, 0.0, end, kept, history))
        return found


def by_hand(field, x, times, solver):
    """The same methods as loops over slopes; ``field(x, t)`` is the velocity."""
    slopes, mean, states = [], 0.0, []
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = field(x, t)
        slopes.insert(0, v)
        mean = mean / 2 + v / 2
        weights = ADAMS[min(len(slopes), 3) - 1]
        total = sum(w * g for w, g in zip(weights, slopes, strict=False))
        x = x + (s - t) * (total if isinstance(solver, AdamsBashforth3) else mean)
        states.append(x)
    return states


BOTH = [AdamsBashforth3(7), Momentum(6)]
SHAPE = (1, 2, 2)


def start_of(model, solver, count=2, shape=SHAPE):
    return Start(model, solver, None, Noise(count, shape), CPU)


def by_hand_from(start, weights=None):
    """All states under these weights of the head, or its own."""
    net = start.model.net

    def field(x, t):
        features = start.field().features(x, t)
        if weights is None:
            return net.fold(net.head(features))
        bias = torch.ones_like(features[:, :1])
        return torch.einsum("op,bphw->bohw", weights, torch.cat([features, bias], 1))

    return by_hand(field, start.initial(), start.solver.times(start.path), start.solver)


@pytest.mark.parametrize("solver", BOTH, ids=lambda s: s.name)
def test_states_are_those_of_a_loop_by_hand(solver):
    net, _, _ = curved()
    start, states = start_of(model_of(net), solver), []
    check_solver(solver, FLOW, conditional=False)
    with torch.no_grad():
        integrate(
            start.field(), start.steps(), start.initial(), None, lambda _, x: states.append(x)
        )
        truth = by_hand_from(start_of(model_of(net), solver))
    torch.testing.assert_close(torch.stack(states), torch.stack(truth))


@pytest.mark.parametrize("solver", BOTH, ids=lambda s: s.name)
def test_an_ensemble_is_the_spread_of_loops_by_hand(solver):
    net, posterior, _ = curved()
    ensemble = Ensemble(members=4)
    samples = ensemble(start_of(model_of(net), solver), posterior)
    with torch.no_grad():
        members = [
            by_hand_from(start_of(model_of(net), solver), w)[-1]
            for w in ensemble.weights(posterior)
        ]
    torch.testing.assert_close(samples.variance, torch.stack(members).var(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", BOTH, ids=lambda s: s.name)
def test_all_columns_are_the_jacobian_of_a_loop_by_hand(solver):
    net, posterior, covariance = curved()
    samples = Linearised(draws="all")(start_of(model_of(net), solver), posterior)
    own = torch.cat([net.head.weight.flatten(1), net.head.bias[:, None]], 1).detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda w: by_hand_from(start_of(model_of(net), solver), w)[-1], own
    )
    truth = torch.einsum("...cp,pq,...cq->...", jacobian, covariance, jacobian)
    torch.testing.assert_close(samples.variance, truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", BOTH, ids=lambda s: s.name)
def test_the_recursion_carries_all_that_is_held(solver):
    """Cov of (x, k_0, k_1) of x' = m x + f theta with fresh weights, by matrices."""
    model, posterior = affine_flow()
    times, f = solver.times(FLOW), 0.9 * 0.2
    state = torch.zeros(3, 3, dtype=torch.float64)
    for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        h, linear, noise = s - t, torch.zeros(3, 3).double(), torch.zeros(3).double()
        if solver.name == "ab3":
            first, *others = (h * w for w in ADAMS[min(k, 2)])
            linear[0, 0], linear[1, 0], linear[2, 1] = 1 + first * M, M, 1
            linear[0, 1 : 1 + len(others)] = torch.tensor(others)
            noise[0], noise[1] = first * f, f
        else:
            linear[0, 0], linear[0, 1] = 1 + h * M / 2, h / 2
            linear[1, 0], linear[1, 1] = M / 2, 0.5
            noise[0], noise[1] = h * f / 2, f / 2
        state = linear @ state @ linear.T + noise[:, None] * noise
    signs = torch.from_numpy(hadamard(8)).double()[:, 1].tolist()

    class Planned(Noise):
        def fork(self, number):
            values = iter(signs * 100)
            scale = (1 - 1 / 8) ** 0.5
            return lambda: torch.full((1, 1, 1, 1), scale * next(values), dtype=torch.float64)

    start = Start(model, solver, None, Planned(1, (1, 1, 1), first=0.0), CPU)
    got = float(TotalVariance(8)(start, posterior).variance)
    assert got == pytest.approx(float(state[0, 0]), rel=1e-8)


def test_a_step_of_every_pixel_reaches_back_as_well():
    """Pixels of one image, and each alone with numbers."""
    net, posterior, _ = curved()
    speeds = torch.tensor([[[0.5, 1.0], [1.5, 2.5]]], dtype=torch.float64)
    solver, parts = AdamsBashforth3(6), []
    for c in (speeds, *speeds.view(-1, 1, 1, 1)):
        model = model_of(net, VPPerPixel(speeds=c), "v")
        noise = Noise(1, c.shape, first=0.3)
        start = Start(model, solver, None, noise, CPU)
        kinds = Ensemble(members=3), Linearised(draws=3)
        found = []
        for kind in kinds:
            start = replace(start, noise=Noise(1, c.shape, first=0.3))
            found.append(kind(start, posterior).variance.flatten())
        parts.append(torch.stack(found))
    together, *alone = parts
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-9, atol=0)


def test_no_more_is_held_than_later_steps_need():
    steps = plan(AdamsBashforth3(6), FLOW, "velocity")
    assert held_after(steps) == [1, 2, 2, 2, 2, 1]
    assert held_after(plan(Euler(3), FLOW, "velocity")) == [0, 0, 0]
    model = model_of(small_unet()[0], num_classes=3)
    sizes = [
        images_at_once(Ensemble(members=4, max_memory=0.1, batch_size=10**6), s, model, (1, 8, 8))
        for s in (Euler(6), AdamsBashforth3(6))
    ]
    assert sizes[1] < sizes[0]


def test_reading_what_was_never_kept_is_a_mistake_of_the_solver():
    step = Step((0.0,), ((1.0,),), (1.0, 1.0), 0.0, 1.0, history=(0.5,))
    with pytest.raises(ValueError, match="k_0, and only 0 were kept"):
        integrate(lambda x, t: x, [step], torch.ones(1, 1, 1, 1), None)
    field = Field(model_of(curved()[0]), None, 1)
    harmless = replace(step, history=(0.0,))
    with torch.no_grad():
        integrate(field, [harmless], torch.ones(1, 1, 1, 1).double(), None)
