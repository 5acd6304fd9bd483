"""Epistemic and aleatoric maps of the same images, apart and together."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.report.layout import (
    GAP,
    bar_label,
    ceiling,
    cell_size,
    class_name,
    fit,
    image_range,
    map_conditions,
    picture,
    put,
    sheet,
    standard_deviation,
)
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import MAP_COLOURS, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

_LEFT, _TOP = 132, 24


@style()
def epistemic_and_aleatoric(
    samples: "Samples",
    classes: Sequence[str],
    count: int = 8,
    settings: Mapping[str, Any] | None = None,
) -> "Figure":
    """The first images with both maps and their sum, all maps on one colour scale.

    Args:
        samples: with aleatoric variances.
        classes: class names.
        count: images, one column each.
        settings: of the run, for the caption.
    """
    aleatoric, total = samples.aleatoric, samples.total
    assert aleatoric is not None and total is not None
    parts = {"epistemic": samples.variance, "aleatoric": aleatoric, "total": total}
    maps = {name: standard_deviation(each[:count]) for name, each in parts.items()}
    shared = ceiling(np.stack(list(maps.values())))
    size = cell_size(samples.images, 80)
    columns = len(samples.images[:count])
    right = _LEFT + columns * (size[0] + GAP) + 8
    tall = _TOP + 4 * (size[1] + GAP)
    title, caption = "Epistemic and aleatoric uncertainty", _caption(samples, settings)
    figure, axes = sheet(right + 124, tall, title, caption)
    for column in range(columns):
        x = _LEFT + column * (size[0] + GAP)
        if samples.labels is not None:
            name = fit(class_name(samples.labels[column], classes), size[0] * 8 // 7)
            axes.text(x + size[0] / 2, _TOP - 6, name, ha="center", va="bottom", size=9)
        put(axes, picture(samples.images[column], samples.units), x, _TOP, size)
        for row, each in enumerate(maps.values(), start=1):
            scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": shared}
            drawn = put(axes, each[column], x, _TOP + row * (size[1] + GAP), size, **scale)
    for row, name in enumerate(["image", *maps]):
        text = name if row == 0 else f"{name}\nmean {float(maps[name].mean()):.2g}"
        y = _TOP + row * (size[1] + GAP) + size[1] / 2
        axes.text(_LEFT - 8, y, text, ha="right", va="center")
    place = (right, _TOP + size[1] + GAP, 14, 3 * size[1] + 2 * GAP)
    inset = axes.inset_axes(place, transform=axes.transData)
    bar = figure.colorbar(drawn, cax=inset, extend="max")
    bar.ax.yaxis.set_major_formatter(lambda value, _: plain_number(value, 3))
    bar.set_label(bar_label(samples))
    return figure


def _caption(samples: "Samples", settings: Mapping[str, Any] | None) -> str:
    """Units, what each row is, and what is not shown as it is kept."""
    aleatoric, time = samples.aleatoric, samples.aleatoric_time
    assert aleatoric is not None and time is not None
    negative = 100 * float((aleatoric < 0).double().mean())
    return (
        f"Standard deviations in units of the image range {image_range(samples)} (root of the "
        "channel mean of the variance), all on one colour scale, which 0.1 % of the pixels "
        "exceed. Epistemic: of the image, the weights' doing. Aleatoric: of the data given the "
        f"image's own state at t = {float(time):.3g}. Total: root of the sum of both variances. "
        f"{negative:.2g} % of the aleatoric estimates are negative and count as 0 where they are "
        f"shown. Conditions: {map_conditions(samples, settings)}."
    )
