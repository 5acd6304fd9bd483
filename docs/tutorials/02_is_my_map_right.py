"""
Is my map right?
================

A map can be wrong in two ways. Its *estimator* may miss what the posterior says. And the
*posterior* may miss what another training would have changed. Both can be checked; this tutorial
does so on the network of the first one.
"""

# %%
# The estimator against a reference
# ---------------------------------
# ``uncertainty.validate=true`` follows 32 other weight draws along whole trajectories, with the
# noise of the images, and compares the first 16 maps with their variance. Three estimators of the
# same posterior:
#
# - ``auto``, the default: for so few maps an ensemble of 16 weight draws;
# - ``linearised``: first-order sensitivities along 32 directions;
# - ``published``: the recursion of BayesDiff (Kou et al. 2024), kept as a baseline.

import logging
from math import exp

import matplotlib.pyplot as plt

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

settings = [
    "model=flow",
    "data=digits",
    "net.channels=[16,32]",
    "net.patch=2",
    "data.batch_size=64",
    "data.epochs=40",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "uncertainty.num_images=40",
    "metrics.num_images=0",  # no FID here
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
estimators = ("auto", "linearised", "published")
results = {
    name: run(compose(*settings, f"uncertainty={name}", "uncertainty.validate=true"))
    for name in estimators
}

# %%
# Trained once: the second and third estimator take the weights of the first, or of the tutorial
# before.

print(f"{'estimator':12} {'image rank':>24} {'pixel rank':>12} {'size':>8} {'negative':>9}")
for name, result in results.items():
    found = {key.removeprefix("validation/"): value for key, value in result.metrics.items()}
    interval = f"[{found['image_rank_low']:.2f}, {found['image_rank_high']:.2f}]"
    print(
        f"{name:12} {found['image_rank']:9.2f} {interval:>14} {found['pixel_rank']:12.2f} "
        f"{exp(found['log_ratio']):8.2f} {found['summed_variance/negative_share']:9.2f}"
    )

# %%
# - *Image rank*: Spearman correlation of the summed variances of images, with a 95 % interval over
#   the 16 images. It says whether the map knows *which image* is the less certain.
# - *Pixel rank*: the same over the pixels of one image, averaged. It says whether the map knows
#   *where*.
# - *Size*: median of the map's summed variance over the reference's. 1 is right; ``nan`` is where
#   sums are negative, which the published recursion does not exclude.
# - *Negative*: share of pixels whose variance is negative.
#
# The reference is itself made of 32 draws, so even a perfect map does not reach a rank of 1.
# Sixteen images make wide intervals; ``uncertainty.validate_images=64`` narrows them, and
# ``uncertainty.validate_members=128`` makes a better reference.
#
# The same images, as pictures
# ----------------------------
# The reference can be drawn too: an ensemble of 32 members from the next seed. The noise, and so
# the images, are the same.

reference = run(
    compose(*settings, "uncertainty=ensemble", "uncertainty.members=32", "uncertainty.seed=1")
)
maps = {name: stored_samples(result.samples) for name, result in results.items()}
maps["reference"] = stored_samples(reference.samples)
images = maps["reference"].images[:, 0]
rows = {
    name: samples.variance[:, 0].clamp(min=0).sqrt()  # published variances can be negative
    for name, samples in maps.items()
}
top = float(rows["reference"][:8].max())

figure, axes = plt.subplots(5, 8, figsize=(8.6, 5.4), layout="constrained")
for number in range(8):
    axes[0, number].imshow(images[number], cmap="gray", vmin=-1, vmax=1)
    for place, name in enumerate(("reference", *estimators), start=1):
        shown = axes[place, number].imshow(rows[name][number], cmap="magma", vmin=0, vmax=top)
for place, name in enumerate(("image", "reference", *estimators)):
    axes[place, 0].set_ylabel(name)
for each in axes.flat:
    each.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[1:].ravel().tolist(), label="standard deviation of the pixel")
plt.show()

# %%
# All maps are on one scale; negative variances are drawn as 0. Where a row does not look like the
# reference's, the estimator is not to be trusted on this model: raise its budget, or take
# ``uncertainty=ensemble``.
#
# The posterior against another training
# --------------------------------------
# A right estimator of the last layer's posterior says what *this posterior* leaves open. Training
# again changes all layers, and so changes images by much more. ``uncertainty.calibrate=1`` trains
# one further network of the same configuration from another seed and gives all variances one
# factor, so that they have the size of that change.

calibrated = run(compose(*settings, "uncertainty.calibrate=1"))
factor = {end: calibrated.metrics[f"calibration/factor{end}"] for end in ("", "_low", "_high")}
print("variances times {:.0f} [{:.0f}, {:.0f}]".format(*factor.values()))

# %%
# The interval is over images. One pair of trainings cannot know how another pair would differ.
#
# The further network is kept in the run's folder. Here are its images from the same noise.

(other,) = (calibrated.folder.parent / "calibration" / "1").glob("checkpoints/last.ckpt")
again = run(compose(*settings, "fit=false", f"ckpt_path='{other}'"))
images_again = stored_samples(again.samples).images[:, 0]
before = maps["auto"].variance[:, 0].sqrt()
after = stored_samples(calibrated.samples).variance[:, 0].sqrt()
pictures = {
    "image": images,
    "trained\nagain": images_again,
    "change": (images - images_again).abs() / 2**0.5,
    "map": before,
    "calibrated\nmap": after,
}

figure, axes = plt.subplots(5, 8, figsize=(8.6, 5.4), layout="constrained")
top = float(pictures["change"][:8].max())
for row, (name, values) in zip(axes, pictures.items(), strict=True):
    scale = {"cmap": "gray", "vmin": -1} if values.min() < 0 else {"cmap": "magma", "vmin": 0}
    top_of_row = 1 if values.min() < 0 else top
    for number, each in enumerate(row):
        shown = each.imshow(values[number], vmax=top_of_row, **scale)
        each.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
figure.colorbar(shown, ax=axes[2:].ravel().tolist(), label="standard deviation of the pixel")
plt.show()

# %%
# *Change* is the difference of the two images over the root of two, the standard deviation of two
# numbers. Two trainings are few, so it is rough. The map before is dark on this scale; after, it
# has the right size on average. The factor changes no rank: what the map did not see before, it
# does not see now.
#
# When not to trust a map
# -----------------------
# - Its image rank against the reference is low, or its interval holds 0.
# - Its pixel rank is low: the bright pixels are chance. More members or directions help.
# - Its size against the reference is far from 1.
# - You read its *size* as what another training would do, and it is not calibrated. Study
#   ``experiments/retraining`` found 0.03 of that size for the last layer on digits, and 0.4 for a
#   posterior of all layers.
# - You take it for a measure of quality: :doc:`03_which_images_are_bad`.
#
# What next
# ---------
# - :doc:`03_which_images_are_bad`: scores, and why not the map's sum.
# - :doc:`/concepts/what-a-map-tells`: the same in words.
# - :doc:`/guide/methods`: calibration and validation in full.
