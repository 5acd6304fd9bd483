"""What a guaranteed threshold keeps and discards, the bad images framed."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bayesdiff.report.charts import three_digits
from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import GAP, bar_label, cell_size, sheet, standard_deviation
from bayesdiff.report.style import style
from bayesdiff.studies.filtering.figures import COLUMNS, SHOWN, with_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.studies.filtering.guaranteed import Marked
    from bayesdiff.uncertainty.samples import Samples

TITLE = "Kept and discarded under the guarantee"


def under_guarantee(
    samples: "Samples", marked: "Marked", found: Mapping[str, Any], conditions: str = ""
) -> Iterator[tuple[str, "Figure"]]:
    """The figure of a guarantee.

    Args:
        samples: one pool.
        marked: its images that are known to be good or bad.
        found: results of the guarantee.
        conditions: of the run, for the caption.

    Yields:
        Tag and figure.
    """
    yield (
        "filtering/kept_and_discarded_by_guarantee",
        kept_and_bad(samples, marked, found, conditions),
    )


@style()
def kept_and_bad(
    samples: "Samples", marked: "Marked", found: Mapping[str, Any], conditions: str = ""
) -> "Figure":
    """The first images that are kept on the left, the first that are discarded on the right.

    Args:
        samples: one pool.
        marked: see ``under_guarantee``.
        found: see ``under_guarantee``.
        conditions: see ``under_guarantee``.
    """
    threshold = found["threshold"]
    keep = torch.zeros(len(marked.scores), dtype=torch.bool)
    if found["holds"]:
        keep = marked.scores <= threshold
    size = cell_size(samples.images, 44)
    side, tall = COLUMNS * (2 * (size[0] + GAP) + 8), size[1] + 22
    left, gap, top = 12, 28, 58
    most = min(SHOWN, max(int(keep.sum()), int((~keep).sum())))
    height = top + -(-most // COLUMNS) * tall + 6
    caption = _caption(found, conditions)
    figure, axes = sheet(left + 2 * side + gap + 112, height, TITLE, caption)
    axes.text(left, 14, _heading(found), weight="bold", va="center")
    high = ceiling(standard_deviation(samples.variance[marked.numbers]))
    scores = torch.full((len(samples.images),), torch.nan, dtype=torch.float64)
    scores[marked.numbers] = marked.scores
    bad = torch.zeros(len(samples.images), dtype=torch.bool)
    bad[marked.numbers] = marked.bad
    drawn: Any = None
    for place, (name, chosen) in enumerate((("Kept", keep), ("Discarded", ~keep))):
        x, count = left + place * (side + gap), int(chosen.sum())
        wrong = int((chosen & marked.bad).sum())
        said = f"{name}: {count} of {len(chosen)}, {wrong} of them bad"
        axes.text(x, top - 10, said, va="bottom")
        numbers = marked.numbers[chosen][:SHOWN].tolist()
        drawn = with_maps(axes, samples, scores, numbers, (x, top), size, high, bad) or drawn
    bar = axes.inset_axes((left + 2 * side + gap, top, 14, min(height - top - 12, 240)),
                          transform=axes.transData)  # fmt: skip
    figure.colorbar(drawn, cax=bar, extend="max").set_label(bar_label(samples))
    return figure


def _heading(found: Mapping[str, Any]) -> str:
    """Threshold, what was asked, and what was found on new noise."""
    asked = f"{found['asked']:.4g} good asked"
    if not found["holds"]:
        return f"Nothing is kept: no threshold of {found['score']} holds; {asked}"
    value = found["threshold"]
    rule = "every image" if value == torch.inf else f"{found['score']} up to {three_digits(value)}"
    new = found["new_noise"] or {"kept": 0}
    good = f", {1 - new['risk']:.3f} found on new noise" if new["kept"] else ""
    return f"Keep {rule}: {asked}{good}"


def _caption(found: Mapping[str, Any], conditions: str) -> str:
    """How to read it."""
    new = found["new_noise"]
    share = (
        f"On new noise {new['bad']} of {new['kept']} kept images are bad, {new['risk']:.3f} "
        f"[{new['risk_low']:.3f}, {new['risk_high']:.3f}]; of all, {new['risk_of_all']:.3f}. "
        if new and new["kept"]
        else ""
    )
    return (
        f"In the order of their numbers, each image with its map and its score; framed: bad, "
        f"{found['bad']}. The threshold is set on seed {found['calibration']['seed']} so that the "
        f"share of good images among the kept is at least {found['asked']:g} with probability "
        f"{1 - found['level']:g}. {share}{conditions}"
    )
