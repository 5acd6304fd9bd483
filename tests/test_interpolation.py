"""Between two samples: the arc against formulas, the ends against the run's own samples."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from scipy import stats

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.report.pictures import Pictures
from bayesdiff.studies.interpolation import interpolation
from bayesdiff.studies.interpolation.interpolation import Interpolation, arc, results_of

SMALL = (
    "experiment=interpolation",
    "uncertainty.members=2",
    "interpolation.pairs=3",
    "interpolation.points=3",
    "interpolation.bootstrap=20",
)


def noises(count=5, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, size, generator=generator, dtype=torch.float64)


def test_the_arc_begins_and_ends_in_the_noises_and_turns_evenly():
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    for place in (0.0, 0.25, 0.5, 0.9, 1.0):
        x, y = arc(a, b, place)[0].tolist()
        assert math.degrees(math.atan2(y, x)) == pytest.approx(90 * place)
        assert math.hypot(x, y) == pytest.approx(1)
    single = a.float(), b.float()
    assert arc(*single, 0.3).dtype == torch.float32
    torch.testing.assert_close(arc(*single, 1.0), single[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("place", [0.25, 0.5, 0.8])
def test_noise_on_the_arc_is_standard_normal_in_law(place):
    """Of few values too, where keeping the ends' norms would show most."""
    a, b = noises(40_000, 1)
    assert stats.kstest(arc(a, b, place).flatten().numpy(), "norm").pvalue > 1e-3


def test_numbers_equal_slow_loops():
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(6, 5, 1, 2, 2, generator=generator, dtype=torch.float64)
    found = results_of(Interpolation(points=5, bootstrap=50), [(0, 1)] * 6, variance)
    sums = variance.sum((2, 3, 4)).tolist()
    rises = [sum(row[1:4]) / 3 - (row[0] + row[4]) / 2 for row in sums]
    assert found["rise"] == pytest.approx(sum(rises) / 6)
    assert found["rise_low"] < found["rise"] < found["rise_high"]
    ends = sum((row[0] + row[4]) / 2 for row in sums)
    assert found["rise_relative"] == pytest.approx(sum(rises) / ends)
    above = [row[2] > max(row[0], row[4]) for row in sums]
    assert found["highest_inside"] == pytest.approx(sum(above) / 6)
    assert [row["sum"] for row in found["curve"]] == pytest.approx(
        [sum(row[k] for row in sums) / 6 for k in range(5)]
    )


def test_pairs_are_neighbours_of_one_class():
    assert Interpolation(pairs=12).numbers(10)[:2] == [(0, 10), (1, 11)]
    assert Interpolation(pairs=12).numbers(10)[10:] == [(20, 30), (21, 31)]
    assert Interpolation(pairs=2).numbers(None) == [(0, 1), (2, 3)]
    assert Interpolation(pairs=[[3, 23]]).numbers(10) == [(3, 23)]
    with pytest.raises(UserError, match=r"\[\[3,4\]\] are of classes 3 and 4.*\[3,13\]"):
        Interpolation(pairs=[[3, 4]]).numbers(10)


@pytest.mark.parametrize(
    "options",
    [{"pairs": 0}, {"pairs": []}, {"pairs": [[1]]}, {"pairs": [[1, 1]]}, {"points": 2},
     {"points": 4}, {"pairs": [[1, -1]]}, {"bootstrap": 1}, {"seed": -1}, {"pairs": True}],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(UserError, match=f"interpolation.{next(iter(options))}") as caught:
        Interpolation(**options)
    assert "\n" not in str(caught.value)


def test_the_ends_are_the_samples_of_the_run(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    more = ["uncertainty.numbers=[0,10,1,11]", "uncertainty.batch_size=3"]
    result = pipeline.run(compose(*SMALL, *more))
    (folder,) = result.studies
    results = json.loads((folder / "results.json").read_text())
    assert results["conditions"]["pairs"] == [[0, 10], [1, 11], [2, 12]]
    with np.load(folder / "path.npz", allow_pickle=False) as arrays:
        images, variance = arrays["images"], arrays["variance"]
    with np.load(result.samples, allow_pickle=False) as own:
        for row, (pair, end) in enumerate([(0, 0), (0, 2), (1, 0), (1, 2)]):
            np.testing.assert_allclose(images[pair, end], own["images"][row], atol=1e-6)
            np.testing.assert_allclose(variance[pair, end], own["variance"][row], rtol=1e-4)
    assert np.abs(images[:, 1] - images[:, 0]).max() > 0.01
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        "images_and_maps", "sum_along",
    }  # fmt: skip
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert all("seed 0" in str(each).replace("\\xa0", " ") for each in captions.values())
    monkeypatch.setattr(interpolation, "made_rows", None)
    assert pipeline.run(compose(*SMALL, *more)).studies == (folder,)


def test_a_stochastic_solver_is_refused_before_any_work(compose: Compose):
    with pytest.raises(UserError, match=r"deterministic solver, solver=ddpm .* solver=ddim"):
        pipeline.prepare(compose(*SMALL, "model=diffusion", "solver=ddpm"))
