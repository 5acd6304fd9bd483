"""Figures of beliefs: sheets of samples and maps here, curves from ``charts``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.machine.shared_rows import Rows
from bayesdiff.report.figures import MAP_COLOURS, ceiling
from bayesdiff.report.layout import GAP, cell_size, picture, put, sheet
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import style
from bayesdiff.studies.beliefs import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 10  # samples beside each other
_SHOWN = 4  # samples on their way
_TOP, _APART = 6, 16  # pixels above the first row, and between rows
_UNDECIDED = "0.75"  # grey, no colour of a map
# Maps of a sample, by their names among the rows: title of the row and label of its scale.
_MAPS = {
    "accumulated": ("entropy,\nmean over t", "nats"),
    "weighted": ("entropy,\nby accuracy", "nats"),
    "commit": ("commit\ntime", "t"),
    "accumulated_epistemic": ("epistemic,\nmean over t", "nats"),
}


def every(
    record: Mapping[str, Any], sampled: Rows, times: Sequence[float], conditions: str = ""
) -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        record: numbers, as in results.json.
        sampled: samples with their maps, see ``trajectory.follow``.
        times: of the frames.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    yield "beliefs/samples_and_maps", samples_and_maps(sampled, conditions)
    yield "beliefs/evolution", evolution(sampled, times, conditions)
    yield "beliefs/over_time", charts.over_time(record, conditions)
    yield "beliefs/decomposition", charts.decomposition(record, conditions)
    yield "beliefs/calibration", charts.calibration(record, conditions)
    yield "beliefs/detection", charts.detection(record, conditions)


@style()
def samples_and_maps(sampled: Rows, conditions: str = "") -> "Figure":
    """The first samples, none picked, above their maps; one scale for each kind of map."""
    images = sampled["images"][:_ACROSS].float() / 127.5 - 1
    width, height = cell_size(images, 84)
    left, right = 108, 108 + len(images) * (width + GAP)
    caption = (
        f"The first {len(images)} of {len(sampled['images'])} samples. Entropy of the output in "
        "nats per pixel, averaged over the steps and, below, weighted by the accuracy that each "
        "step transmits; commit time: from which t on it stays below 0.1 ln K (grey: not at "
        "t = 1); epistemic: mutual information of pixel and head weights. One scale for each row, "
        f"which 0.1 % of the pixels exceed. {conditions}"
    )
    rows = 1 + len(_MAPS)
    tall = _TOP + rows * (height + _APART)
    figure, axes = sheet(right + 104, tall, "Samples, and what was uncertain on the way", caption)
    _name(axes, "sample", left, _TOP + height / 2)
    for column, image in enumerate(images):
        put(axes, picture(image), left + column * (width + GAP), _TOP, (width, height))
    for row, (name, (title, unit)) in enumerate(_MAPS.items(), start=1):
        y = _TOP + row * (height + _APART)
        _name(axes, title, left, y + height / 2)
        maps = sampled[name][: len(images)].double().mean(1).numpy()
        maps = np.where(np.isfinite(maps), maps, np.nan)
        top = 1.0 if name == "commit" else ceiling(maps)
        scale = {"cmap": _colours(), "vmin": 0, "vmax": top}
        for column, each in enumerate(maps):
            drawn = put(axes, each, left + column * (width + GAP), y, (width, height), **scale)
        _bar(figure, axes, drawn, (right + 8, y, 12, height), unit, name != "commit")
    return figure


@style()
def evolution(sampled: Rows, times: Sequence[float], conditions: str = "") -> "Figure":
    """Beliefs, outputs and what they leave open, of a few samples along the sampler."""
    images = sampled["images"][:_SHOWN].float() / 127.5 - 1
    width, height = size = cell_size(images, 72)
    left, head = 116, 26
    block = 3 * (height + GAP) + 12
    right = left + (len(times) + 1) * (width + GAP) + 8
    caption = (
        f"The first {len(images)} of {len(sampled['images'])} samples at t = 0 ... 1: mean value "
        "under the belief, which knows each pixel's own transmissions alone; mean value under the "
        "output, which knows the others' too; entropy of the output. Right: the sample. "
        f"{conditions}"
    )
    figure, axes = sheet(right + 96, head + len(images) * block, "Beliefs on their way", caption)
    entropies = sampled["frames.entropy"][: len(images)].double().mean(2).numpy()
    scale = {"cmap": _colours(), "vmin": 0, "vmax": float(entropies.max()) or 1e-12}
    for column, time in enumerate(times):
        middle = left + column * (width + GAP) + width / 2
        axes.text(middle, head - 8, f"t = {plain_number(time, 3)}", ha="center", size=9)
    end = left + len(times) * (width + GAP) + 6
    axes.text(end + width / 2, head - 8, "sample", ha="center", size=9)
    for row in range(len(images)):
        y = head + row * block
        for name in ("belief", "output", "entropy"):
            _name(axes, name if name == "entropy" else f"{name} mean", left, y + height / 2)
            for column in range(len(times)):
                x, values = left + column * (width + GAP), sampled[f"frames.{name}"][row, column]
                if name == "entropy":
                    drawn = put(axes, entropies[row, column], x, y, size, **scale)
                else:
                    put(axes, picture(values), x, y, size)
            y += height + GAP
        put(axes, picture(images[row]), end, head + row * block + height + GAP, size)
    _bar(figure, axes, drawn, (right + 8, head, 12, block - 12), "nats per pixel", False)
    return figure


def _name(axes: "Axes", text: str, left: int, y: float) -> None:
    axes.text(left - 8, y, text, ha="right", va="center", size=9)


def _bar(figure: "Figure", axes: "Axes", drawn: Any, place: tuple, label: str, more: bool) -> None:
    """A colour bar in pixels of the sheet."""
    from matplotlib.ticker import MaxNLocator

    inset = axes.inset_axes(place, transform=axes.transData)
    colours = figure.colorbar(drawn, cax=inset, extend="max" if more else "neither")
    few = MaxNLocator(3, steps=[1, 2, 5, 10])
    colours.set_ticks(few, format=lambda value, _: plain_number(value, 3))
    colours.ax.tick_params(labelsize=8)
    colours.set_label(label, size=9)


def _colours() -> Any:
    """The colours of maps, and grey for what has no value."""
    from matplotlib import colormaps

    return colormaps[MAP_COLOURS].with_extremes(bad=_UNDECIDED)
