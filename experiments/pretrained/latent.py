"""Pixel maps through a decoder against decoded members, on the pipeline of train_latent.py.

    python experiments/pretrained/latent.py FOLDER IMAGES.zip

Writes ``latent.*`` into results.json and latent.png.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import DiTPipeline

from bayesdiff.data.sources import zip_images
from bayesdiff.metrics.agreement import spearman
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline
from bayesdiff.uncertainty import Ensemble, Linearised

HERE = Path(__file__).parent
IMAGES, STEPS, MEMBERS = 20, 20, 64


def main():
    """Fit, sample twice, compare, draw."""
    folder, images = sys.argv[1:]
    pipe = DiTPipeline.from_pretrained(folder)
    data = zip_images("rgb", images)
    bayes = BayesianPipeline.of(pipe).fit(
        data.images[:4000], labels=data.labels[:4000].tolist(), batch_size=250
    )
    asked = {
        "class_labels": list(range(10)),
        "num_images": IMAGES,
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
    }
    own = bayes(uncertainty=Linearised(draws=64), **asked)
    members = bayes(uncertainty=Ensemble(members=MEMBERS), **asked)
    halves = bayes(uncertainty=Ensemble(members=MEMBERS, seed=1), **asked)
    results = {}
    for name, found in (("latent", own), ("latent.reference_again", halves)):
        pairs = zip(found.variance.flatten(1), members.variance.flatten(1), strict=True)
        results[f"{name}.pixel_rank"] = float(sum(spearman(a, b) for a, b in pairs)) / IMAGES
        sums = found.scores["map.sum"], members.scores["map.sum"]
        results[f"{name}.image_rank"] = float(spearman(*sums))
        results[f"{name}.size"] = float((sums[0] / sums[1]).median())
    results |= {"latent.nfe": own.record["nfe"], "latent.reference_nfe": members.record["nfe"]}
    path = HERE / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | results, indent=2, sort_keys=True) + "\n")
    print(results)
    draw(own, members)


def draw(own, members):
    """Ten samples, their maps by sensitivities, and by decoded members, on one scale."""
    rows = [out.variance[:10].mean(1).sqrt() * 255 for out in (own, members)]
    top = float(torch.stack(rows).max())
    figure, axes = plt.subplots(3, 10, figsize=(10, 3.3), layout="constrained")
    for column in range(10):
        axes[0, column].imshow(own.images[column].permute(1, 2, 0))
        for row, maps in zip(axes[1:], rows, strict=True):
            shown = row[column].imshow(maps[column], vmin=0, vmax=top, cmap="magma")
    names = ("sample", "sensitivities", "64 members")
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(name, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[1:], label="sd, grey levels", shrink=0.9)
    figure.savefig(HERE / "latent.png", dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
