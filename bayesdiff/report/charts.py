"""Curves and distributions; each carries its conditions in its caption."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.layout import by_class, chart, fit, image_range, map_conditions
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from bayesdiff.metrics.validation import Validation
    from bayesdiff.uncertainty.samples import Samples

# So many curves have a colour of their own; of more, only the highest, middle and lowest do.
_EMPHASISED = 4
# Images of a class from which a box of quantiles says more than its points.
_FEW = 20
_PER_CLASS = {
    True: "Points: images of a class; line: their median.",
    False: "Boxes: middle half and median of a class, whiskers: 5 % to 95 %.",
}
_NAME = 110  # of a curve at its end at most, pixels


def spans_decades(values: np.ndarray) -> bool:
    """Whether all values are positive and the largest is 50 times the smallest or more."""
    return values.size > 1 and values.min() > 0 and values.max() >= 50 * values.min()


def log_ticks(axis: "Axis", values: np.ndarray) -> None:
    """Plain numbers along a logarithmic axis, five or so, however many decades it spans."""
    from matplotlib.axis import YAxis
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    ratio, along_y = values.max() / values.min(), isinstance(axis, YAxis)
    if ratio < 8:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    elif ratio < (1e3 if along_y else 200):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    else:
        axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def three_digits(value: float) -> str:
    """A score below an image, trailing zeros kept: ``0.0230`` beside ``0.0231``."""
    return f"{value:#.3g}".rstrip(".")


def label_ends(
    axes: "Axes", ends: Sequence[tuple[float, float, str, Any]], room: float = 0.05
) -> None:
    """Names of curves beside their ends instead of a legend, moved apart where they collide.

    Args:
        axes: with their final limits and scales.
        ends: x, y, name and colour of each curve.
        room: for one name, as a share of the axes' height.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    place = [float(to_axes.transform((x, y))[1]) if np.isfinite(y) else 0.0 for x, y, _, _ in ends]
    order = np.argsort(place, kind="stable")
    spread = np.array(place)[order]
    # The nearest places in this order with room between them: means of what collides.
    steps = room * np.arange(len(spread))
    spread = _increasing(spread - steps) + steps
    spread += min(0, 1 - spread[-1]) if len(spread) else 0
    for index, height in zip(order, spread, strict=True):
        x, y, name, colour = ends[index]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0}
        axes.annotate(
            fit(name, _NAME),
            (x, y) if np.isfinite(y) else (x, axes.get_ylim()[0]),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            size=9,
            color=colour,
            arrowprops=line,
            annotation_clip=False,
        )


def _increasing(values: np.ndarray) -> np.ndarray:
    """The nearest sequence that does not decrease, in least squares."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, n), (two, m) = blocks[-2:]
            blocks[-2:] = [((one * n + two * m) / (n + m), n + m)]
    return np.concatenate([np.full(n, value) for value, n in blocks] or [np.empty(0)])


@style()
def summed_over_time(
    samples: "Samples",
    classes: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    units: str | None = None,
) -> "Figure":
    """Variance summed over channels and pixels after each step: mean and quartiles per class.

    Args:
        samples: with their summed variance.
        classes: class names.
        settings: of the run, for the caption.
        units: of what is summed; None for those of the images.
    """
    times, summed = samples.times.cpu().numpy(), samples.summed.detach().cpu().double().numpy()
    groups = by_class(samples.labels, summed.shape[1], classes)
    means = [np.nanmean(summed[:, chosen], axis=1) for _, chosen in groups]
    looks = _looks([mean[-1] for mean in means])
    more = (
        " In colour: the classes with the highest, the middle and the lowest mean at the end."
        if len(groups) > _EMPHASISED
        else ""
    )
    caption = (
        f"Line: mean of {'a class' if len(groups) > 1 else 'all samples'}, band: middle half of "
        f"the samples.{more} Conditions: {map_conditions(samples, settings)}."
    )
    figure, panels = chart(700, 440, "Summed variance over time", caption)
    axes = panels[0, 0]
    every = max(1, len(times) // 10)
    for (name, chosen), mean, how in zip(groups, means, looks, strict=True):
        axes.plot(times, mean, label=name, markevery=every, **how)
        if "marker" in how:
            low, high = np.nanquantile(summed[:, chosen], (0.25, 0.75), axis=1)
            axes.fill_between(times, low, high, color=how["color"], alpha=0.15, linewidth=0)
    units = units or f"images in {image_range(samples)}"
    axes.set(xlabel="solver time t", ylabel=f"summed variance ({units})")
    positive = summed[np.isfinite(summed) & (summed > 0)]
    if spans_decades(positive) and not (summed < 0).any():
        axes.set_yscale("log")
        log_ticks(axes.yaxis, positive)
    axes.margins(x=0.02)
    if len(groups) > 1:
        ends = zip(groups, means, looks, strict=True)
        label_ends(axes, [(times[-1], m[-1], name, h["color"]) for (name, _), m, h in ends])
    return figure


def _looks(ends: Sequence[float]) -> list[dict[str, Any]]:
    """How each curve is drawn: a few emphasised by colour, marker and line, the others grey."""
    if len(ends) <= _EMPHASISED:
        return [look(place) for place in range(len(ends))]
    order = np.argsort(-np.nan_to_num(np.array(ends)), kind="stable")
    chosen = {int(order[at]): place for place, at in enumerate((0, len(ends) // 2, -1))}
    grey = {"color": "0.55", "linewidth": 0.7}
    return [
        look(chosen[place]) | {"zorder": 3} if place in chosen else grey
        for place in range(len(ends))
    ]


@style()
def score_histogram(
    scores: Tensor,
    labels: Tensor | None,
    classes: Sequence[str],
    conditions: str = "",
    name: str = "score",
) -> "Figure":
    """Distribution of the image scores, for all samples and for each class.

    Args:
        scores: ``(B,)`` uncertainty of each image.
        labels: ``(B,)`` or None.
        classes: class names.
        conditions: what made the scores, for the caption.
        name: of the score with its unit, along the axis.
    """
    values = scores.detach().cpu().double().numpy()
    finite = values[np.isfinite(values)]
    groups = by_class(labels, len(values), classes) if labels is not None else []
    parts = [(fit(n, _NAME), values[i][np.isfinite(values[i])]) for n, i in groups]
    parts = [part for part in parts if part[1].size] if len(groups) > 1 else []
    parts = sorted(parts, key=lambda part: np.median(part[1]))
    broken = len(values) - len(finite)
    few = bool(parts) and min(part.size for _, part in parts) < _FEW
    caption = f"{_PER_CLASS[few]} " if parts else ""
    caption += (f"Conditions: {conditions}" if conditions else f"N {len(values)}") + (
        f"; {broken} not finite" if broken else ""
    )
    title, room = "Uncertainty scores of the samples", 50 + 28 * len(parts)
    split: dict[str, Any] = {"height_ratios": (220, room), "sharex": True} if parts else {}
    size = (640, 300 + (room if parts else 0))
    figure, panels = chart(*size, title, f"{caption}.", 2 if parts else 1, 1, **split)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    log = spans_decades(finite)
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    panels[0, 0].hist(finite, edges if high > low else 10, color="0.55")
    panels[0, 0].set(ylabel="samples", xscale="log" if log else "linear")
    panels[0, 0].yaxis.get_major_locator().set_params(integer=True)
    if log:
        log_ticks(panels[0, 0].xaxis, finite)
    if parts:
        _per_class(panels[1, 0], parts, few)
    panels[-1, 0].set(xlabel=name)
    return figure


def _per_class(axes: "Axes", parts: Sequence[tuple[str, np.ndarray]], few: bool) -> None:
    """A row for each class: its images as points where they are few, a box otherwise."""
    names, values = [name for name, _ in parts], [part for _, part in parts]
    places = range(1, len(parts) + 1)
    median: dict[str, Any] = {"color": look(1)["color"], "linewidth": 1.5}
    if few:
        for place, part in zip(places, values, strict=True):
            height = np.full(part.size, place)
            axes.plot(part, height, "o", color="0.4", alpha=0.6, markeredgewidth=0)
        middle = [float(np.median(part)) for part in values]
        axes.vlines(middle, [p - 0.35 for p in places], [p + 0.35 for p in places], **median)
        axes.set_yticks(places, names)
        axes.set_ylim(0.5, len(parts) + 0.5)
    else:
        how: dict[str, Any] = {"whis": (5, 95), "showfliers": False, "widths": 0.6}
        how |= {"orientation": "horizontal", "medianprops": median}
        axes.boxplot(values, tick_labels=names, **how)
    axes.grid(False, axis="y")


@style()
def validation_scatter(
    validation: "Validation", conditions: str = "", metrics: Mapping[str, float] | None = None
) -> "Figure":
    """Summed variance of each image against that of the reference; on the line they are equal.

    Args:
        validation: both sides.
        conditions: what made the maps, for the caption.
        metrics: of the comparison, ``validation/...`` with ``_low`` and ``_high``; written into
            the panel.
    """
    estimate, reference = (
        side.cpu().double().numpy() for side in (validation.estimate, validation.reference)
    )
    good = (estimate > 0) & (reference > 0) & np.isfinite(estimate * reference)
    hidden = len(good) - int(good.sum())
    caption = f"Each point is one of {len(good)} images; on the line both agree"
    caption += f"; {hidden} without a positive variance are not shown" if hidden else ""
    said = _agreement(metrics or {})
    caption += ". Brackets: bootstrap 95 % intervals over images" if said else ""
    caption += f". Conditions: {conditions}." if conditions else "."
    figure, panels = chart(560, 500, "Summed variance against a reference", caption)
    axes = panels[0, 0]
    axes.set(xscale="log", yscale="log", aspect="equal")
    axes.set(
        xlabel="summed variance, reference ensemble", ylabel="summed variance, this estimator"
    )
    if good.any():
        both = np.concatenate([estimate[good], reference[good]])
        ends = both.min() / 1.15, both.max() * 1.15
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.plot(reference[good], estimate[good], "o", alpha=0.8, markeredgewidth=0)
        axes.set(xlim=ends, ylim=ends)
        log_ticks(axes.xaxis, both)
        log_ticks(axes.yaxis, both)
    axes.set_title(said, loc="left", size=9, linespacing=1.4)
    return figure


def _agreement(metrics: Mapping[str, float]) -> str:
    """Ranks and ratio with their intervals, a line each."""
    rows = (
        ("rank of images", "image_rank", float),
        ("rank of pixels", "pixel_rank", float),
        ("variance over reference's", "log_ratio", np.exp),
    )
    lines = []
    for name, metric, of in rows:
        names = [f"validation/{metric}{end}" for end in ("", "_low", "_high")]
        if not all(each in metrics for each in names):
            continue
        value, low, high = (f"{of(metrics[each]):.2f}" for each in names)
        lines.append(f"{name} {value} [{low}, {high}]")
    return "\n".join(lines)
