"""Do regions of the latent space hold what they should, on the way to the data and back?

A sphere of Mahalanobis radius r around 0 holds a known share of latents. Its image under the flow
is a region of the data, whose boundary the flow moves along with the points: an invertible map
keeps every point on its side. Points that change sides tell of steps that are too long, and the
share of held-out data inside of the region tells whether the model has the data's distribution.

Source: de Albuquerque and Pearson, "Inflationary Flows" (2024), where alpha shapes of points on
the boundary are compared; here it is a closed polygon or mesh whose vertices keep their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, positive, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.machine.ranks import rank
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver, decode, encode
from bayesdiff.solvers.encode import backward
from bayesdiff.studies.coverage import figures, geometry
from bayesdiff.studies.coverage.geometry import Boundary
from bayesdiff.studies.study import Place, Report, Study, check_unconditional, conditions
from bayesdiff.uncertainty import Estimator

_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class RegionCoverage(Study):
    """Which regions, and which points are counted in them.

    Args:
        radii: Mahalanobis radii of the spheres.
        points: latents that are drawn, and followed to the data and back.
        held_out: held-out data that are counted in the regions, the first so many; None for all.
        vertices: of a polygon in the plane.
        subdivisions: of an icosahedron in space, whose triangles are split in four so many times.
        seed: of the latents.

    Example:
        >>> study = RegionCoverage(radii=[1.0, 2.0])
        >>> spheres = geometry.spheres(
        ...     geometry.circle(study.vertices), torch.tensor(study.radii), torch.ones(2)
        ... )
        >>> geometry.normal_mass(spheres)  # nearly 1 - exp(-r^2 / 2), of normal points inside
        tensor([0.3934, 0.8646], dtype=torch.float64)
    """

    radii: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    points: int = 20000
    held_out: int | None = None
    vertices: int = 200
    subdivisions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        radii = listed("coverage.radii", self.radii, "[0.5,1,2]")
        for radius in radii:
            positive("coverage.radii", radius)
        at_least("coverage.points", self.points, 2)
        if self.held_out is not None:
            at_least("coverage.held_out", self.held_out, 2)
        at_least("coverage.vertices", self.vertices, 3)
        at_least("coverage.subdivisions", self.subdivisions, 0)
        seed_of("coverage.seed", self.seed)

    def check_data(self, data: ImageData, name: str) -> None:
        """Refuse data without closed boundaries that a few vertices make.

        Raises:
            UserError: for states of other than two or three coordinates.
        """
        if tuple(data.space.shape) not in ((2,), (3,)):
            raise UserError(
                f"{name} draws closed boundaries around points of 2 or 3 coordinates, states of "
                f"{data.name} are {tuple(data.space.shape)}; use data=circles, or leave {name} out"
            )

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what is no map.

        Raises:
            UserError: for a conditional model, or a solver or prediction without a way back.
        """  # noqa: DOC502 - raised one level down
        check_unconditional(run, "coverage is of one distribution")
        backward(solver, run.model.path, run.model.prediction)

    def made_from(self, at: Setup) -> list[Any]:
        """The network and the solver."""
        return [at.made_from]

    @torch.inference_mode()
    def make(self, at: Setup, place: Place) -> Report | None:
        """Points and boundaries to the data and back; small enough for one process."""
        if rank():
            return None
        size = at.run.data.space.shape[0]
        unit = (
            geometry.circle(self.vertices) if size == 2 else geometry.icosphere(self.subdivisions)
        )
        radii = torch.tensor(list(self.radii), dtype=torch.float64)
        boundary = geometry.spheres(unit, radii, torch.ones(size))
        generator = torch.Generator().manual_seed(self.seed)
        latents = torch.randn(self.points, size, generator=generator)
        moved = self._moved(at, latents, boundary)
        held_out = at.run.data.data.test_images[: self.held_out]
        data = torch.cat([at.run.data.space.encode(part) for part in held_out.split(_AT_ONCE)])
        results = results_of(boundary, radii, latents, moved, data)
        results["conditions"] = {
            "points": self.points, "held_out": len(data), "vertices": unit.vertices.shape[-2],
            "solver": at.solver.name, "seed": self.seed,
        }  # fmt: skip
        made_of = conditions({k: v for k, v in at.settings.items() if k != "uncertainty.name"})
        headlines = {name: results[name] for name in HEADLINES}
        return Report(
            results,
            figures.every(results, boundary, latents, moved, data, made_of),
            {"table.md": table.markdown(results["rows"])},
            scalars=headlines,
            headlines=headlines,
        )

    def _moved(self, at: Setup, latents: Tensor, boundary: Boundary) -> "Moved":
        # A last prediction is no way back.
        model, device = at.run.model, at.run.device
        solver = replace(at.solver, denoise=False)

        def follow(function: Any, x: Tensor) -> Tensor:
            parts = x.float().split(_AT_ONCE)
            return torch.cat([function(model, solver, part.to(device)).cpu() for part in parts])

        edge = boundary.vertices.flatten(0, -2)
        there, there_edge = follow(decode, latents), follow(decode, edge)
        again, again_edge = follow(encode, there), follow(encode, there_edge)
        shape = boundary.vertices.shape
        return Moved(
            there, boundary.at(there_edge.view(shape)), again, boundary.at(again_edge.view(shape))
        )


HEADLINES = ("coverage_error", "held_out_error", "changed_sides")


@dataclass(frozen=True)
class Moved:
    """Latents and boundaries in the data, and back in the latent space.

    Attributes:
        data: states ``(N, D)``.
        boundary: of states, ``(R, V, D)``.
        again: latents of the states, ``(N, D)``.
        boundary_again: of those, ``(R, V, D)``.
    """

    data: Tensor
    boundary: Boundary
    again: Tensor
    boundary_again: Boundary


def results_of(
    boundary: Boundary, radii: Tensor, latents: Tensor, moved: Moved, held_out: Tensor
) -> dict[str, Any]:
    """Coverage at every radius.

    Args:
        boundary: of the latents, ``(R, V, D)``.
        radii: ``(R,)``.
        latents: ``(N, D)``.
        moved: where both went.
        held_out: states of data that the model has not seen, ``(M, D)``.

    Returns:
        ``rows``: for every radius the ``nominal`` share of the closed boundary (``ball`` of the
        sphere around it), the shares of the drawn points inside in ``latent`` space, in the
        ``data`` and after the ``round_trip``, how many ``entered`` and ``left`` on the way to the
        data and how many ``changed_back``, and the share ``held_out`` of held-out data, with
        binomial standard errors; ``coverage_error``: largest distance of ``data`` from
        ``nominal``; ``held_out_error``: that of the held-out data; ``changed_sides``: points that
        change sides on the way to the data, summed over radii.
    """
    before = geometry.inside(latents, boundary)
    there = geometry.coverage(before, geometry.inside(moved.data, moved.boundary))
    back = geometry.coverage(before, geometry.inside(moved.again, moved.boundary_again))
    own = geometry.inside(held_out, moved.boundary)
    of_data = geometry.coverage(own, own)
    columns = {
        "radius": radii,
        "nominal": geometry.normal_mass(boundary),
        "ball": geometry.ball_mass(radii, latents.shape[1]),
        "latent": there.before,
        "data": there.after,
        "data_error": there.standard_error,
        "entered": there.entered,
        "left": there.left,
        "round_trip": back.after,
        "changed_back": back.entered + back.left,
        "held_out": of_data.after,
        "held_out_error": of_data.standard_error,
    }
    names = list(columns)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    nominal = columns["nominal"]
    return {
        "rows": [dict(zip(names, row, strict=True)) for row in values],
        "coverage_error": float((there.after - nominal).abs().max()),
        "held_out_error": float((of_data.after - nominal).abs().max()),
        "changed_sides": int((there.entered + there.left).sum()),
    }
