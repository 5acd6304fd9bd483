"""Estimators against closed forms and slow loops, on hand-made networks (T5-T9, T11, T14)."""

import itertools
import math

import pytest
import torch
from hand import (
    CPU,
    LINEAR,
    SCALE,
    SOLVERS,
    SPREAD,
    Double,
    Hand,
    M,
    affine_flow,
    certain,
    curved,
    gaussian_ddim,
    model_of,
    only_bias,
    plain,
    posterior_of,
    real_start,
    small_unet,
    start_of,
)

from bayesdiff.checks import UserError
from bayesdiff.solvers import DDIM, DDPM, Euler, Heun, SampleNoise, integrate
from bayesdiff.uncertainty import Ensemble, Published, Samples, Start, TotalVariance


def sensitivity(times, slope=M, heun=False):
    total = 0.0
    for start, end in itertools.pairwise(times):
        h = end - start
        z = h * slope
        total = total * (1 + z + heun * z**2 / 2) + h * SCALE * (1 + heun * z / 2)
    return total


@pytest.mark.parametrize(
    ("solver", "value"),
    [(Euler(10), 0.010829410), (Heun(10), (0.2 * 0.50286859) ** 2), (Heun(160), 0.010145801)],
)
def test_ensemble_has_the_shared_weight_variance_of_an_affine_flow(solver, value):
    """T6 and T7; beside the closed form it equals G^2 times the variance of its own draws."""
    model, posterior = affine_flow()
    members = 4000
    samples = Ensemble(members=members)(start_of(model, solver, first=0.7), posterior)
    got = float(samples.variance)
    assert got == pytest.approx(value, rel=4 * math.sqrt(2 / (members - 1)))
    draws = Ensemble(members=members).weights(posterior)[:, 0, 1] / SCALE
    grid = [k / solver.num_steps for k in range(solver.num_steps + 1)]
    gain = sensitivity(grid, heun=isinstance(solver, Heun))
    assert got == pytest.approx(gain**2 * float(draws.var()), rel=1e-4)
    assert gain**2 * SPREAD**2 == pytest.approx(value, rel=1e-6 if len(grid) == 11 else 1e-4)


def test_without_feedback_the_ensemble_does_not_depend_on_the_number_of_steps():
    """T6, m = 0: s^2 f^2 for every N, where the published recursion gives s^2 f^2 / N."""
    model, posterior = affine_flow(slope=0.0)
    ensembles, published = [], []
    for steps in (1, 4, 16):
        start = start_of(model, Euler(steps), first=0.0)
        ensembles.append(float(Ensemble(members=50)(start, posterior).variance))
        samples = Published(mc_samples=4000)(start_of(model, Euler(steps), first=0.0), posterior)
        published.append(float(samples.variance) * steps)
    assert ensembles == pytest.approx(ensembles[:1] * 3, rel=1e-9)
    assert published == pytest.approx([(SCALE * SPREAD) ** 2] * 3, rel=1e-2)


@pytest.mark.parametrize("skip", [2, 4, 10])
def test_a_coarse_ensemble_is_the_euler_method_on_the_coarse_grid(skip):
    """Members follow times 0, k / N, ..., 1; the image stays on its own grid."""
    model, posterior = affine_flow()
    image = plain(start_of(model, Euler(10), first=0.7))
    samples = Ensemble(members=30, skip_interval=skip)(
        start_of(model, Euler(10), first=0.7), posterior
    )
    assert torch.equal(samples.images, image)
    grid = [*(k / 10 for k in range(0, 10, skip)), 1.0]
    draws = Ensemble(members=30).weights(posterior)[:, 0, 1] / SCALE
    expected = sensitivity(grid) ** 2 * float(draws.var())
    assert float(samples.variance) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(samples.times, torch.tensor(grid[1:]))


def test_a_coarse_ensemble_converges_to_the_same_number():
    model, posterior = affine_flow()

    def variance(steps, skip):
        start = start_of(model, Euler(steps), first=0.0)
        return float(Ensemble(members=10, skip_interval=skip)(start, posterior).variance)

    limit = (SCALE * math.expm1(M) / M) ** 2
    draws = Ensemble(members=10).weights(posterior)[:, 0, 1] / SCALE
    errors = [variance(n, 4) / float(draws.var()) - limit for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.15)


def test_ensemble_follows_a_multiplicative_weight_beyond_the_linear_regime():
    """T8: v = theta x; moments of (1 + h theta)^N by Gauss-Hermite, near exp(theta) moments."""
    mean, spread, steps, members = 0.3, 0.25, 50, 20_000
    net = Hand(lambda x, t, y: x, [[mean]])
    covariance = torch.tensor([spread**2, 1e-16], dtype=torch.float64).diag()
    start = start_of(model_of(net), Euler(steps), first=1.0)
    got = float(Ensemble(members=members)(start, posterior_of(net.head, covariance)).variance)
    nodes, weights = (torch.from_numpy(v) for v in hermite(60))
    values = (1 + (mean + spread * nodes) / steps) ** steps
    first, second, fourth = ((weights * v).sum() for v in moments(values, weights))
    assert got == pytest.approx(
        float(second), rel=4 * float((fourth / second**2 - 1) / members) ** 0.5
    )
    limit = math.exp(2 * mean + spread**2) * math.expm1(spread**2)
    assert limit == pytest.approx(0.12510, abs=5e-6)
    assert float(second) == pytest.approx(limit, rel=0.02)
    linear = math.exp(2 * mean) * spread**2
    assert linear == pytest.approx(0.11388, abs=5e-6)
    assert got > linear * 1.04
    assert float(first) > 0


def hermite(count):
    """Nodes and weights of the standard normal distribution."""
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(count)
    return nodes, weights / weights.sum()


def moments(values, weights):
    centred = values - (weights * values).sum()
    return values, centred**2, centred**4


@pytest.mark.parametrize(
    ("count", "spread", "shared"),
    [(25, 0.5, 9.548e-4), (50, 0.05, 1.178e-5), (50, 0.5, 9.947e-4), (50, 1.0, 3.271e-3)],
)
def test_ddim_on_gaussian_data_has_the_tabulated_variances(count, spread, shared):
    """T9: shared weights; the number does not fall with the number of steps."""
    model, posterior, times = gaussian_ddim(count, spread)
    start = start_of(model, DDIM(count), first=0.4, times=times)
    got = Ensemble(members=4000)(start, posterior)
    assert float(got.variance) == pytest.approx(shared, rel=4 * math.sqrt(2 / 3999))


@pytest.mark.parametrize("estimator", [Ensemble(members=5), Published()])
def test_guidance_by_a_label_that_does_not_matter_changes_no_variance(estimator):
    """T11: with phi_c = phi_u the variance is independent of w, never w^2 + (1 - w)^2 of it."""
    net, posterior, _ = curved()
    body = net.formula
    net.formula = lambda x, t, y: body(x, t, None)
    labels = torch.tensor([0, 2])
    maps = [
        estimator(
            start_of(
                model_of(net, num_classes=3), Euler(4, guidance=w), 2, (1, 3, 3), labels=labels
            ),
            posterior,
        ).variance
        for w in (1.0, 0.0, 7.5)
    ]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
@torch.no_grad()
def test_ensemble_equals_sampling_once_per_member(name):
    """The slow truth: put every draw into the head and sample with the same noise."""
    solver, path, prediction = SOLVERS[name]
    net, posterior, _ = curved(kernel=3, patch=2)
    labels, shape, members = torch.tensor([0, 2, 1]), (1, 4, 4), 4
    model = model_of(net, path, prediction, num_classes=3)

    def start():
        return start_of(model, solver, 3, shape, labels=labels)

    fast = Ensemble(members=members, seed=9)(start(), posterior)
    assert torch.equal(fast.images, plain(start()))
    trained = [p.clone() for p in net.head.parameters()]
    images = []
    for draw in Ensemble(members=members, seed=9).weights(posterior):
        net.head.weight.copy_(draw[:, :-1].view_as(net.head.weight))
        net.head.bias.copy_(draw[:, -1])
        images.append(plain(start()))
    for parameter, value in zip(net.head.parameters(), trained, strict=True):
        parameter.copy_(value)
    slow = torch.stack(images).var(0)
    torch.testing.assert_close(fast.variance, slow, rtol=1e-8, atol=1e-16)
    assert (fast.variance > 0).all()
    torch.testing.assert_close(
        fast.variance.flatten(1).sum(1), slow.flatten(1).sum(1), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("estimator", [Ensemble(members=3), Published(mc_samples=2)])
def test_the_shown_image_is_the_models_own_sample(estimator, name):
    """T5: bit for bit, whatever the posterior, the solver and the skip interval."""
    net, posterior = small_unet()
    image = plain(real_start(net, name))
    for skip in (1, 3):
        chosen = type(estimator)(**{**vars(estimator), "skip_interval": skip})
        samples = chosen(real_start(net, name), posterior)
        assert torch.equal(samples.images, image)
        assert samples.variance.shape == image.shape and samples.variance.isfinite().all()
        if isinstance(chosen, Ensemble):
            assert (samples.variance >= 0).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_certain_posterior_leaves_no_variance(name):
    """T5: what is left of a stochastic sampler is its own noise, told apart by the moments."""
    net, _ = small_unet()
    posterior = certain(net.head)
    image = plain(real_start(net, name))
    samples = Ensemble(members=3)(real_start(net, name), posterior)
    assert torch.equal(samples.images, image)
    assert samples.variance.max() < 1e-9 and samples.summed.max() < 1e-7
    samples = Published(mc_samples=3)(real_start(net, name), posterior)
    assert torch.equal(samples.images, image)
    assert not samples.variance.any() and not samples.summed.any()
    if "eta" in name or name == "ddpm":
        assert samples.sampler_noise.flatten(1).sum(1).min() > 0.1
    else:
        assert samples.sampler_noise is None


@pytest.mark.parametrize(
    ("solver", "estimator", "nfe"),
    [
        (DDIM(50), Published(mc_samples=10, skip_interval=5), 140),
        (DDIM(50), Published(mc_samples=10), 50 + 49 * 10),
        (DDIM(50), Published(mc_samples=10, skip_interval=50), 50),
        (DDIM(10, guidance=2.0), Published(mc_samples=3), 2 * (10 + 9 * 3)),
        (DDIM(10), Ensemble(members=4), 10 + 1 + 9 * 4),
        (DDIM(10), Ensemble(members=4, skip_interval=5), 10 + 1 + 1 * 4),
        (DDIM(10, guidance=2.0), Ensemble(members=4), 2 * (10 + 1 + 9 * 4)),
        (DDIM(1), Ensemble(members=4), 2),
    ],
)
def test_network_evaluations_are_counted(solver, estimator, nfe):
    """T14, and the ensemble's N + 1 + (N - 1) M: members share their first evaluation."""
    net, posterior, _ = curved()
    model = model_of(net, LINEAR, "v", num_classes=3)
    start = start_of(model, solver, 2, (1, 2, 2), labels=torch.tensor([0, 1]))
    assert estimator(start, posterior).nfe == nfe
    assert sum(size for size, _ in net.calls) == 2 * nfe


def test_members_share_the_features_of_their_first_evaluation():
    net, posterior, _ = curved()
    start = start_of(model_of(net), Heun(2), 3, (1, 2, 2))
    samples = Ensemble(members=5)(start, posterior)
    assert [size for size, _ in net.calls] == [3] * 4 + [3, 15, 15, 15]
    assert samples.nfe == 4 + 1 + 3 * 5


@pytest.mark.parametrize("estimator", [Ensemble(members=6), Published(mc_samples=3)])
def test_maps_do_not_depend_on_how_images_are_batched(estimator):
    """All images meet the same weight draws, and bring their own noise."""
    net, posterior, _ = curved()
    model = model_of(net)

    def run(indices):
        noise = SampleNoise(0, indices, (1, 3, 3))
        return estimator(Start(model, Euler(4), None, Double(noise), CPU), posterior)

    whole = run(range(5))
    joined = Samples.join([run(part) for part in ([0, 1], [2], [3, 4])])
    for name in ("images", "variance", "summed"):
        torch.testing.assert_close(
            getattr(joined, name), getattr(whole, name), rtol=1e-9, atol=1e-18
        )
    assert joined.nfe == whole.nfe and joined.labels is None


@pytest.mark.parametrize("estimator", [Ensemble(members=4), Published(mc_samples=3)])
def test_the_record_over_time_ends_with_the_map_itself(estimator):
    net, posterior, _ = curved()
    labels = torch.arange(10) % 3
    start = start_of(model_of(net, num_classes=3), Euler(20), 10, (1, 3, 3), labels=labels)
    samples = estimator(start, posterior)
    torch.testing.assert_close(samples.times, torch.arange(1, 21) / 20)
    assert samples.summed.shape == (20, 10)
    torch.testing.assert_close(samples.summed[-1], samples.variance.flatten(1).sum(1))
    assert samples.frames.shape == samples.frame_variance.shape == (9, 8, 1, 3, 3)
    assert torch.equal(samples.frames[-1], samples.images[:8])
    assert torch.equal(samples.frame_variance[-1], samples.variance[:8])
    assert samples.frame_times[-1] == 1 and set(samples.frame_times.tolist()) <= set(
        samples.times.tolist()
    )
    assert torch.equal(samples.labels, labels)


@pytest.mark.parametrize("skip", [1, 4])
@pytest.mark.parametrize("kind", [Ensemble, Published])
def test_frames_are_the_states_of_the_shown_image(kind, skip):
    """Also where members, or the variance, take coarser steps than the image."""
    net, posterior, _ = curved()
    states = {}
    start = start_of(model_of(net, LINEAR, "v"), DDPM(20), 3, (1, 3, 3))
    with torch.no_grad():
        integrate(
            start.field(),
            start.steps(),
            start.draw(),
            start.draw,
            lambda step, x: states.update({round(step.end, 6): x}),
        )
    start = start_of(model_of(net, LINEAR, "v"), DDPM(20), 3, (1, 3, 3))
    samples = kind(skip_interval=skip)(start, posterior)
    for time, frame in zip(samples.frame_times.tolist(), samples.frames, strict=True):
        assert torch.equal(frame, states[round(time, 6)])
    assert len(samples.frames) == (5 if kind is Ensemble and skip == 4 else 9)


def test_sampler_noise_is_the_variance_over_the_solvers_own_noise():
    """A network that says nothing leaves x' = a x + c z: V' = a^2 V + c^2 from V = 0."""
    net = Hand(lambda x, t, y: 0 * x, [[1.0]])
    model, posterior = model_of(net, LINEAR, "noise"), only_bias(net.head, 1e-4)
    count = 4000
    for solver in (DDPM(6), DDIM(6, eta=0.7)):
        start = start_of(model, solver, first=0.7)
        truth = 0.0
        for step in start.steps():
            truth = step.output[0] ** 2 * truth + step.noise**2
        samples = Ensemble(members=2, noise_members=count)(start, posterior)
        got = float(samples.sampler_noise)
        assert got == pytest.approx(truth, rel=4 * math.sqrt(2 / (count - 1)))


@torch.no_grad()
def test_sampler_noise_is_that_of_trajectories_sampled_one_by_one():
    net, posterior, _ = curved()
    solver, path, prediction = SOLVERS["ddpm"]
    model = model_of(net, path, prediction)
    count, shape, seed = 3, (1, 3, 3), 5
    ensemble = Ensemble(members=2, noise_members=count, seed=seed)
    samples = ensemble(start_of(model, solver, 2, shape), posterior)
    start = start_of(model, solver, 2, shape)
    x_0, fresh = start.draw(), start.noise.fork(seed)
    noises = [[fresh().double() for _ in range(count)] for step in start.steps() if step.noise]
    paths = []
    for number in range(count):
        own = iter([at_step[number] for at_step in noises])
        paths.append(integrate(start.field(), start.steps(), x_0, lambda own=own: next(own)))
    slow = torch.stack(paths).var(0)
    torch.testing.assert_close(samples.sampler_noise, slow, rtol=1e-9, atol=0)
    assert samples.sampler_noise.min() > 0
    for other in (
        Ensemble(noise_members=0)(start_of(model, solver, 2, shape), posterior),
        Ensemble()(start_of(model_of(net), Euler(3), 2, shape), posterior),
    ):
        assert other.sampler_noise is None


@pytest.mark.parametrize("skip", [2, 3])
@torch.no_grad()
def test_coarse_members_take_the_noise_of_all_the_steps_they_stand_for(skip):
    net, posterior, _ = curved()
    solver, path, prediction = DDPM(7), LINEAR, "v"
    model, shape = model_of(net, path, prediction), (1, 3, 3)
    fast = Ensemble(members=3, skip_interval=skip)(start_of(model, solver, 2, shape), posterior)
    start = start_of(model, solver, 2, shape)
    x_0 = start.draw()
    drawn = [(step.noise, start.draw() if step.noise else None) for step in start.steps()]
    coarse, noises = start.steps(skip), []
    for first in range(0, len(drawn), skip):
        kept = [(c, z) for c, z in drawn[first : first + skip] if c]
        size = math.sqrt(sum(c * c for c, _ in kept))
        noises.append(sum(c * z for c, z in kept) / size if kept else None)
    assert len(noises) == len(coarse)
    trained = [p.clone() for p in net.head.parameters()]
    images = []
    for draw in Ensemble(members=3).weights(posterior):
        net.head.weight.copy_(draw[:, :-1].view_as(net.head.weight))
        net.head.bias.copy_(draw[:, -1])
        own = iter([z for z, step in zip(noises, coarse, strict=True) if step.noise])
        images.append(integrate(start.field(), coarse, x_0, lambda own=own: next(own)))
    for parameter, value in zip(net.head.parameters(), trained, strict=True):
        parameter.copy_(value)
    torch.testing.assert_close(fast.variance, torch.stack(images).var(0), rtol=1e-8, atol=1e-16)


@pytest.mark.parametrize("skip", [1, 4])
@pytest.mark.parametrize("kind", [Ensemble, Published])
def test_requested_times_get_the_state_and_variance_of_all_images(kind, skip):
    """At the solver's first time that is not before them, in the order of time."""
    net, posterior, _ = curved()

    def start():
        return start_of(model_of(net, LINEAR, "v"), DDPM(20), 11, (1, 3, 3))

    every = kind(skip_interval=skip, times=[k / 1000 for k in range(1, 1000)])(start(), posterior)
    samples = kind(skip_interval=skip, times=[0.93, 0.25, 0.999])(start(), posterior)
    ends = every.times.tolist()
    wanted = [min(end for end in ends if end >= time - 1e-6) for time in (0.25, 0.93, 0.999)]
    assert samples.requested_times.tolist() == wanted
    assert samples.states.shape == samples.state_variance.shape == (3, 11, 1, 3, 3)
    for time, state, variance in zip(wanted, samples.states, samples.state_variance, strict=True):
        place = every.requested_times.tolist().index(time)
        assert torch.equal(state, every.states[place])
        assert torch.equal(variance, every.state_variance[place])
        summed = samples.summed[ends.index(time)]
        torch.testing.assert_close(variance.flatten(1).sum(1), summed)
        if time in samples.frame_times.tolist():
            frame = samples.frames[samples.frame_times.tolist().index(time)]
            assert torch.equal(frame, state[:8])
    assert torch.equal(samples.states[-1], samples.images)
    assert torch.equal(samples.state_variance[-1], samples.variance)
    plain_one = kind(skip_interval=skip)(start(), posterior)
    assert plain_one.states is None and plain_one.requested_times is None
    assert torch.equal(plain_one.variance, samples.variance)
    joined = Samples.join([samples, samples])
    assert joined.states.shape == (3, 22, 1, 3, 3) and len(joined.requested_times) == 3


def test_the_unit_range_halves_images_and_quarters_variances():
    net, posterior, _ = curved()
    start = start_of(model_of(net, LINEAR, "v"), DDPM(5), 3, (1, 3, 3))
    samples = Ensemble(members=3, times=[0.5])(start, posterior)
    unit = samples.in_unit_range()
    assert (samples.units, unit.units) == ("model", "unit")
    for name in ("images", "frames", "states"):
        torch.testing.assert_close(getattr(unit, name), (getattr(samples, name) + 1) / 2)
    for name in ("variance", "summed", "frame_variance", "sampler_noise", "state_variance"):
        torch.testing.assert_close(getattr(unit, name), getattr(samples, name) / 4)
    for name in ("labels", "times", "frame_times", "requested_times", "nfe", "estimator"):
        assert getattr(unit, name) is getattr(samples, name)
    assert unit.in_unit_range() is unit and samples.in_model_range() is samples
    back = unit.in_model_range()
    torch.testing.assert_close(back.variance, samples.variance)
    torch.testing.assert_close(back.images, samples.images)


def test_the_name_of_an_estimator_is_what_a_user_types():
    assert [kind.name for kind in (Ensemble, Published, TotalVariance)] == [
        "ensemble",
        "published",
        "total_variance",
    ]
    ensemble = Ensemble(members=3)
    assert ensemble.fit(lambda numbers: None, None) is ensemble


def test_seeds_of_an_estimator_change_maps_and_nothing_else():
    net, posterior, _ = curved()

    def run(estimator):
        return estimator(start_of(model_of(net), Euler(4), 2, (1, 3, 3)), posterior)

    for kind in (Ensemble, Published):
        first, again, other = run(kind(seed=1)), run(kind(seed=1)), run(kind(seed=2))
        assert torch.equal(first.variance, again.variance)
        assert not torch.equal(first.variance, other.variance)
        assert torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Ensemble(members=1), "uncertainty.members"),
        (lambda: Ensemble(num_images=0), "uncertainty.num_images"),
        (lambda: Ensemble(batch_size=0), "uncertainty.batch_size"),
        (lambda: Ensemble(seed=-1), "uncertainty.seed"),
        (lambda: Ensemble(noise_members=1), "uncertainty.noise_members=1"),
        (lambda: Ensemble(max_memory=0), "uncertainty.max_memory"),
        (lambda: Ensemble(units="cm"), "uncertainty.units 'cm'"),
        (lambda: Ensemble(times=(0.5, 1.5)), "uncertainty.times"),
        (lambda: Ensemble(times="0.5"), "uncertainty.times"),
        (lambda: Ensemble(validate_members=1), "uncertainty.validate_members"),
        (lambda: Ensemble(validate_images=1), "uncertainty.validate_images"),
        (lambda: Ensemble(validate=True, num_images=5), "uncertainty.validate_images=16"),
        (lambda: Published(mc_samples=0), "uncertainty.mc_samples"),
        (lambda: Published(seed=-1), "uncertainty.seed"),
        (lambda: Ensemble(skip_interval=0).check(Euler(4)), "uncertainty.skip_interval"),
        (lambda: Published(skip_interval=5).check(Euler(4)), "uncertainty.skip_interval=5"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("solver", [DDPM(12), DDIM(12, eta=1.0)])
def test_a_coarse_member_gets_the_noise_of_all_the_steps_it_stands_for(solver):
    """Without weights' doing, a coarse path stays near the shown image, whatever the skip."""
    net, _ = small_unet()
    posterior = certain(net.head)
    model = model_of(net, LINEAR, "noise", num_classes=3)

    def start():
        return Start(model, solver, None, SampleNoise(0, range(6), (1, 8, 8)), CPU)

    estimator = Ensemble(members=2, skip_interval=3, noise_members=0)
    image, members = estimator.images(start(), posterior)
    other = image.roll(1, 0)
    near = torch.nn.functional.cosine_similarity(members[0].flatten(1), image.flatten(1))
    far = torch.nn.functional.cosine_similarity(members[0].flatten(1), other.flatten(1))
    assert near.mean() > 0.6 > far.mean() + 0.3


def test_an_ensemble_shares_no_draws_with_other_estimators_of_its_seed():
    _, posterior = affine_flow()
    ours = Ensemble(members=4, seed=3).weights(posterior)
    theirs = posterior.draw(4, torch.Generator().manual_seed(3))
    assert not torch.isclose(ours, theirs)[..., -1].any()  # the bias, the only uncertain weight
