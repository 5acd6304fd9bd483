"""The surest and the least sure sample of every class with their maps, for a slide: trained.png.

    python experiments/pretrained/picture.py SAMPLES.npz

SAMPLES is the file ``samples-*.npz`` of a run on Fashion-MNIST.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

HERE = Path(__file__).parent
CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "boot",
)  # fmt: skip


def main():
    """Two bands of ten samples above their maps; classes from the surest to the least sure."""
    with np.load(sys.argv[1]) as file:
        images, variance, labels = (file[name] for name in ("images", "variance", "labels"))
    sums = variance.reshape(len(variance), -1).sum(1)
    ends = []
    for label in range(10):
        own = np.flatnonzero(labels == label)
        order = own[np.argsort(sums[own])]
        ends.append((order[0], order[-1]))
    ends.sort(key=lambda pair: sums[pair[1]])
    maps = 100 * np.sqrt(variance.mean(1)) / 2  # images lie in [-1, 1]
    shown = np.concatenate([maps[list(pair)].ravel() for pair in ends])
    look = {"cmap": "inferno", "vmin": 0, "vmax": np.quantile(shown, 0.995)}
    figure = plt.figure(figsize=(16, 6.5))
    grid = figure.add_gridspec(
        5, 10, height_ratios=(1, 1, 0.14, 1, 1), left=0.06, right=0.905, top=0.93, bottom=0.02,
        wspace=0.05, hspace=0.05,
    )  # fmt: skip
    for column, pair in enumerate(ends):
        for band, index in enumerate(pair):
            axes = [figure.add_subplot(grid[3 * band + row, column]) for row in (0, 1)]
            axes[0].imshow(images[index, 0], cmap="gray", vmin=-1, vmax=1)
            drawn = axes[1].imshow(maps[index], **look)
            if band == 0:
                axes[0].set_title(CLASSES[labels[index]], fontsize=18)
            if column == 0:
                word = ("surest", "least sure")[band]
                axes[0].set_ylabel(word, fontsize=20, y=0, labelpad=14)
            for axis in axes:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
    bar = figure.colorbar(
        drawn, cax=figure.add_axes((0.92, 0.02, 0.014, 0.91)), extend="max", ticks=MaxNLocator(4)
    )
    bar.set_label("standard deviation, % of the image range", fontsize=18, labelpad=10)
    bar.ax.tick_params(labelsize=16)
    figure.savefig(HERE / "trained.png", dpi=100)


if __name__ == "__main__":
    main()
