"""Figures of errors along trajectories."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "RdBu_r"  # blue below 0, white at 0


def every(results: Mapping[str, Any], conditions: str = "") -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        results: numbers.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    if results["correlation"] is not None:
        yield "residuals/correlation", correlation(results, conditions)
        yield "residuals/by_lag", by_lag(results, conditions)
    yield "residuals/rms", rms(results, conditions)


@style()
def correlation(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Correlation of errors over all pairs of times."""
    times = [row["time"] for row in results["rows"]]
    caption = (
        f"Correlation over {_trajectories(results)} of the error at one time with that at "
        f"another, mean over coordinates: 0 off the diagonal for white noise, 1 for an error that "
        f"stays. {_TRUTH.format(**results['conditions'])} Times: noise, t = 0, to data, t = 1. "
        f"{conditions}"
    )
    figure, panels = chart(600, 460, "Correlation of errors over time", caption)
    edges = _edges(times)
    values = np.array(results["correlation"], dtype=float)
    scale = {"cmap": _COLOURS, "vmin": -1, "vmax": 1, "rasterized": True}
    drawn = panels[0, 0].pcolormesh(edges, edges, values, **scale)
    panels[0, 0].set(xlabel="time t", ylabel="time s", aspect="equal")
    panels[0, 0].grid(visible=False)
    figure.colorbar(drawn, ax=panels[0, 0], label="correlation")
    return figure


@style()
def by_lag(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Correlation by lag, and that with the last time, beside what the paper measures."""
    counts, rows = results["conditions"], results["rows"]
    share, white = results["persistent_share"], results["white_share"]
    caption = (
        f"Left: mean correlation of errors along {_trajectories(results)}, by lag, and of those "
        "of the exact prediction for as many other training data (floor); persistent "
        f"share of their variance {share:.3g}, {white:.3g} for white noise. Right: correlation "
        f"with the last time, beside that of residuals (prediction less clean data) of "
        f"{counts['clean']} references with independent noise at every time, as the paper has "
        f"it: where the exact prediction has the same curve, it says nothing of the network. "
        f"{_TRUTH.format(**counts)} {conditions}"
    )
    figure, panels = chart(900, 440, "Correlation of errors by lag", caption, 1, 2)
    left, right = panels[0]
    left.axhline(0, color="0.3", linewidth=0.8)
    left.axhline(0.5, color="0.6", linestyle=":", linewidth=0.8)
    lags, curve = ([row[name] for row in results["by_lag"]] for name in ("lag", "correlation"))
    left.plot(lags, curve, label="network", **look(0))
    floor = [row["correlation"] for row in results["floor"]["by_lag"]]
    left.plot(lags[: len(floor)], floor, color="0.6", linestyle="--", label="floor")
    left.legend(**_ABOVE)
    left.set(xlabel="lag in t", ylabel="mean correlation", ylim=(_bottom(curve + floor), 1.05))
    times, every_value = [row["time"] for row in rows], [0.0]
    right.axhline(0, color="0.3", linewidth=0.8)
    for place, (name, label) in enumerate(_WITH_LAST):
        values = [row[name] for row in rows]
        every_value += [value for value in values if value is not None]
        shown = [np.nan if value is None else value for value in values]
        right.plot(times, shown, label=label, **look(place))
    right.set(xlabel="time t", ylabel="correlation with the last time")
    right.set_ylim(_bottom(every_value), 1.05)
    right.legend(**_ABOVE)
    return figure


_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
_WITH_LAST = (
    ("trajectory", "errors along trajectories"),
    ("published", "residuals, independent noise"),
    ("published_exact", "the same, exact prediction"),
)


@style()
def rms(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Size of the errors over time, with the floor."""
    rows, counts = results["rows"], results["conditions"]
    caption = (
        f"Root of the mean square over {_trajectories(results)} and coordinates, of the error of "
        f"the predicted data, in states of the model. {_TRUTH.format(**counts)} Floor: distance "
        f"of the exact prediction for as many other training data; nothing can be said of errors "
        f"below it. {results['above_floor']} of {counts['times']} times are above. {conditions}"
    )
    figure, panels = chart(560, 400, "Size of errors over time", caption)
    times = [row["time"] for row in rows]
    values = [[row[name] for row in rows] for name in ("rms", "floor")]
    panels[0, 0].plot(times, values[0], label="network", **look(0))
    panels[0, 0].fill_between(times, values[1], color="0.85", label="floor")
    panels[0, 0].set(xlabel="time t", ylabel="RMS error of predicted data")
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].legend(loc="best")
    return figure


_TRUTH = (
    "The error is the network's prediction of data less the exact one for {references} training "
    "data: exact for these alone."
)


def _trajectories(results: Mapping[str, Any]) -> str:
    counts = results["conditions"]
    whence = "latents" if counts["start"] == "latents" else "held-out data, from noise to data"
    return f"{counts['points']} trajectories of {whence}"


def _edges(times: Sequence[float]) -> np.ndarray:
    """Borders of cells around the times."""
    t = np.array(times)
    middle = (t[1:] + t[:-1]) / 2
    return np.concatenate([[2 * t[0] - middle[0]], middle, [2 * t[-1] - middle[-1]]])


def _bottom(values: Sequence[float]) -> float:
    return min(-0.1, min(values) - 0.05)
