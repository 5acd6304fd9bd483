"""Closed boundaries in the plane and in space, and which points lie inside them.

A boundary keeps the order of its vertices, so that it stays the same closed curve or surface when
a flow moves them: spheres of the latent space become boundaries of regions of the data space, and
whether such a region holds as much as its sphere is what a calibrated flow is asked.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least

# Pairs of a point and a face at once: 32 MiB for each of the few intermediate matrices.
_PAIRS = 1 << 22
# Gauss-Legendre nodes per side of a face; faces are small against the scale of a normal.
_NODES = 8


@dataclass(frozen=True)
class Boundary:
    """One closed polygon or triangle mesh, or several with the same faces.

    Attributes:
        vertices: ``(..., V, D)`` float64, D of 2 or 3; leading axes are boundaries.
        faces: ``(F, D)`` int64: edges counter-clockwise, or triangles whose normals point outward.
    """

    vertices: Tensor
    faces: Tensor

    def __post_init__(self) -> None:
        dimension = self.vertices.shape[-1]
        if dimension not in (2, 3) or self.faces.shape[-1] != dimension:
            shapes = f"{tuple(self.vertices.shape)} and {tuple(self.faces.shape)}"
            raise UserError(f"a boundary has 2 or 3 dimensions, got vertices and faces {shapes}")

    def at(self, vertices: Tensor) -> "Boundary":
        """Its vertices elsewhere, in the same order."""
        return replace(self, vertices=vertices.double())

    def scaled(self, factors: Tensor) -> "Boundary":
        """Every coordinate times its factor, ``(D,)`` or ``(..., 1, D)``."""
        return self.at(self.vertices * factors.double())


def circle(count: int = 200) -> Boundary:
    """The regular polygon of ``count`` vertices on the unit circle."""
    at_least("the number of vertices", count, 3)
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    order = torch.arange(count)
    edges = torch.stack([order, order.roll(-1)], 1)
    return Boundary(torch.stack([angles.cos(), angles.sin()], 1), edges)


def icosphere(subdivisions: int = 3) -> Boundary:
    """An icosahedron on the unit sphere, each triangle split in four so many times.

    Has 20 * 4**subdivisions triangles: 1280 of 642 vertices after 3.
    """
    at_least("the number of subdivisions", subdivisions, 0)
    vertices, faces = _icosahedron()
    for _ in range(subdivisions):
        vertices, faces = _split(vertices, faces)
    return Boundary(vertices, faces)


def spheres(unit: Boundary, radii: Tensor, scales: Tensor) -> Boundary:
    """Ellipsoids of all points at Mahalanobis distance ``radii`` from 0.

    Args:
        unit: ``circle()`` or ``icosphere()``.
        radii: ``(R,)``.
        scales: standard deviations of the latent coordinates, ``(D,)``.

    Returns:
        Vertices ``(R, V, D)``.
    """
    return unit.scaled(radii.double()[:, None, None] * scales.double())


def ball_mass(radius: Tensor, dimension: int) -> Tensor:
    """Probability that a standard normal of ``dimension`` coordinates lies within ``radius``."""
    half = torch.tensor(dimension / 2, dtype=torch.float64, device=radius.device)
    return torch.special.gammainc(half, radius.double().square() / 2)


def normal_mass(boundary: Boundary) -> Tensor:
    """Probability of a standard normal inside each boundary, ``(...)``.

    By the divergence theorem: with F the probability of the ball of radius |p| and S the area of
    the unit sphere, the field p F / (S |p|^D) has the density as its divergence, so its flux is
    what the boundary holds. Exact up to quadrature for any closed polygon or mesh; an inscribed
    polygon holds less than its circle, and this says how much. Regions that are wound around
    twice count twice, and a boundary that points inward counts negatively.
    """
    corners = boundary.vertices.double()[..., boundary.faces, :]
    dimension = corners.shape[-1]
    places, weights = _quadrature(dimension, corners.device)
    points = torch.einsum("qc,...fcd->...fqd", places, corners)
    first, *others = corners.unbind(-2)
    # An edge's length, and twice a triangle's area: weights sum to 1 and to 1/2.
    if dimension == 2:
        edge = others[0] - first
        normal = torch.stack([edge[..., 1], -edge[..., 0]], -1)
    else:
        normal = torch.linalg.cross(others[0] - first, others[1] - first)
    distance = points.norm(dim=-1)
    sphere = 2 * math.pi ** (dimension / 2) / math.gamma(dimension / 2)
    # Near 0 the ratio tends to the density there; no node of a boundary needs it more exactly.
    near = distance < 1e-8
    ratio = ball_mass(distance, dimension) / distance.masked_fill(near, 1.0) ** dimension / sphere
    ratio = ratio.masked_fill(near, (2 * math.pi) ** (-dimension / 2) / dimension)
    flux = (points @ normal[..., None])[..., 0] * ratio
    return (flux * weights).sum((-1, -2))


def winding_number(points: Tensor, boundary: Boundary) -> Tensor:
    """How often one boundary winds around points, ``(N, D) -> (N,)`` float64.

    Whole numbers away from the boundary: 1 inside, 0 outside, -1 inside one that points inward.
    In the plane by crossings, in space by solid angles (van Oosterom and Strackee 1983).

    Raises:
        UserError: for several boundaries.
    """
    if boundary.vertices.ndim != 2:
        shape = tuple(boundary.vertices.shape)
        raise UserError(f"winding numbers are those of one boundary (V, D), got {shape}")
    rows = max(1, _PAIRS // len(boundary.faces))
    around = _crossings if points.shape[-1] == 2 else _solid_angles
    vertices = boundary.vertices.double()
    parts = [around(p, vertices, boundary.faces) for p in points.double().split(rows)]
    return torch.cat(parts) if parts else points.new_zeros(0, dtype=torch.float64)


def inside(points: Tensor, boundary: Boundary) -> Tensor:
    """Which points lie inside which boundaries, ``(..., N)`` bool; orientation does not matter.

    Points without finite coordinates are outside.

    Args:
        points: ``(N, D)``.
        boundary: with vertices ``(..., V, D)``.

    Raises:
        UserError: for vertices that are not finite, which enclose nothing.
    """
    if not boundary.vertices.isfinite().all():
        raise UserError("a boundary has vertices that are not finite: the flow diverged")
    lead = boundary.vertices.shape[:-2]
    rows = boundary.vertices.reshape(-1, *boundary.vertices.shape[-2:])
    found = [_inside_one(points.double(), boundary.at(vertices)) for vertices in rows]
    return torch.stack(found).reshape(*lead, len(points))


@dataclass(frozen=True)
class Coverage:
    """How many points lie inside before and after a map, and which of them change sides.

    Attributes:
        before: share inside, ``(...)``.
        after: share inside after the map, ``(...)``.
        entered: number of points that were outside and are inside, ``(...)``.
        left: number of points that were inside and are outside, ``(...)``.
        points: number of points.
    """

    before: Tensor
    after: Tensor
    entered: Tensor
    left: Tensor
    points: int

    @property
    def standard_error(self) -> Tensor:
        """Of ``after``: binomial, over draws of the points."""
        return (self.after * (1 - self.after) / self.points).sqrt()

    @property
    def change_error(self) -> Tensor:
        """Standard error of ``after - before``, whose points are the same: far below either's."""
        change = (self.entered - self.left) / self.points
        moved = (self.entered + self.left) / self.points
        return ((moved - change.square()).clamp(min=0) / self.points).sqrt()


def coverage(before: Tensor, after: Tensor) -> Coverage:
    """Compare flags ``(..., N)`` of points before and after a map.

    Raises:
        UserError: for flags of different points.
    """
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)} and {tuple(after.shape)}"
        raise UserError(f"flags before and after must be of the same points, got {shapes}")
    entered, left = (~before & after).sum(-1), (before & ~after).sum(-1)
    shares = before.double().mean(-1), after.double().mean(-1)
    return Coverage(*shares, entered, left, before.shape[-1])


def _inside_one(points: Tensor, boundary: Boundary) -> Tensor:
    low, high = boundary.vertices.amin(0), boundary.vertices.amax(0)
    half = ((high - low) / 2).clamp(min=torch.finfo(torch.float64).tiny)
    middle = (low + high) / 2
    # In its own box, so that flat and distant boundaries lose no digits.
    points = (points - middle) / half
    near = (points.abs() <= 1).all(-1)
    flags = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    boxed = boundary.at((boundary.vertices - middle) / half)
    flags[near] = winding_number(points[near], boxed).abs() > 0.5
    return flags


def _crossings(points: Tensor, vertices: Tensor, edges: Tensor) -> Tensor:
    start, end = vertices[edges[:, 0]], vertices[edges[:, 1]]
    x, y = points[:, :1], points[:, 1:]
    edge = end - start
    side = edge[:, 0] * (y - start[:, 1]) - (x - start[:, 0]) * edge[:, 1]
    above_start, above_end = y >= start[:, 1], y >= end[:, 1]
    up = above_start & ~above_end & (side > 0)
    down = ~above_start & above_end & (side < 0)
    return (up.sum(1) - down.sum(1)).double()


def _solid_angles(points: Tensor, vertices: Tensor, triangles: Tensor) -> Tensor:
    middle = vertices.mean(0)
    points, vertices = points - middle, vertices - middle
    first, second, third = (vertices[triangles[:, corner]] for corner in range(3))
    # det(a - p, b - p, c - p) is affine in p, and dot products follow from distances.
    normals = torch.linalg.cross(second - first, third - first)
    determinant = (first * normals).sum(1) - points @ normals.T
    exact = "donot_use_mm_for_euclid_dist"
    away = torch.cdist(points, vertices, compute_mode=exact)
    a, b, c = (away[:, triangles[:, corner]] for corner in range(3))
    ab, bc, ca = (
        (one.square() + other.square() - side.square().sum(1)) / 2
        for one, other, side in (
            (a, b, first - second),
            (b, c, second - third),
            (c, a, third - first),
        )
    )
    angle = 2 * torch.atan2(determinant, a * b * c + ab * c + bc * a + ca * b)
    return angle.sum(1) / (4 * math.pi)


def _quadrature(dimension: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Barycentric places ``(Q, D)`` and weights ``(Q,)`` on an edge or a triangle."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    u, w = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    if dimension == 2:
        places = torch.stack([1 - u, u], 1)
    else:
        # The square folded onto the triangle; its Jacobian is 1 - u.
        second, third = u[:, None].expand(_NODES, _NODES), (1 - u)[:, None] * u
        places = torch.stack([1 - second - third, second, third], -1).reshape(-1, 3)
        w = (w[:, None] * w * (1 - u)[:, None]).reshape(-1)
    return places.to(device), w.to(device)


def _icosahedron() -> tuple[Tensor, Tensor]:
    golden = (1 + math.sqrt(5)) / 2
    signs = [(s, t) for s in (-1.0, 1.0) for t in (-golden, golden)]
    corners = [(0.0, s, t) for s, t in signs] + [(s, t, 0.0) for s, t in signs]
    corners += [(t, 0.0, s) for s, t in signs]
    vertices = torch.tensor(corners, dtype=torch.float64)
    joined = (torch.cdist(vertices, vertices) - 2).abs() < 1e-6
    triples = torch.combinations(torch.arange(12), 3)
    i, j, k = triples.unbind(1)
    faces = triples[joined[i, j] & joined[j, k] & joined[k, i]]
    outward = torch.linalg.det(vertices[faces]) > 0
    faces = torch.where(outward[:, None], faces, faces.flip(1))
    return vertices / vertices.norm(dim=1, keepdim=True), faces


def _split(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Every triangle in four, with the new vertices on the unit sphere."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
    unique, place = edges.unique(dim=0, return_inverse=True)
    middles = vertices[unique].sum(1)
    middles = middles / middles.norm(dim=1, keepdim=True)
    ab, bc, ca = (place + len(vertices)).view(3, -1)
    a, b, c = faces.unbind(1)
    corners = ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))
    split = torch.cat([torch.stack(corner, 1) for corner in corners])
    return torch.cat([vertices, middles]), split
