"""What do d numbers of a latent keep: python few.py RUN_FOLDER ... [images=1000] [keep=784,16].

Samples: latents standard normal in the first d eigen-directions and 0 in all others, scored by
FID/classifier against the training images. Held-out images: to their latents, cut to d numbers,
and back. Adds to few_numbers.json. The classifier is that of the runs, in OUTPUTS/cache.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.metrics.classifier import load_or_train
from bayesdiff.metrics.features import classifier_extractor, extract, weights_hash
from bayesdiff.metrics.scores import reference_statistics, scores
from bayesdiff.runs.invertible import InvertibleFlow
from bayesdiff.solvers import Heun

HERE = Path(__file__).parent
HELD_OUT = 256


def cut(latents: Tensor, keep: int) -> Tensor:
    """Latents ``(N, *shape)`` with 0 behind the first ``keep`` coordinates."""
    rows = latents.flatten(1).clone()
    rows[:, keep:] = 0
    return rows.view(latents.shape)


def judged(data: Any, cache: Path) -> Any:
    """Gives the FID of uint8 images against the training images."""
    extractor = classifier_extractor(load_or_train(cache, data, 0))
    key = f"{data.images_fingerprint}-{weights_hash(extractor)}"
    compute = {"key": key, "cache_dir": cache, "seed": 0}
    reference = reference_statistics(lambda: extract(extractor, data.images), **compute)

    def fid(images: Tensor) -> float:
        found = scores(extract(extractor, images), reference, seed=0, extractor="classifier")
        return next(value for name, value in found.items() if name.startswith("fid@"))

    return fid


def of_run(folder: Path, images: int, keep: list[int], steps: int) -> dict[str, float]:
    """Numbers of one run, by dimensions kept."""
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    data = instantiate(cfg.data.source)
    flow, fid = InvertibleFlow.of(folder, Heun(steps)), judged(data, folder.parent / "cache")
    shape = flow.space.shape
    z = torch.randn(images, *shape, generator=torch.Generator().manual_seed(7))
    shown = data.test_images[:HELD_OUT]
    truth, latents = shown.float() / 127.5 - 1, flow.encode(shown)
    found: dict[str, float] = {}
    for d in keep:
        samples = flow.space.inner.decode(flow.decode(cut(z, d)))
        found[f"keep_{d}.fid"] = fid(samples)
        away = flow.decode(cut(latents, d)) - truth
        found[f"keep_{d}.grey_mse"] = float(127.5**2 * away.square().mean())
    return found


def main(words: list[str]) -> None:
    """All runs of the command line."""
    options = {w.partition("=")[0]: w.partition("=")[2] for w in words if "=" in w}
    folders = [Path(word) for word in words if "=" not in word]
    file = HERE / "few_numbers.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for folder in folders:
        cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
        kept = [784] if cfg.path.dims_to_keep is None else [784, int(cfg.path.dims_to_keep)]
        keep = [int(d) for d in options["keep"].split(",")] if "keep" in options else kept
        found = of_run(
            folder, int(options.get("images", 1000)), keep, int(options.get("steps", 30))
        )
        name = (
            "prp"
            if cfg.path.dims_to_keep is None
            else (f"prr_{cfg.path.dims_to_keep}_gap_{cfg.path.inflation_gap}")
        )
        results |= {f"{name}.{key}": value for key, value in found.items()}
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
