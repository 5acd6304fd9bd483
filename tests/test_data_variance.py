"""Variance of the data given a state: closed forms on every path, probes, records, figures."""

import json

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import CPU, Double, model_of, real_start, small_unet
from test_bad_input import check_line, refused
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.models.exact import exact_model
from bayesdiff.paths import (
    CondOT,
    GeometricAccuracy,
    Inflation,
    QuadraticAccuracy,
    VariancePreserving,
    VPPerPixel,
)
from bayesdiff.paths.prediction import mix
from bayesdiff.report.apart import epistemic_and_aleatoric
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise
from bayesdiff.uncertainty import Ensemble, Samples, Start
from bayesdiff.uncertainty.data_variance import (
    check_probes,
    data_variance,
    data_variance_scores,
    step_at,
    with_data_variance,
)

SHAPE = (1, 3, 3)
SIZE = 9
PATHS = {
    "straight": (CondOT(), "velocity"),
    "linear": (VariancePreserving(), "noise"),
    "cosine": (VariancePreserving("cosine"), "v"),
    "data": (VariancePreserving("cosine"), "data"),
    "per pixel": (VPPerPixel().for_shape(SHAPE), "v"),
    "quadratic": (QuadraticAccuracy(), "data"),
    "geometric": (GeometricAccuracy(0.02), "noise"),
    "inflation": (
        Inflation(duration=7.01, variances=torch.linspace(0.2, 3, SIZE).view(SHAPE)),
        "v",
    ),
}


def normal(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def signs(count, batch, seed=1):
    return normal(count, batch, *SHAPE, seed=seed).sign()


def all_units(batch):
    return torch.eye(SIZE, dtype=torch.float64).view(SIZE, 1, *SHAPE).repeat(1, batch, 1, 1, 1)


class Gaussian(nn.Module):
    """The exact prediction for data N(mean, covariance), linear in the state."""

    time_dtype = torch.float64

    def __init__(self, path, prediction):
        super().__init__()
        self.path, self.prediction = path, prediction
        root = normal(SIZE, SIZE, seed=5)
        self.covariance = root @ root.T / SIZE + 0.1 * torch.eye(SIZE).double()
        self.mean = normal(SIZE, seed=6)
        self.head = nn.Identity()

    def at(self, t):
        """alpha and sigma as vectors, and the gain of E[x_1 | x_t]."""
        c = self.path.coefficients(torch.as_tensor(t, dtype=torch.float64))
        a, s = (torch.broadcast_to(v, SHAPE).flatten().double() for v in (c.alpha, c.sigma))
        of_state = a[:, None] * self.covariance * a + (s**2).diag()
        return a, s, self.covariance * a @ torch.linalg.inv(of_state), c

    def truth(self, t):
        """Variance of x_1 given x_t, the same for every state."""
        a, _, gain, _ = self.at(t)
        return (self.covariance - gain @ (a[:, None] * self.covariance)).diagonal().view(SHAPE)

    def features(self, x, t, y=None):
        a, s, gain, c = self.at(t[0])
        data = (self.mean + (x.flatten(1) - a * self.mean) @ gain.T).view(x.shape)
        r, q = (v if v.numel() == 1 else v[None] for v in mix(self.prediction, c))
        return r * data + q * (x - a.view(SHAPE) * data) / s.view(SHAPE)

    def fold(self, output):
        return output


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("t", [0.25, 0.8])
def test_of_gaussian_data_it_is_the_posterior_covariance(name, t):
    """Exact with all dimensions in turn; tensors of coefficients too."""
    path, prediction = PATHS[name]
    net = Gaussian(path, prediction)
    field, x = Field(model_of(net, path, prediction), None, 2), normal(2, *SHAPE)
    got = data_variance(field, x, t, all_units(2)).sum(0)
    truth = net.truth(t)
    torch.testing.assert_close(got, truth.expand_as(got), rtol=1e-6, atol=1e-9)
    assert truth.min() > 0 and field.evaluations == 1 + SIZE


def test_the_straight_path_has_the_formula_of_the_paper():
    """(1 - t)^2 / t (I + (1 - t) J_v), J_v by autograd."""
    net, t = Gaussian(CondOT(), "velocity"), 0.4
    field, x = Field(model_of(net), None, 1), normal(1, *SHAPE)
    jacobian = torch.autograd.functional.jacobian(
        lambda state: net.features(state, torch.tensor([t])), x
    ).view(SIZE, SIZE)
    truth = (1 - t) ** 2 / t * (1 + (1 - t) * jacobian.diagonal())
    got = data_variance(field, x, t, all_units(1)).sum(0)
    torch.testing.assert_close(got.flatten(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_of_a_finite_set_it_is_the_weighted_variance(name):
    """Which reference a state came from: a sum over them, for every state another."""
    path, prediction = PATHS[name]
    references, t = normal(6, *SHAPE, seed=3), 0.4
    field = Field(exact_model(path, prediction, references), None, 3)
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    x = c.alpha * references[:3] + c.sigma * normal(3, *SHAPE, seed=4)
    away = ((x[:, None] - c.alpha * references) / c.sigma).flatten(2).square().sum(2)
    weights = torch.softmax(-away / 2, 1)
    mean = torch.einsum("bn,n...->b...", weights, references)
    truth = torch.einsum("bn,bn...->b...", weights, (references - mean[:, None]) ** 2)
    got = data_variance(field, x, t, all_units(3)).sum(0)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["straight", "per pixel"])
def test_probes_are_unbiased_with_the_variance_of_hutchinson(name):
    """sum over j != i of J_ij^2, of the matrix that they see."""
    path, prediction = PATHS[name]
    net, t, count = Gaussian(path, prediction), 0.4, 8000
    field, x = Field(model_of(net, path, prediction), None, 1), normal(1, *SHAPE)
    each = data_variance(field, x, t, signs(count, 1))[:, 0].flatten(1)
    a, s, gain, _ = net.at(t)
    seen = (s**2 / a)[:, None] * gain  # rows are scaled, which leaves the diagonal as it is
    spread = (seen.square().sum(1) - seen.diagonal().square()).sqrt()
    error = (each.mean(0) - net.truth(t).flatten()) / (spread / count**0.5)
    assert error.abs().max() < 4
    torch.testing.assert_close(each.std(0), spread, rtol=0.06, atol=0)


def test_the_default_time_is_where_data_and_noise_weigh_the_same():
    net, _ = small_unet()

    def time_of(solver, asked=None, path=CondOT(), prediction="velocity"):  # noqa: B008
        start = Start(model_of(net, path, prediction, 3), solver, None, None, CPU)
        return start.steps()[step_at(start, asked)].end

    assert time_of(Euler(10)) == pytest.approx(0.5) and time_of(Euler(3)) == pytest.approx(2 / 3)
    assert time_of(Euler(2)) == time_of(Euler(2), 0.9) == pytest.approx(0.5)  # the last with noise
    assert time_of(Euler(10), 0.71) == pytest.approx(0.8) and time_of(Euler(10), 0.7) < 0.71
    path = VariancePreserving("cosine")
    late = time_of(DDIM(50), path=path, prediction="v")
    c, before = (path.coefficients(torch.tensor(t)) for t in (late, late - 0.021))
    assert c.alpha >= c.sigma and before.alpha < before.sigma
    with pytest.raises(UserError) as error:
        time_of(Euler(1))
    check_line(str(error.value), ["num_steps=1", "take more steps"])


@torch.no_grad()
def test_samples_keep_all_else_and_count_what_it_takes():
    net, posterior = small_unet()
    ensemble = Ensemble(members=2, noise_members=0)
    for name, guided in (("euler", 1), ("euler-guided", 2), ("ddpm", 1)):
        plain = ensemble(real_start(net, name), posterior)
        found = with_data_variance(plain, real_start(net, name), 6, None, seed=0)
        assert torch.equal(found.images, plain.images)
        assert torch.equal(found.variance, plain.variance)
        assert found.aleatoric.shape == plain.images.shape
        # Two turns, of four and two probes, repeat the state's own evaluation.
        steps = 1 + step_at(real_start(net, name), None)
        assert found.nfe - plain.nfe == guided * (steps + 6 + 2)
        t = float(found.aleatoric_time)
        assert found.estimator == f"{plain.estimator}, aleatoric at t={t:.3g} with 6 probes"
        torch.testing.assert_close(found.total, found.variance + found.aleatoric)
        unit = found.in_unit_range()
        torch.testing.assert_close(unit.aleatoric, found.aleatoric / 4)
        torch.testing.assert_close(unit.in_model_range().aleatoric, found.aleatoric)
    assert plain.total is None and not data_variance_scores([plain])
    scores = data_variance_scores([plain, unit])
    trace = found.aleatoric.double().flatten(1).sum(1)
    torch.testing.assert_close(scores["aleatoric.data_variance"], trace)
    epistemic = found.variance.double().flatten(1).sum(1)
    torch.testing.assert_close(scores["total.sum"], trace + epistemic)


@torch.no_grad()
def test_estimates_do_not_depend_on_how_images_are_batched():
    """And are of the sample's own trajectory."""
    net = Gaussian(CondOT(), "velocity")
    model = model_of(net)

    def run(numbers, probes=3):
        start = Start(model, Euler(4), None, Double(SampleNoise(0, numbers, SHAPE)), CPU)
        blank = torch.zeros(len(numbers), *SHAPE)
        none = Samples(blank, blank, None, blank, blank, blank, blank, blank, 0, "none")
        return with_data_variance(none, start, probes, None, seed=2).aleatoric

    parts = torch.cat([run([0, 1]), run([2])])
    torch.testing.assert_close(parts, run([0, 1, 2]), rtol=1e-9, atol=0)
    assert not torch.allclose(run([0]), run([1]))
    exact = run([0], "all")
    torch.testing.assert_close(exact[0], net.truth(0.5), rtol=1e-6, atol=1e-9)


SMALL = ("uncertainty.aleatoric=2", "metrics.num_images=0")


def test_a_run_stores_and_records_it(copied: Trained, compose: Compose):
    before = dict(np.load(copied.samples))
    assert "aleatoric" not in before
    result = pipeline.run(compose(*SMALL))
    samples = dict(np.load(result.samples))
    assert np.array_equal(samples["variance"], before["variance"])
    assert samples["aleatoric"].shape == before["images"].shape
    assert float(samples["aleatoric_time"]) == pytest.approx(2 / 3)
    assert samples["nfe"] == before["nfe"] + 2 + 1 + 2
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert metrics["estimator"].endswith("aleatoric at t=0.667 with 2 probes")
    mean = samples["aleatoric"].reshape(4, -1).sum(1).mean()
    assert result.metrics["aleatoric/mean"] == pytest.approx(mean, rel=1e-5)
    assert result.metrics["aleatoric/negative_share"] == pytest.approx(
        (samples["aleatoric"] < 0).mean()
    )
    assert (result.folder / "figures" / "epistemic_and_aleatoric.png").is_file()
    # Options that ask for none leave the names of older files as they were.
    again = pipeline.run(compose("uncertainty.aleatoric=0", "uncertainty.aleatoric_time=null"))
    assert again.samples.name == copied.samples.name


def test_the_figure_has_one_scale_and_says_what_is_clamped():
    net, posterior = small_unet()
    with torch.no_grad():
        plain = Ensemble(members=2, noise_members=0)(real_start(net, "euler"), posterior)
        found = with_data_variance(plain, real_start(net, "euler"), 2, None, seed=0)
    figure = epistemic_and_aleatoric(found, ("a", "b", "c"))
    maps = [image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    assert len(maps) == 3 * 2 and len({image.get_clim() for image in maps}) == 1
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "negative" in words and "count as 0" in words and "t = 0.6" in words


@pytest.mark.parametrize(
    ("probes", "time", "fragments"),
    [
        (-1, None, ["uncertainty.aleatoric", ">= 0", "-1"]),
        ("many", None, ["uncertainty.aleatoric", "'many'", "all"]),
        (True, None, ["uncertainty.aleatoric", "True"]),
        (2, 1.0, ["uncertainty.aleatoric_time", "1.0", "null"]),
        (2, "late", ["uncertainty.aleatoric_time", "'late'"]),
        (2, True, ["uncertainty.aleatoric_time", "True"]),
    ],
)
def test_bad_values_are_refused(probes, time, fragments):
    with pytest.raises(UserError) as error:
        check_probes(probes, time)
    check_line(str(error.value), fragments)
    with pytest.raises(UserError):
        Ensemble(aleatoric=probes, aleatoric_time=time)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (("solver.num_steps=1",), ["uncertainty.aleatoric", "num_steps=1"]),
        (("space=rotation",), ["uncertainty.aleatoric", "decoded", "uncertainty.aleatoric=0"]),
        (
            ("model=bfn", "data=binary_digits", "model.likelihood.sampled=true"),
            ["uncertainty.aleatoric", "derivative"],
        ),
    ],
)
def test_runs_are_refused_in_one_line(overrides, fragments, compose: Compose):
    check_line(refused(compose, "uncertainty.aleatoric=2", *overrides), fragments)
