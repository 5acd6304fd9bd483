"""Points of any dimensions: the samples, and the samples in the colours of their variance."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.report.charts import score_histogram, summed_over_time
from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import chart, class_name, map_conditions
from bayesdiff.report.options import SUM, ReportOptions
from bayesdiff.report.style import COLOURS, MAP_COLOURS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.laplace.posterior import HeadPosterior
    from bayesdiff.report.pictures import Seen
    from bayesdiff.uncertainty import Estimator, Samples, Starts

_SHOWN = 3  # coordinates; each pair of them has a panel
UNITS = "points of sd 1"


class PointFigures:
    """Points as points: a panel for each pair of their first three coordinates."""

    measures = False

    def check(self, shown: ReportOptions) -> None:
        """Refuse what is about pictures.

        Raises:
            UserError: for any score but the summed variance, or an order of pictures.
        """
        if shown.chosen_by != SUM or shown.sorted_by:
            raise UserError(
                f"report.chosen_by={shown.chosen_by} and sorted_by={list(shown.sorted_by)} choose "
                f"among pictures, and points are all shown; leave them at {SUM} and []"
            )

    @style()
    def grid(
        self,
        states: Tensor,
        labels: Tensor | None,
        classes: Sequence[str],
        columns: int,
        conditions: str,
    ) -> "Figure":
        """Points ``(B, D)``, in the colours of their classes."""
        views = views_of(states)
        caption = f"{len(states)} samples, unselected{left_out(states)}; {conditions}."
        figure, panels = chart(*body_size(views), "Samples", caption, 1, len(views))
        kinds = np.zeros(len(states), int) if labels is None else labels.cpu().numpy()
        for axes, (x, y, across, up) in zip(panels[0], views, strict=True):
            for kind in np.unique(kinds):
                chosen, colour = kinds == kind, COLOURS[int(kind) % len(COLOURS)]
                name = None if labels is None else class_name(int(kind), classes)
                how: dict[str, Any] = {"s": 6, "color": colour, "linewidths": 0, "label": name}
                axes.scatter(x[chosen], y[chosen], **how)
            square(axes, across, up, limits_of(views))
        if labels is not None:
            named = panels[0, 0].get_legend_handles_labels()
            figure.legend(*named, loc="outside right upper", markerscale=3, handlelength=1)
        return figure

    def measure(
        self,
        starts: "Starts",
        estimator: "Estimator",
        posterior: "HeadPosterior",
        seen: "Samples",
        folder: Path,
    ) -> dict[str, Tensor]:
        """Nothing: figures show the samples alone."""
        return {}

    def every(self, seen: "Seen") -> Iterator[tuple[str, "Figure"]]:
        """The figures of a set of points.

        Yields:
            Tag and figure.
        """
        samples, classes, made = seen.samples, seen.classes, seen.conditions
        few = samples.images, samples.labels, classes, 0, made
        yield "samples/samples", self.grid(*few)
        yield "uncertainty/samples_by_variance", samples_by_variance(seen)
        over = samples, classes, seen.settings, UNITS
        yield "uncertainty/summed_over_time", summed_over_time(*over)
        histogram = seen.scores[SUM], samples.labels, classes, made, f"summed variance ({UNITS})"
        yield "uncertainty/scores", score_histogram(*histogram)


@style()
def samples_by_variance(seen: "Seen") -> "Figure":
    """Samples where they ended, in the colour of their standard deviation."""
    samples = seen.samples
    caption = (
        f"{len(samples.images)} samples where they ended{left_out(samples.images)}; colour: "
        "standard deviation of a sample, root of its variance's mean over all coordinates. "
        f"Conditions: {map_conditions(samples, seen.settings)}."
    )
    views = views_of(samples.images)
    width, height = body_size(views)
    title = "Samples and their uncertainty"
    figure, panels = chart(width + 110, height, title, caption, 1, len(views))
    spread = samples.variance.double().clamp(min=0).mean(1).sqrt().numpy()
    order = np.argsort(spread)  # the least certain on top
    how: dict[str, Any] = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": ceiling(spread)}
    how |= {"c": spread[order], "s": 14, "linewidths": 0}
    for axes, (x, y, across, up) in zip(panels[0], views, strict=True):
        drawn = axes.scatter(x[order], y[order], **how)
        square(axes, across, up, limits_of(views))
    bar: dict[str, Any] = {"fraction": 0.15 / len(views), "label": "standard deviation"}
    figure.colorbar(drawn, ax=list(panels[0]), **bar)
    return figure


def square(axes: "Axes", across: str, up: str, limits: tuple[float, float] | None = None) -> None:
    """Names of both coordinates, in one unit and between the same ends if they are given."""
    axes.set(xlabel=across, ylabel=up, aspect="equal")
    if limits:
        axes.set(xlim=limits, ylim=limits)


View = tuple[np.ndarray, np.ndarray, str, str]


def views_of(states: Tensor) -> list[View]:
    """Values and names along both axes of each panel."""
    x = states.detach().cpu().double().numpy().T
    if len(x) == 1:  # side by side, so that they can be told apart
        return [(x[0], np.linspace(-0.5, 0.5, x.shape[1]), "$x_1$", "place among the samples")]
    pairs = combinations(range(min(len(x), _SHOWN)), 2)
    return [(x[i], x[j], f"$x_{i + 1}$", f"$x_{j + 1}$") for i, j in pairs]


def limits_of(views: Sequence[View]) -> tuple[float, float]:
    """Ends of all axes, a little beyond the finite points."""
    values = np.concatenate([part for x, y, _, _ in views for part in (x, y)])
    values = np.append(values[np.isfinite(values)], (-1, 1))
    margin = 0.04 * float(np.ptp(values))
    return float(values.min()) - margin, float(values.max()) + margin


def body_size(views: Sequence[View]) -> tuple[int, int]:
    """Width and height of a figure's body in pixels."""
    return (560, 460) if len(views) == 1 else (380 * len(views), 370)


def left_out(states: Tensor) -> str:
    """A few words for a caption where points have more coordinates than are shown."""
    dimensions = states.shape[1]
    return f", {_SHOWN} of {dimensions} coordinates" if dimensions > _SHOWN else ""
