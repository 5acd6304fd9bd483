"""Figures of what selections by score gain over random ones."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.report.layout import GAP, cell_size, chart, picture, put, sheet, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.uncertainty.samples import Samples

_SHOWN = 48  # images on each side
_COLUMNS = 12
_CURVES = 6  # scores whose curves are drawn, the best and the run's own among them


def every(
    results: Mapping[str, Any], samples: "Samples", doubt: Tensor, name: str
) -> Iterator[tuple[str, "Figure"]]:
    """All figures of a filtering.

    Args:
        results: its numbers.
        samples: one pool.
        doubt: the run's own score of its images.
        name: of the run's estimator.

    Yields:
        Tag and figure.
    """
    yield "filtering/z_by_score", z_by_score(results)
    yield "filtering/gain_over_keep", gain_over_keep(results, f"{name}.sum")
    yield "filtering/kept_and_discarded", kept_and_discarded(samples, doubt, f"{name}.sum")


@style()
def z_by_score(results: Mapping[str, Any]) -> "Figure":
    """Gain in FID of every score, in standard deviations of random choices, in both modes."""
    keep, seeds = results["conditions"]["main_keep"], len(results["conditions"]["seeds"])
    rows = [row for row in results["over_seeds"] if row["keep"] == keep]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    within = {row["score"]: row["z"] for row in rows if row["mode"] == modes[-1]}
    names = sorted(within, key=lambda name: within[name])
    over = f"mean over {seeds} seeds with its 95 % interval" if seeds > 1 else "one seed"
    caption = (
        f"Best {keep:.0%} kept; {over}. z: gain in standard deviations of random choices, linear "
        "up to 3 and logarithmic beyond; blue gains, red loses; shaded: below 2. Negative "
        "variances count as 0."
    )
    figure, axes = chart(
        1100, 150 + 17 * len(names), "Gain in FID by score", caption, 1, len(modes), sharey=True
    )
    for panel, mode in zip(axes[0], modes, strict=True):
        own = {row["score"]: row for row in rows if row["mode"] == mode}
        for place, name in enumerate(names):
            row = own[name]
            panel.plot([row["z_low"], row["z_high"]], [place, place], color="0.6", linewidth=1)
            panel.plot(row["z"], place, "o", markersize=4, color="C0" if row["z"] > 0 else "C3")
        panel.axvspan(-2, 2, color="0.9", zorder=0)
        panel.set(title=mode.replace("_", " "), xlabel="z", ylim=(-1, len(names)))
        panel.set_xscale("symlog", linthresh=3)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    return figure


@style()
def gain_over_keep(results: Mapping[str, Any], own: str) -> "Figure":
    """Gain in FID over the share kept, for the best scores and the run's own."""
    rows = results["over_seeds"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    caption = (
        "Mean over seeds of the FID of random choices minus that of the kept images; in each "
        f"panel its {_CURVES} best scores, the run's own, and a random one."
    )
    figure, axes = chart(1000, 460, "Gain over the share kept", caption, 1, len(modes))
    for panel, mode in zip(axes[0], modes, strict=True):
        of_mode = [row for row in rows if row["mode"] == mode]
        totals: dict[str, float] = {}
        for row in of_mode:
            totals[row["score"]] = totals.get(row["score"], 0) + row["fid_gain"]
        best = sorted(totals, key=lambda name: -totals[name])[:_CURVES]
        for name in dict.fromkeys([own, *best, "random"]):
            points = sorted((r["keep"], r["fid_gain"]) for r in of_mode if r["score"] == name)
            panel.plot(*zip(*points, strict=True), ".-", label=name)
        panel.axhline(0, color="0.5", linewidth=0.8)
        panel.set(title=mode.replace("_", " "), xlabel="share kept", ylabel="gain in FID")
        panel.legend(fontsize=7)
    return figure


@style()
def kept_and_discarded(samples: "Samples", doubt: Tensor, score: str) -> "Figure":
    """The least doubtful images on the left, the most doubtful on the right."""
    count = min(_SHOWN, len(doubt) // 2)
    order = doubt.argsort()
    columns = min(_COLUMNS, count)
    size = width, height = cell_size(samples.images, 40)
    rows = -(-count // columns)
    side = columns * (width + GAP)
    figure, axes = sheet(
        2 * side + 4 * GAP,
        rows * (height + GAP),
        f"First kept and first discarded by {score}",
        f"Left: the {count} least doubtful of {len(doubt)} images; right: the most doubtful.",
    )
    for offset, chosen in ((0, order[:count]), (side + 4 * GAP, order.flip(0)[:count])):
        for place, index in enumerate(chosen.tolist()):
            row, column = divmod(place, columns)
            x, y = offset + column * (width + GAP), row * (height + GAP)
            put(axes, picture(samples.images[index], samples.units), x, y, size)
    return figure
