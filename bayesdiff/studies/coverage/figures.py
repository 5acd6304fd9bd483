"""Figures of the coverage of regions."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.report.layout import chart
from bayesdiff.report.style import COLOURS, style
from bayesdiff.studies.coverage.geometry import Boundary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.studies.coverage.coverage import Moved

_SHOWN = 1500  # points of a cloud


def every(
    results: Mapping[str, Any],
    boundary: Boundary,
    latents: Tensor,
    moved: "Moved",
    held_out: Tensor,
    conditions: str = "",
) -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        results: numbers.
        boundary: of the latents, ``(R, V, D)``.
        latents: ``(N, D)``.
        moved: where both went.
        held_out: states of data that the model has not seen, ``(M, D)``.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    yield "coverage/curves", curves(results, conditions)
    yield "coverage/regions", regions(results, boundary, latents, moved, held_out, conditions)


@style()
def curves(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Coverage against radius, and its distance from the nominal one."""
    rows = results["rows"]
    counts = results["conditions"]
    caption = (
        f"Share inside of spheres of Mahalanobis radius r and of what the flow makes of them: "
        f"{counts['points']} latents on their way to the data, {counts['held_out']} held-out "
        f"data. Bars: two binomial standard errors. {results['changed_sides']} changes of side in "
        f"all. {conditions}"
    )
    figure, panels = chart(900, 380, "Coverage of regions", caption, 1, 2)
    radius, nominal = ([row[name] for row in rows] for name in ("radius", "nominal"))
    panels[0, 0].plot(radius, nominal, color="0.3", label="nominal")
    panels[0, 1].axhline(0, color="0.3")
    for place, (name, error, label) in enumerate(_CURVES):
        shares = [row[name] for row in rows]
        bars = [2 * row[error] for row in rows] if error else None
        how: dict[str, Any] = {"fmt": "os^"[place], "color": COLOURS[place], "label": label}
        panels[0, 0].errorbar(radius, shares, bars, **how)
        off = [share - own for share, own in zip(shares, nominal, strict=True)]
        panels[0, 1].errorbar(radius, off, bars, linestyle="-", linewidth=0.8, **how)
    panels[0, 0].set(xlabel="radius r", ylabel="share inside", ylim=(0, 1.02))
    panels[0, 1].set(xlabel="radius r", ylabel="share inside less nominal")
    panels[0, 0].legend(loc="lower right")
    return figure


_CURVES = (
    ("latent", None, "latents drawn"),
    ("data", "data_error", "the same, in the data"),
    ("held_out", "held_out_error", "held-out data"),
)


@style()
def regions(
    results: Mapping[str, Any],
    boundary: Boundary,
    latents: Tensor,
    moved: "Moved",
    held_out: Tensor,
    conditions: str = "",
) -> "Figure":
    """Boundaries around points, in the latent space and in the data, by pairs of coordinates."""
    pairs = list(combinations(range(latents.shape[1]), 2))
    radii = [row["radius"] for row in results["rows"]]
    caption = (
        f"Boundaries of radius {', '.join(f'{r:g}' for r in radii)}: around latents, drawn from a "
        "standard normal (above), and what the flow makes of them around held-out data (below), "
        f"in states of the model. {conditions}"
    )
    size = 380
    title = "Regions that the flow carries along"
    figure, panels = chart(size * len(pairs), 2 * size, title, caption, 2, len(pairs))
    for row, (points, edges, name) in enumerate(
        ((latents, boundary, "latent"), (held_out, moved.boundary, "state"))
    ):
        for column, (i, j) in enumerate(pairs):
            panel, shown = panels[row, column], points[:_SHOWN]
            panel.scatter(shown[:, i], shown[:, j], s=2, color="0.7", linewidths=0)
            for number, vertices in enumerate(edges.vertices):
                lines = vertices[edges.faces][:, :, [i, j]] if len(pairs) > 1 else None
                colour = COLOURS[number % len(COLOURS)]
                if lines is None:
                    closed = vertices[[*range(len(vertices)), 0]]
                    panel.plot(closed[:, i], closed[:, j], color=colour, linewidth=0.9)
                else:
                    panel.scatter(vertices[:, i], vertices[:, j], s=1, color=colour, linewidths=0)
            panel.set(xlabel=f"{name} {i + 1}", ylabel=f"{name} {j + 1}", aspect="equal")
    return figure
