"""States drawn anew in the middle of a trajectory, against closed forms and slow loops."""

import dataclasses
import math

import pytest
import torch
from hand import (
    FLOW,
    LINEAR,
    SOLVERS,
    Hand,
    curved,
    model_of,
    only_bias,
    plain,
    real_start,
    small_unet,
    start_of,
)

from bayesdiff.solvers import Euler, Heun, SampleNoise
from bayesdiff.solvers.dpm_solver import DPMSolverPP2M
from bayesdiff.studies.repair.alternatives import (
    WAYS,
    Middle,
    Origin,
    box_region,
    fresh_noise,
    map_region,
    resample,
    weight_draws,
)
from bayesdiff.uncertainty import Ensemble

STEPS, OWN, SHARED, SPREAD = 8, -0.7, 0.9, 0.2
SIDE = 3
PIXELS = SIDE**2


def coupled():
    """dx/dt = (OWN + SHARED mean) x + theta: pixels mix, and the one weight moves all alike."""

    def formula(x, t, y):
        return OWN * x + SHARED * x.mean((1, 2, 3), keepdim=True)

    net = Hand(formula, [[1.0]])
    return model_of(net), only_bias(net.head, SPREAD**2)


def step_matrix():
    """I + h M of one Euler step on the flattened image, float64."""
    eye = torch.eye(PIXELS, dtype=torch.float64)
    return eye + (OWN * eye + SHARED * torch.full_like(eye, 1 / PIXELS)) / STEPS


def gain(count):
    """State after ``count`` steps per unit of the weight, h sum_j A^j 1."""
    found = torch.zeros(PIXELS, dtype=torch.float64)
    for _ in range(count):
        found = step_matrix() @ found + 1 / STEPS
    return found


def everywhere(images):
    return torch.ones_like(images[:, :1], dtype=torch.bool)


def middle_of(origin, place, variance, count=1, region=None, weights=None):
    region = everywhere(origin.image) if region is None else region
    trajectories = origin.states[place].expand(count, *origin.image.shape)
    if weights is not None:
        (trajectories,) = origin.trajectories(weights, [place])
    return origin.middle(place, variance, region, trajectories)


def covariance(images):
    """Over alternatives of the first image, ``(n, B, C, H, W) -> (D, D)``."""
    return torch.cov(images[:, 0].flatten(1).T)


def close(found, wanted, draws):
    """Within five standard errors of an estimate of a covariance, element by element."""
    error = ((wanted.square() + wanted.diag().outer(wanted.diag())) / draws).sqrt()
    return bool(((found - wanted).abs() <= 5 * error).all())


@pytest.mark.parametrize("place", [1, 4])
def test_coherent_and_independent_draws_end_with_the_covariances_of_an_affine_flow(place):
    """Equal variances at c, other ones at the end: the flow amplifies what pixels share."""
    model, posterior = coupled()
    origin, count = Origin.of(start_of(model, Euler(STEPS), shape=(1, SIDE, SIDE))), 6000
    before = gain(place + 1)
    variance = (SPREAD * before).square().view(1, 1, SIDE, SIDE)
    middle = middle_of(
        origin, place, variance, count, weights=weight_draws(posterior, count, seed=3)
    )
    later = torch.linalg.matrix_power(step_matrix(), STEPS - place - 1)
    at_c = {
        "coherent": SPREAD**2 * before.outer(before),
        "independent": (SPREAD * before).square().diag(),
    }
    z = fresh_noise(origin.start, count, seed=3)
    ends = {}
    for way, wanted in at_c.items():
        drawn = resample(way, middle, z)
        assert close(covariance(drawn), wanted, count)
        ends[way] = later @ wanted @ later.T
        assert close(covariance(origin.finish(place, drawn)), ends[way], count)
    # The two are far apart, so that neither formula passes for the other.
    assert ends["coherent"].sum() > 5 * ends["independent"].sum()


def test_coherent_states_have_the_spread_of_an_ensemble_at_that_time():
    net, posterior, _ = curved()
    start = start_of(model_of(net), Euler(6), count=2, shape=(1, 4, 4))
    members = 3000
    samples = Ensemble(members=members, times=[0.4], noise_members=0)(start, posterior)
    origin = Origin.of(start_of(model_of(net), Euler(6), count=2, shape=(1, 4, 4)))
    place = origin.place(0.4)
    assert origin.steps[place].end == pytest.approx(0.5) == float(samples.requested_times[0])
    torch.testing.assert_close(origin.states[place], samples.states[0])
    (states,) = origin.trajectories(weight_draws(posterior, members, seed=0), [place])
    # Two estimates of M members each, six standard deviations of their ratio.
    ratio = states.var(0) / samples.state_variance[0]
    assert (ratio.log().abs() < 6 * math.sqrt(4 / members)).all()
    # Their draws are not those of the variance.
    assert not torch.equal(
        weight_draws(posterior, 4, seed=0), Ensemble(members=4).weights(posterior)
    )


@pytest.fixture
def middle():
    """A state with a region, a variance with negative values, and no structure."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    variance = 0.02 * random(2, 2, 4, 4)
    image, e = random(2, 2, 4, 4), 1.3 * random(2, 2, 4, 4)
    region = random(2, 1, 4, 4) > -0.3
    return Middle(0.6 * image + 0.4 * e, variance, image, random(5, 2, 2, 4, 4), region, 0.6, 0.4)


def test_independent_isotropic_and_matched_renoising_have_the_same_power(middle):
    z = torch.randn(40_000, *middle.state.shape, generator=torch.Generator().manual_seed(1))
    z = z.double()
    wanted = torch.zeros(2, dtype=torch.float64)
    for image, channel, row, column in torch.cartesian_prod(*map(torch.arange, (2, 2, 4, 4))):
        if middle.region[image, 0, row, column]:
            wanted[image] += max(float(middle.variance[image, channel, row, column]), 0.0)
    torch.testing.assert_close(middle.power.flatten(), wanted)
    for way in ("independent", "isotropic", "renoise_matched"):
        moved = resample(way, middle, z) - middle.state
        torch.testing.assert_close(
            moved.square().sum((2, 3, 4)).mean(0), wanted, rtol=0.02, atol=0
        )
    # One level for all pixels of the region, another than the map's.
    spread = (resample("isotropic", middle, z) - middle.state).var(0)
    level = (wanted / middle.size.flatten()).view(2, 1, 1, 1).expand_as(spread)
    inside = middle.region.expand_as(spread)
    torch.testing.assert_close(spread[inside], level[inside], rtol=0.05, atol=0)


def test_renoising_is_the_path_around_the_finished_image(middle):
    z = torch.randn(20_000, *middle.state.shape, generator=torch.Generator().manual_seed(1))
    drawn = WAYS["renoise"](middle, z.double())
    torch.testing.assert_close(drawn.mean(0), 0.6 * middle.image, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.std(0), 0.4 + 0 * middle.image, rtol=0.05, atol=0)
    # More power than fresh noise has turns matched renoising into it.
    strong = dataclasses.replace(middle, variance=1e3 + 0 * middle.variance)
    torch.testing.assert_close(
        WAYS["renoise_matched"](strong, z.double()), WAYS["renoise"](strong, z.double())
    )


@pytest.mark.parametrize("way", WAYS)
def test_nothing_outside_the_region_is_drawn_anew(way, middle):
    drawn = resample(way, middle, torch.ones(5, *middle.state.shape, dtype=torch.float64))
    same = (drawn == middle.state).all(2)
    assert same[:, ~middle.region[:, 0]].all()
    assert not same[:, middle.region[:, 0]].all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("time", [0.2, 0.6])
def test_an_unchanged_state_gives_the_original_image(name, time):
    """Stochastic solvers take the sample's own later noise."""
    net, _ = small_unet()
    origin = Origin.of(real_start(net, name))
    assert torch.equal(origin.image, plain(real_start(net, name)))
    place = origin.place(time)
    again = origin.finish(place, origin.states[place][None])
    assert torch.equal(again[0], origin.image)
    # Of many at once, rows of a batch are rounded apart.
    many = origin.finish(place, origin.states[place].expand(3, *origin.image.shape))
    torch.testing.assert_close(many, origin.image.expand_as(many), rtol=0, atol=1e-4)


def test_posterior_trajectories_of_the_trained_weights_are_the_original():
    net, posterior = small_unet()
    origin = Origin.of(real_start(net, "ddpm"))
    mean = posterior.curvature.mean[None].expand(2, -1, -1)
    first, second = origin.trajectories(mean, [1, 3])
    torch.testing.assert_close(first, origin.states[1].expand_as(first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, origin.states[3].expand_as(second), rtol=1e-4, atol=1e-4)


def test_a_multistep_solver_starts_anew_and_nearly_finds_the_image():
    net, _, _ = curved()
    gaps = []
    for steps in (20, 40):
        model = model_of(net, LINEAR, "v")
        solver = DPMSolverPP2M(steps, grid="log_snr")
        origin = Origin.of(start_of(model, solver, shape=(1, 4, 4)))
        place = steps // 2
        again = origin.finish(place, origin.states[place][None])[0]
        gaps.append(float((again - origin.image).abs().max()))
        # As the solver's own steps from that time on would have it.
        times = [step.end for step in origin.steps[place:]]
        slow = start_of(model, solver, shape=(1, 4, 4), times=times)
        x, kept = origin.states[place], None
        for step in slow.steps():
            output = slow.field()(x, step.times[0])
            new = step.output[0] * x + step.output[1] * output
            if kept is not None:
                new = new + sum(step.history) * kept
            kept = step.kept[0][0] * x + step.kept[0][1] * output if step.kept else None
            x = new
        torch.testing.assert_close(again, x)
    # The error of one first-order step: of second order in its length.
    assert 0 < gaps[1] < gaps[0] / 3


@pytest.mark.parametrize("name", ["euler", "heun", "ddim-eta"])
def test_what_is_held_equals_the_original_exactly_and_at_every_step(name):
    net, posterior = small_unet()
    origin = Origin.of(real_start(net, name))
    region = box_region(origin.image, [2, 1, 3, 4])
    assert region[0].sum() == 12 and region[0, 0, 2:5, 1:5].all()
    place = origin.place(0.3)
    variance = torch.full_like(origin.image, 0.5)
    middle = middle_of(origin, place, variance, 3, region, weight_draws(posterior, 3, 0))
    z = fresh_noise(origin.start, 3, 0)
    held = ~region[:, 0]
    for way in WAYS:
        x = resample(way, middle, z)
        images = origin.finish(place, x, region)
        assert (images == origin.image).all(2)[:, held].all()
        assert (images[:, :, 0][:, region[:, 0]] != origin.image[:, 0][region[:, 0]]).any()
        # Holding is no matter of the end alone: inside, another image than without it.
        free = origin.finish(place, x)
        assert ((images - free).abs() * region).max() > 1e-4


def test_the_region_of_a_map_is_its_most_uncertain_pixels():
    variance = torch.arange(2 * 2 * 25, dtype=torch.float64).reshape(2, 2, 5, 5)
    variance[0, :, 1, 2] = 1e3
    region = map_region(variance, 0.2)
    assert region.shape == (2, 1, 5, 5) and region.flatten(1).sum(1).tolist() == [5, 5]
    assert region[0, 0, 1, 2] and region[1, 0, 4].all()
    # Rounded up, also where a share times the pixels is not exact in binary.
    assert map_region(variance, 0.001).flatten(1).sum(1).tolist() == [1, 1]
    assert map_region(torch.rand(1, 1, 10, 10), 0.07).sum() == 7


def test_alternatives_are_the_same_for_every_batch_and_do_not_depend_on_how_many_there_are():
    net, posterior = small_unet()
    whole = Origin.of(real_start(net, "ddpm"))

    def alone(number, label):
        noise = SampleNoise(1, (number,), (1, 8, 8))
        start = dataclasses.replace(whole.start, noise=noise, condition=torch.tensor([label]))
        return Origin.of(start)

    z, weights = fresh_noise(whole.start, 4, 5), weight_draws(posterior, 4, 5)
    assert torch.equal(fresh_noise(whole.start, 2, 5), z[:2])
    assert not torch.equal(fresh_noise(whole.start, 4, 6), z)
    place, variance = whole.place(0.4), torch.full_like(whole.image, 0.1)
    for row, (number, label) in enumerate(((4, 0), (7, 2))):
        one = alone(number, label)
        assert torch.equal(fresh_noise(one.start, 4, 5)[:, 0], z[:, row])
        for way in WAYS:
            many = middle_of(whole, place, variance, 4, weights=weights)
            few = middle_of(one, place, variance[:1], 4, weights=weights)
            made = whole.finish(place, resample(way, many, z))[:, row]
            again = one.finish(place, resample(way, few, z[:, row : row + 1]))[:, 0]
            torch.testing.assert_close(made, again, rtol=0, atol=2e-4)


def test_the_cost_of_an_alternative_is_counted():
    net, _, _ = curved()
    origin = Origin.of(start_of(model_of(net), Heun(4), shape=(1, 4, 4)))
    place = origin.place(0.5)
    assert origin.evaluations(place) == (4, 4)
    net.calls.clear()
    origin.finish(place, origin.states[place].expand(3, *origin.image.shape))
    assert len(net.calls) == 4 and {count for count, _ in net.calls} == {3}
    net, _ = small_unet()
    assert Origin.of(real_start(net, "euler-guided")).evaluations(1) == (4, 6)


def test_a_time_means_the_first_step_that_does_not_end_before_it():
    net, _, _ = curved()
    origin = Origin.of(start_of(model_of(net, FLOW), Euler(10), shape=(1, 2, 2)))
    single = torch.tensor([0.3]).double()  # as times are kept
    assert [origin.place(t) for t in (0.3, 0.31, 0.05, float(single))] == [2, 3, 0, 2]
