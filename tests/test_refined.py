"""The refined estimator: what it learns, what it keeps, what it refuses."""

from dataclasses import replace

import pytest
import torch
from hand import certain, plain, posterior_of, random_covariance, small_unet

from bayesdiff.checks import UserError
from bayesdiff.solvers import DDIM, DDPM, DPMSolverPP2M, Euler, Heun
from bayesdiff.uncertainty import Ensemble, Linearised, Refined, starts_of
from bayesdiff.uncertainty.sensitivities import refined as module
from bayesdiff.uncertainty.sensitivities.predicted_products import spread_nodes
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS
from bayesdiff.uncertainty.sensitivities.refiner import (
    Evidence,
    Level,
    Refiner,
    loss,
    overlap,
    summary,
    train_refiner,
)
from bayesdiff.uncertainty.sensitivities.refiner_file import TOLERANCE, representative

SMALL = {"train_images": 20, "epochs": 2, "derivative": "difference"}


def starts(net, solver, path=None, prediction="velocity"):
    from hand import FLOW, model_of

    model = model_of(net, path or FLOW, prediction, num_classes=3)
    return starts_of(model, solver, 0, (1, 8, 8), torch.device("cpu"))


def known(count, members, seed=0):
    """Images that tell their own variance, with live and target draws of it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    level = torch.randn(count, 1, 1, 1, generator=generator)
    variance = (2 * images + level - 6).exp()

    def draw(m):
        return variance[:, None].sqrt() * torch.randn(count, m, 1, 8, 8, generator=generator)

    live = draw(members)
    features = (images + level).expand(-1, 4, -1, -1)
    return (
        variance,
        Evidence(images, features.half(), live.square().mean(1), overlap(live.transpose(0, 1))),
        draw(3),
    )


def test_the_loss_is_least_at_the_true_variance():
    """Pixels and totals alike: the minimiser over one level is the mean squared draw."""
    generator = torch.Generator().manual_seed(0)
    d = 0.3 * torch.randn(50, 4, 1, 6, 6, generator=generator, dtype=torch.float64)
    level = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([level], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(level.expand(50, 1, 6, 6), d)
        value.backward()
        return value

    optimizer.step(closure)
    assert float(level.detach().exp()) == pytest.approx(float(d.square().mean()), rel=1e-6)


def test_a_refiner_finds_the_variance_that_noisy_maps_are_samples_of():
    """It never sees the true variance, and beats 4 live draws by far on images it has not seen."""
    _, seen, target = known(400, 4)
    refiner = train_refiner(seen, target, patch=1, epochs=20, seed=0)
    truth, new, _ = known(100, 4, seed=1)
    with torch.no_grad():
        error = (refiner(new) - truth.log()).square().mean()
    raw = (new.variance.log() - truth.log()).square().mean()
    assert error < 0.1 * raw
    assert float((refiner(new).detach().exp().sum() / truth.sum()).log().abs()) < 0.1


def test_the_level_is_a_ridge_regression_with_a_given_mean():
    """Against the normal equations written out; an unfitted one changes nothing."""
    truth, seen, target = known(200, 4)
    level = Level(seen.features.shape[1])
    map_ = truth.log()
    assert not level.missing(map_, seen).any()
    level.fit(seen, target, torch.tensor(-5.0))
    x, y = summary(seen).double(), target.square().mean((1, 2, 3, 4)).double()
    z = (x - x.mean(0)) / (x.std(0) + 1e-2)
    penalty = torch.tensor([0.2] * 3 + [800.0] * (x.shape[1] - 3), dtype=torch.float64)
    z_1 = torch.cat([z, torch.ones(200, 1)], 1)
    normal = z_1.T @ z_1 + torch.cat([penalty, torch.zeros(1)]).diag()
    slopes = torch.linalg.solve(normal, z_1.T @ y.log())[:-1]
    expected = z @ slopes - 5
    assert torch.allclose(level(seen).double(), expected, atol=1e-4)
    moved = map_ + level.missing(map_, seen)
    assert torch.allclose(moved.exp().mean((1, 2, 3)).log(), level(seen), atol=1e-4)


def test_overlap_is_one_for_one_direction_and_one_over_n_for_random_ones():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 3, 1, 4, 4, generator=generator)
    weights = torch.randn(5, 1, 1, 1, 1, generator=generator)
    assert torch.allclose(overlap(weights * one), torch.ones(3))
    many = torch.randn(200, 2, 1, 4, 4, generator=generator)
    assert torch.allclose(overlap(many), torch.full((2,), 1 / 16), atol=0.01)
    assert not overlap(one).any()


@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("products", [1, 2, 3, 7])
def test_products_are_spread_over_the_evaluations(count, products):
    nodes = sorted(spread_nodes(count, products))
    assert len(nodes) <= products and all(0 < n < count for n in nodes if count > 1)
    if count >= 4 * products:
        gaps = [b - a for a, b in zip([0, *nodes], [*nodes, count], strict=True)]
        assert len(nodes) == products and max(gaps) <= 3 * min(gaps) + 1


CASES = {
    "euler": (Euler(6), None, "velocity"),
    "heun": (Heun(3), None, "velocity"),
    "guided": (Euler(5, guidance=2.0), None, "velocity"),
    "one step": (Euler(1), None, "velocity"),
    "ddim": (DDIM(6), "vp", "v"),
    "ddpm": (DDPM(5), "vp", "noise"),
    "dpmpp_2m": (DPMSolverPP2M(6), "vp", "v"),
}


def case(name):
    from bayesdiff.paths import VariancePreserving

    solver, path, prediction = CASES[name]
    net, posterior = small_unet()
    return starts(net, solver, path and VariancePreserving("cosine"), prediction), posterior


@pytest.mark.parametrize("name", CASES)
def test_the_shown_image_is_the_models_own_sample(name, monkeypatch):
    monkeypatch.setattr(module.Refined, "refiner", untrained)
    start, posterior = case(name)
    image = plain(start(range(3)))
    samples = Refined(**SMALL).fit(start, posterior)(start(range(3)), posterior)
    assert torch.equal(samples.images, image)
    assert samples.variance.shape == image.shape and samples.variance.isfinite().all()
    assert (samples.variance >= 0).all() and not samples.variance.requires_grad
    assert torch.equal(samples.summed[-1], samples.variance.flatten(1).sum(1))


def untrained(self, everything, target):
    patch = everything.images.shape[-1] // everything.features.shape[-1]
    refiner = Refiner(everything.images.shape[1], everything.features.shape[1], patch)
    log = everything.variance.clamp(min=1e-30).log()
    refiner.scale.copy_(torch.stack([log.mean(), log.std()]))
    return refiner.eval()


@pytest.mark.parametrize("name", ["euler", "ddpm"])
def test_a_certain_posterior_leaves_no_variance(name):
    """T5."""
    start, posterior = case(name)
    nothing = certain(start([0]).model.net.head)
    samples = Refined(**SMALL).fit(start, nothing)(start(range(2)), nothing)
    assert not samples.variance.any() and not samples.summed.any()


def test_maps_do_not_depend_on_how_images_are_batched(monkeypatch):
    """With exact products: the rounding of a difference alone is 2e-3 of a dark pixel."""
    monkeypatch.setattr(module.Refined, "refiner", untrained)
    monkeypatch.setattr(module.Refined, "product", lambda *_: PRODUCTS["exact"])
    start, posterior = case("heun")
    ready = Refined(**SMALL).fit(start, posterior)
    together = ready(start(range(4)), posterior).variance
    apart = torch.cat([ready(start([n]), posterior).variance for n in range(4)])
    assert torch.allclose(together, apart, rtol=1e-3, atol=1e-12)


def test_the_live_part_is_a_linearised_map_on_its_budget(monkeypatch):
    """With a product at every evaluation nothing is predicted."""
    monkeypatch.setattr(module.Refined, "refiner", untrained)
    start, posterior = case("euler")
    estimator = Refined(**SMALL, products=5, budget=5.0)
    ready = estimator.fit(start, posterior)
    rule = ready.fitted[0]
    assert rule.nodes == frozenset(range(1, 6))
    assert torch.allclose(rule.correction, torch.ones(6).to(rule.correction), rtol=1e-4)
    followed = ready.follow(start(range(2)), ready.directions(posterior, 6), rule)
    linear = Linearised(draws=ready.draws(6), derivative="difference")
    expected = linear(start(range(2)), posterior).variance
    assert torch.allclose(followed.variance[-1], expected, rtol=1e-3)
    assert ready.draws(6) == 6 and ready(start([0]), posterior).nfe == 6 + 6 * 5


@pytest.fixture
def trainings(monkeypatch):
    """Counts trainings, and leaves out their costly part."""
    done = []
    train = module.Refined.train
    monkeypatch.setattr(module.Refined, "refiner", untrained)
    monkeypatch.setattr(module.Refined, "train", lambda *a: done.append(1) or train(*a))
    return done


def test_a_finished_refiner_is_read_again(tmp_path, trainings):
    start, posterior = case("euler")
    maps = [
        Refined(**SMALL).fit(start, posterior, tmp_path)(start(range(2)), posterior).variance
        for _ in range(2)
    ]
    assert len(trainings) == 1 and torch.equal(*maps)


def test_what_a_refiner_depends_on_trains_another(tmp_path, trainings):
    start, posterior = case("euler")
    estimator = Refined(**SMALL)
    size = posterior.curvature.geometry.size
    other = posterior_of(start([0]).model.net.head, random_covariance(size, seed=5))
    other = replace(other, curvature=replace(other.curvature, source="elsewhere"))
    torch.manual_seed(1)
    with_other_weights = case("euler")[0]
    with torch.no_grad():
        with_other_weights([0]).model.net.head.bias.add_(1)
    for changed in (
        lambda: estimator.fit(start, posterior, tmp_path),
        lambda: estimator.fit(start, other, tmp_path),
        lambda: estimator.fit(case("guided")[0], posterior, tmp_path),
        lambda: estimator.fit(with_other_weights, posterior, tmp_path),
        lambda: replace(estimator, budget=1.0).fit(start, posterior, tmp_path),
        lambda: replace(estimator, skip_interval=2).fit(start, posterior, tmp_path),
    ):
        before = len(trainings)
        changed()
        assert len(trainings) == before + 1


def test_a_posterior_of_another_scale_needs_no_training_and_scales_the_map(tmp_path, trainings):
    """Sigma times 9 through sigma_noise and a matching prior: every map is 9 times as large."""
    start, posterior = case("euler")
    estimator = Refined(**SMALL)
    maps = estimator.fit(start, posterior, tmp_path)(start(range(2)), posterior)
    prior = posterior.prior_precision / 9
    wider = replace(posterior, sigma_noise=3.0, prior_precision=prior)
    scaled = estimator.fit(start, wider, tmp_path)(start(range(2)), wider)
    assert len(trainings) == 1
    assert torch.allclose(scaled.variance, 9 * maps.variance, rtol=1e-2)
    assert torch.allclose(scaled.summed, 9 * maps.summed, rtol=1e-2)


def test_a_posterior_that_moved_in_shape_is_refused_and_trained_for(tmp_path, trainings):
    start, posterior = case("euler")
    estimator = Refined(**SMALL)
    low, high = posterior.eigenvalue_range
    for prior, expected in ((1e-5 * low, 1), (1e-4 * low, 1), ((low * high) ** 0.5, 2)):
        estimator.fit(start, replace(posterior, prior_precision=prior), tmp_path)
        assert len(trainings) == expected


def test_maps_do_not_depend_on_which_posterior_came_first(tmp_path, trainings):
    start, posterior = case("euler")
    low, high = posterior.eigenvalue_range
    near = [
        replace(posterior, prior_precision=1e-5 * low, sigma_noise=0.7),
        replace(posterior, prior_precision=3e-5 * low, sigma_noise=2.0),
    ]
    maps = {}
    for order in ((0, 1), (1, 0)):
        for which in order:
            ready = Refined(**SMALL).fit(start, near[which], tmp_path / f"{order[0]}")
            maps[order, which] = ready(start(range(2)), near[which]).variance
    assert len(trainings) == 2  # one for each order
    for which in (0, 1):
        assert torch.equal(maps[(0, 1), which], maps[(1, 0), which])


@pytest.mark.parametrize("structure", ["full", "diag", "prior_only", "empirical_fisher"])
def test_the_representative_is_near_whatever_the_prior_and_stands_for_itself(structure):
    _, posterior = case("euler")
    mean = posterior.curvature.mean
    squares = torch.rand(mean.shape, generator=torch.Generator().manual_seed(0)).double()
    curvature = replace(posterior.curvature, squared_gradients=squares)
    posterior = replace(posterior, structure=structure, curvature=curvature)
    middle = float(posterior.eigenvalues.mean())
    shared = set()
    for exponent in torch.linspace(-12, 6, 150):
        own = replace(posterior, prior_precision=middle * 10 ** float(exponent))
        near, shift = representative(own)
        ratio = (near.eigenvalues + near.prior_precision) / (own.eigenvalues + own.prior_precision)
        far = ratio.log() - shift
        assert float(far.mean().abs()) < 1e-9 and float(far.abs().max()) <= TOLERANCE
        assert representative(near)[0] == near
        # Noise and prior that change the scale alone make no other representative.
        weight = 4.0 if structure != "empirical_fisher" else 16.0
        weight = 1.0 if structure == "prior_only" else weight
        scaled = replace(own, sigma_noise=2.0, prior_precision=own.prior_precision / weight)
        assert representative(scaled)[0].prior_precision == near.prior_precision
        shared.add(near.prior_precision)
    assert len(shared) < 150


def test_posteriors_of_other_spectra_never_share():
    """As those with one noise level and with one for every time, whose other numbers may agree."""
    start, posterior = case("euler")
    curvature = replace(posterior.curvature, gram=2 * posterior.curvature.gram)
    other = replace(posterior, curvature=curvature, prior_precision=2 * posterior.prior_precision)
    one, two = (Refined(**SMALL).key(start([0]), each) for each in (posterior, other))
    assert one != two


@pytest.mark.parametrize("content", [b"", b"damaged", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_refiner_is_made_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr(module.Refined, "refiner", untrained)
    start, posterior = case("euler")
    first = Refined(**SMALL).fit(start, posterior, tmp_path)
    (path,) = tmp_path.glob("refiner-*.safetensors")
    path.write_bytes(content)
    again = Refined(**SMALL).fit(start, posterior, tmp_path)
    assert torch.equal(again.fitted[0].coefficients, first.fitted[0].coefficients)
    assert path.read_bytes() != content


def test_a_refiner_that_does_not_help_is_refused_and_the_live_map_stands(
    monkeypatch, caplog, tmp_path
):
    def harmful(seen, target, **options):
        refiner = Refiner(seen.images.shape[1], seen.features.shape[1], options["patch"])
        with torch.no_grad():
            refiner.out.bias.fill_(5.0)
        return refiner

    monkeypatch.setattr(module, "train_refiner", harmful)
    start, posterior = case("euler")
    for _ in range(2):  # trained, then read
        ready = Refined(**SMALL).fit(start, posterior, tmp_path)
        assert "no better than the live map" in caplog.text
        samples = ready(start(range(2)), posterior)
        live = ready.follow(start(range(2)), ready.directions(posterior, 6), ready.fitted[0])
        assert torch.allclose(samples.variance, live.variance[-1], rtol=1e-4)
        assert samples.estimator.endswith("refiner refused")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": 0}, "uncertainty.budget"),
        ({"budget": float("nan")}, "uncertainty.budget"),
        ({"products": 0}, "uncertainty.products"),
        ({"train_images": 3}, "uncertainty.train_images"),
        ({"epochs": 0}, "uncertainty.epochs"),
        ({"noise_draws": -1}, "uncertainty.noise_draws"),
        ({"derivative": "exact"}, "uncertainty.derivative"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(options, named):
    with pytest.raises(UserError, match=named) as error:
        Refined(**options)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_refined_maps_agree_with_an_ensemble_better_than_their_live_part():
    """On a small network with random weights, against 256 members."""
    from bayesdiff.metrics.agreement import pixel_rank, spread_ratio

    start, posterior = case("euler")
    ready = Refined(train_images=600, derivative="difference").fit(start, posterior)
    reference = Ensemble(members=256, seed=9)(start(range(32)), posterior).variance
    refined = ready(start(range(32)), posterior).variance
    live = ready.follow(start(range(32)), ready.directions(posterior, 6), ready.fitted[0])
    assert pixel_rank(refined, reference) > pixel_rank(live.variance[-1], reference)
    assert spread_ratio(refined, reference) == pytest.approx(1, abs=0.15)
