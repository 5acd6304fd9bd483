"""
Bayesian flow networks: where and when is a sample decided?
===========================================================

A Bayesian flow network (Graves et al., 2023) keeps a *belief* about every pixel. In black and
white that is the probability of white. A network sees all beliefs, says what it makes of them, and
this steers which data the beliefs receive next. So at every moment there is a number for
how undecided a pixel is, its entropy. Beside it there are maps, as for any other model here.
"""

# %%
# Train, and ask
# --------------
# The data are scikit-learn's digits, made black and white anew in every epoch.
# ``experiment=beliefs`` measures entropies: of held-out images, of other data, and of samples on
# their way. Other data are the same digits *inverted*, unless you choose some.

import json
import logging

import matplotlib.pyplot as plt
import numpy as np

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

settings = [
    "model=bfn",
    "data=binary_digits",  # 16x16 pixels
    "net=tiny",
    "net.channels=[16,32]",
    "net.patch=2",
    "data.batch_size=64",
    "data.epochs=25",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "solver.num_steps=20",
    "uncertainty=ensemble",
    "uncertainty.members=8",
    "uncertainty.num_images=10",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
beliefs = [
    "experiment=beliefs",
    "beliefs.num_images=100",
    "beliefs.num_samples=10",
    "beliefs.bins=4",
    "beliefs.bootstrap=200",
]
result = run(compose(*settings, *beliefs))
(study,) = result.studies
found = json.loads((study / "results.json").read_text())
samples = np.load(study / "samples.npz")

# %%
# A sample takes shape
# --------------------
# Time runs from t = 0, where nothing is known, to t = 1. First row: the belief, which knows of
# each pixel only what that pixel received. Second row: what the network makes of all beliefs
# together. Third row: the entropy of the second, in nats. A fair coin has ln 2 = 0.69.

number, times = 0, [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]
rows = {
    "belief": (samples["frames.belief"], "gray", -1, 1),
    "network": (samples["frames.output"], "gray", -1, 1),
    "entropy": (samples["frames.entropy"], "magma", 0, np.log(2)),
}
figure, axes = plt.subplots(3, len(times), figsize=(11, 4.4), layout="constrained")
for (name, (frames, colours, low, high)), line in zip(rows.items(), axes, strict=True):
    for axis, frame, time in zip(line, frames[number], times, strict=True):
        shown = axis.imshow(frame[0], cmap=colours, vmin=low, vmax=high)
        axis.set(xticks=[], yticks=[], title=f"t = {time}" if name == "belief" else "")
    line[0].set_ylabel(name)
    label = "nats" if name == "entropy" else "black to white"
    figure.colorbar(shown, ax=line.tolist(), label=label, pad=0.01)
plt.show()

# %%
# Entropy on the way
# ------------------
# The same numbers, averaged over pixels and samples. Held-out images are given beliefs at the same
# times. A perfect model and sampler would put the solid lines on the dashed ones.

curve = found["curve"]
t = [row["t"] for row in curve]
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for name, label, colour in (("belief", "belief", "C0"), ("entropy", "network", "C1")):
    ax.plot(t, [row[f"sampler.{name}"] for row in curve], colour, label=f"{label}, samples")
    held_out = [row[f"held_out.{name}"] for row in curve]
    ax.plot(t, held_out, colour, ls="--", label=f"{label}, held-out images")
ax.set(xlabel="t", ylabel="mean entropy (nats per pixel)", ylim=(0, None))
ax.legend()
plt.show()

# %%
# The network is less undecided than the beliefs: it knows how pixels belong together.
#
# Maps
# ----
# Four maps of the same ten samples, each row on one scale:
#
# - *accumulated entropy*: how long, and how much, a pixel was undecided;
# - *commit time*: from when on its entropy stays below a tenth of ln 2;
# - *epistemic entropy*: the part of it that the posterior of the weights is responsible for;
# - *standard deviation*: by how much other weights would change the pixel of the finished image,
#   which runs from -1 to 1. The run makes it as for any model, by an ensemble of 8.

stored = stored_samples(result.samples)
maps = {
    "accumulated entropy\n(nats)": samples["accumulated"],
    "commit time\n(t)": np.where(np.isfinite(samples["commit"]), samples["commit"], 1),
    "epistemic entropy\n(nats)": samples["accumulated_epistemic"],
    "standard deviation\n(of the pixel)": stored.variance.sqrt().numpy(),
}
figure, axes = plt.subplots(5, 10, figsize=(11, 6), layout="constrained")
for axis, image in zip(axes[0], samples["images"], strict=True):
    axis.imshow(image[0], cmap="gray", vmin=0, vmax=255)
axes[0, 0].set_ylabel("sample", rotation=0, ha="right")
for line, (name, values) in zip(axes[1:], maps.items(), strict=True):
    for axis, value in zip(line, values, strict=True):
        shown = axis.imshow(value[0], cmap="magma", vmin=0, vmax=values.max())
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.colorbar(shown, ax=line.tolist(), pad=0.01)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %%
# Entropy and the posterior answer different questions. Entropy says what the sampler's own chance
# decided: another draw of the noise might have decided otherwise. The other two say what the
# training data left open about the weights.
#
# What are these numbers good for?
# --------------------------------
# Two tests on held-out images. Which pixels will the network get wrong? Which images are of
# another kind? The AUROC is the chance that a wrong pixel, or an image of another kind, scores
# higher than one that is not; 0.5 is a coin.

print("AUROC of                    wrong pixels   inverted digits")
for score, name in (
    ("belief", "entropy of the belief"),
    ("entropy", "entropy of the network"),
    ("epistemic", "epistemic part of it"),
):
    wrong, shift = found[f"{score}.auroc_wrong_pixels"], found[f"{score}.auroc_shift"]
    print(f"{name:28} {wrong:8.3f} {shift:17.3f}")

# %%
# These are the numbers of this short training and of 100 images. On binarised MNIST, trained for
# longer, the entropy of the network found wrong pixels best and its epistemic part found other
# data best; ``experiments/bfn-mnist`` has those numbers with their intervals.
#
# What next
# ---------
# - Other data: ``shift@beliefs.shift=shuffled``, or ``fashion``, or a source of your own.
# - Classes, levels, or plain numbers: ``data_type=discrete``, ``data_type=discretised``,
#   ``data_type=continuous``.
# - How many nats an image takes: ``experiment=code_length``.
# - How it works: :doc:`/guide/bayesian-flow-networks`.
