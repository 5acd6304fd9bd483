"""Figures of points that go to latents and back, a panel for each pair of coordinates."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import chart
from bayesdiff.report.points import body_size, left_out, limits_of, square, views_of
from bayesdiff.report.style import COLOURS, MAP_COLOURS, style
from bayesdiff.studies.inversion.results import squared_errors
from bayesdiff.studies.inversion.shown import Shown
from bayesdiff.studies.inversion.trip import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMES = 5  # clouds beside each other
_SHOWN = 3  # coordinates with a histogram


def every(shown: Shown) -> Iterator[tuple[str, "Figure"]]:
    """Those of points.

    Yields:
        Tag and figure.
    """
    yield "inversion/clouds", clouds(shown)
    yield "inversion/latents", latents(shown)
    yield "inversion/round_trip", round_trip(shown)
    if "latent_variance" in shown.rows:
        yield "inversion/weights", weights(shown)


@style()
def clouds(shown: Shown) -> "Figure":
    """Points at a few times there, and below at the nearest ones back."""
    ways = [shown.frames(way) for way in (0, 1)]
    there, back = (np.array(times) for times in shown.times)
    columns = evenly(len(there), _TIMES)
    frames = [(columns, ways[0]), ([int(abs(back - t).argmin()) for t in there[columns]], ways[1])]
    pairs = views_of(ways[0][0])
    caption = (
        f"{shown.start} Upper rows: from data, t = 1, to latents, t = 0; lower rows: from these "
        f"back, right to left. {shown.units} Points keep their colours"
        f"{left_out(ways[0][0])}. {shown.conditions}"
    )
    rows = 2 * len(pairs)
    size, shared = (176 * len(columns) + 40, 176 * rows + 46), {"sharex": True, "sharey": True}
    title = "Points on their way to latents and back"
    figure, panels = chart(*size, title, caption, rows, len(columns), **shared)
    ends = limits_of([view for _, way in frames for k in way for view in views_of(k)])
    for below, (places, states) in enumerate(frames):
        for column, place in enumerate(places):
            for row, view in enumerate(views_of(states[place])):
                panel = panels[below * len(pairs) + row, column]
                _scatter(panel, view, ends, c=shown.hues, s=4)
                panel.label_outer()
                panel.set(xlabel="", ylabel="")
    for panel, t in zip(panels[0], there[columns], strict=True):
        panel.set_title(f"t = {t:.3g}")
    for row, panel in enumerate(panels[:, 0]):
        way, (_, _, across, up) = "back" if row >= len(pairs) else "there", pairs[row % len(pairs)]
        panel.set_ylabel(f"{way}: {up} over {across}")
    return figure


def _scatter(axes: "Axes", view: tuple, ends: tuple[float, float], **how: Any) -> Any:
    x, y, across, up = view
    drawn = axes.scatter(x, y, linewidths=0, **how)
    square(axes, across, up, ends)
    return drawn


@style()
def latents(shown: Shown) -> "Figure":
    """Histograms of the first coordinates, and their pairs, beside the standard normal."""
    record = shown.record
    z = shown.rows["latents"].double()
    pairs, few = views_of(z), min(z.shape[1], _SHOWN)
    each = record["coordinates"]
    numbers = "; ".join(
        f"{k + 1}: mean {each['mean'][k]:.3f}, variance {each['variance'][k]:.3f}, excess "
        f"kurtosis {each['kurtosis'][k]:.3f}"
        for k in range(few)
    )
    caption = (
        f"Latents of {shown.start} Dashed: the standard normal density; circles: 1, 2 and 3 of "
        f"its standard deviations. {numbers}. Two standard errors of normal ones: mean "
        f"{2 / len(z) ** 0.5:.3f}, variance {2 * (2 / (len(z) - 1)) ** 0.5:.3f}, kurtosis "
        f"{2 * (24 / len(z)) ** 0.5:.3f}. Largest correlation {record['correlation_max']:.3f}"
        f"{left_out(z)}. {shown.conditions}"
    )
    columns = max(few, len(pairs))
    title = "Latents beside the normal distribution"
    figure, panels = chart(max(560, 290 * columns), 560, title, caption, 2, columns)
    for k in range(columns):
        panels[0, k].set_visible(k < few)
        panels[1, k].set_visible(k < len(pairs))
    for k in range(few):
        density(panels[0, k], z[:, k].numpy())
        panels[0, k].set(xlabel=f"$z_{k + 1}$", ylabel="density")
    for panel, (x, y, across, up) in zip(panels[1], pairs, strict=False):
        names = _latent(across), _latent(up)
        _scatter(panel, (x, y, *names), limits_of(pairs), c=shown.hues, s=6)
        if z.shape[1] > 1:
            _circles(panel)
    return figure


def _latent(name: str) -> str:
    return name.replace("$x_", "$z_")


def _circles(axes: "Axes") -> None:
    from matplotlib.patches import Circle

    for radius in (1, 2, 3):
        line: dict[str, Any] = {"fill": False, "color": "0.3", "linestyle": "--", "linewidth": 0.9}
        axes.add_patch(Circle((0, 0), radius, **line))


def density(axes: "Axes", values: np.ndarray, reach: float = 4.0) -> None:
    """A histogram, and the standard normal density as a dashed line."""
    from scipy.stats import norm

    x = np.linspace(-reach, reach, 201)
    bins = np.linspace(-reach, reach, 49).tolist()
    axes.hist(values, bins, density=True, color=COLOURS[0], alpha=0.6)
    axes.plot(x, norm.pdf(x), color="0.2", linestyle="--")


@style()
def round_trip(shown: Shown) -> "Figure":
    """Points as they were below those that came back, in the colour of their error."""
    rows, record = shown.rows, shown.record
    errors = squared_errors(rows).sqrt()
    caption = (
        f"{shown.start} Grey rings: points as they were; dots: as they came back, coloured by "
        f"their error, root mean square over coordinates (scale logarithmic). Mean squared error "
        f"{record['round_trip_mse']:.3g} [{record['round_trip_mse_low']:.3g}, "
        f"{record['round_trip_mse_high']:.3g}], median {record['round_trip_median']:.3g}, worst "
        f"{record['round_trip_worst']:.3g}; {record['conditions']['nfe']} network evaluations"
        f"{left_out(rows['data'])}. {shown.conditions}"
    )
    pairs = views_of(rows["returned"])
    width, height = body_size(pairs)
    figure, panels = chart(width + 70, height + 20, "Round trips", caption, 1, len(pairs))
    ends = limits_of([*views_of(rows["data"]), *pairs])
    level = errors.clamp(min=1e-12).log10().numpy()
    for panel, before, after in zip(panels[0], views_of(rows["data"]), pairs, strict=True):
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "0.75", "s": 26}
        panel.scatter(before[0], before[1], linewidths=0.7, **ring)
        drawn = _scatter(panel, after, ends, c=level, s=7, cmap=MAP_COLOURS)
    bar: dict[str, Any] = {"fraction": 0.15 / len(pairs), "label": "log10 of the error"}
    figure.colorbar(drawn, ax=list(panels[0]), **bar)
    return figure


@style()
def weights(shown: Shown) -> "Figure":
    """Latents, and the points reached from them, in the colour of their spread over heads."""
    rows, record = shown.rows, shown.record
    caption = (
        f"{shown.start} Upper: latents, coloured by their standard deviation over "
        f"{record['conditions']['members']} flows with heads drawn from the posterior; lower: "
        "points that the trained flow comes back to, coloured by that of what those flows reach "
        "from the same latents; root mean square over coordinates. All of them: "
        f"{record['latent_sd']:.3g} and {record['returned_sd']:.3g}; of the latents' variance "
        f"{record['weights_share']:.2%} is the weights'{left_out(rows['data'])}. "
        f"{shown.conditions}"
    )
    pairs = len(views_of(rows["latents"]))
    width, height = body_size(views_of(rows["latents"]))
    title = "What the weights change"
    figure, panels = chart(width + 70, 2 * height, title, caption, 2, pairs)
    shown_rows = (("latents", "latent_variance"), ("returned", "returned_variance"))
    for row, (where, variance) in enumerate(shown_rows):
        drawn = _spread(panels[row], rows[where], rows[variance])
        for panel in panels[row] if where == "latents" else ():
            panel.set(xlabel=_latent(panel.get_xlabel()), ylabel=_latent(panel.get_ylabel()))
        name = "sd of the latent" if where == "latents" else "sd of the point"
        bar: dict[str, Any] = {"fraction": 0.15 / pairs, "label": name}
        figure.colorbar(drawn, ax=list(panels[row]), **bar)
    return figure


def _spread(panels: np.ndarray, states: Tensor, variance: Tensor) -> Any:
    """A row of panels, the least certain points on top."""
    spread = variance.double().mean(1).sqrt()
    order = spread.argsort()
    pairs = views_of(states[order])
    how: dict[str, Any] = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": ceiling(spread.numpy())}
    for panel, view in zip(panels, pairs, strict=True):
        drawn = _scatter(panel, view, limits_of(pairs), c=torch.sort(spread)[0], s=10, **how)
    return drawn
