"""Toy data: exact moments, draws of a seed, embeddings, and whole runs on each of them."""

from functools import partial
from math import pi

import numpy as np
import pytest
import torch
from conftest import compose_list, smallest
from hydra.errors import HydraException
from hydra.utils import instantiate

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data import toys
from bayesdiff.data.points import PointData
from bayesdiff.report.points import PointFigures
from bayesdiff.report.style import caption_of, save
from bayesdiff.storage.artefacts import read_arrays

NAMES = ("circles", "sine2", "moons", "s_curve", "swirl", "alt_s_curve", "alt_swirl")
# Angle and width at the middles of equal shares: (points, angle, width) without noise.
SHARES = (np.arange(20_000) + 0.5) / 20_000
# Raw means and variances with noise, and eigenvalues once standardised, as published.
PUBLISHED = {
    "circles": ((0, 0), (0.3189, 0.3189), (1, 1)),
    "sine2": ((0, 0), (1 / 3, 0.05375), (1.148628, 0.851372)),
    "moons": ((0.5, 0.25), (0.7564, 0.25059), (1.444014, 0.555986)),
    "s_curve": ((0, 1, 0), (0.54, 0.37333, 1.96441), (1.103019, 1, 0.896981)),
    "swirl": ((2, 10.5, 0.21221), (45.427, 38.3125, 49.882), (1.09008, 1, 0.90992)),
    "alt_s_curve": ((0, 1, 0), (0.54, 0.37333, 1.96441), (1.103019, 0.896981, 0.25)),
    "alt_swirl": ((2, 10.5, 0.21221), (45.427, 38.3125, 49.882), (1.09008, 0.90992, 0.25)),
}
NOISE = {"circles": 0.08, "sine2": 0.15, "moons": 0.08, "s_curve": 0.2, "swirl": 1.25}


def toy_of(name: str) -> toys.Toy:
    return getattr(toys, name.upper())


def curve(name: str) -> np.ndarray:
    """The set without noise by a rule of midpoints, written down a second time."""
    u = SHARES
    if name == "circles":
        ring = np.stack([np.cos(2 * pi * u), np.sin(2 * pi * u)], 1)
        return np.concatenate([ring, ring / 2])
    if name == "sine2":
        return np.stack([2 * u - 1, np.sin(4 * pi * (2 * u - 1)) / 4], 1)
    if name == "moons":
        c, s = np.cos(pi * u), np.sin(pi * u)
        return np.concatenate([np.stack([c, s], 1), np.stack([1 - c, 0.5 - s], 1)])
    if name.endswith("s_curve"):
        t = 3 * pi * (u - 0.5)
        sheet = [np.sin(t), np.sign(t) * (np.cos(t) - 1)]
        width = 2 * u
    else:
        t = 1.5 * pi * (1 + 2 * u)
        sheet, width = [t * np.cos(t), t * np.sin(t)], 21 * u
    return np.stack([sheet[0], width, sheet[1]], 1)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_the_integrals_and_the_published_ones(name):
    toy, points = toy_of(name), curve(name)
    np.testing.assert_allclose(points.mean(0), toy.mean, atol=1e-7)
    np.testing.assert_allclose(points.var(0), toy.variance, rtol=1e-6)
    mean, variance, _ = PUBLISHED[name]
    noise = np.isin(np.arange(len(mean)), toy.noisy) * NOISE[name.removeprefix("alt_")] ** 2
    np.testing.assert_allclose(toy.mean, mean, atol=5e-6)
    np.testing.assert_allclose(np.array(toy.variance) + noise, variance, rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_large_draw_has_the_moments(name):
    """Within five standard errors of 200,000 points."""
    n = 200_000
    x = getattr(toys, name)(points=n, test_points=2).images.double()
    eigenvalues = PUBLISHED[name][2]
    variance = torch.ones(x.shape[1]).double()
    if name.startswith("alt_"):
        variance[1] = 0.25
    assert bool((x.mean(0).abs() < 5 * (variance / n).sqrt()).all())
    error = ((x.square() - variance).square().mean(0) / n).sqrt()
    assert bool(((x.square().mean(0) - variance).abs() < 5 * error).all())
    found = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    # Of an eigenvalue l of a normal: l sqrt(2 / n); these have thinner tails.
    expected = torch.tensor(eigenvalues).double()
    assert bool(((found - expected).abs() < 5 * expected * (2 / n) ** 0.5).all())


@pytest.mark.parametrize("name", NAMES)
def test_points_are_those_of_their_seed(name):
    make = partial(getattr(toys, name), test_points=50)
    data, again, other = make(points=50), make(points=50), make(points=50, seed=1)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(data.images, again.images) and data.name == name
    assert not bool((data.images == other.images).any())
    # Held-out points are others, and the same however many are trained on.
    assert torch.equal(data.test_images, make(points=60).test_images)
    assert float(torch.cdist(data.test_images, data.images).min()) > 0
    before = np.random.get_state()[1].copy()
    make(points=50, augment_to=5)
    assert np.array_equal(before, np.random.get_state()[1])


def test_more_noise_is_more_noise_and_still_standard():
    for noise in (0.01, 3.0):
        x = toys.sine2(noise, points=100_000).images.double()
        torch.testing.assert_close(x.var(0), torch.ones(2).double(), rtol=0.03, atol=0)
    raw = x * torch.tensor([1 / 3, 1 / 32 + 9]).double().sqrt()
    assert float(raw[:, 1].std()) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize(("name", "to"), [("moons", 2), ("moons", 7), ("alt_swirl", 8)])
def test_an_embedding_keeps_distances(name, to):
    make, few = getattr(toys, name), {"points": 40, "test_points": 10}
    own = make(**few).images.double()
    data = make(**few, augment_to=to)
    found = data.images.double()
    assert found.shape == (40, to) and data.space.shape == (to,)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(own, own), rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == own.shape[1]
    other = make(**few, augment_to=to, augment_seed=1)
    assert not torch.allclose(other.images, data.images)
    turn = toys.embedding(own.shape[1], to, 0)
    torch.testing.assert_close(turn.T @ turn, torch.eye(own.shape[1]).double())
    torch.testing.assert_close(found @ turn, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["circles", "moons"])
def test_parts_are_classes(name):
    data = getattr(toys, name)(labels=True, points=401)
    assert data.num_classes == 2 and data.labels.bincount().tolist() == [200, 201]
    kind = data.labels == 0
    if name == "circles":
        radius = data.images.norm(dim=1)
        assert float(radius[kind].min()) > float(radius[~kind].max())
    else:
        first, second = data.images[kind].mean(0), data.images[~kind].mean(0)
        assert first[0] < second[0] and first[1] > second[1]
    # Points are in random order: any first part has both classes, and all angles.
    assert 60 < int(kind[:200].sum()) < 140


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"noise": 0}, "noise must be positive"),
        ({"noise": float("nan")}, "noise must be positive and finite"),
        ({"noise": float("inf")}, "noise must be positive and finite"),
        ({"noise": "much"}, "noise must be a number"),
        ({"points": 1}, "points must be a whole number >= 2"),
        ({"points": 10.5}, "points must be a whole number"),
        ({"test_points": 1}, "test_points must be a whole number >= 2"),
        ({"augment_to": 2}, "augment_to=2 is fewer than the 3 dimensions of swirl"),
        ({"augment_to": 3.0}, "augment_to must be a whole number"),
        ({"augment_seed": -1}, "augment_seed"),
        ({"seed": -1}, "seed must be"),
        ({"labels": True}, "swirl has no classes"),
        ({"labels": "yes"}, "labels must be true or false"),
    ],
)
def test_wrong_options_are_one_line(asked, said):
    with pytest.raises(UserError, match=said) as error:
        toys.swirl(**asked)
    assert "\n" not in str(error.value)


def test_points_of_two_spaces_are_refused():
    with pytest.raises(UserError, match="of 2 dimensions and test points of 3"):
        PointData.of("p", torch.zeros(4, 2), None, torch.zeros(4, 3), None)
    with pytest.raises(UserError, match="shape"):
        PointData.of("p", torch.zeros(4, 0), None, torch.zeros(4, 0), None)


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_the_set(name):
    """Every option of the file is taken, and noise is that of the recipe."""
    cfg = compose_list([f"data={name}", "data.source.points=30", "data.source.test_points=10"])
    made = getattr(toys, name)(points=30, test_points=10)
    assert instantiate(cfg.data.source).fingerprint == made.fingerprint
    own = {"_target_", "noise"} | ({"labels"} if toy_of(name).classes else set())
    shared = set(toys.Options.__annotations__) - {"labels"}
    assert set(cfg.data.source) == own | shared


def small(folder, name, *more):
    """The smallest run on points."""
    own = ("net=mlp", "net.width=16", "net.blocks=1", "data.source.points=120")
    shape = ("data.source.test_points=40", "data.batch_size=32", "trainer.max_steps=2")
    given = [o for o in smallest(folder) if o != "net=tiny"]
    return [*given, f"data={name}", *own, *shape, *more]


@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_and_samples_every_set(name, tmp_path):
    result = pipeline.run(compose_list(small(tmp_path, name)))
    states = read_arrays(result.samples)["images"]
    assert states.shape == (4, len(PUBLISHED[name][0])) and bool(states.isfinite().all())
    assert result.metrics["sliced_wasserstein@12"] > 0


@pytest.mark.usefixtures("every_figure_drawn")
def test_figures_of_points_in_space_have_a_panel_for_each_pair(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path, **how):
        drawn[path.stem] = figure
        return save(figure, path, **how)

    monkeypatch.setattr("bayesdiff.report.figures.save", keep)
    more = ("data.source.augment_to=3", "data.source.labels=true")
    result = pipeline.run(compose_list(small(tmp_path, "circles", *more)))
    names = {path.stem for path in (result.folder / "figures").glob("*.png")}
    own = {"samples", "samples_by_variance", "summed_over_time", "scores", "evidence"}
    assert names == own == set(drawn)
    states = read_arrays(result.samples)["images"].double()
    by_variance = drawn["samples_by_variance"].axes[:3]
    order = read_arrays(result.samples)["variance"].double().mean(1).argsort()
    for axes, (i, j) in zip(by_variance, [(0, 1), (0, 2), (1, 2)], strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"$x_{i + 1}$", f"$x_{j + 1}$")
        shown = torch.from_numpy(np.asarray(axes.collections[0].get_offsets()))
        torch.testing.assert_close(shown, states[order][:, [i, j]])
        limits = [*axes.get_xlim(), *axes.get_ylim()]
        assert limits[:2] == limits[2:] == [*by_variance[0].get_xlim()]
    assert "coordinates" not in caption_of(drawn["samples"])
    assert not list(result.folder.parent.glob("plane-*"))


@pytest.mark.parametrize(("dimensions", "panels"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_points_of_any_dimensions_are_shown(dimensions, panels):
    figure = PointFigures().grid(torch.randn(9, dimensions), None, (), 0, "by hand")
    assert [len(axes.collections[0].get_offsets()) for axes in figure.axes] == [9] * panels
    assert ("3 of 5 coordinates" in caption_of(figure)) == (dimensions == 5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("experiment=filtering",), "filtering is about pictures"),
        (("data.flip=true",), "mirrors images"),
        (("net=unet28",), "net=mlp"),
        (("space=rotation",), "decodes images, and s_curve has none"),
        (("path=vp_per_pixel", "model=diffusion"), "pixel"),
        (("metrics=inception",), "looks at pictures"),
        (("data.source.augment_to=1",), "fewer than the 3 dimensions"),
        (("data.source.noise=-1",), "data.source.noise must be positive"),
    ],
)
def test_what_is_about_pictures_refuses_points_in_space(asked, said, tmp_path):
    overrides = [
        o for o in small(tmp_path, "s_curve") if "net" not in o or "net=" not in str(asked)
    ]
    with pytest.raises((UserError, HydraException), match=said):
        pipeline.prepare(compose_list([*overrides, *asked]))


@pytest.mark.parametrize("net", ["mlp", "tiny"])
def test_images_are_no_points(net, tmp_path):
    space = "+data.space._target_=bayesdiff.data.spaces.Points"
    overrides = [o for o in smallest(tmp_path) if o != "net=tiny"]
    with pytest.raises(UserError, match="holds points"):
        pipeline.prepare(compose_list([*overrides, f"net={net}", "data=digits", space]))
