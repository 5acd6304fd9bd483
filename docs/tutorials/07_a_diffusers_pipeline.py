"""
Maps for a pipeline of diffusers
================================

You have a pipeline already, and do not want to train it again. ``BayesianPipeline`` makes the last
layer of its network Bayesian, from a few hundred images like those that it was trained on. The
pipeline stays as it is, and its images are its own. The extra is needed:
``pip install -e ".[pretrained]"``.
"""

# %%
# A pipeline
# ----------
# This page is to run without a download. So it trains a small one first, by diffusers alone: a
# U-Net that predicts v, on scikit-learn's digits. With a pipeline of your own this section is one
# line: ``pipe = DiffusionPipeline.from_pretrained("path/to/pipeline")``.

import tempfile

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from sklearn.datasets import load_digits

torch.manual_seed(0)
images = torch.tensor(load_digits().images[:, None] / 16, dtype=torch.float32)  # in [0, 1]
net = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(24, 48),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
scheduler = DDIMScheduler(
    clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"
)

steps = 500
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
for _ in range(steps):
    x = 2 * images[torch.randint(len(images), (64,))] - 1
    noise, t = torch.randn_like(x), torch.randint(1000, (64,))
    output = net(scheduler.add_noise(x, noise, t), t).sample
    loss = (output - scheduler.get_velocity(x, noise, t)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

pipe = DDPMPipeline(net.eval(), scheduler)
pipe.set_progress_bar_config(disable=True)

# %%
# The essential lines
# -------------------
# ``fit`` takes images like those of the training: here a tensor, but a folder, a zip or a data set
# will do. A few hundred are enough. Then the call takes the pipeline's own arguments.

from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline

bayes = BayesianPipeline.of(pipe).fit(images[:500])
out = bayes(num_images=10, num_inference_steps=20, seed=1)

print("images  ", tuple(out.images.shape), "in [0, 1]")
print("variance", tuple(out.variance.shape), "in squared units of these")
print("evaluations of the network per image with its map:", out.record["nfe"])

# %%
# Each image with its map
# -----------------------
# All maps share one scale: the standard deviation of a pixel, in units of the images. The number
# is the sum of the variance over the image.

deviation = out.variance.sqrt()
figure, axes = plt.subplots(2, 10, figsize=(11, 2.7), layout="constrained")
for k, (above, below) in enumerate(axes.T):
    above.imshow(out.images[k, 0], cmap="gray", vmin=0, vmax=1)
    above.set_title(f"{out.scores['map.sum'][k]:.3f}")
    shown = below.imshow(deviation[k, 0], cmap="magma", vmin=0, vmax=deviation.max())
    above.set_axis_off()
    below.set_axis_off()
figure.colorbar(shown, ax=axes[1].tolist(), label="sd of the pixel", pad=0.01)
plt.show()

# %%
# The map says where other weights of the last layer, as plausible given the 500 images, would have
# drawn something else. It does not say that something is wrong there.
#
# Before you trust it
# -------------------
# ``doctor`` names what would spoil samples on this pipeline: clipping, times that are visited
# twice, a scheduler that begins where the network has never been. An empty list is good news.

findings = bayes.doctor()
for finding in findings:
    print(finding.what, finding.why, finding.cure, sep="; ")
print(len(findings), "findings")

# %%
# ``needs`` says what a map costs before you pay for it.

print(bayes.needs(num_inference_steps=20, num_images=10))

# %%
# Another estimator, other steps, the same posterior
# --------------------------------------------------
# The default, an ensemble of 16, follows 16 draws of the weights along whole trajectories.
# ``Linearised`` carries first-order sensitivities instead. On the same images they should agree
# where the posterior is narrow. Look before you rely on it.

from bayesdiff.uncertainty import Linearised

other = bayes(num_images=10, num_inference_steps=20, seed=1, uncertainty=Linearised(draws=16))
assert torch.allclose(other.images, out.images, atol=1e-4)  # the images do not depend on the map

figure, ax = plt.subplots(figsize=(4.2, 4), layout="constrained")
ax.scatter(deviation.flatten(), other.variance.sqrt().flatten(), s=6, alpha=0.6)
top = float(max(deviation.max(), other.variance.sqrt().max()))
ax.plot([0, top], [0, top], color="0.4", lw=1, label="equal")
ax.set(xlabel="sd of a pixel, ensemble", ylabel="sd of a pixel, linearised", aspect="equal")
ax.legend()
plt.show()

# %%
# Keep it
# -------
# The posterior is a small file beside the pipeline. It is refused by any other network.
# ``out.save`` writes every image and every map as a PNG, with a record of what they were made
# with.

folder = tempfile.mkdtemp()
bayes.save(f"{folder}/posterior")
again = BayesianPipeline.load(pipe, f"{folder}/posterior")
same = again(num_images=2, num_inference_steps=20, seed=1)
print("the same maps:", torch.allclose(same.variance, out.variance[:2], rtol=1e-3, atol=1e-6))
out.save(f"{folder}/out")

# %%
# What next
# ---------
# - Latents, prompts, classes, guidance, networks that diffusers does not know, and what is
#   refused: :doc:`/guide/pretrained`.
# - The whole run, with scores, reports and sweeps, for a pipeline's folder: ``python train.py
#   model=pretrained model.path=pipeline data=digits``.
# - The other way: ``bayesdiff.pretrained.export.export_pipeline`` writes a model that was trained
#   here as a folder that diffusers reads.
