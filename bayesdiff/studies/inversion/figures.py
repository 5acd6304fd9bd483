"""Figures of round trips: sheets of images and charts of latents; those of points are apart."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.charts import log_ticks
from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import (
    GAP,
    cell_size,
    chart,
    picture,
    put,
    sheet,
    standard_deviation,
)
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import COLOURS, MAP_COLOURS, style
from bayesdiff.studies.inversion import clouds
from bayesdiff.studies.inversion.clouds import density
from bayesdiff.studies.inversion.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 10  # images beside each other
_MARKED = 64  # coordinates that have a marker each
# Rows of the sheet below the images, by their names among the rows.
_MAPS = {"latent_variance": "sd of latent", "returned_variance": "sd of image"}


def every(shown: Shown) -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Yields:
        Tag and figure.
    """
    if shown.points:
        yield from clouds.every(shown)
    else:
        yield "inversion/round_trips", round_trips(shown)
        yield "inversion/latents", latents(shown)
    yield "inversion/by_dimension", by_dimension(shown)


@style()
def round_trips(shown: Shown) -> "Figure":
    """The first images, none picked: as they are, as they come back, and what the weights do."""
    rows = {name: value[:_ACROSS] for name, value in shown.rows.items()}
    error = rows["returned"] - rows["data"]
    largest = float(error.abs().max())
    more = magnification(largest)
    sheets = {"image": rows["data"], "returned": rows["returned"]}
    sheets[f"error × {plain_number(more)}"] = more * error
    if rows["latents"].ndim == 4:
        sheets["latent"] = rows["latents"] / 3
    maps = {n: rows[n] for n in _MAPS if n in rows and rows[n].ndim == 4}
    record = shown.record
    caption = (
        f"The first {len(error)} of {shown.start} {record['conditions']['nfe']} network "
        f"evaluations there and back; largest error shown {largest:.2g}, of images in [-1, 1], "
        "grey is none. Latents from -3 to 3, in the places of a state's coordinates. "
        f"{_of_maps(shown)} {shown.conditions}"
    )
    size = width, height = cell_size(rows["data"], 72)
    left, tall = 116, height + 8
    right = left + len(error) * (width + GAP)
    body = tall * (len(sheets) + len(maps)) + 6
    figure, axes = sheet(right + 100, body, "Data to latents and back", caption)
    for row, (name, images) in enumerate(sheets.items()):
        axes.text(left - 8, 6 + row * tall + height / 2, name, ha="right", va="center", size=9)
        for column, image in enumerate(images):
            put(axes, picture(image), left + column * (width + GAP), 6 + row * tall, size)
    for row, (name, variance) in enumerate(maps.items(), start=len(sheets)):
        place = left, 6 + row * tall
        _maps(figure, axes, _MAPS[name], variance, place, size)
    return figure


def magnification(largest: float) -> float:
    """The power of ten, at least 10, that brings an error near 1 and not beyond."""
    if not 0 < largest < math.inf:
        return 10.0
    return 10.0 ** max(1, math.floor(-math.log10(largest)))


def _maps(
    figure: "Figure",
    axes: "Axes",
    name: str,
    variance: Tensor,
    place: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """A row of maps with a scale of its own."""
    (left, y), (width, height) = place, size
    values = standard_deviation(variance)
    scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": ceiling(values)}
    axes.text(left - 8, y + height / 2, name, ha="right", va="center", size=9)
    for column, each in enumerate(values):
        drawn = put(axes, each, left + column * (width + GAP), y, size, **scale)
    right = left + len(values) * (width + GAP) + 8
    bar = axes.inset_axes((right, y, 12, height), transform=axes.transData)
    figure.colorbar(drawn, cax=bar, extend="max").ax.tick_params(labelsize=8)


def _of_maps(shown: Shown) -> str:
    """A sentence about the maps."""
    count = shown.record["conditions"]["members"]
    if not count:
        return ""
    return (
        f"Below: standard deviation, over {count} flows with heads drawn from the posterior, of "
        "the latent that each finds, and of the image that each reaches from the trained flow's "
        "latent; a scale for each row."
    )


@style()
def latents(shown: Shown) -> "Figure":
    """All coordinates together beside the standard normal, and the kurtosis of each."""
    record = shown.record
    z = shown.rows["latents"].double().flatten(1)
    sd = z.std(0)
    chance = (24 / len(z)) ** 0.5
    caption = (
        f"Latents of {shown.start} Left: all {z.shape[1]} coordinates together, and the standard "
        "normal (dashed). Right: excess kurtosis of each coordinate, 0 if normal; shaded: two "
        f"standard errors of normal ones. Mean excess kurtosis {record['latent_kurtosis']:.3g}, "
        f"correlations of coordinates: root mean square {record['correlation_rms']:.3g}, by "
        f"chance {record['correlation_by_chance']:.3g}. {shown.conditions}"
    )
    figure, axes = chart(760, 340, "Latents beside the normal distribution", caption, 1, 2)
    density(axes[0, 0], z.flatten().numpy(), max(4.0, 3 * float(sd.max())))
    axes[0, 0].set(xlabel="coordinate of a latent", ylabel="density", yscale="log")
    axes[0, 0].set_ylim(bottom=1e-5)
    kurtosis = np.array(record["coordinates"]["kurtosis"], dtype=float)
    axes[0, 1].axvspan(-2 * chance, 2 * chance, color="0.9", linewidth=0)
    axes[0, 1].hist(kurtosis[np.isfinite(kurtosis)], 40, color=COLOURS[0])
    axes[0, 1].set(xlabel="excess kurtosis of a coordinate", ylabel="coordinates")
    return figure


@style()
def by_dimension(shown: Shown) -> "Figure":
    """Variance of every coordinate of the latents, in both units, and the weights' share of it."""
    record, scaled = shown.record, shown.scaled_variance
    variance = np.array(record["coordinates"]["variance"], dtype=float)
    expected = shown.expected.flatten().numpy()
    share = record.get("weights_share_of_coordinates")
    count = 1 + (scaled is not None) + (share is not None)
    figure, axes = chart(350 * count, 320, "Latents by dimension", _by_dimension(shown), 1, count)
    panels = iter(axes[0])
    panel = next(panels)
    off = 2 * np.sqrt(2 / (record["conditions"]["images"] - 1))
    x = np.arange(1, len(variance) + 1)
    band = expected * (1 - off), expected * (1 + off)
    panel.stairs(band[1], _edges(x), baseline=band[0], fill=True, color="0.9", linewidth=0)
    _curve(panel, x, variance, expected)
    panel.set_ylabel("variance (noise: 1)")
    if scaled is not None:
        panel = next(panels)
        both = variance * scaled.numpy(), expected * scaled.numpy()
        _curve(panel, x, *both)
        panel.set(ylabel="variance (the paper's units)", yscale="log")
        log_ticks(panel.yaxis, np.concatenate(both))
    if share is not None:
        panel = next(panels)
        _curve(panel, x, 100 * np.array(share, dtype=float))
        panel.set_ylabel("share due to weights (%)")
    for panel in axes[0]:
        if panel.get_yscale() == "linear":
            panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        panel.set_xlabel(shown.coordinates)
        if len(x) <= 10:
            panel.set_xticks(x)
            panel.set_xlim(0.5, len(x) + 0.5)
    return figure


def _by_dimension(shown: Shown) -> str:
    """Caption."""
    parts = [
        f"Latents of {shown.start} First: variance of each coordinate, and (dashed) that of "
        "Gaussian data exactly followed, shaded: two standard errors."
    ]
    if shown.scaled_variance is not None:
        parts.append("Second: both in the units of the paper, where the largest is 1.")
        parts.append("Dimensions lie by falling variance of the data.")
    if shown.record["conditions"]["members"]:
        parts.append(
            f"Last: share of the variance, over images and "
            f"{shown.record['conditions']['members']} flows with heads drawn from the posterior, "
            f"that is the heads'; of all coordinates {shown.record['weights_share']:.2%}."
        )
    return " ".join([*parts, shown.conditions])


def _curve(
    axes: "Axes", x: np.ndarray, values: np.ndarray, expected: np.ndarray | None = None
) -> None:
    """Values as markers, of many coordinates as dots, and what is expected as a dashed line."""
    how: Mapping[str, Any] = {"marker": "o", "markersize": 5 if len(x) <= _MARKED else 1.5}
    axes.plot(x, values, linestyle="none", color=COLOURS[0], **how)
    if expected is not None:
        line: dict[str, Any] = {"color": "0.3", "linestyle": "--", "linewidth": 1.2}
        axes.stairs(expected, _edges(x), baseline=None, **line)


def _edges(x: np.ndarray) -> np.ndarray:
    return np.append(x - 0.5, x[-1] + 0.5)
