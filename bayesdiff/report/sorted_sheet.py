"""All images in the order of a score, one block for each score or each cell of a sweep."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.charts import three_digits
from bayesdiff.report.layout import GAP, cell_size, descending, picture, put, sheet, without_score
from bayesdiff.report.style import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Images of one block, and of all; of more as many are shown, evenly over the ranks.
_MOST, _ALL = 200, 480
MOST_BLOCKS = 12
_COLUMNS = 10
_ACROSS = 2  # blocks side by side
_LEFT, _HEAD = 90, 48  # for the values, and for two lines of a heading


@dataclass(frozen=True)
class Block:
    """Images that are sorted together.

    Attributes:
        name: heading.
        images: ``(B, C, H, W)``.
        scores: ``(B,)``, higher is more uncertain.
        units: of the images, ``model`` or ``unit``.
    """

    name: str
    images: Tensor
    scores: Tensor
    units: str = "model"

    def order(self, most: int = _MOST) -> np.ndarray:
        """Numbers of the images that are shown, the highest score first; NaN comes last."""
        order = descending(self.scores)
        places = np.linspace(0, len(order) - 1, min(len(order), most)).round().astype(int)
        return order[places]


@style()
def sorted_images(blocks: Sequence[Block], conditions: str, score: str = "") -> "Figure":
    """Blocks of sorted images side by side.

    Args:
        blocks: at least one.
        conditions: what made the images, for the caption.
        score: by which all blocks are sorted; empty where their names say so.
    """
    size = cell_size(blocks[0].images, 40)
    columns = _COLUMNS if len(blocks) > 1 else 2 * _COLUMNS
    across = min(len(blocks), _ACROSS)
    most = min(_MOST if len(blocks) > 1 else 2 * _MOST, max(_ALL // len(blocks), columns))
    count = max(min(len(block.images), most) for block in blocks)
    rows = -(-count // columns)
    wide, tall = _LEFT + columns * (size[0] + GAP) + 16, _HEAD + rows * (size[1] + GAP) + 10
    whole = max(len(block.images) for block in blocks)
    shown = "all of them" if whole <= most else f"{most} of them, evenly over the ranks"
    by = f" by {score}," if score else ""
    nan = without_score(sum(int(block.scores.isnan().sum()) for block in blocks))
    caption = (
        f"{whole} images, {shown},{by} row by row from the most uncertain to the least; left of a "
        f"row: the score of its first image. {nan}Conditions: {conditions}."
    )
    down = -(-len(blocks) // across)
    figure, axes = sheet(across * wide, down * tall, "Images sorted by score", caption)
    for place, block in enumerate(blocks):
        y, x = divmod(place, across)
        _draw(axes, block, size, (x * wide, y * tall), columns, most)
    return figure


def _draw(
    axes: "Axes",
    block: Block,
    size: tuple[int, int],
    at: tuple[int, int],
    columns: int,
    most: int,
) -> None:
    """One block with its heading and a value for each row."""
    left, top = at[0] + _LEFT, at[1] + _HEAD
    width = columns * (size[0] + GAP)
    heading: dict[str, Any] = {"weight": "bold", "va": "bottom"}
    lines = textwrap.wrap(block.name, max(10, width // 9), max_lines=2, placeholder=" …")
    axes.text(left, top - 6, "\n".join(lines).replace("$", r"\$"), size=9, **heading)
    for place, index in enumerate(block.order(most)):
        row, column = divmod(place, columns)
        y = top + row * (size[1] + GAP)
        if column == 0:
            value = three_digits(float(block.scores[index]))
            axes.text(left - 8, y + size[1] / 2, value, ha="right", va="center", size=9)
        x = left + column * (size[0] + GAP)
        put(axes, picture(block.images[int(index)], block.units), x, y, size)
