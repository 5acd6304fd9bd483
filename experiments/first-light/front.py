"""The figure of the README: images above their maps, in grey levels.

python experiments/first-light/front.py outputs/RUN/samples-....npz
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bayesdiff.report.style import DPI, MAP_COLOURS, style

FIGURE = Path(__file__).parents[2] / "docs" / "start" / "first-maps.png"
COUNT = 10  # the first samples, one of every class
GREY_LEVELS = 127.5  # of 255 in one unit of images in [-1, 1]
TOP = 99.7  # percentile of all maps where their common scale ends


@style()
def draw(images: np.ndarray, variance: np.ndarray) -> None:
    """Two rows and one scale."""
    from matplotlib.figure import Figure

    maps = GREY_LEVELS * np.sqrt(variance.clip(0).mean(1))
    top = float(np.percentile(maps, TOP))
    figure = Figure(figsize=(10, 2.35), dpi=DPI, layout="constrained")
    axes = figure.subplots(2, len(images), gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for column, (image, uncertainty) in enumerate(zip(images, maps, strict=True)):
        axes[0, column].imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        shown = axes[1, column].imshow(uncertainty, cmap=MAP_COLOURS, vmin=0, vmax=top)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, extend="max", fraction=0.03, pad=0.01)
    bar.set_label("grey levels")
    figure.savefig(FIGURE)


def main(words: Sequence[str]) -> None:
    """Draw the first samples of a file."""
    (path,) = words
    with np.load(path) as samples:
        draw(samples["images"][:COUNT], samples["variance"][:COUNT])


if __name__ == "__main__":
    main(sys.argv[1:])
