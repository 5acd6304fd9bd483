"""Each metric over each swept key, with intervals over seeds, or a cell's own."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.report.charts import log_ticks, spans_decades
from bayesdiff.report.layout import chart, fit
from bayesdiff.report.series import (
    SEED,
    Row,
    Values,
    axis_keys,
    depends,
    distinct,
    finite,
    plain_number,
    series,
    short_names,
    text_of,
)
from bayesdiff.report.style import look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_WIDTH = 300  # of a panel, pixels
_MARGIN = 0.05  # of an axis to either side of its values' middle, as a share of it
_LABEL = 150  # of a category's name at most, pixels


@style()
def sweep_figure(
    rows: Sequence[Row],
    swept_keys: Sequence[str],
    metrics: Sequence[str],
    over: str | None = None,
    conditions: str = "",
) -> "Figure":
    """One small panel for each metric over each swept key that it can depend on.

    Cells that differ in ``seed`` alone are one point: their mean, with Student's t interval. Each
    combination of the remaining keys has a line; where these are too many, the line is the mean.

    Args:
        rows: one dictionary per cell; a failed cell lacks its metrics.
        swept_keys: keys of ``rows`` with the swept values.
        metrics: keys of ``rows`` to draw.
        over: the only key on the axes; None for every one in turn.
        conditions: of all cells, for the caption.
    """
    done = [row for row in rows if any(finite(row.get(metric)) for metric in metrics)]
    keys = axis_keys(swept_keys) if over is None else [over]
    shown = {key: [m for m in metrics if depends(done, swept_keys, key, m)] for key in keys}
    # Where nothing depends on anything, that is what there is to see.
    shown = {k: m for k, m in shown.items() if m} or {keys[0]: list(metrics)}
    keys = list(shown)
    wide = min(max(map(len, shown.values())), _COLUMNS)
    talls = {key: math.ceil(len(names) / wide) for key, names in shown.items()}
    caption = " ".join(
        [
            f"{len(done)} of {len(rows)} cells have a result.",
            _reading(done, swept_keys, keys),
            _left_out(done, shown, metrics),
            f"Conditions: {conditions}." if conditions else "",
        ]
    )
    tall = sum(talls.values())
    size = 40 + _WIDTH * wide + 210 * (len(swept_keys) > 1), 20 + 270 * tall
    figure, panels = chart(*size, "Sweep over " + ", ".join(keys), caption, tall, wide)
    first = 0
    for key in keys:
        block = panels[first : first + talls[key]].ravel()
        first += talls[key]
        names, groups = series(done, swept_keys, key)
        for axes, metric in zip(block, shown[key], strict=False):
            _panel(axes, groups, key, metric, _places(done, key))
            axes.set_title(metric.replace("$", r"\$"))
            axes.set_xlabel(fit(key.rpartition(".")[2], _WIDTH).replace("$", r"\$"))
        for axes in block[len(shown[key]) :]:
            axes.axis("off")
        if len(groups) > 1:
            beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
            title = ",\n".join(short_names(names))
            block[wide - 1].legend(
                *block[0].get_legend_handles_labels(), title=title, title_fontsize=9, **beside
            )
    return figure


def _left_out(
    rows: Sequence[Row], shown: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> str:
    """Which panels are not there, and the value that they would show."""
    parts = []
    for key, names in shown.items():
        gone = [metric for metric in metrics if metric not in names]
        values = {
            metric: {f"{row[metric]:.4g}" for row in rows if finite(row.get(metric))}
            for metric in gone
        }
        said = [
            metric + (f" (always {next(iter(each))})" if len(each) == 1 else "")
            for metric, each in values.items()
            if each
        ]
        if said:
            parts.append(f"Not drawn, since they do not depend on {key}: {', '.join(said)}.")
    return " ".join(parts)


def _reading(rows: Sequence[Row], swept_keys: Sequence[str], keys: Sequence[str]) -> str:
    """How lines, points and bars are to be read."""
    text = "Each point is a cell; bars are its own 95 % interval where it has one."
    if SEED in swept_keys and SEED not in keys:
        seeds = len(distinct(rows, SEED))
        text = f"Faint points are cells, bars Student's t 95 % intervals over {seeds} seeds."
    if any(not names and len(swept_keys) > 1 + (SEED in swept_keys) for names in
           (series(rows, swept_keys, key)[0] for key in keys if key != SEED)):  # fmt: skip
        text += " Lines: mean over the other keys, which have too many combinations to tell apart."
    return text


def _places(rows: Sequence[Row], key: str) -> dict[Any, float]:
    """Where each value lies on the axis: numbers where they are, categories side by side."""
    values = distinct(rows, key)
    numeric = all(finite(value) for value in values)
    return {value: float(value) if numeric else float(i) for i, value in enumerate(values)}


def _panel(
    axes: "Axes",
    groups: Mapping[Values, Sequence[Row]],
    key: str,
    metric: str,
    places: Mapping[Any, float],
) -> None:
    """Lines of means, points of cells and bars over seeds, one colour for each group."""
    numeric = all(finite(value) for value in places)
    shown = []
    for number_of, (values, rows) in enumerate(groups.items()):
        rows = [row for row in rows if finite(row.get(metric)) and row.get(key) in places]
        # Categories have no line between them; side by side none hides another.
        shift = 0.0 if numeric else 0.5 * ((number_of + 0.5) / len(groups) - 0.5)
        points: dict[float, list[Row]] = {}
        for row in sorted(rows, key=lambda row: places[row[key]]):
            points.setdefault(places[row[key]] + shift, []).append(row)
        # Thick under thin: lines that coincide are all seen.
        width = 1 + 2 * (len(groups) - 1 - number_of) / max(len(groups) - 1, 1)
        label = ", ".join(fit(text_of(value), 180) for value in values)
        how = look(number_of) | {"linewidth": width, "markersize": 4 + width, "label": label}
        shown += _line(axes, points, key, metric, how if numeric else how | {"linestyle": "none"})
    _x_axis(axes, places, numeric)
    _y_axis(axes, np.array(shown))
    if not shown:
        axes.text(0.5, 0.5, "no values", ha="center", color="0.5", transform=axes.transAxes)


def _line(
    axes: "Axes",
    points: Mapping[float, Sequence[Row]],
    key: str,
    metric: str,
    how: Mapping[str, Any],
) -> list[float]:
    """Means, cells and bars of one group; returns every value that the axis must hold."""
    spots = list(points)
    values = [[float(row[metric]) for row in points[x]] for x in spots]
    means = [float(np.mean(each)) for each in values]
    axes.plot(spots, means, **how)
    flat = [(x, y) for x, each in zip(spots, values, strict=True) if len(each) > 1 for y in each]
    if flat:
        faint: dict[str, Any] = {"color": how["color"], "alpha": 0.35, "markersize": 3}
        axes.plot(*zip(*flat, strict=True), "o", **faint)
    ends = [_interval(points[x], mean, key, metric) for x, mean in zip(spots, means, strict=True)]
    known = [end for end in ends if end is not None]
    if known:
        bars = np.array([(m - e[0], e[1] - m) if e else (0, 0) for m, e in
                         zip(means, ends, strict=True)]).T  # fmt: skip
        look_of: dict[str, Any] = {"ecolor": how["color"], "elinewidth": 1, "capsize": 3}
        axes.errorbar(spots, means, bars.clip(min=0), fmt="none", **look_of)
    return [*means, *(y for _, y in flat), *(value for end in known for value in end)]


def _interval(
    rows: Sequence[Row], mean: float, key: str, metric: str
) -> tuple[float, float] | None:
    """Over seeds where several cells differ in nothing else, a single cell's own, or none."""
    if len(rows) > 1:
        if key == SEED or len({row.get(SEED) for row in rows}) < len(rows):
            return None
        return mean_interval([float(row[metric]) for row in rows])[1:]
    low, high = (rows[0].get(f"{metric}{end}") for end in ("_low", "_high"))
    return (float(low), float(high)) if finite(low) and finite(high) else None  # type: ignore


def _x_axis(axes: "Axes", places: Mapping[Any, float], numeric: bool) -> None:
    """Numbers, logarithmic where they span decades; categories with names that do not overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    at = np.array(list(places.values()))
    if not len(at):
        return
    if numeric and spans_decades(at):
        axes.set_xscale("log")
        log_ticks(axes.xaxis, at)
        if at.max() >= 1e3 * at.min():
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain_number(x)))
    elif numeric:
        gaps = np.diff(at) / (np.ptp(at) or 1.0)
        if len(at) <= 8 and (gaps >= 0.1).all():
            axes.set_xticks(at, [f"{value:g}" for value in at])
    else:
        every = math.ceil(len(at) / 24)
        names = [fit(text_of(value), _LABEL).replace("$", r"\$") for value in places][::every]
        wide = 8 * sum(len(name) + 1 for name in names) > _WIDTH - 70
        turned: dict[str, Any] = {"rotation": 30 if len(names) <= 10 else 90} if wide else {}
        turned |= {"ha": "right", "rotation_mode": "anchor"} if wide else {}
        if turned.get("rotation") == 90:
            turned["va"] = "center"
        axes.set_xticks(at[::every], names, **turned)
        axes.set_xlim(at.min() - 0.5, at.max() + 0.5)


def _y_axis(axes: "Axes", values: np.ndarray) -> None:
    """Logarithmic over decades; else never less than 5 % of the value to either side.

    A closer look would make a trend of what is noise.
    """
    if spans_decades(values):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, values)
        return
    # 288.9996 as it is, not as 0.0006 above 2.889990e2.
    axes.ticklabel_format(axis="y", useOffset=False)
    if len(values):
        low, high = float(values.min()), float(values.max())
        middle, half = (low + high) / 2, (high - low) / 2
        half = max(1.12 * half, _MARGIN * abs(middle)) or 1.0
        axes.set_ylim(middle - half, middle + half)
