"""How the uncertainty of all cells of a sweep grows over t, in one plot."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bayesdiff.report.charts import log_ticks, spans_decades
from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

MOST_CELLS = 14  # lines that can be told apart


@dataclass(frozen=True)
class CellCurve:
    """How the uncertainty of one cell grows on its way from noise to data.

    Attributes:
        name: the cell's swept values.
        times: ``(S,)`` in [0, 1].
        summed: ``(S,)`` variance summed over an image, mean over images, images in [-1, 1].
    """

    name: str
    times: np.ndarray
    summed: np.ndarray

    @classmethod
    def of(cls, samples: "Samples", name: str) -> "CellCurve":
        """Of a cell's samples, as ``stored_samples`` gives them."""
        return cls(name, samples.times.numpy(), samples.summed.double().mean(1).numpy())


@style()
def over_time_figure(cells: Sequence[CellCurve], more: int, conditions: str) -> "Figure":
    """The summed variance of all cells over t in one plot, whatever their solvers and steps.

    Args:
        cells: at least one.
        more: cells that are not shown.
        conditions: how they were made.
    """
    caption = (
        "Variance summed over channels and pixels after each solver step, mean over a cell's "
        "images; t = 0 is noise, t = 1 data."
    )
    caption += f" {more} more cells are not shown." if more else ""
    caption += f" Conditions: {conditions}."
    figure, panels = chart(1000, 470, "Uncertainty over time", caption)
    axes = panels[0, 0]
    for place, cell in enumerate(cells):
        lines = textwrap.wrap(cell.name, 34, max_lines=4, placeholder=" …")
        every = max(len(cell.times) // 8, 1)
        label = "\n".join(lines).replace("$", r"\$")
        axes.plot(cell.times, cell.summed, label=label, markevery=every, **look(place))
    values = np.concatenate([cell.summed for cell in cells])
    positive = values[np.isfinite(values) & (values > 0)]
    if spans_decades(positive) and not (values < 0).any():
        axes.set_yscale("log")
        log_ticks(axes.yaxis, positive)
    axes.set(xlabel="solver time t", ylabel="summed variance (images in [-1, 1])")
    axes.set_xlim(0, 1.01)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
