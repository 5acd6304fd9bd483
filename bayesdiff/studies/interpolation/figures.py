"""Figures of what lies between two samples."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.report.figures import MAP_COLOURS, ceiling
from bayesdiff.report.layout import (
    GAP,
    cell_size,
    chart,
    picture,
    put,
    sheet,
    standard_deviation,
)
from bayesdiff.report.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAIRS = 6  # that are shown as images
_CELL = 56


def every(
    results: Mapping[str, Any], images: Tensor, variance: Tensor, conditions: str = ""
) -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        results: numbers.
        images: in [-1, 1], ``(N, S, C, H, W)``.
        variance: of the same shape.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    yield "interpolation/images_and_maps", images_and_maps(results, images, variance, conditions)
    yield "interpolation/sum_along", sum_along(results, conditions)


@style()
def images_and_maps(
    results: Mapping[str, Any], images: Tensor, variance: Tensor, conditions: str = ""
) -> "Figure":
    """The first pairs, none picked: images along the arc, their maps below on one scale."""
    images, variance = images[:_PAIRS], variance[:_PAIRS]
    maps = standard_deviation(variance)
    top = ceiling(maps)
    size = width, height = cell_size(images[:, 0], _CELL)
    left, tall = 70, 2 * (height + GAP) + 10
    across = left + images.shape[1] * (width + GAP)
    caption = (
        f"The first {len(images)} of {len(results['sums'])} pairs, along the arc between their "
        f"noises; the outer images are the samples. Maps: standard deviation, one scale for all. "
        f"{conditions}"
    )
    title = "Between two samples"
    figure, axes = sheet(across + 100, len(images) * tall, title, caption)
    for row, pair in enumerate(results["conditions"]["pairs"][: len(images)]):
        y = row * tall
        axes.text(
            left - 8, y + height, f"{pair[0]} to\n{pair[1]}", ha="right", va="center", size=8
        )
        for column in range(images.shape[1]):
            x = left + column * (width + GAP)
            put(axes, picture(images[row, column]), x, y, size)
            scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": top}
            drawn = put(axes, maps[row, column], x, y + height + GAP, size, **scale)
    bar = axes.inset_axes((across + 10, 0, 16, len(images) * tall - 10), transform=axes.transData)
    figure.colorbar(drawn, cax=bar, extend="max").set_label("standard deviation")
    return figure


@style()
def sum_along(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Summed variance along the arcs: every pair, and their mean with its interval."""
    curve = results["curve"]
    places = [row["place"] for row in curve]
    caption = (
        f"Thin: {len(results['sums'])} pairs; thick: their mean, with its 95 % interval over "
        f"pairs. Inner places against both ends: {results['rise_relative']:+.1%} "
        f"[{results['rise_relative_low']:+.1%}, {results['rise_relative_high']:+.1%}]. "
        f"{conditions}"
    )
    figure, axes = chart(760, 420, "Uncertainty between two samples", caption)
    panel = axes[0, 0]
    for sums in results["sums"]:
        panel.plot(places, sums, color="0.8", linewidth=0.7)
    low, high = ([row[f"sum_{end}"] for row in curve] for end in ("low", "high"))
    panel.fill_between(places, low, high, color="C0", alpha=0.25, linewidth=0)
    panel.plot(places, [row["sum"] for row in curve], "o-", color="C0", linewidth=2)
    panel.set(xlabel="place on the arc", ylabel="variance summed over the image")
    panel.set_ylim(bottom=0)
    return figure
