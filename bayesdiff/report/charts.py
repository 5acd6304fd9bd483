"""Curves, distributions and sweeps; each carries its conditions in its caption."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.layout import by_class, chart, map_conditions, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from bayesdiff.metrics.validation import Validation
    from bayesdiff.uncertainty.samples import Samples


def _spans_decades(values: np.ndarray) -> bool:
    """Whether all values are positive and the largest is 50 times the smallest or more."""
    return values.size > 1 and values.min() > 0 and values.max() >= 50 * values.min()


def _log_ticks(axis: "Axis", values: np.ndarray) -> None:
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
    if _spans_decades(positive) and not (summed < 0).any():
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, positive)
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
    log = _spans_decades(finite)
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    panels[0, 0].hist(finite, edges if high > low else 10)
    panels[0, 0].set(ylabel="samples", xscale="log" if log else "linear")
    if log:
        _log_ticks(panels[0, 0].xaxis, finite)
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
        _log_ticks(axes.xaxis, both)
        _log_ticks(axes.yaxis, both)
    return figure


def _number(value: Any) -> float | None:
    """Number a swept value or a metric stands for; None where it is none (a flag, a name)."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return None


def _text(value: Any) -> str:
    """A swept value as a label: ``10.0`` and ``10`` are the same value."""
    number = _number(value)
    return str(value) if number is None else f"{number:g}"


def _sorted_values(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[Any], bool]:
    """Distinct values of ``key`` and whether all are numbers; sorted then, else as they come."""
    values = list(dict.fromkeys(row[key] for row in rows if key in row))
    numeric = all(_number(value) is not None for value in values)
    return (sorted(values, key=float) if numeric else values), numeric


@style()
def sweep_figure(
    rows: Sequence[Mapping[str, Any]], swept_keys: Sequence[str], metrics: Sequence[str]
) -> "Figure":
    """Each metric (a row of panels) over each swept key (a column of panels).

    Args:
        rows: one dictionary per cell; a failed cell lacks its metrics.
        swept_keys: keys of ``rows`` with the swept values. Of two keys, the one that is not on
            the axis gives one line per value; with more, the line is the mean over the others.
        metrics: keys of ``rows`` to draw.
    """
    done = [row for row in rows if any(_finite(row.get(metric)) for metric in metrics)]
    caption = f"{len(done)} of {len(rows)} cells have a result; each point is a cell"
    caption += "; lines: mean over the other keys" if len(swept_keys) > 2 else ""
    size = (60 + 560 * len(swept_keys), 40 + 270 * len(metrics))
    shape = (len(metrics), len(swept_keys))
    title = "Sweep over " + ", ".join(swept_keys)
    figure, panels = chart(*size, title, caption, *shape, sharex="col", sharey="row")
    for column, key in enumerate(swept_keys):
        others = [other for other in swept_keys if other != key]
        lines = others[0] if len(others) == 1 else None
        for row, metric in enumerate(metrics):
            _sweep_panel(panels[row, column], done, key, lines, metric)
            panels[row, column].set_ylabel(metric if column == 0 else "")
        panels[-1, column].set_xlabel(key)
        if lines is not None and panels[0, column].lines:
            place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
            panels[0, column].legend(title=lines, title_fontsize=8, **place)
    return figure


def _finite(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    number = _number(value)
    return number is not None and bool(np.isfinite(number))


def _sweep_panel(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, lines: str | None, metric: str
) -> None:
    """Points of all cells and a line of means, one for each value of ``lines``."""
    values, numeric = _sorted_values(rows, key)
    at = {value: float(value) if numeric else float(i) for i, value in enumerate(values)}
    rows = [row for row in rows if key in row and _finite(row.get(metric))]
    for place, series in enumerate(_sorted_values(rows, lines)[0] if lines else [None]):
        cells = [row for row in rows if lines is None or row.get(lines) == series]
        points: dict[float, list[float]] = {}
        for row in cells:
            points.setdefault(at[row[key]], []).append(float(row[metric]))
        colour = f"C{place % 10}"
        spots = sorted(points)
        axes.plot(spots, [np.mean(points[x]) for x in spots], color=colour, label=_text(series))
        flat = [(x, y) for x in spots for y in points[x]]
        axes.plot(*zip(*flat, strict=True), "o", color=colour, markersize=4) if flat else None
    if numeric and _spans_decades(np.array(list(at.values()))):
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, np.array(list(at.values())))
    else:
        axes.set_xticks(list(at.values()), [_text(value) for value in values])
    shown = np.array([float(row[metric]) for row in rows])
    if _spans_decades(shown):
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, shown)
