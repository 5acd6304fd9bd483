"""Each metric over each swept key, with intervals where seeds are swept."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.report.charts import log_ticks, spans_decades
from bayesdiff.report.layout import chart, fit, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Values = tuple[Any, ...]

SEED = "seed"
# Lines that can be told apart.
MOST_LINES = 10
_COLUMNS = 3
_WIDTH = 330  # of a panel, pixels
_LABEL = 150  # of a category's name at most, pixels


@style()
def sweep_figure(
    rows: Sequence[Row],
    swept_keys: Sequence[str],
    metrics: Sequence[str],
    over: str | None = None,
) -> "Figure":
    """One small panel for each metric over each swept key.

    Cells that differ in ``seed`` alone are one point: their mean, with Student's t interval. Each
    combination of the remaining keys has a line; where these are too many, the line is the mean.

    Args:
        rows: one dictionary per cell; a failed cell lacks its metrics.
        swept_keys: keys of ``rows`` with the swept values.
        metrics: keys of ``rows`` to draw.
        over: the only key on the axes; None for every one in turn.
    """
    done = [row for row in rows if any(finite(row.get(metric)) for metric in metrics)]
    keys = axis_keys(swept_keys) if over is None else [over]
    tall = math.ceil(len(metrics) / _COLUMNS)
    wide = min(len(metrics), _COLUMNS)
    caption = f"{len(done)} of {len(rows)} cells have a result. {_reading(done, swept_keys, keys)}"
    size = 40 + _WIDTH * wide + 210 * (len(swept_keys) > 1), 250 * tall * len(keys)
    title = "Sweep over " + ", ".join(keys)
    figure, panels = chart(*size, title, caption, tall * len(keys), wide)
    for place, key in enumerate(keys):
        block = panels[place * tall : (place + 1) * tall].ravel()
        names, groups = series(done, swept_keys, key)
        for axes, metric in zip(block, metrics, strict=False):
            _panel(axes, groups, key, metric, _places(done, key))
            axes.set_title(metric.replace("$", r"\$"))
        for axes in block[len(metrics) :]:
            axes.axis("off")
        if len(groups) > 1:
            look = {"title_fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1.02, 1)}
            block[wide - 1].legend(title=",\n".join(short_names(names)), **look)
    return figure


def _reading(rows: Sequence[Row], swept_keys: Sequence[str], keys: Sequence[str]) -> str:
    """How lines, points and bars are to be read."""
    text = "Each point is a cell."
    if SEED in swept_keys and SEED not in keys:
        seeds = len(_distinct(rows, SEED))
        text = f"Faint points are cells, bars Student's t 95 % intervals over {seeds} seeds."
    if any(not names and len(swept_keys) > 1 + (SEED in swept_keys) for names in
           (series(rows, swept_keys, key)[0] for key in keys if key != SEED)):  # fmt: skip
        text += " Lines: mean over the other keys, which have too many combinations to tell apart."
    return text


def axis_keys(swept_keys: Sequence[str]) -> list[str]:
    """Keys that get an axis: seeds do where nothing else was swept."""
    return [key for key in swept_keys if key != SEED] or list(swept_keys)


def short_names(keys: Sequence[str]) -> list[str]:
    """Last parts of dotted keys, whole keys where these would be the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def series(
    rows: Sequence[Row], swept_keys: Sequence[str], key: str
) -> tuple[list[str], dict[Values, list[Row]]]:
    """The other keys but seeds, and the cells of each of their combinations that is there.

    No keys and one group with all cells where these are too many to tell apart.
    """
    others = [name for name in swept_keys if name not in (key, SEED)]
    known = [_distinct(rows, name) for name in others]
    groups = {
        values: [row for row in rows if tuple(row.get(name) for name in others) == values]
        for values in product(*known)
    }
    groups = {values: cells for values, cells in groups.items() if cells}
    return (others, groups) if len(groups) <= MOST_LINES else ([], {(): list(rows)})


def number(value: Any) -> float | None:
    """Number a swept value or a metric stands for; None where it is none (a flag, a name)."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return None


def finite(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    found = number(value)
    return found is not None and math.isfinite(found)


def text_of(value: Any) -> str:
    """A swept value as a label: ``10.0`` and ``10`` are the same value."""
    found = number(value)
    return str(value) if found is None else f"{found:g}".replace("e+0", "e").replace("e-0", "e-")


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """Values of ``key``: numbers in order, else as they come."""
    values = list(dict.fromkeys(row[key] for row in rows if key in row))
    numeric = all(finite(value) for value in values)
    return sorted(values, key=float) if numeric else values


def _places(rows: Sequence[Row], key: str) -> dict[Any, float]:
    """Where each value lies on the axis: numbers where they are, categories side by side."""
    values = _distinct(rows, key)
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
        width = 1 + 2.5 * (len(groups) - 1 - number_of) / max(len(groups) - 1, 1)
        label = ", ".join(fit(text_of(value), 180) for value in values)
        _line(axes, points, key, metric, f"C{number_of % 10}", width, label, numeric)
        shown += [float(row[metric]) for row in rows]
    _x_axis(axes, places, numeric)
    _y_axis(axes, np.array(shown))
    if not shown:
        axes.text(0.5, 0.5, "no values", ha="center", color="0.5", transform=axes.transAxes)


def _line(
    axes: "Axes",
    points: Mapping[float, Sequence[Row]],
    key: str,
    metric: str,
    colour: str,
    width: float,
    label: str,
    numeric: bool,
) -> None:
    spots = list(points)
    values = [[float(row[metric]) for row in points[x]] for x in spots]
    means = [float(np.mean(each)) for each in values]
    style = {"linewidth": width, "markersize": 3 + width} if numeric else {"linestyle": "none"}
    axes.plot(spots, means, marker="o" if numeric else "s", color=colour, label=label, **style)
    flat = [(x, y) for x, each in zip(spots, values, strict=True) if len(each) > 1 for y in each]
    if flat:
        look: dict[str, Any] = {"color": colour, "alpha": 0.35, "markersize": 3}
        axes.plot(*zip(*flat, strict=True), "o", **look)
    seeds = [len({row.get(SEED) for row in points[x]}) == len(points[x]) > 1 for x in spots]
    if key != SEED and any(seeds):
        ends = [
            mean_interval(each) if s else (0.0,) * 3 for each, s in zip(values, seeds, strict=True)
        ]
        bars = np.array([(mean - low, high - mean) for mean, low, high in ends]).T
        axes.errorbar(spots, means, bars, fmt="none", ecolor=colour, elinewidth=1, capsize=3)


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
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text_of(x)))
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
    if spans_decades(values):
        axes.set_yscale("log")
        log_ticks(axes.yaxis, values)
    else:
        # 288.9996 as it is, not as 0.0006 above 2.889990e2.
        axes.ticklabel_format(axis="y", useOffset=False)
