"""How the size of the map of all layers depends on what the likelihood counts.

    python experiments/retraining/counts.py [DATA_MODEL ...] [share=K ...]

The posterior multiplies its likelihood by n_eff, here a share of the images seen. It counts every
pixel of an image as an observation of its own: 784 on 28x28 images, 64 on digits. Whether they
are is asked of the head's gradients: ``overcount``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import Bench, images_of
from networks import REFERENCE, SETTINGS
from run import linearised

from bayesdiff.laplace.block.posterior import BlockPosterior
from bayesdiff.laplace.gradients import gradients, unfolded
from bayesdiff.laplace.gram import gram
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.metrics.agreement import image_rank, pixel_rank, spread_ratio
from bayesdiff.report import table
from bayesdiff.runs.training import images_seen
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
SHARES = ("1", "0.25", str(round(64 / 784, 4)))
IMAGES = 2000  # for the overcount


@torch.no_grad()
def overcount(bench: Bench) -> float:
    """How often the likelihood counts what an image says of the head, 1 where pixels are apart.

    The mean of the diagonal of H^-1 J over the head's weights: H the likelihood's curvature, which
    takes residuals of pixels for independent, J the sum of g g^T over images, g their gradients;
    as in the magnitude adjustment of composite likelihoods (Pauli, Racugno and Ventura 2011).
    """
    model, data = bench.run.model, bench.run.data.data
    net, seen = model.net, {"num_images": IMAGES, "seed": 3}
    curvature = score = torch.zeros((), dtype=torch.float64)
    squares: list[torch.Tensor] = []
    for draw in draws_of(model, data.images, data.labels, **seen):
        features = net.features(draw.x_t, draw.time, draw.y)
        output = net.head(features)
        residual = net.fold(output) - draw.target
        slopes = gradients(net.head, features, unfolded(net, output, residual))
        curvature = curvature + gram(net.head, features)
        score = score + torch.einsum("bcp,bcq->pq", slopes, slopes) / slopes.shape[1]
        squares.append(residual.double().square().flatten())
    apart = curvature * torch.cat(squares).mean()  # H in the units of J
    return float(torch.linalg.solve(apart, score).diagonal().mean())


def main(words: Sequence[str]) -> None:
    """Compare, and add to the results."""
    asked = Asked.of(words, SETTINGS, "share")
    for setting in asked.names or ["fashion_flow"]:
        bench = Bench(setting, 0)
        images = images_of(bench, REFERENCE)
        reference = torch.stack([images[k] for k in REFERENCE if k]).var(0)
        factors = bench.factors("all")
        results = read_json(HERE / "counts.json") or {}
        found = results.setdefault(setting, {})
        once = overcount(bench)
        for share in asked.options["share"] or SHARES:
            n_eff = float(share) * images_seen(bench.run)
            options = {"prior_precision": "evidence", "n_eff": n_eff}
            head = HeadPosterior.fit(bench.head.curvature, **options)
            block = BlockPosterior.beside(head, factors, "evidence", "layer")
            maps = bench.maps(f"all_share_{share}", linearised(), head, block)
            found[share] = {
                "image_rank": image_rank(maps.variance, reference),
                "pixel_rank": pixel_rank(maps.variance, reference),
                "size": spread_ratio(maps.variance, reference),
                "overcount": once,
            }
        write_json(HERE / "counts.json", results)
        rows = [{"share": name, **found[name]} for name in sorted(found, key=float)]
        write_text(HERE / f"counts-{setting}.md", table.markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
