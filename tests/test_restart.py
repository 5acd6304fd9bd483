"""Maps from the middle of a trajectory on, against slow loops, and fresh samples of a class."""

import pytest
import torch
from hand import (
    FLOW,
    SCALE,
    SPREAD,
    affine_flow,
    curved,
    model_of,
    real_start,
    small_unet,
    start_of,
)

from bayesdiff.solvers import Euler
from bayesdiff.studies.repair.alternatives import Origin
from bayesdiff.uncertainty import Ensemble, Linearised, Published
from bayesdiff.uncertainty.restart import fresh_start
from bayesdiff.uncertainty.scores.of_maps_and_images import map_score


def origin_of(net, solver=None, count=2):
    return Origin.of(start_of(model_of(net, FLOW), solver or Euler(6), count, shape=(1, 3, 3)))


@pytest.mark.parametrize("skip", [1, 2])
def test_the_map_of_a_state_is_the_spread_of_trajectories_that_begin_there(skip):
    net, posterior, _ = curved()
    origin = origin_of(net)
    state = origin.states[2] + 0.3
    samples = Ensemble(members=5, skip_interval=skip)(origin.restart(2, state), posterior)
    ends = []
    for weights in Ensemble(members=5).weights(posterior):
        x, t = state, 0.5
        while t < 1 - 1e-9:
            h = min(skip / 6, 1 - t)
            features = net.features(x, torch.full((len(x),), t))
            field = torch.einsum("p,bphw->bhw", weights[0, :-1], features) + weights[0, -1]
            x, t = x + h * field[:, None], t + h
        ends.append(x)
    torch.testing.assert_close(samples.variance, torch.stack(ends).var(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(samples.images, origin.finish(2, state[None])[0])


def test_an_affine_flow_adds_from_there_what_its_formula_says():
    """V = (sd sum_j a^j h)^2 over the later steps alone."""
    model, posterior = affine_flow(-1.3)
    origin = Origin.of(start_of(model, Euler(10), shape=(1, 2, 2)))
    found = Linearised(draws="all")(origin.restart(3, origin.states[3]), posterior)
    a, h = 1 - 1.3 / 10, 1 / 10
    size = h * sum(a**j for j in range(6))
    wanted = (SCALE * SPREAD * size) ** 2
    assert found.variance.flatten().tolist() == pytest.approx([wanted] * 4, rel=1e-6)


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ddim-eta", "ddpm", "euler-guided"])
@pytest.mark.parametrize("estimator", [Ensemble(members=2), Published(mc_samples=2)])
def test_every_solver_goes_on_from_its_own_state_to_its_own_image(name, estimator):
    net, posterior = small_unet()
    origin = Origin.of(real_start(net, name))
    samples = estimator(origin.restart(1, origin.states[1]), posterior)
    torch.testing.assert_close(samples.images, origin.image, rtol=0, atol=1e-4)
    assert (samples.variance.flatten(1).sum(1) > 0).all()
    # The end has nothing behind it but its last step.
    late = estimator(origin.restart(len(origin.steps) - 2, origin.states[-2]), posterior)
    assert (map_score(late, "sum") < map_score(samples, "sum")).all()


def test_fresh_samples_have_the_class_and_noise_by_number():
    net, _ = small_unet()
    start = real_start(net, "euler")
    one, two = (fresh_start(start, k, seed=0) for k in (0, 1))
    assert one.labels.tolist() == start.labels.tolist()
    first, own = one.noise.copy()(), start.noise.copy()()
    assert not torch.equal(first, two.noise.copy()()) and not torch.equal(first, own)
    assert torch.equal(first, fresh_start(start, 0, seed=0).noise())
    assert not torch.equal(first, fresh_start(start, 0, seed=1).noise())


def test_only_what_is_fitted_to_whole_trajectories_cannot_begin_in_the_middle():
    from bayesdiff.uncertainty import Refined

    assert Ensemble().restarts and Published().restarts and Linearised().restarts
    assert not Refined().restarts and not Linearised(skip_interval=2).restarts
