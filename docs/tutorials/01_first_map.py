"""
Your first uncertainty map
==========================

A small network learns to draw digits. Then every digit that it draws comes with a map: how much
each pixel would move if other weights, as plausible given the training data, had drawn it.
This takes a minute or two and needs no download.
"""

# %%
# One run
# -------
# ``compose`` takes the words of the command line, ``run`` does what ``python train.py`` does with
# them. A run has five stages: train the network (fit), one pass over the data for the posterior of
# the last layer (curvature), draw images with their maps (sample), score, report.

import logging

import matplotlib.pyplot as plt

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

settings = [
    "model=flow",  # flow matching: from noise to an image along a velocity
    "data=digits",  # scikit-learn's, 8x8 pixels, ten classes
    "net.channels=[16,32]",  # a small U-Net
    "net.patch=2",  # that works at half the resolution
    "data.batch_size=64",
    "data.epochs=40",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "uncertainty.num_images=40",  # images that get a map
    "metrics.num_images=500",  # images for FID and its kin
    "report.pdf=false",
    "callbacks.samples=null",  # no pictures on the way
    "callbacks.progress=null",  # and no progress bar
    "output_dir=outputs/tutorials",
]
result = run(compose(*settings))

# %%
# On the command line the same run is ``python train.py`` with these words behind it.
#
# One image beside its map
# ------------------------
# The samples are a file of the run. Images lie in [-1, 1]; the root of ``variance`` is the
# standard deviation of each pixel in the same units.

samples = stored_samples(result.samples)
images = samples.images[:, 0]
deviation = samples.variance[:, 0].sqrt()

number = 1
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
shown = left.imshow(images[number], cmap="gray", vmin=-1, vmax=1)
figure.colorbar(shown, ax=left, label="pixel")
left.set_title(f"sample {number}, a {samples.labels[number]}")
shown = right.imshow(deviation[number], cmap="magma", vmin=0)
figure.colorbar(shown, ax=right, label="standard deviation of the pixel")
right.set_title("its map")
for axes in (left, right):
    axes.set_axis_off()
plt.show()

# %%
# The image is the trained network's own sample. The estimate of the map never changes it.
#
# A bright pixel of the map is one that other weights would have made lighter or darker. It is
# *not* the probability that something is wrong there.
#
# Many on one scale
# -----------------
# Maps can be compared when they share a scale. These are the first ten samples, one of each class.

figure, axes = plt.subplots(2, 10, figsize=(11, 2.5), layout="constrained")
top = float(deviation[:10].max())
for number, (above, below) in enumerate(axes.T):
    above.imshow(images[number], cmap="gray", vmin=-1, vmax=1)
    above.set_title(f"{samples.labels[number]}")
    shown = below.imshow(deviation[number], cmap="magma", vmin=0, vmax=top)
    above.set_axis_off()
    below.set_axis_off()
figure.colorbar(shown, ax=axes[1].tolist(), label="sd of the pixel", pad=0.01)
plt.show()

# %%
# What is in the folder
# ---------------------
# Everything of one training lies in one folder. Its name ends in a digest of what was trained, so
# another training gets another folder. Inside is one folder for each way of sampling from it.

for path in sorted(result.folder.parent.glob("[!.]*")):
    print(path.name + "/" * path.is_dir())
print(f"\nand in {result.folder.name}/:")
for path in sorted(result.folder.rglob("*.png")):
    print(path.relative_to(result.folder))

# %%
# - ``checkpoints`` holds the weights.
# - ``curvature-*.safetensors`` is the pass over the data: one matrix.
# - ``samples-*.npz`` holds images and maps, ``images-*.npz`` the images behind the scores.
# - ``figures`` holds the report's pictures, and ``tensorboard`` the same for TensorBoard:
#   ``tensorboard --logdir outputs/tutorials``.
#
# Each of these is made once. The same command again, or one that shares a part of it, takes what
# is there.
#
# What the numbers mean
# ---------------------
# ``metrics.json`` holds them, and so does ``result.metrics``.

metrics = result.metrics
print(f"{'weights of the last layer':42} {metrics['laplace/parameters']:10.0f}")
print(f"{'of them determined by the data':42} {metrics['laplace/effective_parameters']:10.1f}")
print(f"{'sigma_noise':42} {metrics['laplace/sigma_noise']:10.3f}")
print(f"{'network evaluations per image and map':42} {metrics['nfe']:10.0f}")
print(f"{'summed variance of a map, mean':42} {metrics['summed_variance/mean']:10.4f}")
print(f"{'summed variance of a map, sd over images':42} {metrics['summed_variance/sd']:10.4f}")
for name, value in metrics.items():
    if name.removeprefix("real/").startswith("fid@"):
        print(f"{name:42} {value:10.2f}")

# %%
# - *Weights of the last layer*: these are Bayesian. All others stay as they were trained.
# - *Determined by the data*: where this is near the number of weights, the prior hardly matters.
# - ``sigma_noise`` is the root of the training error, in units of the network's output.
# - *Network evaluations*: 20 for the image. The rest is for its map, by an ensemble of 16 draws
#   of the last layer's weights. The default takes an ensemble when few maps are asked for.
# - *Summed variance*: a map added up over its pixels, one number for each image.
# - FID compares 500 samples with real digits, on features of a small classifier that is trained
#   for this data set; ``real/`` is the same for 300 real digits that were held out. It is not on
#   the scale of the usual Inception network, and it falls with more samples: compare it only with
#   others of the same name.
#
# What next
# ---------
# - :doc:`02_is_my_map_right`: compare the map with a reference.
# - :doc:`03_which_images_are_bad`: what a map cannot tell, and which score can.
# - :doc:`05_your_own_images`: the same for your pictures.
# - :doc:`/guide/methods`: posteriors and estimators in full.
