"""Points on their way to latents and back, as a GIF."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdiff.report.points import limits_of, square, views_of
from bayesdiff.report.style import style
from bayesdiff.storage.atomic import write_atomic
from bayesdiff.studies.inversion.shown import Shown

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 60  # of both ways together
_POINTS = 400
_PIXELS = 320  # along a side of a panel
_DPI = 100
_COLOURS = 48
_MOVING, _RESTING = 80, 900  # milliseconds


def write(path: Path, shown: Shown) -> None:
    """Write the first points' way, in the units of ``Shown.frames``; it rests at both ends.

    Args:
        path: of the GIF, 1.5 megabytes at most.
        shown: gives the frames.
    """
    images = _drawn(shown)
    there = len(shown.times[0])
    pauses = [_RESTING if k in (0, there - 1) else _MOVING for k in range(len(images))]
    how: dict[str, Any] = {"save_all": True, "append_images": images[1:], "loop": 0}
    how |= {"duration": pauses, "format": "GIF"}
    write_atomic(path, partial(images[0].save, **how))


@style()
def _drawn(shown: Shown) -> "list[Image]":
    """Pictures of one palette, there and back."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    ways = [shown.frames(way)[:, :_POINTS] for way in (0, 1)]
    frames = [views_of(state) for states in ways for state in states]
    ends, first = limits_of([view for views in frames for view in views]), frames[0]
    figure = Figure((_PIXELS * len(first) / _DPI, 1.06 * _PIXELS / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(first), squeeze=False)[0]
    drawn = []
    for panel, (x, y, across, up) in zip(panels, first, strict=True):
        drawn.append(panel.scatter(x, y, s=9, c=shown.hues[: len(x)], linewidths=0))
        square(panel, across, up, ends)
    images: list[Image.Image] = []
    times = [*shown.times[0], *shown.times[1]]
    for views, t in zip(frames, times, strict=True):
        for points, (x, y, *_) in zip(drawn, views, strict=True):
            points.set_offsets(np.column_stack([x, y]))
        panels[0].set_title(f"t = {t:.2f}", loc="left")
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        palette = {"palette": images[0]} if images else {"colors": _COLOURS}
        images.append(picture.quantize(**palette, dither=Image.Dither.NONE))
    return images
