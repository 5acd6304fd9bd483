"""Curves and distributions; each carries its conditions in its caption."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.layout import by_class, chart, map_conditions, style

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from bayesdiff.metrics.validation import Validation
    from bayesdiff.uncertainty.samples import Samples


def spans_decades(values: np.ndarray) -> bool:
    """Whether all values are positive and the largest is 50 times the smallest or more."""
    return values.size > 1 and values.min() > 0 and values.max() >= 50 * values.min()


def log_ticks(axis: "Axis", values: np.ndarray) -> None:
    """Plain numbers along a logarithmic axis: 1, 2, 5 over a few decades, else powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    short = values.max() < 1e3 * values.min()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


@style()
def summed_over_time(samples: "Samples", classes: Sequence[str]) -> "Figure":
    """Variance summed over channels and pixels after each step: mean and quartiles per class."""
    times, summed = samples.times.cpu().numpy(), samples.summed.detach().cpu().double().numpy()
    groups = by_class(samples.labels, summed.shape[1], classes)
    caption = f"{map_conditions(samples)}; line: mean of a class, band: its middle half."
    title = "Summed variance over time"
    figure, panels = chart(1000, 470, title, caption)
    axes = panels[0, 0]
    for place, (name, chosen) in enumerate(groups):
        colour = f"C{place}" if len(groups) <= 10 else _ramp(place, len(groups))
        low, high = np.nanquantile(summed[:, chosen], (0.25, 0.75), axis=1)
        axes.plot(times, np.nanmean(summed[:, chosen], axis=1), color=colour, label=name)
        axes.fill_between(
            times, low, high, color=colour, alpha=0.2 if len(groups) <= 3 else 0.08, linewidth=0
        )
    axes.set(xlabel="solver time t", ylabel="summed variance")
    positive = summed[np.isfinite(summed) & (summed > 0)]
    if spans_decades(positive) and not (summed < 0).any():
        axes.set_yscale("log")
        log_ticks(axes.yaxis, positive)
    # In the order of the lines at the end.
    lines = sorted(axes.lines, key=lambda line: -np.nan_to_num(line.get_ydata()[-1]))
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.margins(x=0.01)
    return figure


def _ramp(place: int, count: int) -> Any:
    """Colour ``place`` of ``count`` along an ordered colour map."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.95 * place / max(count - 1, 1))


@style()
def score_histogram(
    scores: Tensor, labels: Tensor | None, classes: Sequence[str], conditions: str = ""
) -> "Figure":
    """Distribution of the image scores, for all samples and, as box plots, for each class.

    Args:
        scores: ``(B,)`` uncertainty of each image.
        labels: ``(B,)`` or None.
        classes: class names.
        conditions: what made the scores, for the caption.
    """
    values = scores.detach().cpu().double().numpy()
    finite = values[np.isfinite(values)]
    groups = by_class(labels, len(values), classes) if labels is not None else []
    parts = [(name, values[i][np.isfinite(values[i])]) for name, i in groups if len(groups) > 1]
    parts = sorted((p for p in parts if p[1].size), key=lambda part: np.median(part[1]))
    broken = len(values) - len(finite)
    caption = (conditions or f"N {len(values)}") + (f"; {broken} not finite" if broken else "")
    caption += "; boxes: middle half and median, whiskers: 5 % to 95 %" if parts else ""
    title, room = "Uncertainty scores of the samples", 50 + 28 * len(parts)
    split: dict[str, Any] = {"height_ratios": (220, room), "sharex": True} if parts else {}
    size = (900, 330 + (room if parts else 0))
    figure, panels = chart(*size, title, caption, 2 if parts else 1, 1, **split)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    log = spans_decades(finite)
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    panels[0, 0].hist(finite, edges if high > low else 10)
    panels[0, 0].set(ylabel="samples", xscale="log" if log else "linear")
    if log:
        log_ticks(panels[0, 0].xaxis, finite)
    if parts:
        look = {"whis": (5, 95), "showfliers": False, "widths": 0.6, "orientation": "horizontal"}
        panels[1, 0].boxplot([v for _, v in parts], tick_labels=[n for n, _ in parts], **look)
        panels[1, 0].grid(False, axis="y")
    panels[-1, 0].set(xlabel="score")
    return figure


@style()
def validation_scatter(validation: "Validation", conditions: str = "") -> "Figure":
    """Summed variance of each image against that of the reference; on the line they are equal."""
    estimate, reference = (
        side.cpu().double().numpy() for side in (validation.estimate, validation.reference)
    )
    good = (estimate > 0) & (reference > 0) & np.isfinite(estimate * reference)
    hidden = len(good) - int(good.sum())
    caption = f"{len(good)} images; {conditions}".rstrip("; ")
    caption += f"; {hidden} without a positive variance are not shown" if hidden else ""
    figure, panels = chart(640, 520, "Summed variance against a reference", caption)
    axes = panels[0, 0]
    axes.set(xlabel="reference ensemble", ylabel="this estimator", xscale="log", yscale="log")
    if good.any():
        both = np.concatenate([estimate[good], reference[good]])
        ends = both.min() / 1.2, both.max() * 1.2
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.plot(reference[good], estimate[good], "o", markersize=4)
        log_ticks(axes.xaxis, both)
        log_ticks(axes.yaxis, both)
    return figure
