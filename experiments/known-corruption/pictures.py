"""Figures of the study: AUROC by score, and the images of the affected classes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.patches import Rectangle

from bayesdiff.report.layout import GAP, cell_size, chart, picture, put, sheet
from bayesdiff.report.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a map's many scores, these; results.json has all.
MAP_SCORES = ("sum", "mean_log", "patch_max", "percentile_90")
MAPS = ("refined", "linearised", "ensemble", "published")
TRUTHS = (("auroc", "interval", "C0"), ("wrong_auroc", "wrong_interval", "C1"))


@style()
def by_score(
    flat: Mapping[str, Any], scores: Sequence[str], cases: Mapping[str, bool], seeds: int
) -> "Figure":
    """AUROC of every score, a panel for every corruption.

    Args:
        flat: means and intervals.
        scores: all of them.
        cases: corruptions, and whether they made enough wrong images to look for.
        seeds: how many.
    """
    names = [name for name in scores if _is_shown(name)]
    order = {name: sum(flat[f"{c}.{name}.auroc"] for c in cases) for name in names}
    names.sort(key=lambda name: order[name])
    over = f"Mean over {seeds} seeds with its 95 % interval" if seeds > 1 else "One seed"
    caption = (
        f"{over}. Blue dots: images asked for an affected class; orange squares: images in "
        "which a judge trained on clean data sees another class than was asked for, where there "
        "are enough of them; grey: the same classes as blue, with a network trained on clean data."
    )
    figure, axes = chart(
        1150, 120 + 17 * len(names), "AUROC by score", caption, 1, len(cases), sharey=True
    )
    for panel, case in zip(axes[0], cases, strict=True):
        for place, name in enumerate(names):
            panel.plot(flat[f"{case}.{name}.clean_auroc"], place, "|", color="0.5", markersize=8)
            for offset, (truth, between, colour) in zip((0.18, -0.18), TRUTHS, strict=True):
                if truth == "wrong_auroc" and not cases[case]:
                    continue
                low, high = flat[f"{case}.{name}.{between}"]
                height = place + offset
                panel.plot(
                    [max(low, 0), min(high, 1)], [height] * 2, color=colour, linewidth=1, alpha=0.4
                )
                value = flat[f"{case}.{name}.{truth}"]
                mark = "o" if truth == "auroc" else "s"
                panel.plot(value, height, mark, color=colour, markersize=3.5)
        panel.axvline(0.5, color="0.6", linewidth=0.8)
        panel.axvline(0.9, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(
            title=case.replace("_", "\n"), xlabel="AUROC", xlim=(0, 1.02), ylim=(-1, len(names))
        )
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    return figure


def _is_shown(name: str) -> bool:
    family, _, kind = name.partition(".")
    return family not in MAPS or kind in MAP_SCORES


@style()
def first_images(shown: Mapping[str, tuple[Any, Sequence[str]]], count: int) -> "Figure":
    """The first images of each affected class, in order, framed where the judge disagrees.

    Args:
        shown: by name, a case with ``samples``, ``labels`` and ``wrong``, and its classes.
        count: images in a row.
    """
    rows = [(name, case, label) for name, (case, labels) in shown.items() for label in labels]
    size = width, height = cell_size(rows[0][1].samples.images, 32)
    left, tall = 220, height + 3 * GAP
    caption = (
        f"The first {count} images of every affected class, in order. A red frame: a judge "
        "trained on clean data sees another class. Clean: trained without corruption."
    )
    across = left + count * (width + 2 * GAP)
    figure, axes = sheet(across, tall * len(rows) + GAP, "First images", caption)
    for row, (name, case, label) in enumerate(rows):
        y = row * tall + GAP
        axes.text(left - 8, y + height / 2, f"{name}, {label}", ha="right", va="center")
        chosen = (case.labels == case.data.classes.index(label)).nonzero().flatten()[:count]
        for column, index in enumerate(chosen.tolist()):
            x = left + column * (width + 2 * GAP)
            put(axes, picture(case.samples.images[index]), x, y, size)
            if case.wrong[index]:
                frame = Rectangle((x, y), *size, fill=False, edgecolor="red", linewidth=2)
                axes.add_patch(frame)
    return figure
