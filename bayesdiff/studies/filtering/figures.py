"""Figures of what selections by score gain over random ones."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.report.charts import three_digits
from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import (
    GAP,
    cell_size,
    chart,
    descending,
    picture,
    put,
    sheet,
    standard_deviation,
    without_score,
)
from bayesdiff.report.style import MAP_COLOURS, look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

SHOWN = 20  # images on each side
COLUMNS = 4
MARK = "#d62728"  # frames of bad images
_CURVES = 4  # the best scores, beside the run's own and a random one
# These look alike in every figure of every run; other scores take what is left.
_KNOWN = (
    "members.joint", "members.predictive_entropy", "members.mutual_information",
    "members.log_det", "members.semantic_entropy", "classifier.class_entropy", "real.realism",
    "published.sum",
)  # fmt: skip
_RANDOM: dict[str, Any] = {"color": "0.5", "linestyle": ":", "marker": ""}


def every(
    results: Mapping[str, Any],
    samples: "Samples",
    scores: Mapping[str, Tensor],
    name: str,
    conditions: str = "",
) -> Iterator[tuple[str, "Figure"]]:
    """All figures of a filtering.

    Args:
        results: its numbers.
        samples: one pool.
        scores: of its images, by name.
        name: of the run's estimator.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    own, best = f"{name}.sum", best_score(results)
    yield "filtering/z_by_score", z_by_score(results, own, conditions)
    yield "filtering/gain_over_keep", gain_over_keep(results, own, conditions)
    yield (
        "filtering/kept_and_discarded",
        kept_and_discarded(samples, scores[own], own, conditions),
    )
    if best in scores and best != own:
        yield (
            "filtering/kept_and_discarded_by_best",
            kept_and_discarded(samples, scores[best], best, conditions),
        )


def best_score(results: Mapping[str, Any]) -> str:
    """The score with the highest mean z, within classes where there are any."""
    keep = results["conditions"]["main_keep"]
    rows = [row for row in results["over_seeds"] if row["keep"] == keep]
    rows = [row for row in rows if row["mode"] == rows[-1]["mode"]]
    return max(rows, key=lambda row: row["z"] if isfinite(row["z"]) else -np.inf)["score"]


def score_looks(results: Mapping[str, Any], own: str) -> dict[str, dict[str, Any]]:
    """How each score that has a curve is drawn, the same in every figure."""
    modes = list(dict.fromkeys(row["mode"] for row in results["over_seeds"]))
    drawn = [name for mode in modes for name in _curves(results, mode, own)]
    others = sorted({*drawn} - {own, "random", *_KNOWN})
    places = {name: place for place, name in enumerate((own, *_KNOWN, *others))}
    return {name: _RANDOM if name == "random" else look(places[name]) for name in drawn}


def _curves(results: Mapping[str, Any], mode: str, own: str) -> list[str]:
    """Scores with a curve: the run's own, those that gain most over all shares, a random one."""
    totals: dict[str, float] = {}
    for row in (row for row in results["over_seeds"] if row["mode"] == mode):
        totals[row["score"]] = totals.get(row["score"], 0) + row["fid_gain"]
    best = sorted(totals, key=lambda name: -totals[name])[:_CURVES]
    return [name for name in dict.fromkeys([own, *best, "random"]) if name in totals]


@style()
def z_by_score(results: Mapping[str, Any], own: str = "", conditions: str = "") -> "Figure":
    """Gain in FID of every score, in standard deviations of random choices, in both modes."""
    keep, seeds = results["conditions"]["main_keep"], len(results["conditions"]["seeds"])
    rows = [row for row in results["over_seeds"] if row["keep"] == keep]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    within = {row["score"]: row["z"] for row in rows if row["mode"] == modes[-1]}
    names = sorted(within, key=lambda name: within[name])
    over = f"mean over {seeds} seeds with its 95 % interval" if seeds > 1 else "one seed"
    caption = (
        f"Best {keep:.0%} of {results['conditions']['num_images']} images kept; {over}. z: gain "
        "in FID over random choices, in their standard deviations, linear up to 3 and logarithmic "
        "beyond; shaded: below 2. Markers in colour: as in the figure of the gain over the share "
        f"kept. Negative variances count as 0. {conditions}"
    )
    size = 900, 90 + 17 * len(names)
    figure, axes = chart(*size, "Gain in FID by score", caption, 1, len(modes), sharey=True)
    looks = score_looks(results, own)
    for panel, mode in zip(axes[0], modes, strict=True):
        found = {row["score"]: row for row in rows if row["mode"] == mode}
        for place, name in enumerate(names):
            row, how = found[name], looks.get(name, {})
            how = {"color": how.get("color", "0.35"), "marker": how.get("marker") or "o"}
            panel.plot([row["z_low"], row["z_high"]], [place, place], color="0.6", linewidth=1)
            panel.plot(row["z"], place, markersize=6 if name in looks else 4, **how)
        panel.axvspan(-2, 2, color="0.93", zorder=0)
        panel.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        panel.set(title=_title(mode), xlabel="z", ylim=(-1, len(names)))
        _decades(panel)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    return figure


def _decades(panel: "Axes") -> None:
    """A symmetric logarithmic axis with plain numbers."""
    panel.set_xscale("symlog", linthresh=3)
    ends = panel.get_xlim()
    ticks = [sign * tick for tick in (1, 3, 10, 30, 100, 300, 1000) for sign in (-1, 1)]
    ticks = sorted(tick for tick in (0, *ticks) if ends[0] <= tick <= ends[1] and tick**2 != 1)
    panel.set_xticks(ticks, [f"{tick:g}".replace("-", "\u2212") for tick in ticks])
    panel.set_xticks([], minor=True)


def _title(mode: str) -> str:
    return {"per_class": "kept within classes", "global": "kept over all classes"}.get(mode, mode)


@style()
def gain_over_keep(results: Mapping[str, Any], own: str, conditions: str = "") -> "Figure":
    """Gain in FID over the share kept, for the best scores and the run's own."""
    rows, seeds = results["over_seeds"], len(results["conditions"]["seeds"])
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    bars = f"bars: 95 % intervals over {seeds} seeds; " if seeds > 1 else "one seed; "
    caption = (
        "Gain: FID of random choices of the same size minus that of the kept images, mean over "
        f"seeds; {bars}in each panel its {_CURVES} best scores, the run's own, and a random one. "
        f"{conditions}"
    )
    size = 980, 380
    figure, axes = chart(*size, "Gain over the share kept", caption, 1, len(modes), sharey=True)
    looks = score_looks(results, own)
    for panel, mode in zip(axes[0], modes, strict=True):
        names = _curves(results, mode, own)
        for place, name in enumerate(names):
            found = [r for r in rows if (r["mode"], r["score"]) == (mode, name)]
            shift = 0.006 * (place - (len(names) - 1) / 2)
            _gain_curve(panel, sorted(found, key=lambda r: r["keep"]), looks[name], shift)
        panel.axhline(0, color="0.5", linewidth=0.8, zorder=0)
        panel.set(title=_title(mode), xlabel="share kept")
    axes[0, 0].set_ylabel("gain in FID")
    _legend(figure, looks)
    return figure


def _gain_curve(
    panel: "Axes", rows: Sequence[Mapping[str, Any]], how: Mapping[str, Any], shift: float
) -> None:
    """One score's gains with their intervals, moved aside a little so that bars stay apart."""
    x = [row["keep"] + shift for row in rows]
    panel.plot(x, [row["fid_gain"] for row in rows], **how)
    if how is not _RANDOM:
        low, high = (
            [row.get(f"fid_gain_{end}", np.nan) for row in rows] for end in ("low", "high")
        )
        panel.vlines(x, low, high, color=how["color"], linewidth=0.8, alpha=0.7)


def _legend(figure: "Figure", looks: Mapping[str, Mapping[str, Any]]) -> None:
    """One for all panels, beside them."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=name, **how) for name, how in looks.items()]
    figure.legend(handles=lines, loc="outside right upper")


@style()
def kept_and_discarded(
    samples: "Samples", scores: Tensor, score: str, conditions: str = ""
) -> "Figure":
    """The least uncertain images on the left, the most uncertain on the right, with their maps."""
    left_out = int(scores.isnan().sum())
    order = torch.from_numpy(descending(scores)[: len(scores) - left_out][::-1].copy())
    count = min(SHOWN, len(order) // 2)
    columns = min(COLUMNS, count)
    size = cell_size(samples.images, 44)
    side = columns * (2 * (size[0] + GAP) + 8)
    tall = size[1] + 22
    groups = (
        (f"Kept first: lowest {score}", order[:count]),
        (f"Discarded first: highest {score}", order.flip(0)[:count]),
    )
    caption = (
        f"The {count} images with the lowest and the {count} with the highest {score} of "
        f"{len(scores)}, each with its map beside it and its score below. Maps: standard "
        f"deviation, one colour scale for all. {without_score(left_out)}{conditions}"
    )
    left, gap, top = 12, 28, 34
    width, height = left + 2 * side + gap + 96, top + -(-count // columns) * tall + 6
    figure, axes = sheet(width, height, f"First kept and first discarded by {score}", caption)
    chosen = order[:count].tolist() + order.flip(0)[:count].tolist()
    high = ceiling(standard_deviation(samples.variance[chosen]))
    for place, (name, indices) in enumerate(groups):
        x = left + place * (side + gap)
        axes.text(x, top - 10, name, weight="bold", va="bottom")
        drawn = with_maps(axes, samples, scores, indices.tolist(), (x, top), size, high)
    bar = axes.inset_axes((left + 2 * side + gap, top, 14, min(height - top - 12, 240)),
                          transform=axes.transData)  # fmt: skip
    figure.colorbar(drawn, cax=bar, extend="max").set_label("standard deviation")
    return figure


def with_maps(
    axes: "Axes",
    samples: "Samples",
    scores: Tensor,
    indices: Sequence[int],
    at: tuple[int, int],
    size: tuple[int, int],
    high: float,
    marked: Tensor | None = None,
) -> Any:
    """Images, maps and scores in rows, marked ones framed; returns what was drawn last."""
    from matplotlib.patches import Rectangle

    columns = min(COLUMNS, len(indices))
    drawn = None
    for place, index in enumerate(indices):
        row, column = divmod(place, columns)
        x = at[0] + column * (2 * (size[0] + GAP) + 8)
        y = at[1] + row * (size[1] + 22)
        put(axes, picture(samples.images[index], samples.units), x, y, size)
        of = standard_deviation(samples.variance[index])
        scale = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": high}
        drawn = put(axes, of, x + size[0] + GAP, y, size, **scale)
        if marked is not None and marked[index]:
            frame = Rectangle((x - 1, y - 1), size[0] + 2, size[1] + 2, fill=False, zorder=4)
            frame.set(edgecolor=MARK, linewidth=2)
            axes.add_patch(frame)
        middle = x + size[0] + GAP / 2
        value = three_digits(float(scores[index]))
        axes.text(middle, y + size[1] + 3, value, ha="center", va="top", size=8)
    return drawn


def headlines(results: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """Gains over chance at the main share, within classes where there are any, over all seeds.

    Of the sum of the run's own map, of the members' joint score, and of the best score, which
    another run may have chosen otherwise.

    Args:
        results: of the study.
        name: of the run's own estimator.
    """
    keep = results["conditions"]["main_keep"]
    rows = [row for row in results["over_seeds"] if row["keep"] == keep]
    by_score = {row["score"]: row for row in rows if row["mode"] == rows[-1]["mode"]}
    shown = {each: each for each in (f"{name}.sum", "members.joint")}
    shown["best"] = results.get("best", "")
    return {
        f"{label}/{value}@{keep:g}": by_score[score].get(value)
        for label, score in shown.items()
        if score in by_score
        for value in ("z", "fid_gain", "cmmd_gain")
    }
