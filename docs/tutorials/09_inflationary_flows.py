"""
Inflationary flows: data to latents and back
============================================

An inflationary flow (de Albuquerque and Pearson, 2024) is an invertible map. It carries data to a
Gaussian, and every latent back to the point that it came from. Here the data are points in the
plane, so that everything can be seen.

We train a flow, follow data to their latents and back, look at samples with their uncertainty,
and ask whether regions of the latent space hold what they should.
"""

# %%
# Train
# -----
# The data are two half circles. ``path.duration`` says how long noise is inflated; 7 is enough in
# two dimensions. The network is small and the training short, so that this page takes a minute.

import json
import logging
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bayesdiff.pipeline import compose, run

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

settings = [
    "model=inflation",
    "path.duration=7.01",
    "net.width=64",
    "data.source.points=40000",
    "data.batch_size=512",
    "data.epochs=12",
    "data.ema_decay=0.98",
    "model.optimizer.lr=4e-3",
    "trainer.precision=32-true",
    "solver.num_steps=30",
    "uncertainty=ensemble",  # 16 flows, each with other weights in the last layer
    "uncertainty.num_images=300",
    "uncertainty.batch_size=300",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
result = run(compose("data=moons", *settings))

# %%
# There and back
# --------------
# ``InvertibleFlow`` is the trained model as a map. ``encode`` takes data as they are stored,
# ``decode`` takes latents. Where the model is right, latents are standard normal.

from bayesdiff.data.toys import moons
from bayesdiff.runs.invertible import InvertibleFlow

held_out = moons(points=2, test_points=2000, labels=True)  # points that training has not seen
points, which = held_out.test_images, held_out.test_labels

flow = InvertibleFlow.of(result.folder.parent)
latents = flow.encode(points)
again = flow.decode(latents)

mean, sd = latents.mean(0).tolist(), latents.std(0).tolist()
print(f"largest error of the round trip: {(again - points).abs().max():.4f}")
print(f"latents: mean {mean[0]:.2f}, {mean[1]:.2f}, standard deviation {sd[0]:.2f}, {sd[1]:.2f}")

# %%
# The error of the round trip is the solver's: more steps make it smaller. It says that the map is
# invertible. It does not say that the model is right.

figure, axes = plt.subplots(
    1, 3, figsize=(10.5, 4.1), sharex=True, sharey=True, layout="constrained"
)
for ax, cloud, title in (
    (axes[0], points, "held-out data"),
    (axes[1], latents, "their latents"),
    (axes[2], again, "back again"),
):
    ax.scatter(*cloud.T, c=which, s=3, cmap="coolwarm", vmin=-0.2, vmax=1.2)
    ax.set(title=title, aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
    ax.set_xlabel("first coordinate")
axes[0].set_ylabel("second coordinate")
for radius in (1, 2, 3):
    axes[1].add_patch(plt.Circle((0, 0), radius, fill=False, color="0.3", ls=":"))
plt.show()

# %%
# Each half circle becomes one half of the Gaussian. Dotted: 1, 2 and 3 standard deviations.
#
# Samples and their uncertainty
# -----------------------------
# The run has made 300 samples. For each of them it knows the variance that the posterior of the
# last layer gives its coordinates: other weights would have put it about so far away.

from bayesdiff.uncertainty.stored import stored_samples

samples = stored_samples(result.samples)
distance = samples.variance.sum(1).sqrt()  # in the units of the data
print(f"sd of a sample: median {distance.median():.3f}, largest {distance.max():.3f}")

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
ax.scatter(*points.T, s=2, color="0.85", label="held-out data")
order = distance.argsort()
shown = ax.scatter(
    *samples.images[order].T, c=distance[order], s=14, cmap="viridis", vmin=0, label="samples"
)
ax.set(aspect="equal", xlabel="first coordinate", ylabel="second coordinate")
ax.legend(loc="lower left")
figure.colorbar(shown, label="standard deviation (units of the data)")
plt.show()

# %%
# In this run the uncertain samples are those that lie apart from the data.
#
# What coverage means
# -------------------
# A sphere of radius r around 0 holds a known share of a Gaussian, the *nominal* one. ``decode``
# bends the sphere into the boundary of a region of the data. Two questions:
#
# - Do latents that lie inside of the sphere land inside of the region? They must, if the map is
#   invertible. Points that change sides tell of steps that are too long.
# - Does the region hold the nominal share of *held-out data*? It does if the model has their
#   distribution. Only this tells whether the model is right.
#
# ``experiment=coverage`` asks both. The trained model is there already, and is used again. For
# comparison we train as briefly on ``circles``: two circles, one in the other.

found = {}
for toy in ("moons", "circles"):
    study = run(compose(f"data={toy}", *settings, "experiment=coverage", "coverage.points=3000"))
    found[toy] = json.loads(Path(study.studies[0], "results.json").read_text())
    print(f"{toy}: {found[toy]['changed_sides']} latents changed sides")
    for row in found[toy]["rows"][:5]:
        print(
            "  r = {radius}: {nominal:.3f} nominal, {data:.3f} of latents,".format(**row), end=""
        )
        print(" {held_out:.3f} of held-out data".format(**row))

# %%
# Left: the boundaries among the data. Right: the share of held-out data inside, less the nominal
# share; bars are two standard errors.

angle = torch.linspace(0, 2 * torch.pi, 400)
circle = torch.stack([angle.cos(), angle.sin()], 1)
radii = [row["radius"] for row in found["moons"]["rows"]]

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
left.scatter(*points.T, s=2, color="0.8")
for radius, shade in zip(radii, torch.linspace(0, 0.9, len(radii)).tolist(), strict=True):
    left.plot(*flow.decode(radius * circle).T, color=plt.cm.viridis(shade), label=f"r = {radius}")
left.set(title="moons: regions", xlabel="first coordinate", ylabel="second coordinate")
left.set_aspect("equal")
left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
right.axhline(0, color="0.3", lw=1)
for toy, marker in (("moons", "o"), ("circles", "s")):
    rows = found[toy]["rows"]
    difference = [row["held_out"] - row["nominal"] for row in rows]
    error = [2 * row["held_out_error"] for row in rows]
    right.errorbar(radii, difference, error, marker=marker, capsize=3, label=toy)
right.set(title="held-out data inside of regions", ylabel="share, less the nominal one")
right.set_xlabel("radius r (standard deviations of the latents)")
right.legend()
plt.show()

# %%
# Hardly a latent changes sides: both maps are invertible. But the smallest region of ``circles``
# lies in the middle of the inner circle, where there are hardly any data. This short training puts
# samples there, and the round trip does not notice. Coverage of held-out data does.
#
# What next
# ---------
# - Fewer numbers: ``path.schedule=prr path.dims_to_keep=1`` squeezes all directions of the data
#   but one.
# - Images: ``model=inflation data=digits``. The same code serves.
# - How it works: :doc:`/guide/inflationary-flows`. Longer trainings on five toys, with their
#   numbers: ``experiments/inflation-toys``.
