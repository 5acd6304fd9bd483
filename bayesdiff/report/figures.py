"""Every picture of the report: sheets of images and maps here, curves from ``charts``."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.charts import (
    score_histogram,
    summed_over_time,
    three_digits,
    validation_scatter,
)
from bayesdiff.report.layout import (
    GAP,
    bar_label,
    by_class,
    ceiling,
    cell_size,
    class_name,
    descending,
    fit,
    image_range,
    map_conditions,
    picture,
    put,
    sheet,
    standard_deviation,
    without_score,
)
from bayesdiff.report.options import SUM_IN_WORDS
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import MAP_COLOURS, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

__all__ = [
    "extremes",
    "image_and_map",
    "over_time",
    "sample_grid",
    "save",
    "score_histogram",
    "summed_over_time",
    "validation_scatter",
]


@style()
def sample_grid(
    images: Tensor,
    labels: Tensor | None,
    classes: Sequence[str],
    columns: int = 10,
    conditions: str = "",
    units: str = "model",
) -> "Figure":
    """Samples as they are, one row per class where there are labels.

    Args:
        images: ``(B, C, H, W)`` in their units.
        labels: ``(B,)`` or None.
        classes: class names.
        columns: images per row.
        conditions: what made the images, for the caption.
        units: ``model`` for images in [-1, 1], ``unit`` for [0, 1].
    """
    groups = by_class(labels, len(images), classes)
    rows = [(name, chosen[:columns]) for name, chosen in groups]
    titled = len(groups) > 1
    if not titled:
        first = groups[0][1][: columns**2]
        rows = [("", first[i : i + columns]) for i in range(0, len(first), columns)]
    width, height = cell_size(images, 72)
    left = 12 + (8 + 9 * max(len(fit(name, 160)) for name, _ in rows) if titled else 0)
    shown = sum(len(chosen) for _, chosen in rows)
    caption = f"{shown} of {len(images)} samples"
    caption += "" if "chosen by" in conditions else ", unselected"
    caption += f"; {conditions}" if conditions else ""
    across = max(len(chosen) for _, chosen in rows) * (width + GAP)
    tall = 2 * GAP + len(rows) * (height + GAP)
    figure, axes = sheet(left + across + 8, tall, "Samples", f"{caption}.")
    for row, (name, chosen) in enumerate(rows):
        y = 2 * GAP + row * (height + GAP)
        axes.text(left - 8, y + height / 2, fit(name, 160), ha="right", va="center")
        for column, index in enumerate(chosen):
            shown_at = left + column * (width + GAP), y, (width, height)
            put(axes, picture(images[index], units), *shown_at)
    return figure


def _pairs(
    samples: "Samples",
    blocks: Sequence[tuple[str, np.ndarray]],
    label: Callable[[int], str],
    title: str,
    caption: str,
    own_scale: bool,
) -> "Figure":
    """Blocks of images with their maps below, all maps on one colour scale or each on its own."""
    from matplotlib.ticker import MaxNLocator

    chosen = np.concatenate([indices for _, indices in blocks])
    maps = dict(zip(chosen, standard_deviation(samples.variance[chosen]), strict=True))
    tops = {i: ceiling(each) for i, each in maps.items()}
    shared = ceiling(np.stack(list(maps.values())))
    size = cell_size(samples.images, 96)
    head = 14 + 18 * max(label(i).count("\n") + 1 for i in chosen)
    heading = 26 if any(name for name, _ in blocks) else 0
    body = 2 * size[1] + GAP
    tall = heading + head + body + (28 if own_scale else 12)
    left, columns = 12, max(len(indices) for _, indices in blocks)
    right = left + columns * (size[0] + GAP) + 8
    figure, axes = sheet(right + (10 if own_scale else 124), tall * len(blocks), title, caption)
    for block, (name, indices) in enumerate(blocks):
        y = block * tall + heading + head
        axes.text(left, y - head + 2, name, weight="bold", va="bottom")
        for column, i in enumerate(indices):
            x = left + column * (size[0] + GAP)
            middle: dict[str, Any] = {"ha": "center", "size": 9}
            axes.text(x + size[0] / 2, y - 5, label(i), va="bottom", **middle)
            put(axes, picture(samples.images[i], samples.units), x, y, size)
            scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": tops[i] if own_scale else shared}
            drawn = put(axes, maps[i], x, y + size[1] + GAP, size, **scale)
            if own_scale:
                axes.text(x + size[0] / 2, y + body + 4, f"≤ {tops[i]:.2g}", va="top", **middle)
    if not own_scale:
        first = heading + head
        long = min((len(blocks) - 1) * tall + body, 3 * body)
        bar = axes.inset_axes((right, first, 14, long), transform=axes.transData)
        colours = figure.colorbar(drawn, cax=bar, extend="max")
        few = MaxNLocator(5, steps=[1, 2, 5, 10])
        colours.set_ticks(few, format=lambda value, _: plain_number(value, 3))
        colours.set_label(bar_label(samples))
    return figure


def _how_maps_read(samples: "Samples", own_scale: bool) -> str:
    """Unit and colour scale, for a caption."""
    scale = (
        "each on a scale of its own, from 0 to the value below it"
        if own_scale
        else "all on one colour scale, which 0.1 % of the pixels exceed"
    )
    return (
        f"Maps: standard deviation in units of the image range {image_range(samples)} (root of "
        f"the channel mean of the variance), {scale}."
    )


@style()
def image_and_map(
    samples: "Samples",
    classes: Sequence[str],
    count: int | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    own_scale: bool = False,
) -> "Figure":
    """Images with their uncertainty maps below, one colour scale for all.

    Args:
        samples: the generated images.
        classes: class names.
        count: images, the first ones; None: eight, and as many as classes if that is 9 or 10.
        settings: of the run, for the caption.
        own_scale: whether each map has a colour scale of its own instead.
    """
    across = 8 if len(classes) > 10 else max(8, len(classes))
    chosen = np.arange(min(across if count is None else count, len(samples.images)))
    blocks = [("", chosen[i : i + across]) for i in range(0, len(chosen), across)]
    size = cell_size(samples.images, 96)[0]

    def label(index: int) -> str:
        if samples.labels is None:
            return f"sample {index}"
        return fit(class_name(samples.labels[index], classes), size * 8 // 7)

    caption = (
        f"{len(chosen)} of {len(samples.images)} samples, in order. "
        f"{_how_maps_read(samples, own_scale)} "
        f"Conditions: {map_conditions(samples, settings)}."
    )
    title = "Samples and their uncertainty maps"
    return _pairs(samples, blocks, label, title, caption, own_scale)


@style()
def extremes(
    samples: "Samples",
    classes: Sequence[str],
    scores: Tensor,
    count: int = 8,
    *,
    name: str = SUM_IN_WORDS,
    unit: str = "",
    settings: Mapping[str, Any] | None = None,
    own_scale: bool = False,
) -> "Figure":
    """The images with the highest and the lowest score, with their maps.

    Args:
        samples: the generated images.
        classes: class names.
        scores: ``(B,)`` uncertainty of each image; those without one, NaN, are left out.
        count: images of each kind.
        name: of the score.
        unit: of it, for the caption.
        settings: of the run, for the caption.
        own_scale: whether each map has a colour scale of its own; one for all groups otherwise.
    """
    values = scores.detach().cpu().double()
    left_out = int(values.isnan().sum())
    order = descending(values)[: len(values) - left_out][::-1]
    order = order if len(order) else np.zeros(1, int)
    count = max(1, min(count, len(order) // 2))
    size = cell_size(samples.images, 96)[0]

    def label(index: int) -> str:
        known = "" if samples.labels is None else class_name(samples.labels[index], classes)
        return f"{fit(known, size * 8 // 7)}\n{three_digits(float(values[index]))}".strip()

    caption = (
        f"Number: the image's {name}{f' ({unit})' if unit else ''}. {without_score(left_out)}"
        f"{_how_maps_read(samples, own_scale)} "
        f"Conditions: {map_conditions(samples, settings)}."
    )
    blocks = [
        (f"Most uncertain: highest {name} of {len(values)} images", order[::-1][:count]),
        (f"Least uncertain: lowest {name}", order[:count]),
    ]
    title = "Most and least uncertain samples"
    return _pairs(samples, blocks, label, title, caption, own_scale)


@style()
def over_time(
    samples: "Samples",
    classes: Sequence[str],
    count: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> "Figure":
    """Images and their maps while the solver runs, two rows per image, one column per time.

    Each column of maps has a colour scale of its own, written under it: a scale for all would
    show the last columns only, as the variance grows by orders of magnitude along the way.
    """
    frames = len(samples.frame_times)
    columns = np.unique(np.linspace(0, frames - 1, min(frames, 10)).round().astype(int))
    count = min(count, samples.frames.shape[1])
    maps = standard_deviation(samples.frame_variance[columns, :count])
    size, left = cell_size(samples.images, 80), 104
    tall = 2 * (size[1] + GAP) + 10
    caption = (
        "Each image above its map (standard deviation in units of the image range "
        f"{image_range(samples)}). Each column of maps has its own colour scale, from 0 to the "
        f"value under the column. Conditions: {map_conditions(samples, settings)}."
    )
    width, height = left + len(columns) * (size[0] + GAP) + 10, 26 + count * tall + 20
    figure, axes = sheet(width, height, "Samples and uncertainty over time", caption)
    for column, frame in enumerate(columns):
        x, top = left + column * (size[0] + GAP), ceiling(maps[column])
        place: dict[str, Any] = {"ha": "center", "size": 9}
        axes.text(x + size[0] / 2, 20, f"t = {float(samples.frame_times[frame]):.3g}", **place)
        axes.text(x + size[0] / 2, height - 10, f"{top:.2g}", **place)
        for row in range(count):
            y = 26 + row * tall
            put(axes, picture(samples.frames[frame, row], samples.units), x, y, size)
            scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": top}
            put(axes, maps[column, row], x, y + size[1] + GAP, size, **scale)
    for row in range(count):
        labels = samples.labels
        name = f"sample {row}" if labels is None else class_name(labels[row], classes)
        axes.text(left - 10, 26 + row * tall + size[1] / 2, fit(name, 88), ha="right", va="center")
    axes.text(left - 10, height - 10, "scale up to", ha="right", size=9)
    return figure
