"""How every figure is laid out: a caption with the conditions, sheets in whole pixels."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.style import CAPTION, DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

GAP = 4
NARROWEST = 560
# Classes with a row, a line or a box of their own; more cannot be told apart.
MOST_CLASSES = 20


def frame(width: int, height: int, title: str, caption: str) -> tuple["Figure", float]:
    """A figure with a wrapped caption below; its title is kept, and not drawn.

    Args:
        width: pixels; made wider when below ``NARROWEST``.
        height: pixels of the body above the caption.
        title: what is seen, a few words: for a page's or a paper's own heading.
        caption: how it was made and how to read it.

    Returns:
        The figure and the caption's share of its height.
    """
    from matplotlib.figure import Figure

    width = max(width, NARROWEST)
    lines = textwrap.wrap(caption, int((width - 24) / 7.7), break_on_hyphens=False)
    footer = 14 + 17 * len(lines) if lines else 0
    total = height + footer
    figure = Figure((width / DPI, total / DPI), dpi=DPI)
    figure.set_label(title)
    place: dict[str, Any] = {"size": 8, "color": "0.35", "va": "top", "linespacing": 1.25}
    figure.text(12 / width, (footer - 6) / total, "\n".join(lines), gid=CAPTION, **place)
    return figure, footer / total


def sheet(width: int, height: int, title: str, caption: str) -> tuple["Figure", "Axes"]:
    """A figure for images; its one axes counts pixels from the top left."""
    figure, foot = frame(width, height, title, caption)
    axes = figure.add_axes((0, foot, 1, 1 - foot))
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
    """A figure for curves with a grid of axes, ``(rows, columns)``, above the caption."""
    figure, foot = frame(width, height, title, caption)
    body = (0, foot, 1, 1 - foot)
    figure.set_layout_engine("constrained", rect=body, w_pad=0.08, h_pad=0.06)
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
    """Draw ``pixels`` with their top left corner at ``(x, y)`` and return the drawn image.

    A thin grey line around them, one pixel wide and covering none, parts white from the page.
    """
    from matplotlib.patches import Rectangle

    line: dict[str, Any] = {"edgecolor": "0.7", "linewidth": 72 / DPI, "zorder": 3}
    exact: dict[str, Any] = {"antialiased": False, "snap": False}
    around = Rectangle((x - 0.5, y - 0.5), size[0] + 1, size[1] + 1, fill=False, **line, **exact)
    axes.add_patch(around)
    extent = (x, x + size[0], y + size[1], y)
    # "none": nearest pixels on a screen, the image's own pixels in a vector file.
    return axes.imshow(pixels, extent=extent, aspect="auto", interpolation="none", **show)


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


def ceiling(values: np.ndarray) -> float:
    """Upper end of a colour scale: 99.9 % of the pixels lie below; never 0."""
    finite = values[np.isfinite(values)]
    return (float(np.quantile(finite, 0.999)) if finite.size else 1.0) or 1e-12


def descending(values: Tensor) -> np.ndarray:
    """Numbers of the values, the highest first, infinite ones in their places; NaN comes last."""
    given = values.detach().cpu().double().numpy()
    missing = np.isnan(given)
    return np.lexsort((np.where(missing, 0, -given), missing))


def without_score(count: int) -> str:
    """A sentence about images whose score is NaN, for a caption; nothing where there are none."""
    if not count:
        return ""
    return f"{count} image{'s have' if count > 1 else ' has'} no score (NaN). "


def image_range(samples: "Samples") -> str:
    """Where the images lie, and so the unit of a map."""
    return {"model": "[-1, 1]", "unit": "[0, 1]"}[samples.units]


def bar_label(samples: "Samples") -> str:
    """Beside the colour bar of maps: what the colours are, and in which unit."""
    return f"standard deviation\n(images in {image_range(samples)})"


def conditions_of(settings: Mapping[str, Any]) -> str:
    """Data, model, sampler and posterior of a run in words, as far as ``settings`` has them."""
    if not settings:
        return ""
    prediction = f" ({settings['prediction']})" if "prediction" in settings else ""
    where = str(settings.get("model.path") or "").rstrip("/").rpartition("/")[2]
    named_model = " ".join(str(name) for name in (settings.get("model"), where) if name)
    model = f"{named_model}{prediction}" if named_model else None
    named = {"data": None, "model": None, "solver.name": None, "seed": "seed"}
    steps = f", {settings['solver.num_steps']} steps" if "solver.num_steps" in settings else ""
    given = {**settings, "model": model}
    if "solver.name" in settings:
        start = "solver.options."
        options = [
            f"{k.removeprefix(start)} {v}" for k, v in settings.items() if k.startswith(start)
        ]
        own = f" ({', '.join(options)})" if options else ""
        given["solver.name"] = f"{settings['solver.name']}{own}{steps}"
    parts = [
        f"{word} {given[name]}" if word else str(given[name])
        for name, word in named.items()
        if given.get(name) is not None
    ]
    if "structure" in settings:
        parts.append(f"posterior {settings['structure']}")
    for name in ("sigma_noise", "prior_precision"):
        if name in settings:
            parts.append(f"{name} {settings[name]:.4g}")
    if "n_eff" in settings:
        parts.append(f"N_eff {settings['n_eff']:,.0f}")
    return ", ".join(part.replace(" ", "\u00a0") for part in parts)


def estimator_of(settings: Mapping[str, Any]) -> str | None:
    """What made the maps of a run, and what was asked for if it is not that."""
    name, asked = (settings.get(f"uncertainty.{key}") for key in ("name", "instead_of"))
    return f"{name}, in place of {asked}" if asked else name


def conditions(samples: "Samples", settings: Mapping[str, Any] | None = None) -> str:
    """What made the samples and their maps.

    Args:
        samples: say the estimator, NFE and N.
        settings: of the run, flat, as its row in HPARAMS has them.
    """
    settings = settings or {}
    picked = [name for name in ("numbers", "labels") if settings.get(f"uncertainty.{name}")]
    own = f"estimator {samples.estimator}, NFE\u00a0{samples.nfe}, N\u00a0{len(samples.images)}"
    own += f", chosen by uncertainty.{picked[0]}" if picked else ""
    return "; ".join(part for part in (conditions_of(settings), own) if part)


def map_conditions(samples: "Samples", settings: Mapping[str, Any] | None = None) -> str:
    """The conditions and whatever is wrong with the variances."""
    text = conditions(samples, settings)
    negative = (samples.variance < 0).double().mean().item()
    if negative:
        text += f"; {100 * negative:.2g} % of all variances are negative and count as 0 in a map"
    broken = int((~samples.variance.isfinite()).flatten(1).any(1).sum())
    return text + (f"; {broken} images have variances that are not finite" if broken else "")
