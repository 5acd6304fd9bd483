"""The look of every figure: one style, a header with the conditions, sheets in whole pixels."""

import textwrap
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.disk import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

# A power of two: pixels / DPI * DPI is exact, so no image loses a row to rounding.
DPI = 128
GAP = 4
NARROWEST = 640
# Classes with a row, a line or a box of their own; more cannot be told apart.
MOST_CLASSES = 20


LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def style() -> Generator[None]:
    """One look for all figures; works as a decorator too."""
    import matplotlib

    with matplotlib.rc_context():
        # A user's matplotlibrc must not change a report.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


@style()
def save(figure: "Figure", path: str | Path) -> Path:
    """Write ``figure`` as PNG; the same figure gives the same bytes."""
    path = Path(path)
    options: dict[str, Any] = {"dpi": DPI, "format": "png", "metadata": {"Software": None}}
    write_atomic(path, lambda file: figure.savefig(file, **options))
    return path


def frame(width: int, height: int, title: str, caption: str) -> tuple["Figure", float]:
    """A figure with a title and a wrapped caption.

    Args:
        width: pixels; made wider when below ``NARROWEST``.
        height: pixels of the body below the header.
        title: what is seen, a few words.
        caption: how it was made and how to read it.

    Returns:
        The figure and the body's share of its height.
    """
    from matplotlib.figure import Figure

    width = max(width, NARROWEST)
    titles, captions = textwrap.wrap(title, width // 11), textwrap.wrap(caption, width // 8)
    header = 18 + 24 * len(titles) + 18 * len(captions)
    total = height + header
    figure = Figure((width / DPI, total / DPI), dpi=DPI)
    left, top = 10 / width, 1 - 8 / total
    figure.text(left, top, "\n".join(titles), size=11, weight="bold", va="top")
    top -= (4 + 24 * len(titles)) / total
    figure.text(left, top, "\n".join(captions), size=8, color="0.35", va="top")
    return figure, height / total


def sheet(width: int, height: int, title: str, caption: str) -> tuple["Figure", "Axes"]:
    """A figure for images; its one axes counts pixels from the top left below the header."""
    figure, share = frame(width, height, title, caption)
    axes = figure.add_axes((0, 0, 1, share))
    axes.axis("off")
    axes.set(xlim=(0, max(width, NARROWEST)), ylim=(height, 0), autoscale_on=False)
    return figure, axes


def chart(
    width: int,
    height: int,
    title: str,
    caption: str,
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> tuple["Figure", np.ndarray]:
    """A figure for curves with a grid of axes, ``(rows, columns)``, below the header."""
    figure, share = frame(width, height, title, caption)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, share), w_pad=0.08, h_pad=0.06)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def picture(image: Tensor, units: str = "model") -> np.ndarray:
    """``(C, H, W)`` in its units to ``(H, W, 3)`` in [0, 1]; other than 3 channels: their mean."""
    image = image.detach().cpu().double().nan_to_num()
    image = (image if units == "unit" else (image + 1) / 2).clamp(0, 1)
    image = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


def cell_size(images: Tensor, target: int) -> tuple[int, int]:
    """Width and height of a cell: a whole multiple of the image, near ``target`` pixels."""
    height, width = images.shape[-2:]
    scale = max(1, round(target / max(height, width)))
    return scale * width, scale * height


def put(
    axes: "Axes", pixels: np.ndarray, x: int, y: int, size: tuple[int, int], **show: Any
) -> Any:
    """Draw ``pixels`` with their top left corner at ``(x, y)`` and return the drawn image."""
    extent = (x, x + size[0], y + size[1], y)
    return axes.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest", **show)


def class_name(label: Tensor | int, classes: Sequence[str]) -> str:
    """Name of a class, or its number where there is no name."""
    name = str(classes[int(label)]) if 0 <= int(label) < len(classes) else str(int(label))
    # A dollar sign in a class name is no formula.
    return name.replace("$", r"\$")


def fit(text: str, width: int) -> str:
    """``text`` cut to about ``width`` pixels."""
    most = max(2, width // 8)
    return text if len(text) <= most else text[: most - 1] + "…"


def by_class(
    labels: Tensor | None, count: int, classes: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """Name and sample indices of each class; one group without a name if there are too many."""
    values = np.unique(labels.cpu().numpy()) if labels is not None else np.empty(0, int)
    if labels is None or len(values) > MOST_CLASSES:
        return [("all samples", np.arange(count))]
    return [(class_name(v, classes), np.flatnonzero(labels.cpu().numpy() == v)) for v in values]


def standard_deviation(variance: Tensor) -> np.ndarray:
    """Map in the image's own units, root of the channel mean, ``(..., C, H, W) -> (..., H, W)``.

    The published recursion can give negative variances; they count as 0 here.
    """
    return variance.detach().cpu().double().clamp(min=0).mean(-3).sqrt().numpy()


def image_range(samples: "Samples") -> str:
    """Where the images lie, and so the unit of a map."""
    return {"model": "[-1, 1]", "unit": "[0, 1]"}[samples.units]


def conditions(samples: "Samples") -> str:
    """What made the samples and their maps: estimator, NFE and N."""
    return f"estimator {samples.estimator}, NFE {samples.nfe}, N {len(samples.images)}"


def map_conditions(samples: "Samples") -> str:
    """The conditions and whatever is wrong with the variances."""
    text = conditions(samples)
    negative = (samples.variance < 0).double().mean().item()
    if negative:
        text += f"; {100 * negative:.2g} % of all variances are negative and count as 0 in a map"
    broken = int((~samples.variance.isfinite()).flatten(1).any(1).sum())
    return text + (f"; {broken} images have variances that are not finite" if broken else "")
