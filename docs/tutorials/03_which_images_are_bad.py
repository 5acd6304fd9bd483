"""
Which images are bad?
=====================

A model draws some images that are better discarded. A *score* is one number for each image that
says which. Maps have a score too, their sum, and it is not the one to take. This tutorial shows
why, and what to take instead.
"""

# %%
# A pool of images and all their scores
# -------------------------------------
# ``experiment=filtering`` draws a pool of images for each noise seed, gives every image every
# score, and discards the fifth that a score finds most uncertain. Ten random choices of the same
# size are the baseline. Pools are small here, so that this takes minutes.

import json
import logging

import matplotlib.pyplot as plt

from bayesdiff.pipeline import compose, run

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
    "uncertainty=ensemble",
    "uncertainty.members=8",
    "uncertainty.num_images=10",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
filtering = [
    "experiment=filtering",
    "filtering.num_images=300",  # in each pool
    "filtering.seeds=[0,1]",  # of the noise
    "filtering.keep=[0.8]",
    "filtering.rules=[]",
    "~filtering.maps.published",  # no maps of another estimator
    "filtering.aleatoric_draws=0",
    "filtering.draws=20",
    "filtering.guarantee=0.95",  # for the last section
    "filtering.judge=0.9",
]
result = run(compose(*settings, *filtering))
(study,) = result.studies
found = json.loads((study / "results.json").read_text())

# %%
# What the scores find
# --------------------
# Six scores of about thirty:

scores = {
    "members.joint": "members.joint",
    "members.predictive_entropy": "entropy of the members' classes",
    "members.log_det": "spread of the members' pixels",
    "classifier.class_entropy": "entropy of the image's own class",
    "ensemble.sum": "the map's sum",
    "random": "a random number",
}
gains = {row["score"]: row for row in found["over_seeds"] if row["mode"] == "per_class"}
follows = {row["score"]: row for row in found["profile"]}
print(f"{'score':34} {'z':>6} {'rank of unlikely':>17} {'rank with busyness':>20}")
for name, said in scores.items():
    row = follows[name]
    print(
        f"{said:34} {gains[name]['z']:6.1f} {row['rank_off_label']:17.2f} "
        f"{row['rank_total_variation']:20.2f}"
    )

# %%
# - ``z``: gain in FID of the kept images over a random choice, in standard deviations of the ten
#   random choices; mean of two seeds. A fifth of *each class* is discarded, since a score that
#   merely removes a class gains nothing.
# - *Rank of unlikely*: Spearman correlation with how improbable the image's label is to the
#   classifier that judges.
# - *Rank with busyness*: the same with the image's total variation, how much neighbouring pixels
#   differ. It has nothing to do with right or wrong.
#
# Another classifier gives the scores their features than the one that judges, but both learnt from
# the same data: scores that read a classifier have an easy judge.

figure, axes = plt.subplots(figsize=(6.6, 3.2), layout="constrained")
for seed, marker in (("0", "o"), ("1", "s")):
    rows = {row["score"]: row for row in found["seeds"][seed] if row["mode"] == "per_class"}
    axes.plot(
        [rows[name]["z"] for name in scores], list(scores.values()), marker, label=f"seed {seed}"
    )
axes.axvspan(-2, 2, color="0.93", label="two sd of chance")
axes.invert_yaxis()
axes.set(xlabel="gain in FID over a random choice, in sd of chance")
axes.legend(loc="lower right")
plt.show()

# %%
# The random number shows how far two small pools can stray. Trust a score only where both points
# are well beyond it.
#
# Why not the map's sum
# ---------------------
# The map says where other weights would have drawn something else. A clean image with long edges
# has many such pixels; a wrong image may have none, when all weights agree on it. In the study
# ``experiments/filtering``, with four models on MNIST and Fashion-MNIST, the summed map found
# wrong images within classes with an AUROC of 0.53 to 0.60, where 0.5 is chance, and followed
# total variation with ranks of 0.48 to 0.77. In the table above, of 8x8 digits,
# its rank with busyness may have another sign; compare its rank of unlikely with those of the
# other scores.
#
# What to take instead
# --------------------
# ``members.joint`` looks at the *members*, five images that other weights draw from the same
# noise. It adds two ranks of an image among those of its label: by the entropy of the classes
# that a classifier sees in the members, and by the spread of their pixels. In the same study it
# was the one score with a z above 5 on all four models.
#
# What it costs: recall falls, since rare images are discarded along with wrong ones. And on a
# model whose images are nearly all good the same study found nothing worth discarding.
#
# A threshold that holds
# ----------------------
# Ranks say what to discard first, not where to stop. ``filtering.guarantee=0.95`` sets the
# threshold of a score on the first pool, so that with probability 0.9 at least 95 % of what it
# keeps is good, on new noise of this network. Bad is here an image to whose label the judge
# gives less than ``filtering.judge=0.9``. The score is ``members.predictive_entropy``, since
# ``members.joint`` ranks within a pool and has no threshold.

guarantee = found["guarantee"]
print("a threshold holds:", guarantee["holds"])
for pool in ("calibration", "new_noise"):
    row = guarantee[pool]
    print(f"{pool:12} bad of all images: {row['risk_of_all']:.3f}, kept: {row['share_kept']:.2f}")
    if row["kept"]:
        interval = f"[{row['risk_low']:.3f}, {row['risk_high']:.3f}]"
        print(f"{pool:12} bad of those kept: {row['risk']:.3f} {interval}")

# %%
# Where no threshold holds, nothing is kept. Where the network is good enough by itself, all is.
#
# The run's own picture of it: images that are kept and discarded, in the order of their numbers,
# each with its map and its score; bad ones are framed.

picture = plt.imread(study / "figures" / "kept_and_discarded_by_guarantee.png")
figure = plt.figure(figsize=(picture.shape[1] / 110, picture.shape[0] / 110))
figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[]).imshow(picture)
plt.show()

# %%
# What next
# ---------
# - The other kinds of scores, and labels of your own in place of the judge: :doc:`/guide/methods`.
# - :doc:`/concepts/what-a-map-tells`: what a map does and does not say.
# - :doc:`02_is_my_map_right`: a map can be right and still not be a measure of quality.
# - :doc:`04_sweeps_overnight`: the same over seeds and settings.
