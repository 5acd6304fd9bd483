"""The study of data to latents and back: against closed forms, and on points and images."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Compose, Trained, compose_list, smallest
from hand import certain, posterior_of
from PIL import Image, ImageSequence
from scipy.stats import kurtosis
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import Points
from bayesdiff.laplace.head import head_matrix
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import Labels
from bayesdiff.paths import CondOT, Inflation, VariancePreserving
from bayesdiff.report import board
from bayesdiff.report.style import caption_of
from bayesdiff.runs.invertible import InvertibleFlow
from bayesdiff.solvers import DDIM, Euler, Heun, decode
from bayesdiff.studies.inversion import animation, results
from bayesdiff.studies.inversion.figures import every, magnification
from bayesdiff.studies.inversion.inversion import Inversion, standardised
from bayesdiff.studies.inversion.shown import Shown
from bayesdiff.studies.inversion.trip import RoundTrip, evenly, expected_variance, left_noise

DOUBLE = torch.float64
SIX = {"atol": 1e-6, "rtol": 0}
CHANCE = {"seed": 0, "resamples": 50, "level": 0.95}
PLANE = Points(SimpleNamespace(images=torch.zeros(3, 2), name="plane"))


def inflation(*variances, **options):
    xi = torch.tensor(variances, dtype=DOUBLE)
    space = SimpleNamespace(variances=xi, shape=tuple(xi.shape))
    return Inflation(**{"rho": 2.0, "duration": 7.01, **options}).for_space(space)


P1 = inflation(1.444, 0.556)


class Bias(nn.Module):
    """Says its bias, whatever it sees."""

    def __init__(self, size=2):
        super().__init__()
        self.head = nn.Linear(1, size).double()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x, t, y=None):
        return torch.zeros_like(x[:, :1])

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


class GaussianVelocity(Bias):
    """The velocity of straight lines between noise and N(0, s^2) data."""

    def __init__(self, sd):
        super().__init__()
        self.sd = sd
        nn.init.zeros_(self.head.bias)
        self.head = nn.Linear(2, 2).double()
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(2))
            self.head.bias.zero_()

    def features(self, x, t, y=None):
        t = t.double()[:, None]
        variance = (t * self.sd) ** 2 + (1 - t) ** 2
        return x * (t * self.sd**2 - (1 - t)) / variance


def model_of(net, path=P1, prediction="v"):
    return GenerativeModel(net, path, prediction, torch.optim.SGD).eval()


def angle(path, t):
    c = path.coefficients(torch.tensor(t, dtype=DOUBLE))
    return torch.atan2(c.sigma, c.alpha)


X = torch.randn(40, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", [Euler(3), Heun(2)])
def test_a_gaussian_comes_back_exactly_and_has_the_variance_that_is_expected(solver):
    """The zero head is the exact one for Gaussian data, in any number of steps."""
    trip = RoundTrip(model_of(Bias()), solver, PLANE, frames=3)
    rows = trip(X)
    assert float(results.squared_errors(rows).max()) < 1e-12
    alpha = P1.coefficients(torch.ones((), dtype=DOUBLE)).alpha
    torch.testing.assert_close(rows["latents"], alpha * X)
    noised = X + left_noise(P1) * torch.randn(X.shape, dtype=DOUBLE)
    assert float(results.squared_errors(trip(noised)).max()) < 1e-12
    torch.testing.assert_close(expected_variance(P1, False, (2,)), alpha**2)
    assert expected_variance(P1, True, (2,)).tolist() == pytest.approx([1, 1])
    assert expected_variance(CondOT(), False, (2,)).tolist() == [1, 1]
    scaled = alpha**2 * P1.latent_variance  # spec T7
    torch.testing.assert_close(scaled, torch.tensor([0.999654, 0.997659], dtype=DOUBLE), **SIX)


def test_the_variance_expected_of_noised_data_is_that_of_draws():
    big = torch.randn(100_000, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).sign()
    path = inflation(0.01, 0.001)  # two points in each direction, clean: alpha^2 = 0.95, 0.67
    trip = RoundTrip(model_of(Bias(), path), Euler(1), PLANE)
    noise = torch.randn(big.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    for noised, x in ((False, big), (True, big + left_noise(path) * noise)):
        found = results.moments(trip(x)["latents"])["variance"]
        expected = expected_variance(path, noised, (2,))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert expected_variance(path, False, (2,))[1] < 0.7


def test_frames_are_states_on_the_way_in_the_order_of_their_times():
    sd = 0.3
    model = model_of(GaussianVelocity(sd), CondOT(), "velocity")
    trip = RoundTrip(model, Heun(200), PLANE, frames=5)
    rows, (there, back) = trip(X), trip.times
    assert (there[0], there[-1], back[0], back[-1]) == (1, 0, 0, 1)
    assert there == pytest.approx(back[::-1])
    for name, times in (("there", there), ("back", back)):
        for frame, t in zip(rows[name].unbind(1), times, strict=True):
            exact = X / sd * math.sqrt((t * sd) ** 2 + (1 - t) ** 2)
            torch.testing.assert_close(frame, exact, atol=2e-3, rtol=0)
    assert torch.equal(rows["there"][:, -1], rows["latents"])
    assert torch.equal(rows["back"][:, -1], rows["returned"])
    assert trip.nfe == 800
    assert RoundTrip(model, Heun(4), PLANE)(X).keys() == {"data", "returned", "latents"}
    assert evenly(5, 3) == [0, 2, 4] and evenly(2, 5) == [0, 1] and evenly(4, 0) == []


def test_frames_of_a_path_with_noise_at_the_end_are_its_states():
    path = inflation(0.01, 0.001)
    trip = RoundTrip(model_of(Bias(), path), Heun(4), PLANE, frames=9)
    rows, (there, _) = trip(X), trip.times
    alpha = path.coefficients(torch.ones((), dtype=DOUBLE)).alpha
    for name in ("there", "back"):  # nothing moves but what the units do
        torch.testing.assert_close(rows[name], (alpha * X)[:, None].expand(-1, len(there), -1))
    torch.testing.assert_close(rows["returned"], X)


def test_a_denoised_sample_is_no_way_back():
    path = inflation(0.01, 0.001)
    trip = RoundTrip(model_of(Bias(), path), Heun(4, denoise=True), PLANE)
    torch.testing.assert_close(trip(X)["returned"], X)


def test_a_bias_moves_latents_by_the_angle_of_the_path():
    """Spec L2, -1.5096295 of the second one in the units of the paper, whose network says -v."""
    heads = torch.zeros(2, 2, 2, dtype=DOUBLE)
    heads[1, :, -1] = 1e-3  # of a derivative by differences; the map is linear in the bias
    rows = RoundTrip(model_of(Bias()), Heun(100), PLANE, heads)(X[:3])
    slope = (2 * rows["latent_variance"]).sqrt() / 1e-3  # two flows: var = difference^2 / 2
    exact = (angle(P1, 0.0) - angle(P1, 1.0)).expand(3, 2)
    torch.testing.assert_close(slope, exact, rtol=1e-4, atol=0)
    paper = -P1.latent_variance.sqrt() * exact[0]
    assert float(paper[1]) == pytest.approx(-1.5096295, abs=5e-8)


def test_spread_of_latents_is_that_of_the_biases_along_the_angle():
    """Spec L2: K flows' variance is theta's square times that of their biases."""
    net, sd = Bias(), 0.05
    posterior = posterior_of(net.head, torch.diag(torch.tensor([1e-12, sd**2], dtype=DOUBLE)))
    heads = posterior.draw(1000, torch.Generator().manual_seed(0))
    trip = RoundTrip(model_of(net), Heun(60), PLANE, heads)
    rows = trip(X[:3])
    turned = angle(P1, 0.0) - angle(P1, 1.0)
    own = heads[:, :, -1].var(0) * turned**2
    torch.testing.assert_close(rows["latent_variance"], own.expand(3, 2), rtol=2e-3, atol=0)
    exact = (sd * turned) ** 2
    error = 5 * math.sqrt(2 / 1000)
    torch.testing.assert_close(own, exact, rtol=error, atol=0)
    # On the way back the same angle is turned, and data are the state over alpha.
    alpha = P1.coefficients(torch.ones((), dtype=DOUBLE)).alpha
    back = (own / alpha**2).expand(3, 2)
    torch.testing.assert_close(rows["returned_variance"], back, rtol=2e-3, atol=0)
    alone = RoundTrip(model_of(net), Heun(60), PLANE, certain(net.head).draw(2, torch.Generator()))
    assert float(alone(X[:3])["latent_variance"].max()) < 1e-40


def test_members_are_flows_with_these_heads_one_by_one():
    net = GaussianVelocity(0.5)
    heads = head_matrix(net.head) + 0.1 * torch.randn(
        3, 2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)
    )
    model = model_of(net, CondOT(), "velocity")
    rows = RoundTrip(model, Heun(5), PLANE, heads)(X)
    found = {"latents": [], "returned": []}
    for head in heads:
        other = GaussianVelocity(0.5)
        other.head.weight.data, other.head.bias.data = head[:, :2], head[:, 2]
        trip = RoundTrip(model_of(other, CondOT(), "velocity"), Heun(5), PLANE)
        found["latents"].append(trip(X)["latents"])
        found["returned"].append(decode(trip.model, trip.solver, rows["latents"]))
    for name, of in (("latent_variance", "latents"), ("returned_variance", "returned")):
        torch.testing.assert_close(rows[name], torch.stack(found[of]).var(0))


def test_round_trip_numbers_by_hand():
    data = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 0.5]])
    returned = data + torch.tensor([[0.1, -0.1], [0.0, 0.2], [0.0, 0.0]])
    rows = {"data": data, "returned": returned}
    found = results.round_trip(rows, True, CHANCE)
    errors = [0.01, 0.02, 0.0]
    assert found["round_trip_mse"] == pytest.approx(0.01, rel=1e-6)
    assert found["round_trip_median"] == pytest.approx(0.01, rel=1e-6)
    assert found["round_trip_worst"] == pytest.approx(max(errors), rel=1e-6)
    assert 0 <= found["round_trip_mse_low"] < 0.01 < found["round_trip_mse_high"] <= 0.02
    assert found["round_trip_grey_mse"] == pytest.approx(127.5**2 * 0.01, rel=1e-6)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-6)
    grey = {"data": torch.zeros(4, 1), "returned": torch.full((4, 1), 16 / 127.5)}
    assert results.round_trip(grey, True, CHANCE)["round_trip_grey_mse"] == pytest.approx(256)
    assert "psnr" not in results.round_trip(rows, False, CHANCE)


def test_moments_are_those_of_scipy_and_of_loops():
    z = torch.randn(50, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) ** 3
    z[:, 1] += z[:, 0]
    found = results.of_latents(z)
    expected = kurtosis(z.numpy(), bias=False)
    assert found["coordinates"]["kurtosis"] == pytest.approx(expected.tolist())
    assert found["latent_kurtosis"] == pytest.approx(expected.mean())
    assert found["coordinates"]["variance"] == pytest.approx(z.var(0).tolist())
    pairs = [abs(float(torch.corrcoef(z.T)[i, j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["correlation_max"] == pytest.approx(max(pairs))
    rms = math.sqrt(sum(r * r for r in pairs) / 3)
    assert found["correlation_rms"] == pytest.approx(rms)
    assert found["correlation_by_chance"] == pytest.approx(1 / 7) and found["correlated"] == 3
    z[:, 2] = 1.0  # never changes: no kurtosis and no correlation
    still = results.of_latents(z)
    assert math.isnan(still["coordinates"]["kurtosis"][2]) and still["correlated"] == 2
    assert still["latent_kurtosis"] == pytest.approx(expected[:2].mean())
    alone = results.of_latents(z[:, :1])
    assert math.isnan(alone["correlation_max"]) and alone["correlated"] == 1


def test_many_coordinates_are_correlated_in_part():
    z = torch.randn(30, 3000, generator=torch.Generator().manual_seed(0))
    found = results.correlations(z)
    assert found["correlated"] == 1024
    assert found["correlation_rms"] == pytest.approx(found["correlation_by_chance"], rel=0.02)


def test_the_share_of_the_weights_by_hand():
    latents = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], dtype=DOUBLE)
    rows = {
        "latents": latents,
        "latent_variance": torch.tensor([[1.0, 0.0], [2.0, 3.0], [3.0, 0.0]], dtype=DOUBLE),
        "returned_variance": torch.full((3, 2), 0.04, dtype=DOUBLE),
    }
    found = results.of_weights(rows, CHANCE)
    assert found["weights_share_of_coordinates"] == pytest.approx([2 / 6, 1 / 4])
    assert found["weights_share"] == pytest.approx(3 / 10)
    assert found["latent_sd"] == pytest.approx(math.sqrt(1.5))
    assert found["latent_sd_of_coordinates"] == pytest.approx([math.sqrt(2), 1])
    assert found["returned_sd"] == pytest.approx(0.2)
    assert found["latent_sd_low"] <= found["latent_sd"] <= found["latent_sd_high"]
    half = standardised(rows, 2.0)
    assert torch.equal(half["latents"], latents / 2)
    assert torch.equal(half["latent_variance"], rows["latent_variance"] / 4)
    assert results.of_weights(half, CHANCE)["weights_share"] == pytest.approx(3 / 10)


def test_dimensions_that_are_kept_and_compressed_in_the_units_of_the_paper():
    path = inflation(1.0, 1.0, 1.0, schedule="prr", dims_to_keep=1, rho=1.0, duration=15.01)
    ones = torch.ones(3, dtype=DOUBLE)
    kept, compressed = results.groups(path, {"variance": [0.9, 1.2, 0.6]}, ones)
    assert (kept["dimensions"], kept["count"], kept["variance"]) == ("kept", 1, 0.9)
    assert compressed["count"] == 2 and compressed["variance"] == pytest.approx(0.9)
    assert kept["scaled_expected"] == pytest.approx(1)
    assert compressed["scaled_expected"] == pytest.approx(2.24502e-7, rel=1e-5)  # spec T1
    assert compressed["scaled_variance"] == pytest.approx(0.9 * 2.24502e-7, rel=1e-5)
    (every,) = results.groups(CondOT(), {"variance": [0.9, 1.2, 0.6]}, ones)
    assert every["dimensions"] == "all" and "scaled_variance" not in every


@pytest.mark.parametrize("kernel", ["constant", "proportional"])
def test_scaled_states_of_the_paper(kernel):
    path = inflation(4.0, 1.0, 0.25, kernel=kernel)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE)
    gamma = path.log_gamma(t).exp()
    for k in range(3):
        total = path.variances + gamma[k]
        torch.testing.assert_close(path.scale(t)[k], (total / total[0]).sqrt())
        torch.testing.assert_close(path.scale(t[k]), path.scale(t)[k])


def test_guided_flows_are_evaluated_twice_as_often():
    net = Bias()
    net.num_classes = 3
    labelled = GenerativeModel(
        net, P1, "v", torch.optim.SGD, condition=Labels(3), class_dropout=0.1
    )
    assert RoundTrip(labelled, Heun(4, guidance=2.0), PLANE).nfe == 32
    assert RoundTrip(labelled, Heun(4), PLANE).nfe == 16
    assert left_noise(VariancePreserving()) is None
    assert RoundTrip(model_of(Bias(), VariancePreserving()), DDIM(5), PLANE).nfe == 10


@pytest.mark.parametrize("size", [1, 5])
def test_points_of_any_dimensions_have_figures(size, tmp_path):
    x = torch.randn(9, size, dtype=DOUBLE)
    heads = torch.randn(2, size, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    path = inflation(*range(size, 0, -1))
    trip = RoundTrip(model_of(Bias(size), path), Heun(4), PLANE, heads, frames=3)
    rows = trip(x)
    record = results.round_trip(rows, False, CHANCE) | results.of_latents(rows["latents"])
    record |= results.of_weights(rows, CHANCE)
    record["conditions"] = {"images": 9, "start": "clean", "members": 2, "nfe": trip.nfe}
    ones = torch.ones(size, dtype=DOUBLE)
    shown = Shown(record, rows, path, PLANE, ones, trip.times, "Conditions: none.")
    drawn = {tag: caption_of(figure) for tag, figure in every(shown)}
    assert len(drawn) == 5
    assert ("3 of 5 coordinates" in drawn["inversion/clouds"]) == (size == 5)
    assert shown.frames(0).shape == (3, 9, size) and shown.hues.shape == (9, 3)
    scaled = path.scale(torch.tensor(trip.times[0], dtype=DOUBLE))[:, None]
    torch.testing.assert_close(shown.frames(0), rows["there"].transpose(0, 1) * scaled)
    animation.write(tmp_path / "a.gif", shown)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames > 1


@pytest.mark.parametrize("error, more", [(0.6, 10), (0.05, 10), (6.4e-4, 1000), (0.0, 10)])
def test_errors_are_magnified_until_they_are_seen(error, more):
    assert magnification(error) == more


# The study

SMALL = (
    *("experiment=inversion", "uncertainty.num_images=2", "inversion.bootstrap=20"),
    *("inversion.num_images=12", "inversion.members=2"),
)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A run on points, with its study."""
    folder = tmp_path_factory.mktemp("inverted")
    cfg = compose_list(
        smallest(
            folder, *SMALL, "model=inflation", "data=s_curve", "net=mlp", "net.width=16",
            "data.source.points=500", "data.source.test_points=40", "data.batch_size=250",
            "path.schedule=prr", "path.dims_to_keep=2", "inversion.start=noised",
        )
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # figures of the study alone
        patch.setattr(board, "write", lambda *args, **kwargs: [])
        return pipeline.run(cfg)


def test_points_have_figures_numbers_latents_and_an_animation(points):
    (folder,) = points.studies
    found = json.loads((folder / "results.json").read_text())
    assert found["conditions"] == {
        "images": 12, "start": "noised", "members": 2, "solver": "heun", "seed": 0, "nfe": 12,
    }  # fmt: skip
    for name in ("round_trip_mse", "latent_variance", "latent_kurtosis", "weights_share"):
        assert points.metrics[f"inversion/{name}"] == found[name]
    assert 0 < found["round_trip_mse"] < 0.1 and "psnr" not in found
    assert 0 < found["weights_share"] < 1 and found["latent_sd"] > 0
    assert [row["dimensions"] for row in found["groups"]] == ["kept", "compressed"]
    assert len(found["coordinates"]["kurtosis"]) == 3
    assert "round_trip_mse" in (folder / "table.md").read_text()
    assert "compressed" in (folder / "dimensions.md").read_text()
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert captions.keys() == {"clouds", "latents", "round_trip", "weights", "by_dimension"}
    assert all("seed" in str(each) for each in captions.values())
    with Image.open(folder / "inversion.gif") as film:
        frames = list(ImageSequence.Iterator(film))
        assert len(frames) <= 60 and film.info["loop"] == 0
    assert (folder / "inversion.gif").stat().st_size < 1.5e6


def test_latents_of_a_study_are_read_and_decoded_by_an_invertible_flow(points):
    (folder,) = points.studies
    flow = InvertibleFlow.of(points.folder.parent)
    latents = flow.load(folder / "latents.safetensors")
    assert latents.shape == (12, 3)
    with np.load(folder / "round_trips.npz") as kept:
        returned, data = torch.tensor(kept["returned"]), torch.tensor(kept["data"])
    torch.testing.assert_close(flow.decode(latents), returned, atol=1e-5, rtol=0)
    assert data.shape == (12, 3)
    other = InvertibleFlow.of(points.folder.parent, Heun(7))
    with pytest.raises(UserError, match="encode the data again"):
        other.load(folder / "latents.safetensors")


def test_images_come_back_with_maps(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    found = pipeline.run(compose(*SMALL, "solver=heun"))
    (folder,) = found.studies
    record = json.loads((folder / "results.json").read_text())
    assert record["psnr"] == pytest.approx(10 * math.log10(4 / record["round_trip_mse"]))
    assert record["round_trip_grey_mse"] == pytest.approx(127.5**2 * record["round_trip_mse"])
    assert len(record["coordinates"]["mean"]) == 64 and record["conditions"]["start"] == "clean"
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert captions.keys() == {"round_trips", "latents", "by_dimension"}
    assert not (folder / "inversion.gif").exists()
    cut = pipeline.run(compose(*SMALL, "solver=heun", "inversion.batch_size=5"))
    assert cut.studies == found.studies  # how work is cut up makes no other study


@pytest.mark.parametrize(
    "more, match",
    [
        (["model=diffusion", "solver=ddpm"], "deterministic solver, solver=ddpm draws noise"),
        (["model=bfn", "data=binary_digits"], "model=flow, diffusion or inflation"),
        (["model=flow", "inversion.start=noised"], "use inversion.start=clean"),
        (["model=flow", "inversion.num_images=301"], "more than the 300 held-out images"),
    ],
)
def test_what_is_no_map_is_refused_before_any_work(compose: Compose, more, match):
    with pytest.raises(UserError, match=match) as caught:
        pipeline.prepare(compose(*SMALL, "data=digits", *more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"num_images": 3}, {"start": "dirty"}, {"members": 1}, {"members": -1}, {"bootstrap": 1},
     {"batch_size": 0}, {"seed": -1}, {"animation": 1}],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(UserError, match=f"inversion.{next(iter(options))}") as caught:
        Inversion(**options)
    assert "\n" not in str(caught.value)
