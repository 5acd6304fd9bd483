"""Spaces of the data: points with maps of their own kind, and images decoded from latents."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Compose, smallest
from hand import FLOW, LINEAR, Noise, model_of, posterior_of, random_covariance, small_unet
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.points import PointData
from bayesdiff.data.sources import digits
from bayesdiff.data.spaces import Latents, Pixels, Points, Rotation, to_model_range
from bayesdiff.data.toys import moons
from bayesdiff.laplace.curvature import batches, fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.metrics.two_samples import energy_distance, sliced_wasserstein
from bayesdiff.networks import MLP
from bayesdiff.report import plane
from bayesdiff.report.plane import TIMES
from bayesdiff.solvers import DDIM, Euler, Heun, integrate
from bayesdiff.storage.artefacts import read_arrays
from bayesdiff.uncertainty import Ensemble, Linearised, Published, Start, TotalVariance
from bayesdiff.uncertainty.restart import with_state

CPU = torch.device("cpu")
SOLVERS = {"euler": (Euler(4), FLOW, "velocity"), "ddim": (DDIM(4), LINEAR, "v")}


def lively(net: nn.Module, dtype=torch.float64) -> nn.Module:
    """The network with blocks that do something, which start as the identity."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return net.to(dtype).eval()


def points_start(name, net, count=3, decoder=None):
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=2)
    labels = torch.arange(count) % 2
    return Start(model, solver, labels, Noise(count, net.shape), CPU, decoder)


def mlp(shape=(2,), width=6):
    torch.manual_seed(0)
    net = lively(MLP(shape, num_classes=2, width=width, blocks=2))
    size = head_matrix(net.head).shape[1]
    covariance = random_covariance(size)
    return net, posterior_of(net.head, covariance), covariance


def final(start: Start, weights: torch.Tensor) -> torch.Tensor:
    """The last state under a head with these weights ``(C_out, P)``, step by step."""
    net, labels = start.model.net, start.condition
    head = {"weight": weights[:, :-1], "bias": weights[:, -1]}

    def field(x, t):
        features = net.features(x, torch.full((len(x),), t), labels)
        return net.fold(torch.func.functional_call(net.head, head, features))

    return integrate(field, start.steps(), start.draw(), start.draw)


@pytest.mark.parametrize("wrong", ["dtype", "shape", "finite"])
def test_points_are_refused_where_they_are_none(wrong):
    bad = {"dtype": torch.zeros(4, 2).double(), "shape": torch.zeros(4, 2, 1)}
    values = bad.get(wrong, torch.full((4, 2), torch.nan))
    with pytest.raises(UserError, match="points are"):
        PointData.of("p", values, None, torch.zeros(4, 2), None)


def test_pixels_are_their_own_states():
    data = digits()
    space = data.space
    assert isinstance(space, Pixels) and space.shape == (1, 8, 8)
    states = space.encode(data.images)
    truth = data.images.double() / 127.5 - 1
    torch.testing.assert_close(states.double(), truth, rtol=0, atol=1e-7)
    assert space.values(states) is states
    assert torch.equal(space.decode(states), data.images)
    doubled = (255 * (truth + 0.5).clamp(0, 1)).round()
    assert float((space.decode(2 * states).double() - doubled).abs().max()) <= 1  # ties
    # Mirroring before or after makes no difference, in memory neither.
    flipped = space.encode(data.images.flip(-1))
    assert torch.equal(flipped, states.flip(-1)) and flipped.stride() == states.stride()


def test_a_rotation_is_orthogonal_and_its_latents_are_what_batches_hold():
    data = digits()
    space = Latents(data, Rotation(64, seed=3))
    identity = space.coder.matrix @ space.coder.matrix.T
    torch.testing.assert_close(identity, torch.eye(64).double(), rtol=0, atol=1e-12)
    states = space.encode(data.images)
    assert states.shape == data.images.shape
    torch.testing.assert_close(states.square().sum(), to_model_range(data.images).square().sum())
    assert torch.equal(space.decode(states), data.images)
    assert not torch.allclose(Rotation(64, seed=4).matrix, space.coder.matrix)
    module = ImageDataModule(replace(data, states=space))
    (batch, _), *_ = module.val_dataloader()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[: len(batch)]
    torch.testing.assert_close(batch, space.encode(data.test_images[order]))


def test_spaces_refuse_what_does_not_fit_them():
    with pytest.raises(UserError, match="points"):
        Points(digits())
    with pytest.raises(UserError, match="size=10"):
        Latents(digits(), Rotation(10))
    with pytest.raises(UserError, match="no encode and no decode"):
        Latents(digits(), nn.Identity())


def test_the_gram_of_points_is_the_hessian_of_the_loss():
    torch.manual_seed(0)
    model = model_of(lively(MLP((2,), width=4, blocks=1), torch.float32))
    data = moons(points=40, test_points=10)
    options = {"encode": data.space.encode, "batch_size": 16, "draws": 2}
    found = fit_curvature(model, data.images, None, source="a", **options)
    seen = list(batches(model, data.images, None, **options))
    phi = torch.cat([part.features for part in seen]).double()
    target = torch.cat([part.target for part in seen]).double()

    def loss(weights):
        output = phi @ weights[:, :-1].T + weights[:, -1]
        return (output - target).square().sum() / 2 / options["draws"]

    weights = head_matrix(model.net.head)
    hessian = torch.func.hessian(loss)(weights).flatten(2).flatten(0, 1)
    whole = torch.block_diag(found.gram, found.gram)
    torch.testing.assert_close(whole, hessian, rtol=1e-10, atol=1e-10)
    slope = torch.func.grad(loss)(weights)
    torch.testing.assert_close(found.gradient, slope, rtol=1e-4, atol=1e-4)
    assert found.num_outputs == 80


@pytest.mark.parametrize("name", SOLVERS)
def test_members_of_points_are_the_network_under_each_head(name):
    net, posterior, _ = mlp()
    estimator = Ensemble(members=5)
    samples = estimator(points_start(name, net), posterior)
    heads = estimator.weights(posterior)
    states = torch.stack([final(points_start(name, net), head) for head in heads])
    torch.testing.assert_close(samples.variance, states.var(0), rtol=1e-9, atol=0)
    own = final(points_start(name, net), head_matrix(net.head))
    torch.testing.assert_close(samples.images, own, rtol=1e-9, atol=1e-12)
    assert samples.latents is None


@pytest.mark.parametrize("name", SOLVERS)
def test_sensitivities_of_points_are_derivatives_and_agree_with_many_members(name):
    net, posterior, covariance = mlp()
    samples = Linearised(draws="all")(points_start(name, net), posterior)
    start = points_start(name, net)
    mean = head_matrix(net.head)
    slope = torch.func.jacrev(lambda w: final(replace(start, noise=start.noise.copy()), w))(mean)
    variance = torch.einsum("bdcp,pq,bdcq->bd", slope, covariance, slope).detach()
    torch.testing.assert_close(samples.variance, variance, rtol=1e-7, atol=0)
    # Small steps are straight: members that are drawn a hundredth as far agree within their noise.
    close = posterior_of(net.head, 1e-4 * covariance)
    many = Ensemble(members=3000)(points_start(name, net), close)
    ratio = many.variance / (1e-4 * variance)
    assert (ratio - 1).abs().max() < 5 * (2 / 3000) ** 0.5


@pytest.mark.parametrize("derivative", ["difference", "bfloat16"])
def test_differences_serve_points(derivative):
    net, posterior, _ = mlp()
    net.float()
    exact, rough = (
        Linearised(draws=64, derivative=kind)(start, posterior).variance
        for kind in ("exact", derivative)
        for start in [replace(points_start("euler", net), noise=Typed(3, (2,), torch.float32))]
    )
    tolerance = {"difference": 0.02, "bfloat16": 0.5}[derivative]
    torch.testing.assert_close(rough, exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", [Published, TotalVariance])
def test_one_step_of_a_recursion_has_the_predictive_variance_of_points(kind):
    net, posterior, covariance = mlp()
    solver, path, prediction = Euler(1), FLOW, "velocity"
    model = model_of(net, path, prediction, num_classes=2)
    labels = torch.tensor([0, 1, 0])
    start = Start(model, solver, labels, Noise(3, (2,)), CPU)
    samples = kind()(start, posterior)
    features = net.features(Noise(3, (2,))(), torch.zeros(3), labels)
    phi = torch.cat([features, torch.ones(3, 1)], 1)
    variance = ((phi @ covariance) * phi).sum(1, keepdim=True).expand(3, 2)
    torch.testing.assert_close(samples.variance, variance, rtol=1e-9, atol=0)
    # More steps, and two stages, follow all the same.
    longer = replace(start, solver=Heun(3), noise=Noise(3, (2,)))
    assert bool((kind(clamp=True)(longer, posterior).variance >= 0).all())


class Conjugated(nn.Module):
    """A network of latents as one of pixels: turned before it, and back behind its fold."""

    def __init__(self, net, coder):
        super().__init__()
        self.net, self.coder, self.head = net, coder, net.head
        self.num_classes = net.num_classes

    def features(self, x, t, y=None):
        return self.net.features(self.coder.encode(x), t, y)

    def fold(self, output):
        return self.coder.decode(self.net.fold(output))

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


class Typed(Noise):
    """Noise in another precision."""

    def __init__(self, count, shape, dtype):
        super().__init__(count, shape)
        self.dtype = dtype

    def __call__(self):
        return super().__call__().to(self.dtype)


class Turned(Typed):
    """The noise that the latents' noise is the image of."""

    def __init__(self, count, shape, dtype, coder):
        super().__init__(count, shape, dtype)
        self.coder = coder

    def __call__(self):
        return self.coder.decode(super().__call__())


NETS = {
    "mlp": lambda: MLP((1, 8, 8), num_classes=3, width=16, blocks=1),
    "unet": lambda: small_unet()[0],
}


@pytest.mark.parametrize("kind", NETS)
def test_maps_of_rotated_latents_are_those_of_the_model_in_pixels(kind):
    torch.manual_seed(0)
    data = digits()
    space = Latents(data, Rotation(64, seed=3))
    model = model_of(lively(NETS[kind](), torch.float32), num_classes=3)
    count = {"source": "a", "num_images": 64, "encode": space.encode}
    curvature = fit_curvature(model, data.images, data.labels % 3, **count)
    posterior = HeadPosterior.fit(curvature, sigma_noise=3.0)
    # The U-Net tells its times in single precision.
    tolerance, dtype = {"mlp": (1e-9, torch.float64), "unet": (1e-5, torch.float32)}[kind]
    pixels = model_of(Conjugated(model.to(dtype).net, space.coder), num_classes=3).to(dtype)
    labels = torch.tensor([0, 2])
    for estimator in (Ensemble(members=4), Linearised(draws=8), Linearised(draws="all")):
        latent = estimator(
            Start(model, Heun(3), labels, Typed(2, (1, 8, 8), dtype), CPU, space.values),
            posterior,
        )
        noise = Turned(2, (1, 8, 8), dtype, space.coder)
        pixel = estimator(Start(pixels, Heun(3), labels, noise, CPU), posterior)
        torch.testing.assert_close(latent.images, pixel.images, rtol=tolerance, atol=tolerance)
        scale = float(pixel.variance.max())
        torch.testing.assert_close(
            latent.variance, pixel.variance, rtol=tolerance, atol=tolerance * scale
        )
        # In the state the same total, elsewhere.
        assert not torch.allclose(latent.latent_variance, pixel.variance, rtol=0.1)
        assert torch.equal(latent.summed[-1], latent.latent_variance.flatten(1).sum(1))
        total = latent.variance.flatten(1).sum(1)
        torch.testing.assert_close(total, latent.summed[-1], rtol=tolerance, atol=0)


class Bent(nn.Module):
    """A decoder that is not linear."""

    def encode(self, images):
        return images

    def decode(self, latents):
        return torch.tanh(latents + 0.3 * latents.flip(-1))


def test_sensitivities_are_decoded_by_the_decoder_s_derivative():
    net, posterior, covariance = mlp((1, 2, 2))
    decode = Bent().decode
    samples = Linearised(draws="all")(points_start("euler", net, decoder=decode), posterior)
    start = points_start("euler", net)
    shown = torch.func.jacrev(
        lambda w: decode(final(replace(start, noise=start.noise.copy()), w)).flatten(1)
    )(head_matrix(net.head))
    variance = torch.einsum("bdcp,pq,bdcq->bd", shown, covariance, shown)
    torch.testing.assert_close(samples.variance.flatten(1), variance, rtol=1e-7, atol=0)
    members = Ensemble(members=6)(points_start("euler", net, decoder=decode), posterior)
    heads = Ensemble(members=6).weights(posterior)
    states = torch.stack([final(points_start("euler", net), head) for head in heads])
    decoded = torch.stack([decode(state) for state in states]).var(0)
    torch.testing.assert_close(members.variance, decoded, rtol=1e-9, atol=0)
    torch.testing.assert_close(members.latent_variance, states.var(0), rtol=1e-9, atol=0)


def test_other_units_leave_the_states_of_decoded_images_alone():
    net, posterior, _ = mlp((1, 2, 2))
    decode = Bent().decode
    samples = Ensemble(members=3, times=[0.5])(
        points_start("euler", net, decoder=decode), posterior
    )
    unit = samples.in_unit_range()
    torch.testing.assert_close(unit.variance, samples.variance / 4)
    for name in ("latents", "latent_variance", "states", "summed", "frames", "spatial"):
        assert torch.equal(getattr(unit, name), getattr(samples, name)), name


def test_distances_of_points():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 2, generator=generator).double()
    b = torch.randn(300, 2, generator=generator).double() + 1
    assert sliced_wasserstein(a, a[torch.randperm(400)]) == 0
    shifted = a + torch.tensor([3.0, 0.0])
    assert sliced_wasserstein(a, shifted) == pytest.approx(3 / 2**0.5, rel=0.1)
    assert 0.8 < sliced_wasserstein(a, b) < 1.2
    rows = [[float((x - y).norm()) for y in b] for x in a[:50]]
    inside = [sum(float((x - y).norm()) for x in s for y in s) / (50 * 49) for s in (a[:50],)]
    within = float(torch.cdist(b, b).sum()) / (300 * 299)
    slow = 2 * sum(map(sum, rows)) / (50 * 300) - inside[0] - within
    assert energy_distance(a[:50], b) == pytest.approx(slow, rel=1e-9)
    with pytest.raises(UserError, match="one size"):
        energy_distance(a, b[:, :1])


POINTS = (
    "data=moons", "net=mlp", "net.width=16", "net.blocks=1", "data.source.points=300",
    "data.source.test_points=60", "data.batch_size=64",
)  # fmt: skip


def overrides(folder, *more):
    return [o for o in smallest(folder, *more) if o != "net=tiny" or "net=mlp" not in more]


@pytest.mark.usefixtures("every_figure_drawn")
def test_a_run_on_points_has_maps_over_the_plane(compose: Compose, tmp_path, monkeypatch):
    monkeypatch.setattr("bayesdiff.report.plane.CELLS", 6)
    labels = "data.source.labels=true"
    result = pipeline.run(compose(*overrides(tmp_path, *POINTS, labels, "uncertainty=auto")))
    names = {path.stem for path in (result.folder / "figures").glob("*.png")}
    own = {"samples", "samples_by_variance", "variance_of_output", "variance_over_starts"}
    assert names == own | {"summed_over_time", "scores", "evidence"}
    assert result.metrics["sliced_wasserstein@12"] > 0
    assert "real/energy_distance@12" in result.metrics
    assert result.settings["uncertainty.name"] == "ensemble"
    maps = read_arrays(next(result.folder.parent.glob("plane-*.npz")))
    assert maps["output_variance"].shape == (2, len(TIMES), 6, 6)
    assert maps["start_variance"].shape == (2, 6, 6)
    assert bool((maps["start_variance"] > 0).all())
    assert maps["kinds"].tolist() == [0, 1]


def test_a_cell_of_the_plane_has_the_variance_of_what_starts_there(monkeypatch):
    """Rows are the second coordinate; each class has its own map."""
    monkeypatch.setattr(plane, "CELLS", 3)
    net, posterior, _ = mlp()
    model = model_of(net, FLOW, "velocity", num_classes=2)

    def starts(numbers):
        labels = torch.tensor(list(numbers)) % 2
        return Start(model, Euler(4), labels, Noise(len(numbers), (2,)), CPU)

    estimator = Ensemble(members=4, noise_members=0)
    seen = SimpleNamespace(images=torch.zeros(1, 2).double())
    maps = plane.PlaneFigures().measure(starts, estimator, posterior, seen, Path())
    for kind, row, column in ((0, 0, 2), (1, 2, 1)):
        start = replace(starts([0]), condition=torch.tensor([kind]))
        start.draw()
        place = torch.stack([maps["start_x"][column], maps["start_y"][row]])[None].double()
        found = estimator(with_state(start, place), posterior).variance.sum()
        torch.testing.assert_close(maps["start_variance"][kind, row, column], found)
        at = torch.stack([maps["output_x"][column], maps["output_y"][row]])[None].double()
        phi = start.field().features(at, float(maps["times"][1]))
        truth = posterior.predictive_variance(phi).mean()
        torch.testing.assert_close(maps["output_variance"][kind, 1, row, column], truth)


@pytest.mark.usefixtures("every_figure_drawn")
def test_a_run_in_latents_shows_decoded_images(compose: Compose, tmp_path):
    more = ("space=rotation", "laplace.subset=head", "metrics.num_images=0")
    result = pipeline.run(compose(*smallest(tmp_path, *more)))
    stored = read_arrays(result.samples)
    assert stored["latents"].shape == stored["images"].shape == (4, 1, 8, 8)
    coder = Rotation(64)
    torch.testing.assert_close(coder.decode(stored["latents"]), stored["images"])
    assert not torch.allclose(stored["latent_variance"], stored["variance"], rtol=0.1)
    assert not (result.folder / "figures" / "over_time.png").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("uncertainty=refined",), "uncertainty=linearised"),
        (("uncertainty.units=unit",), "of pictures"),
        (("uncertainty.export=png",), "writes pictures"),
        (("metrics=inception",), "looks at pictures"),
        (("report.sorted_by=[map.sum]",), "choose among pictures"),
        (("data.flip=true",), "mirrors images"),
        (("experiment=filtering",), "filtering is about pictures"),
        (("net=tiny",), "net=mlp"),
    ],
)
def test_what_is_about_pictures_refuses_points(compose: Compose, tmp_path, asked, said):
    points = [o for o in POINTS if "net" not in o] if "net=tiny" in asked else POINTS
    with pytest.raises(UserError, match=said):
        pipeline.prepare(compose(*overrides(tmp_path, *points, *asked)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("uncertainty=published",), "nothing of decoded pixels"),
        (("uncertainty=refined",), "trained in latents"),
        (("experiment=interpolation",), "trained in latents"),
        (("report.chosen_by=likelihood.bits_per_dim",), "states are decoded"),
        (("data.space.coder.size=9",), "has 64 values"),
    ],
)
def test_what_is_of_pixels_refuses_latents(compose: Compose, tmp_path, asked, said):
    with pytest.raises(UserError, match=said):
        pipeline.prepare(compose(*smallest(tmp_path, "space=rotation", *asked)))


def test_weights_of_another_space_are_refused(compose: Compose, tmp_path):
    """Latents have the shape of pixels here: nothing else would tell."""
    rotated = ("space=rotation", "metrics.num_images=0")
    result = pipeline.run(compose(*smallest(tmp_path, *rotated)))
    assert "space_Latents" in result.folder.parent.name
    taken = ("fit=false", f"ckpt_path={result.folder.parent / 'checkpoints' / 'last.ckpt'}")
    for other in ((), ("space=rotation", "data.space.coder.seed=1")):
        with pytest.raises(UserError, match="was trained with data.space"):
            pipeline.run(compose(*smallest(tmp_path / "other", *taken, *other)))
