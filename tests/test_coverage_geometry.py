"""Closed boundaries: what they hold, who is inside, and who changes sides."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.stats import norm

from bayesdiff.checks import UserError
from bayesdiff.studies.coverage import geometry
from bayesdiff.studies.coverage.geometry import (
    Boundary,
    ball_mass,
    circle,
    coverage,
    icosphere,
    inside,
    normal_mass,
    spheres,
    winding_number,
)

RADII = torch.linspace(0.5, 3.5, 7, dtype=torch.float64)
IN_BALL = {
    2: [0.1175, 0.3935, 0.6753, 0.8647, 0.9561, 0.9889, 0.9978],
    3: [0.0309, 0.1988, 0.4778, 0.7385, 0.8999, 0.9707, 0.9934],
}
UNIT = {2: circle(200), 3: icosphere(2)}
# A letter C: its hull holds points that it does not.
LETTER = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]


def normals(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def polygon(corners: list[tuple[float, float]]) -> Boundary:
    count = len(corners)
    edges = torch.tensor([(i, (i + 1) % count) for i in range(count)])
    return Boundary(torch.tensor(corners, dtype=torch.float64), edges)


def angle_sum(point: np.ndarray, vertices: np.ndarray) -> float:
    """Turns of the line of sight along a polygon, one edge after the other."""
    turns = 0.0
    for a, b in zip(vertices - point, np.roll(vertices, -1, 0) - point, strict=True):
        turns += math.atan2(a[0] * b[1] - a[1] * b[0], a @ b)
    return turns / (2 * math.pi)


def ray_count(point: np.ndarray, corners: np.ndarray) -> int:
    """Triangles that a ray meets on its way out, signed by the side it comes from."""
    ray, count = np.array([0.3127, 0.5391, 0.7823]), 0
    for a, b, c in corners:
        system = np.stack([b - a, c - a, -ray], 1)
        u, v, t = np.linalg.solve(system, point - a)
        if u >= 0 and v >= 0 and u + v <= 1 and t > 0:
            count += 1 if ray @ np.cross(b - a, c - a) > 0 else -1
    return count


@pytest.mark.parametrize("dimension", [2, 3])
def test_mass_of_balls(dimension):
    r = RADII
    closed = 1 - (-r.square() / 2).exp()
    if dimension == 3:
        closed = torch.erf(r / 2**0.5) - (2 / math.pi) ** 0.5 * r * (-r.square() / 2).exp()
    assert torch.allclose(ball_mass(r, dimension), closed, rtol=0, atol=1e-12)
    assert ball_mass(r, dimension).tolist() == pytest.approx(IN_BALL[dimension], abs=6e-5)


def test_mass_of_polygons_by_another_integral():
    area = 200 / (2 * math.pi) * math.sin(2 * math.pi / 200)
    tiny = torch.tensor([1e-3], dtype=torch.float64)
    share = normal_mass(spheres(circle(200), tiny, torch.ones(2))) / ball_mass(tiny, 2)
    assert float(share) == pytest.approx(area, abs=1e-7) == pytest.approx(0.999836, abs=1e-6)
    square = polygon([(-1, -0.5), (2, -0.5), (2, 0.7), (-1, 0.7)])
    sides = (norm.cdf(2) - norm.cdf(-1)) * (norm.cdf(0.7) - norm.cdf(-0.5))
    assert float(normal_mass(square)) == pytest.approx(sides, abs=1e-6)
    # Three bars of the letter, away from 0 and not convex.
    bars = [((0, 3), (0, 1)), ((0, 1), (1, 2)), ((0, 3), (2, 3))]
    letter = sum(np.diff(norm.cdf(x))[0] * np.diff(norm.cdf(y))[0] for x, y in bars)
    assert float(normal_mass(polygon(LETTER))) == pytest.approx(letter, abs=1e-6)


def test_mass_of_a_mesh_by_another_integral():
    # The tetrahedron x + y + z < 1.5 of the first octant.
    faces = torch.tensor([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)])
    corners = torch.cat([torch.zeros(1, 3), 1.5 * torch.eye(3)]).double()

    def column(y: float, x: float) -> float:
        return norm.pdf(x) * norm.pdf(y) * (norm.cdf(1.5 - x - y) - 0.5)

    exact = dblquad(column, 0, 1.5, 0, lambda x: 1.5 - x, epsabs=1e-8)[0]
    assert float(normal_mass(Boundary(corners, faces))) == pytest.approx(exact, abs=1e-6)
    reverse = Boundary(corners, faces.flip(1))
    assert float(normal_mass(reverse)) == pytest.approx(-exact, abs=1e-6)


@pytest.mark.parametrize("dimension", [2, 3])
def test_share_of_normal_points_inside(dimension):
    scales = torch.tensor([1.0, 0.01, 3.0], dtype=torch.float64)[:dimension]
    points = normals(20_000, dimension)
    flags = inside(points * scales, spheres(UNIT[dimension], RADII, scales))
    nominal = normal_mass(spheres(UNIT[dimension], RADII, torch.ones(dimension)))
    share = flags.double().mean(1)
    error = (nominal * (1 - nominal) / len(points)).sqrt()
    assert ((share - nominal).abs() < 5 * error).all()
    if dimension == 2:
        assert ((share - torch.tensor(IN_BALL[2])).abs() < 5 * error + 1e-4).all()
    # The chords of the mesh cut off what the nominal value knows to be missing.
    assert (nominal < ball_mass(RADII, dimension)).all()
    distance = points.norm(dim=1)
    assert not (flags & (distance > RADII[:, None])).any()
    assert flags[distance < 0.95 * RADII[:, None]].all()


def test_a_finer_mesh_holds_the_ball():
    coarse, fine = (
        ball_mass(RADII, 3) - normal_mass(spheres(icosphere(k), RADII, torch.ones(3)))
        for k in (1, 2)
    )
    assert ((coarse / fine).log2() - 2).abs().max() < 0.35  # second order in the edge
    assert fine.max() < 0.02


@pytest.mark.parametrize("dimension", [2, 3])
def test_linear_maps_move_no_point_across(dimension):
    points = normals(2000, dimension, 1)
    unit = spheres(UNIT[dimension], RADII[::2], torch.ones(dimension))
    matrix = normals(dimension, dimension, 2)
    matrix[0] *= 1e-4
    shift = 1e3 * normals(1, dimension, 3)
    before = inside(points, unit)
    after = inside(points @ matrix.T + shift, unit.at(unit.vertices @ matrix.T + shift))
    assert before.any() and not before.all()
    assert torch.equal(before, after)
    reflected = inside(points * -1, unit.at(unit.vertices * -1))
    assert torch.equal(before, reflected)


def test_winding_in_the_plane_against_angles():
    star = circle(40)
    radius = 1 + 0.6 * torch.cos(5 * torch.arange(40) * (2 * math.pi / 40))
    star = star.at(star.vertices * radius[:, None])
    twice = polygon(
        [(math.cos(4 * math.pi * k / 9), math.sin(4 * math.pi * k / 9)) for k in range(9)]
    )
    points = normals(150, 2, 4)
    for shape in (star, polygon(LETTER), twice, Boundary(star.vertices, star.faces.flip(1))):
        order = shape.vertices[shape.faces[:, 0]].numpy()
        if shape.faces[0, 0] > shape.faces[0, 1]:
            order = shape.vertices.flip(0).numpy()
        slow = [angle_sum(p, order) for p in points.numpy()]
        assert winding_number(points, shape).tolist() == pytest.approx(slow, abs=1e-9)
    assert set(winding_number(points, twice).tolist()) == {0.0, 1.0, 2.0}


def test_winding_in_space_against_rays():
    mesh = icosphere(1)
    # Dented until it is not star-shaped, then moved far away and stretched.
    bent = mesh.vertices.clone()
    bent[:, 2] += 1.2 * bent[:, 0].square()
    points = torch.cat([bent.mean(0) + 0.8 * normals(120, 3, 5), 1e5 * normals(4, 3, 6)])
    shape = mesh.at(bent)
    slow = [ray_count(p, bent[mesh.faces].numpy()) for p in points.numpy()]
    assert 20 < sum(slow) < 100
    fast = winding_number(points, shape)
    assert fast.tolist() == pytest.approx(slow, abs=1e-8)
    assert torch.equal(inside(points, shape), torch.tensor(slow) == 1)
    reverse = Boundary(bent, mesh.faces.flip(1))
    assert winding_number(points, reverse).tolist() == pytest.approx([-k for k in slow], abs=1e-8)
    assert torch.equal(inside(points, reverse), inside(points, shape))


def test_a_point_between_hull_and_polygon_is_outside():
    points = torch.tensor(
        [(2.0, 1.5), (0.5, 1.5), (2.0, 0.5), (2.0, 2.5), (-1.0, 1.5), (9e9, 1.5)]
    )
    assert inside(points, polygon(LETTER)).tolist() == [False, True, True, True, False, False]


def test_translated_and_scaled_spheres():
    centre, sphere = torch.tensor([5.0, -3.0, 2.0]).double(), icosphere(2)
    for size in (1e-3, 1.0, 50.0):
        shape = sphere.at(centre + size * sphere.vertices)
        directions = torch.nn.functional.normalize(normals(200, 3, 7), dim=1)
        distance = torch.linspace(0.01, 2, 200).double()[:, None]
        flags = inside(centre + size * distance * directions, shape)
        near = (distance[:, 0] < 0.95) | (distance[:, 0] > 1)
        assert torch.equal(flags[near], (distance[:, 0] < 1)[near])
    far = centre + torch.tensor([[1e12, 0, 0], [0, math.nan, 0], [math.inf, 0, 0]])
    assert not inside(far, sphere).any()


def test_icospheres_are_closed_and_point_outward():
    sphere = icosphere(2)
    assert sphere.faces.shape == (320, 3) and sphere.vertices.shape == (162, 3)
    assert torch.allclose(sphere.vertices.norm(dim=1), torch.ones(162).double())
    a, b, c = sphere.faces.unbind(1)
    directed = torch.cat([torch.stack(pair, 1) for pair in ((a, b), (b, c), (c, a))])
    edges, counts = directed.unique(dim=0, return_counts=True)
    # Every edge runs once each way.
    assert (counts == 1).all()
    assert {tuple(e) for e in edges.tolist()} == {tuple(e) for e in edges.flip(1).tolist()}
    assert (torch.linalg.det(sphere.vertices[sphere.faces]) > 0).all()


def test_chunks_change_nothing(monkeypatch):
    points = normals(500, 3, 8)
    whole = winding_number(points, icosphere(1))
    monkeypatch.setattr(geometry, "_PAIRS", 1000)
    assert torch.allclose(winding_number(points, icosphere(1)), whole, atol=1e-12)
    assert winding_number(points[:0], icosphere(1)).shape == (0,)


def test_points_that_change_sides_are_counted():
    before = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8]).bool()
    after = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 0], [1] * 8]).bool()
    both = coverage(before, after)
    assert both.before.tolist() == [3 / 8, 1] and both.after.tolist() == [4 / 8, 1]
    assert both.entered.tolist() == [2, 0] and both.left.tolist() == [1, 0]
    assert both.standard_error.tolist() == pytest.approx([math.sqrt(0.25 / 8), 0])
    change = after[0].double() - before[0].double()
    assert float(both.change_error[0]) == pytest.approx(float(change.std(correction=0) / 8**0.5))


def test_refusals_name_the_shapes():
    with pytest.raises(UserError, match=r"2 or 3 dimensions.*\(5, 4\)"):
        Boundary(torch.zeros(5, 4), torch.zeros(5, 4).long())
    with pytest.raises(UserError, match="the flow diverged"):
        inside(torch.zeros(1, 2), circle(3).at(torch.full((3, 2), math.nan)))
    with pytest.raises(UserError, match="same points"):
        coverage(torch.ones(3).bool(), torch.ones(4).bool())
    with pytest.raises(UserError, match=r"one boundary.*\(7, 200, 2\)"):
        winding_number(torch.zeros(1, 2), spheres(circle(200), RADII, torch.ones(2)))
