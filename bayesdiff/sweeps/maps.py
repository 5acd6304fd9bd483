"""The same images' uncertainty maps for every cell of a sweep, on one colour scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.charts import log_ticks
from bayesdiff.report.layout import (
    GAP,
    cell_size,
    picture,
    put,
    sheet,
    standard_deviation,
)
from bayesdiff.report.style import MAP_COLOURS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

MOST_CELLS = 24
_IMAGES = 8
_LEFT, _RIGHT = 270, 190
# So many times brighter than all others, or darker.
_OUTLIER = 30
_DARKER = 2.5
# Images of two cells are the same if no pixel of a screen differs by more than one level.
_LEVEL = 2 / 255


@dataclass(frozen=True)
class CellMaps:
    """The first images of one cell and their maps.

    Attributes:
        name: the cell's swept values.
        images: ``(K, C, H, W)`` in [-1, 1].
        maps: ``(K, H, W)`` standard deviations in these units.
    """

    name: str
    images: Tensor
    maps: np.ndarray

    @classmethod
    def of(cls, samples: "Samples", name: str, count: int = _IMAGES) -> "CellMaps":
        """The first of a cell's samples, as ``stored_samples`` gives them."""
        return cls(
            name, samples.images[:count].clone(), standard_deviation(samples.variance[:count])
        )

    def shares_images(self, other: "CellMaps") -> bool:
        """Whether both cells drew the same images."""
        one, two = self.images.clamp(-1, 1), other.images.clamp(-1, 1)
        return one.shape == two.shape and bool(((one - two).abs() <= _LEVEL).all())


def by_images(cells: Sequence[CellMaps]) -> list[list[CellMaps]]:
    """Cells with the same images together, in the order of their first."""
    groups: list[list[CellMaps]] = []
    for cell in cells:
        same = next((group for group in groups if group[0].shares_images(cell)), None)
        if same is None:
            groups.append([cell])
        else:
            same.append(cell)
    return groups


def scale_of(cells: Sequence[CellMaps]) -> tuple[float, float, bool]:
    """Ends of the shared colour scale, and whether it is logarithmic.

    A few cells, a quarter at most, that are ``_OUTLIER`` times brighter or darker than all others
    do not count: they lie beyond the scale, and the others keep their contrast. A linear scale
    from 0 shows all maps as long as the palest is within ``_DARKER`` of the brightest.
    """
    values = [cell.maps[np.isfinite(cell.maps)] for cell in cells]
    tops = [float(np.quantile(each, 0.999)) for each in values if each.size and each.max() > 0]
    if not tops:
        return 0.0, 1.0, False
    tops.sort()
    for _ in range(len(tops) // 4):
        tops = tops[:-1] if tops[-1] > _OUTLIER * tops[-2] else tops
        tops = tops[1:] if tops[1] > _OUTLIER * tops[0] else tops
    if max(tops) <= _DARKER * min(tops):
        return 0.0, max(tops), False
    positive = np.concatenate([each[each > 0] for each in values])
    # Of a map a factor 20 is seen; below that is mostly the noise of the estimate.
    palest = max(min(tops) / 20, 1e-4 * max(tops))
    low = float(max(np.quantile(positive, 0.02), palest))
    return low, max(tops), True


def beyond(cells: Sequence[CellMaps], low: float, high: float) -> int:
    """Cells with half of their pixels off the scale."""
    middles = [float(np.nanmedian(c.maps)) for c in cells if np.isfinite(c.maps).any()]
    return sum(middle > high or 0 < middle < low for middle in middles)


@style()
def map_tiles(cells: Sequence[CellMaps], more: int, conditions: str) -> "Figure":
    """Each cell's maps below the images they are of.

    Args:
        cells: at least one; those with the same images stand together.
        more: cells that are not shown.
        conditions: how they were made.
    """
    low, high, log = scale_of(cells)
    scale = f"one {'logarithmic' if log else 'linear'} colour scale"
    caption = (
        "Standard deviations of the first images, in units of the image range "
        f"[-1, 1], {scale} for all cells; cells of one seed, model and solver share their images, "
        f"shown above their maps. Conditions: {conditions}."
    )
    off = beyond(cells, low, high)
    caption += f" {off} cells are mostly off the scale, see their mean." if off else ""
    caption += f" {more} more cells are not shown; each has its own figures." if more else ""
    groups = by_images(cells)
    sizes = [cell_size(group[0].images, 60) for group in groups]
    heights = [
        (len(group) + 1) * (size[1] + GAP) + 14 for group, size in zip(groups, sizes, strict=True)
    ]
    across = max(len(g[0].images) * (size[0] + GAP) for g, size in zip(groups, sizes, strict=True))
    title = "Uncertainty maps over the sweep"
    figure, axes = sheet(_LEFT + across + _RIGHT, max(sum(heights), 160) + 18, title, caption)
    y, drawn = 2 * GAP, None  # type: int, Any
    for group, size, height in zip(groups, sizes, heights, strict=True):
        drawn = _group(axes, group, size, y, (low, high, log), _LEFT + across + 6)
        y += height
    axes.text(_LEFT + across + 6, 16, "mean sd", va="center", size=8)
    tall = min(max(sum(heights), 160) - 44, 300)
    bar = axes.inset_axes((_LEFT + across + 76, 30, 14, tall), transform=axes.transData)
    ends = "both" if log else "max"
    figure.colorbar(drawn, cax=bar, extend=ends).set_label("standard deviation")
    if log:
        log_ticks(bar.yaxis, np.array([low, high]))
    return figure


def _group(
    axes: "Axes",
    group: Sequence[CellMaps],
    size: tuple[int, int],
    y: int,
    scale: tuple[float, float, bool],
    right: int,
) -> Any:
    """One row of images and a row of maps for every cell; returns what was drawn last."""
    from matplotlib.colors import LogNorm, Normalize

    low, high, log = scale
    drawn: Any = None
    axes.text(_LEFT - 10, y + size[1] / 2, "images", ha="right", va="center", color="0.45", size=8)
    for column, image in enumerate(group[0].images):
        put(axes, picture(image), _LEFT + column * (size[0] + GAP), y, size)
    for row, cell in enumerate(group, start=1):
        top = y + row * (size[1] + GAP)
        place: dict[str, Any] = {"va": "center", "size": 8}
        lines = [part.replace("$", r"\$") for part in cell.name.split("\n")]
        axes.text(_LEFT - 10, top + size[1] / 2, "\n".join(lines), ha="right", **place)
        for column, values in enumerate(cell.maps):
            norm = LogNorm(low, high) if log else Normalize(low, high)
            values = np.maximum(values, low) if log else values  # 0 has no logarithm
            where = _LEFT + column * (size[0] + GAP), top, size
            drawn = put(axes, values, *where, cmap=MAP_COLOURS, norm=norm)
        spread = float(np.nanmean(cell.maps)) if np.isfinite(cell.maps).any() else np.nan
        axes.text(right, top + size[1] / 2, f"{spread:.2g}", **place)
    return drawn
