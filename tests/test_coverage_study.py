"""The study of regions that a flow carries to the data: shares, changes of side, bad input."""

import json

import pytest
import torch

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.studies.coverage import geometry
from bayesdiff.studies.coverage.coverage import Moved, RegionCoverage, results_of

RADII = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
UNITS = {2: geometry.circle(200), 3: geometry.icosphere(2)}
SMALL = [
    "data=circles", "model=inflation", "net=mlp", "experiment=coverage", "coverage.points=500",
    "coverage.held_out=200", "coverage.radii=[1,2]", "data.source.points=2000", "net.width=16",
    "data.source.test_points=300", "trainer.max_steps=2", "uncertainty=ensemble",
    "uncertainty.members=2", "uncertainty.num_images=4", "metrics.num_images=0",
    "report.pdf=false", "solver.num_steps=4",
]  # fmt: skip


_OF_POINTS = ("data.source", "net.width", "net=mlp")


def drawn(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("size", [2, 3])
def test_a_linear_map_keeps_every_side_and_data_of_its_law_have_the_nominal_share(size):
    latents = drawn(4000, size)
    boundary = geometry.spheres(UNITS[size], RADII, torch.ones(size))
    matrix = drawn(size, size, 1) + 2 * torch.eye(size)
    there = boundary.at(boundary.vertices @ matrix)
    moved = Moved(latents @ matrix, there, latents, boundary)
    found = results_of(boundary, RADII, latents, moved, drawn(4000, size, 2) @ matrix)
    assert found["changed_sides"] == 0
    assert all(row["changed_back"] == 0 for row in found["rows"])
    for row in found["rows"]:
        assert row["latent"] == row["data"] == row["round_trip"]
        for name in ("data", "held_out"):
            assert abs(row[name] - row["nominal"]) < 5 * row[f"{name}_error"]
        assert 0 < row["ball"] - row["nominal"] < 0.03


def test_other_data_and_points_that_slip_out_are_seen():
    latents = drawn(4000, 2)
    boundary = geometry.spheres(UNITS[2], RADII, torch.ones(2))
    slipped = latents.clone()
    inner = latents.norm(dim=1) < 0.4
    slipped[inner] = 10.0
    found = results_of(
        boundary, RADII, latents, Moved(slipped, boundary, latents, boundary), 2 * latents
    )
    count = int(inner.sum())
    assert [row["left"] for row in found["rows"]] == [count] * 3
    assert found["changed_sides"] == 3 * count and found["rows"][0]["entered"] == 0
    assert found["coverage_error"] == pytest.approx(count / 4000, abs=0.02)
    assert found["held_out_error"] > 0.3


def test_the_study_of_a_run(compose):
    result = pipeline.run(compose(*SMALL))
    (folder,) = result.studies
    found = json.loads((folder / "results.json").read_text())
    assert [row["radius"] for row in found["rows"]] == [1.0, 2.0]
    assert found["conditions"]["held_out"] == 200
    assert result.headlines["coverage/changed_sides"] == found["changed_sides"]
    assert {f.name for f in (folder / "figures").glob("*.png")} == {"curves.png", "regions.png"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("coverage.radii=[]", "coverage.radii must be a list such as"),
        ("coverage.radii=[0]", "coverage.radii"),
        ("coverage.points=1", "coverage.points"),
        ("coverage.vertices=2", "coverage.vertices"),
        ("data=digits", "closed boundaries around points of 2 or 3 coordinates"),
        ("solver=ddpm", "draws noise"),
        ("data.source.augment_to=4", r"states of circles are \(4,\)"),
    ],
)
def test_bad_input_is_refused_in_one_line(compose, override, message):
    key = override.partition("=")[0]
    words = [w for w in SMALL if not w.startswith(f"{key}=")]
    if override == "data=digits":
        words = [w for w in words if not w.startswith(_OF_POINTS)]
    with pytest.raises(Exception, match=message) as error:
        pipeline.run(compose(*words, override))
    assert len(explain(error.value).splitlines()) == 1


def test_conditional_models_are_refused(compose):
    words = [*SMALL, "data.source.labels=true", "model.num_classes=auto"]
    with pytest.raises(UserError, match="use model.num_classes=null"):
        pipeline.run(compose(*words))


def test_options_are_checked():
    with pytest.raises(UserError, match="coverage.held_out"):
        RegionCoverage(held_out=1)
