"""One style for every figure, the studies' included, and the files that a figure becomes."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesdiff.storage.artefacts import read_json, write_json
from bayesdiff.storage.atomic import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A power of two: pixels / DPI * DPI is exact, so no image loses a row to rounding.
DPI = 128
# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
)  # fmt: skip
MARKERS = "os^Dv<X>P*"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))
# How a map is drawn.
MAP_COLOURS = "magma"
CAPTION = "caption"
CAPTIONS_FILE = "captions.json"

LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    # One image stays one object of its own resolution in a vector file.
    "image.composite_image": False,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    # Letters that other programs can search and edit.
    "pdf.fonttype": 42,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextmanager
def style() -> Generator[None]:
    """One look for all figures; works as a decorator too."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        # A user's matplotlibrc must not change a report.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
        yield


def look(place: int) -> dict[str, Any]:
    """Colour, marker and line style of curve ``place``: told apart in print as well."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[(place + place // len(COLOURS)) % len(LINES)],
    }


def caption_of(figure: "Figure") -> str:
    """The caption on one line, empty for a figure without one."""
    texts = [text.get_text() for text in figure.texts if text.get_gid() == CAPTION]
    return " ".join(" ".join(texts).split())


def clear(folder: Path) -> None:
    """Remove the figures that ``save`` wrote there, and their captions."""
    kept = folder / CAPTIONS_FILE
    for name in read_json(kept) or {}:
        for end in (".png", ".pdf"):
            (folder / f"{Path(name).name}{end}").unlink(missing_ok=True)
    kept.unlink(missing_ok=True)


def save(figure: "Figure", path: str | Path, *, pdf: bool = True) -> Path:
    """Write ``figure`` as PNG, with its caption below, and for a paper as PDF without.

    Title and caption are kept in ``captions.json`` beside them. The same figure gives the same
    bytes.

    Args:
        figure: made by ``layout``, or any other.
        path: of the PNG; the PDF has the same name.
        pdf: whether there is one; an earlier one is removed otherwise.

    Returns:
        The PNG's path.
    """
    path = Path(path)
    title, caption = figure.get_label(), caption_of(figure)
    kept = read_json(path.parent / CAPTIONS_FILE) or {}
    with style():
        image: dict[str, Any] = {"dpi": DPI, "format": "png", "metadata": {"Software": None}}
        write_atomic(path, lambda file: figure.savefig(file, **image))
        beside = path.with_suffix(".pdf")
        if pdf:
            write_atomic(beside, lambda file: _save_pdf(figure, file, title, caption))
        else:
            beside.unlink(missing_ok=True)
    said = {"title": str(title), "caption": caption}
    write_json(path.parent / CAPTIONS_FILE, dict(sorted({**kept, path.stem: said}.items())))
    return path


def _save_pdf(figure: "Figure", file: Path, title: Any, caption: str) -> None:
    """Letters and lines as such, images pixel by pixel, no margins."""
    texts = [text for text in figure.texts if text.get_gid() == CAPTION]
    about = {"Title": str(title), "Subject": caption, "Creator": None, "Producer": None}
    about["CreationDate"] = None
    tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.02}
    for text in texts:
        text.set_visible(False)
    try:
        figure.savefig(file, format="pdf", dpi=DPI, metadata=about, **tight)
    finally:
        for text in texts:
            text.set_visible(True)
