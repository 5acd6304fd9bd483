"""Figures and table lines of images that were resampled."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.report.layout import GAP, cell_size, chart, picture, put, sheet
from bayesdiff.report.style import look, style
from bayesdiff.report.table import cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Columns of the tables; those with an interval show it.
OF_DRAWS = (
    "time", "way", "gain", "over_isotropic", "success", "harm", "precision_gain",
    "feature_distance", "pixel_distance", "power", "fid",
)  # fmt: skip
OF_PICKS = (
    "time", "way", "among", "better", "gain", "over_chance", "over_isotropic", "success", "harm",
    "precision_gain", "fid",
)  # fmt: skip
_IMAGES = 8  # rows of a grid
_EACH = 4  # alternatives of every way in it
_CELL = 40
_FRESH = "fresh"  # the way that leaves no trajectory in its middle


def line(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """One line of a table: values with their intervals as text."""
    return {name.replace("_", " "): _value(row, name) for name in names}


def _value(row: Mapping[str, Any], name: str) -> str:
    """``value [low, high]``, two digits; nothing for what a row does not have."""
    ends = [row.get(name + end) for end in ("", "_low", "_high")]
    if isinstance(ends[0], float) and not isfinite(ends[0]):
        return ""
    if ends[1] is None:
        return cell(ends[0])
    value, low, high = (f"{end:.2g}" for end in ends)
    return f"{value} [{low}, {high}]"


def _there(value: float | None) -> bool:
    """Whether there is a number: no success without failures, no distance without pairs."""
    return value is not None and isfinite(value)


def every(
    results: Mapping[str, Any],
    drawn: Mapping[str, Tensor],
    ways: Sequence[str],
    score: str,
    conditions: str = "",
) -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        results: numbers.
        drawn: images and alternatives.
        ways: by which they were drawn from the middle of their trajectories.
        score: by which the best is chosen.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    rows = [row for row in results["draws"] if row["way"] in ways]
    for number, time in enumerate(dict.fromkeys(row["time"] for row in rows)):
        yield f"repair/draws_from_{time:.3g}", grid(results, drawn, ways, number, time, conditions)
    if _FRESH in drawn:
        yield "repair/fresh", fresh_grid(results, drawn, conditions)
    yield "repair/quality_over_diversity", quality_over_diversity(results, score, conditions)
    yield "repair/success_and_harm", success_and_harm(results, score, conditions)


@style()
def grid(
    results: Mapping[str, Any],
    drawn: Mapping[str, Tensor],
    ways: Sequence[str],
    number: int,
    time: float,
    conditions: str = "",
) -> "Figure":
    """The first images in order, each with alternatives of every way.

    Args:
        results: for the conditions.
        drawn: images and alternatives.
        ways: by which they were drawn.
        number: of the time among ``draws``.
        time: where the images were left.
        conditions: of the run, for the caption.
    """
    draws = drawn["draws"][:_IMAGES, number, :, :_EACH]
    part = "region" in drawn and not bool(drawn["region"].all())
    blocks = [("region", drawn["region"][:_IMAGES, None] * 255)] if part else []
    blocks += [(way.replace("_", " "), draws[:, place]) for place, way in enumerate(ways)]
    caption = (
        f"{_images(results, len(draws))}, and {draws.shape[2]} alternatives of each by every way, "
        f"from t = {time:.3g}; {_conditions(results, ways)}. {conditions}"
    )
    title = "Images resampled from the middle of their trajectories"
    return _grid(results, drawn["images"], blocks, title, caption)


@style()
def fresh_grid(
    results: Mapping[str, Any], drawn: Mapping[str, Tensor], conditions: str = ""
) -> "Figure":
    """The first images in order, each with other whole samples of its class.

    Args:
        results: for the conditions.
        drawn: images and fresh samples.
        conditions: of the run, for the caption.
    """
    draws = drawn[_FRESH][:_IMAGES, :_EACH]
    caption = (
        f"{_images(results, len(draws))}, and {draws.shape[1]} fresh samples of each one's class: "
        f"other whole images, from other noise, under the trained weights. {conditions}"
    )
    title = "Images and fresh samples of their classes"
    return _grid(results, drawn["images"], [(_FRESH, draws)], title, caption)


def _images(results: Mapping[str, Any], count: int) -> str:
    """Which images a grid shows, to begin its caption with."""
    chosen = results["conditions"].get("images")
    return f"The first {count} images, {'none picked' if chosen is None else 'picked by number'}"


def _grid(
    results: Mapping[str, Any],
    images: Tensor,
    blocks: Sequence[tuple[str, Tensor]],
    title: str,
    caption: str,
) -> "Figure":
    """Blocks of pixels ``(N, n, C, H, W)`` beside their images, a row with its number for each."""
    images = images[:_IMAGES]
    size = width, height = cell_size(images, _CELL)
    numbers = results["conditions"].get("images") or range(len(images))
    left, head, wide = 12 + 8 * max(len(str(number)) for number in numbers), 22, 3 * GAP
    blocks = [("image", images[:, None]), *blocks]
    places, x = [], left
    for _, block in blocks:
        places.append(x)
        x += max(block.shape[1] * (width + GAP), 8 * 6) + wide
    figure, axes = sheet(x, head + len(images) * (height + GAP) + 8, title, caption)
    for (name, block), at in zip(blocks, places, strict=True):
        axes.text(at, head - 8, name, size=8, va="bottom")
        for row, cells in enumerate(block):
            y = head + row * (height + GAP)
            for column, one in enumerate(cells):
                pixels = picture(one.double() / 255, "unit")
                put(axes, pixels, at + column * (width + GAP), y, size)
    for row, number in zip(range(len(images)), numbers, strict=False):
        middle = head + row * (height + GAP) + height / 2
        axes.text(left - 6, middle, str(number), ha="right", va="center", size=8)
    return figure


@style()
def quality_over_diversity(
    results: Mapping[str, Any], score: str, conditions: str = ""
) -> "Figure":
    """Quality of alternatives, and of the best of them, over their distance; a line per way."""
    found = results["conditions"]
    caption = (
        f"{found['num_images']} images, {found['draws']} alternatives of each; "
        f"{_conditions(results)}. Feature distance: between alternatives of one image; quality: "
        "the judge's probability of the class asked for; "
        f"best: by {score} of another classifier. {_dots(results)}Bars: 95 % over images; dotted: "
        f"the images themselves. {conditions}"
    )
    figure, axes = chart(940, 380, "Quality against diversity", caption, 1, 2, sharey=True)
    times = sorted({row["time"] for row in results["draws"]})
    apart = {(row["time"], row["way"]): row["feature_distance"] for row in results["draws"]}
    best = [row for row in results["picks"] if (row["score"], row["among"]) == (score, "draws")]
    for panel, rows, title in (
        (axes[0, 0], results["draws"], "all alternatives"),
        (axes[0, 1], best, "the best alternative of every image"),
    ):
        for place, way in enumerate(_ways(results)):
            own = [row for row in rows if row["way"] == way]
            own = [row for row in own if _there(apart[row["time"], way])]
            x = [apart[row["time"], way] for row in own]
            _with_bars(panel, x, own, "quality", way, place)
            sizes = [18 * (1 + times.index(row["time"])) for row in own]
            how = look(place)
            points = {"color": how["color"], "marker": how["marker"], "alpha": 0.85}
            panel.scatter(x, [row["quality"] for row in own], sizes, **points)
        panel.axhline(results["original"]["quality"], color="0.4", linestyle=":", linewidth=1)
        panel.set(title=title, xlabel="feature distance")
        if all(_there(value) and value > 0 for value in apart.values()):
            panel.set_xscale("log")  # renoising is far from all others
    axes[0, 0].set_ylabel("quality")
    _legend(figure, axes[0, 0])
    return figure


@style()
def success_and_harm(results: Mapping[str, Any], score: str, conditions: str = "") -> "Figure":
    """Images mended and images spoiled by taking the best one, over the times."""
    found = results["conditions"]
    wrong, count = results["original"]["wrong"], found["num_images"]
    caption = (
        f"Best of {found['draws']} alternatives and the image itself by {score}; "
        f"{_conditions(results)}. Success: of the {wrong} images the judge takes for another "
        f"class, those right afterwards; harm: of the other {count - wrong}, those wrong "
        f"afterwards. Bars: 95 % over images. {conditions}"
    )
    along = "time the images were left at"
    along += "; 0: fresh samples" if _FRESH in _ways(results) else ""
    figure, axes = chart(940, 360, "Images mended and images spoiled", caption, 1, 2)
    rows = [row for row in results["picks"] if (row["score"], row["among"]) == (score, "all")]
    for panel, name in zip(axes[0], ("success", "harm"), strict=True):
        for place, way in enumerate(_ways(results)):
            own = [row for row in rows if row["way"] == way and _there(row[name])]
            x = [row["time"] + 0.006 * (place - 2) for row in own]
            _with_bars(panel, x, own, name, way, place)
        panel.set(title=name, xlabel=along, ylabel="share of them")
        times = [row["time"] for row in rows]
        panel.set(xlim=(min(times) - 0.05, max(times) + 0.05))
        panel.set_ylim(bottom=0)
    _legend(figure, axes[0, 0])
    return figure


def _legend(figure: "Figure", panel: "Axes") -> None:
    """One for all panels, beside them."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper")


def _with_bars(
    panel: "Axes", x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, way: str,
    place: int,
) -> None:  # fmt: skip
    """A line through the rows' values with bars for their intervals."""
    y = [row[name] for row in rows]
    how = look(place)
    panel.plot(x, y, label=way.replace("_", " "), **how)
    low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
    panel.vlines(x, low, high, color=how["color"], linewidth=1, alpha=0.6)


def _ways(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["way"] for row in results["draws"]))


def _dots(results: Mapping[str, Any]) -> str:
    """How the size of a dot reads, where there are times."""
    if _ways(results) == [_FRESH]:
        return ""
    return "The larger a dot, the later the images were left. "


def _conditions(results: Mapping[str, Any], shown: Sequence[str] | None = None) -> str:
    """What is resampled, by the ways that are shown; None for all."""
    found, ways = results["conditions"], _ways(results) if shown is None else shown
    fresh = "fresh: other whole samples of the class of each image, from other noise"
    if list(ways) == [_FRESH]:
        return fresh
    share = f"{found['region_share']:.0%} of the pixels"
    kinds = {None: "the whole image", "map": f"the {share} most uncertain on its map"}
    region = found["region"]
    if region is None or isinstance(region, str):
        where = kinds[region]
    elif isinstance(region, dict):
        where = f"a box of its own for each image, {share}"
    else:
        where = f"the box {region}, {share}"
    said = f"resampled: {where}; variance: {found['estimator']}"
    return f"{said}; {fresh}" if _FRESH in ways else said
