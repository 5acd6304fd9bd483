"""
Your own images
===============

Any folder of pictures will do. This tutorial draws one, with the untidiness that real folders
have, trains on it and makes maps in colour.
"""

# %%
# A folder of pictures
# --------------------
# One sub-folder for each class: its name becomes the label. Pictures may have any size, and any
# format that Pillow reads. Here are circles, squares and triangles of many sizes and colours.

import logging
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices
logging.basicConfig(stream=sys.stdout, format="%(message)s")  # but what bayesdiff warns of

random = np.random.default_rng(0)
folder = Path("outputs/tutorials/shapes")
shutil.rmtree(folder, ignore_errors=True)


def picture(shape):
    """One shape somewhere near the middle, in a bright colour on dark grey."""
    width, height = random.integers(40, 72, 2)
    image = Image.new("RGB", (int(width), int(height)), (30, 30, 40))
    radius = 0.28 * min(width, height) * random.uniform(0.8, 1.2)
    x, y = np.array([width, height]) / 2 + random.uniform(-3, 3, 2)
    colour = [(230, 80, 60), (70, 170, 230), (240, 200, 70)][random.integers(3)]
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    elif shape == "square":
        draw.rectangle([x - radius, y - radius, x + radius, y + radius], fill=colour)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
    return image


for shape in ("circle", "square", "triangle"):
    (folder / shape).mkdir(parents=True)
    for number in range(200):
        picture(shape).save(folder / shape / f"{number:03d}.png")
(folder / "notes.txt").write_text("not a picture")
(folder / "hexagon").mkdir()  # and a class without pictures

figure, axes = plt.subplots(1, 6, figsize=(8.6, 1.9), layout="constrained")
for number, each in enumerate(axes):
    path = folder / ("circle", "square", "triangle")[number % 3] / f"{number:03d}.png"
    image = Image.open(path)
    each.imshow(image)
    each.set(xticks=[], yticks=[], xlabel=f"{image.width} x {image.height}")
    each.set_title(path.parent.name)
plt.show()

# %%
# Train on it
# -----------
# ``data=folder data.root=...`` reads the folder. Networks need one size: ``data.crop=square`` cuts
# out the largest square of the middle, and ``data.resize=16`` brings that to 16x16 pixels.
# Without a folder ``test/`` beside ``train/`` a tenth is held out, chosen by ``data.source.seed``.
#
# What is left out is said, never skipped in silence.

settings = [
    "model=flow",
    "data=folder",
    f"data.root={folder}",
    "data.crop=square",
    "data.resize=16",
    "data.batch_size=60",
    "data.epochs=80",
    "data.ema_decay=0.98",
    "net.channels=[16,32]",  # configs/net/unet32.yaml has the size for larger data sets
    "net.blocks=1",
    "net.dropout=0",
    "model.optimizer.lr=2e-3",
    "uncertainty.num_images=18",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
result = run(compose(*settings))

# %%
# Maps in colour
# --------------
# A map has a value for each channel. For a picture, take the root of their mean.

samples = stored_samples(result.samples)
images = ((samples.images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
deviation = samples.variance.mean(1).sqrt()
names = ("circle", "square", "triangle")  # in the order of their names

figure, axes = plt.subplots(2, 9, figsize=(10.4, 2.6), layout="constrained")
top = float(deviation[:9].max())
for number, (above, below) in enumerate(axes.T):
    above.imshow(images[number])
    above.set_title(names[samples.labels[number]], fontsize=9)
    shown = below.imshow(deviation[number], cmap="magma", vmin=0, vmax=top)
    above.set_axis_off()
    below.set_axis_off()
figure.colorbar(shown, ax=axes[1].tolist(), label="sd, images in [-1, 1]", pad=0.01)
plt.show()

# %%
# All maps share one scale. They are bright along edges: there other weights draw a shape larger,
# smaller or elsewhere. They do not mark the grain of the pictures, which a small network and a
# short training leave: a map says where weights differ, not what is wrong.
#
# The images as files
# -------------------
# ``uncertainty.export=png`` writes each image and each map as a picture of its own, with the
# label and the summed variance in the name. The training is the one from before.

exported = run(compose(*settings, "uncertainty.export=png", "uncertainty.labels=[triangle]"))
for path in sorted((exported.folder / "png").iterdir())[:6]:
    print(path.name)

# %%
# ``uncertainty.labels=[triangle]`` makes maps of one class only, by the name of its folder.
#
# What next
# ---------
# - For real pictures leave out the words that made this small: ``data=folder`` comes with a
#   network for 32x32 pixels, ``net=unet64`` is that of larger ones.
# - ``data=zip`` reads the same from a zip; without sub-folders there are no labels, and
#   ``metrics.num_images`` gives FID on features of a classifier only where there are.
# - :doc:`02_is_my_map_right`: check these maps as well.
# - :doc:`/guide/pretrained`: maps for a network that is trained already.
