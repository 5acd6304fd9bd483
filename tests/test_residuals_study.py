"""The study of errors along trajectories: known errors, the paper's blind spot, bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.models.exact import ExactPrediction, exact_model
from bayesdiff.models.generative import GenerativeModel
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.paths.inflation import Inflation
from bayesdiff.solvers import DDIM, DPMSolverPP2M, Euler, Heun, decode
from bayesdiff.studies.residuals.predictions import (
    known_times,
    predicted,
    published_residuals,
    trajectory,
    trajectory_errors,
)
from bayesdiff.studies.residuals.residuals import ErrorsInTime
from bayesdiff.studies.residuals.summary import curves_of, half_width, summary_of

SMALL = [
    "data=circles", "model=inflation", "net=mlp", "experiment=residuals", "residuals.points=40",
    "residuals.references=100", "residuals.batch_size=16", "data.source.points=2000",
    "net.width=16", "data.source.test_points=300", "trainer.max_steps=2", "uncertainty=ensemble",
    "uncertainty.members=2", "uncertainty.num_images=4", "metrics.num_images=0",
    "report.pdf=false", "solver.num_steps=4",
]  # fmt: skip
_OF_POINTS = ("data.source", "net.width", "net=mlp")
P = Inflation(duration=7.01, variances=torch.tensor([2.0, 0.5], dtype=torch.float64))
PATHS = [
    (P, "v", Heun(6), 7),
    (CondOT(), "velocity", Euler(6), 6),
    (CondOT(), "noise", Euler(6), 5),  # the noise alone says nothing of the data
    (VariancePreserving("cosine"), "v", DDIM(6), 6),
    (VariancePreserving("linear"), "noise", DPMSolverPP2M(6), 6),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Off(ExactPrediction):
    """The exact prediction and an error: of each point of a batch, or new at every call."""

    offset: torch.Tensor | None = None
    noise: torch.Generator | None = None

    def features(self, x, t, y=None):
        exact = super().features(x, t, y)
        if self.noise is not None:
            return exact + torch.randn(x.shape, generator=self.noise).to(x)
        return exact if self.offset is None else exact + self.offset.to(x)


def model_off(path, references, **errors) -> GenerativeModel:
    net = _Off(path, "data", references)
    for name, value in errors.items():
        setattr(net, name, value)
    return GenerativeModel(net, path, "data", torch.optim.SGD).eval()


def errors_of(model, solver, references, starts, batch_size=64):
    others = drawn(len(references), 2, seed=9)
    exact = tuple(exact_model(model.path, "data", each.double()) for each in (references, others))
    return trajectory_errors(model, solver, exact, starts, batch_size)


@pytest.mark.parametrize("path, prediction, solver, count", PATHS)
def test_the_exact_network_has_no_error(path, prediction, solver, count):
    references = drawn(30, 2)
    model = exact_model(path, prediction, references.double())
    times = known_times(solver, path, prediction)
    assert len(times) == count and times == sorted(times)
    if prediction == "noise" and not float(path.coefficients(torch.zeros(())).alpha):
        return  # its first step is not finite
    starts = drawn(20, 2, seed=1).double()
    errors, floor = errors_of(model, solver, references, starts, batch_size=7)
    assert errors.shape == floor.shape == (count, 20, 2)
    assert errors.abs().max() < 1e-6 and floor.square().mean().sqrt() > 0.1
    found = summary_of(errors, times, least=1e-6)
    assert found["lag_1"] is found["persistent_share"] is found["correlation"] is None


def test_states_are_those_of_the_sampler():
    model = exact_model(P, "v", drawn(30, 2).double())
    starts = drawn(5, 2, seed=1).double()
    times, states = zip(*trajectory(model, Heun(6), starts), strict=True)
    assert list(times) == Heun(6).times(P) and states[0] is starts
    # The sampler ends with the mean of the data; the state keeps the path's scale.
    alpha = P.coefficients(torch.ones((), dtype=torch.float64)).alpha
    torch.testing.assert_close(states[-1] / alpha, decode(model, Heun(6), starts))


@pytest.mark.parametrize("path, solver", [(P, Euler(8)), (VariancePreserving("cosine"), DDIM(8))])
def test_an_error_that_stays_and_one_that_is_new_at_every_time(path, solver):
    references, starts = drawn(30, 2), drawn(60, 2, seed=1)
    times = known_times(solver, path, "data")
    offset = drawn(60, 2, seed=2)
    errors, _ = errors_of(model_off(path, references, offset=offset), solver, references, starts)
    torch.testing.assert_close(errors, offset.expand_as(errors), atol=1e-4, rtol=0)
    found = summary_of(errors, times)
    assert found["persistent_share"] == pytest.approx(1, abs=1e-4)
    assert found["lag_1"] == pytest.approx(1, abs=1e-4) and found["half_width"] is None
    assert np.allclose(found["correlation"], 1, atol=1e-4)
    noisy = model_off(path, references, noise=torch.Generator().manual_seed(3))
    starts = drawn(1000, 2, seed=1)
    errors, _ = errors_of(noisy, solver, references, starts)
    found = summary_of(errors, times)
    assert found["white_share"] == 1 / len(times)
    assert found["persistent_share"] == pytest.approx(1 / len(times), rel=0.1)
    assert abs(found["lag_1"]) < 0.05 and found["bias_share"] < 0.02
    assert found["half_width"] == pytest.approx((times[1] - times[0]) / 2, rel=0.1)


def test_an_error_that_all_points_share_is_bias_and_varies_not():
    errors = torch.full((4, 30, 2), 0.3) + 1e-8 * drawn(4, 30, 2)
    found = summary_of(errors, [0.0, 0.2, 0.4, 0.6], least=1e-6)
    assert found["bias_share"] == pytest.approx(1) and found["persistent_share"] is None
    assert found["rms"] == pytest.approx([0.3] * 4)
    none = {"rms": [0.1, 0.4, 0.5, 0.2], "correlation": None}
    rows = curves_of([0.0, 0.2, 0.4, 0.6], found, none, None, [[0.0, 0.5]] * 4)
    assert rows["above_floor"] == 2
    assert [row["published_exact"] for row in rows["rows"]] == [0.5] * 4


def test_numbers_of_errors_with_a_known_correlation():
    times = [0.0, 0.1, 0.3, 0.6]
    common, own = drawn(20000, 1), drawn(4, 20000, 1, seed=1)
    found = summary_of(3 * common + own, times)
    assert found["lag_1"] == pytest.approx(0.9, abs=0.01)
    assert found["persistent_share"] == pytest.approx(0.9 + 0.1 / 4, abs=0.01)
    assert found["rms"] == pytest.approx([10**0.5] * 4, rel=0.02)
    assert [row["lag"] for row in found["by_lag"]] == pytest.approx([0, 0.2, 0.4, 0.6])
    lags = [{"lag": 0.0, "correlation": 1.0}, {"lag": 0.2, "correlation": 0.9}]
    assert half_width(lags) is None
    assert half_width([*lags, {"lag": 0.6, "correlation": 0.1}]) == pytest.approx(0.4)


def test_independent_noise_on_clean_data_does_not_see_an_error_that_stays():
    """Along trajectories its correlation with the last time is 1, here that of no error at all."""
    solver, references = Euler(8), drawn(200, 2)
    times = known_times(solver, P, "data")
    off = model_off(P, references, offset=0.1 * drawn(60, 2, seed=2))
    errors, _ = errors_of(off, solver, references, drawn(60, 2, seed=1))
    exact = exact_model(P, "data", references.double())
    clean = references[:60]
    found = published_residuals(off, exact, times, clean, 64, 0)
    assert np.allclose(np.array(summary_of(errors, times)["correlation"])[:, -1], 1, atol=1e-3)
    seen, unseen = (np.array(summary_of(x, times)["correlation"])[:, -1] for x in found)
    assert abs(seen[:4]).max() < 0.3 and abs(unseen[:4]).max() < 0.3
    torch.testing.assert_close(found[0] - found[1], errors[:, :60], atol=1e-4, rtol=0)
    y = clean.double()
    torch.testing.assert_close(
        found[1][0].double(), predicted(exact, drawn(60, 2, seed=0).double(), 0.0) - y,
        atol=1e-2, rtol=0,
    )  # fmt: skip


class _Same(_Off):
    """A network that takes the state for the data."""

    def features(self, x, t, y=None):
        return x


def test_the_noise_on_clean_data_is_independent_over_times_and_of_the_paths_size():
    times = [0.0, 0.5, 0.9]
    clean = torch.zeros(3000, 2)
    model = GenerativeModel(_Same(CondOT(), "data", clean[:2]), CondOT(), "data", torch.optim.SGD)
    exact = exact_model(CondOT(), "data", clean[:2])
    found, none = published_residuals(model, exact, times, clean, 1000, 0)
    summary = summary_of(found, times)
    assert summary["rms"] == pytest.approx([1.0, 0.5, 0.1], rel=0.05)
    assert np.allclose(summary["correlation"], np.eye(3), atol=0.08) and not none.any()


def test_the_study_of_a_run(compose):
    result = pipeline.run(compose(*SMALL))
    (folder,) = result.studies
    found = json.loads((folder / "results.json").read_text())
    assert [row["time"] for row in found["rows"]] == [0, 0.25, 0.5, 0.75, 1]
    assert np.shape(found["correlation"]) == (5, 5)
    assert np.allclose(np.diag(found["correlation"]), 1)
    assert found["rows"][-1]["trajectory"] == pytest.approx(1)
    assert found["conditions"] == {
        "points": 40, "start": "latents", "references": 100, "clean": 40, "times": 5,
        "solver": "heun", "seed": 0,
    }  # fmt: skip
    share = result.headlines["residuals/persistent_share"]
    assert 0 < share == found["persistent_share"] <= 1
    made = {f.name for f in (folder / "figures").glob("*.png")}
    assert made == {"correlation.png", "by_lag.png", "rms.png"}
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert all("exact for these alone" in each["caption"] for each in captions.values())


def test_images_from_held_out_data(compose):
    words = [w for w in SMALL if not w.startswith((*_OF_POINTS, "data=", "model="))]
    images = ["data=digits", "model=flow", "model.num_classes=null", "residuals.start=held_out"]
    result = pipeline.run(compose(*images, *words, "residuals.points=6"))
    (folder,) = result.studies
    found = json.loads((folder / "results.json").read_text())
    assert [row["time"] for row in found["rows"]] == [0, 0.25, 0.5, 0.75]
    assert found["conditions"]["points"] == 6


@pytest.mark.parametrize(
    "override, message",
    [
        ("residuals.points=1", "residuals.points"),
        ("residuals.start=data", "unknown residuals.start 'data'"),
        ("residuals.references=1", "residuals.references"),
        ("residuals.batch_size=0", "residuals.batch_size"),
        ("solver=ddpm", "solver=ddpm draws noise"),
    ],
)
def test_bad_input_is_refused_in_one_line(compose, override, message):
    key = override.partition("=")[0]
    words = [w for w in SMALL if not w.startswith(f"{key}=")]
    with pytest.raises(Exception, match=message) as error:
        pipeline.prepare(compose(*words, override))
    assert len(explain(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["model=flow", "data=digits"], "use model.num_classes=null"),
        (["model=bfn", "data=digits", "data.binarise=dynamic"], "are beliefs; use"),
        (["model=flow", "data=digits", "model.num_classes=null", "solver.num_steps=1"],
         "leaves 1 time with noise"),
    ],
)  # fmt: skip
def test_models_without_an_exact_prediction_along_their_trajectories(compose, words, message):
    left = [w for w in SMALL if not w.startswith((*_OF_POINTS, "data=", "model="))]
    with pytest.raises(UserError, match=message) as error:
        pipeline.prepare(compose(*words[:2], *left, *words[2:]))
    assert len(explain(error.value).splitlines()) == 1


def test_options_and_too_few_data_are_refused():
    with pytest.raises(UserError, match=r"residuals\.seed"):
        ErrorsInTime(seed=-1)
    few = SimpleNamespace(name="few", images=torch.zeros(4, 2), test_images=torch.zeros(1, 2))
    ErrorsInTime().check_data(few, "residuals")
    with pytest.raises(UserError, match="2 held-out data or more, and few has 1"):
        ErrorsInTime(start="held_out").check_data(few, "residuals")
    few.images = torch.zeros(3, 2)
    with pytest.raises(UserError, match="residuals needs 4 training data or more"):
        ErrorsInTime().check_data(few, "residuals")
