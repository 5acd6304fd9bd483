"""What do d numbers of a latent keep: python few.py RUN_FOLDER ... [images=1000] [keep=784,16].

Samples: latents standard normal in the first d eigen-directions and 0 in all others, scored by
FID/classifier against the training images. Held-out images: to their latents, cut to d numbers,
and back. Adds to few_numbers.json, and draws the first samples. The classifier is that of the
runs, in OUTPUTS/cache.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.cli import one_line_errors
from bayesdiff.data.spaces import to_uint8
from bayesdiff.metrics.classifier import load_or_train
from bayesdiff.metrics.features import classifier_extractor, extract, weights_hash
from bayesdiff.metrics.scores import reference_statistics, scores
from bayesdiff.report import figures
from bayesdiff.report.layout import GAP, picture, put, sheet
from bayesdiff.runs.invertible import InvertibleFlow
from bayesdiff.solvers import Heun

HERE = Path(__file__).parent
HELD_OUT, SHOWN = 256, 12


def cut(latents: Tensor, keep: int) -> Tensor:
    """Latents ``(N, *shape)`` with 0 behind the first ``keep`` coordinates."""
    rows = latents.flatten(1).clone()
    rows[:, keep:] = 0
    return rows.view(latents.shape)


def judged(data: Any, cache: Path) -> Callable[[Tensor], float]:
    """Gives the FID of uint8 images against the training images."""
    extractor = classifier_extractor(load_or_train(cache, data, 0))
    reference = reference_statistics(
        lambda: extract(extractor, data.images),
        key=f"{data.images_fingerprint}-{weights_hash(extractor)}",
        cache_dir=cache,
        seed=0,
    )

    def fid(images: Tensor) -> float:
        found = scores(extract(extractor, images), reference, seed=0, extractor="classifier")
        return next(value for name, value in found.items() if name.startswith("fid@"))

    return fid


def of_flow(
    flow: InvertibleFlow, data: Any, fid: Callable[[Tensor], float], images: int, keep: list[int]
) -> tuple[dict[str, float], dict[int, Tensor]]:
    """Numbers of one flow, and its first samples, by dimensions kept."""
    z = torch.randn(images, *flow.space.shape, generator=torch.Generator().manual_seed(7))
    truth = data.test_images[:HELD_OUT].float() / 127.5 - 1
    latents = flow.encode(data.test_images[:HELD_OUT])
    found: dict[str, float] = {}
    rows: dict[int, Tensor] = {}
    for d in keep:
        samples = flow.decode(cut(z, d))
        rows[d] = samples[:SHOWN]
        found[f"keep_{d}.fid"] = fid(to_uint8(samples))
        away = flow.decode(cut(latents, d)) - truth
        found[f"keep_{d}.grey_mse"] = float(127.5**2 * away.square().mean())
    return found, rows


def drawn(rows: dict[int, Tensor], conditions: str) -> Any:
    """Samples ``(n, C, H, W)`` in [-1, 1] of the same latents, a row for each d."""
    height, width = (2 * side for side in next(iter(rows.values())).shape[-2:])
    across, left = max(map(len, rows.values())), 84
    caption = (
        "Samples of the same latents, unselected, of which the first d numbers are kept and the "
        f"others set to 0; {conditions}."
    )
    size = left + across * (width + GAP), len(rows) * (height + GAP)
    figure, axes = sheet(*size, "What d numbers keep", caption)
    for row, (d, images) in enumerate(rows.items()):
        y = row * (height + GAP)
        axes.text(left - 8, y + height / 2, f"d = {d}", ha="right", va="center", size=8)
        for column, image in enumerate(images):
            put(axes, picture(image), left + column * (width + GAP), y, (width, height))
    return figure


def name_of(cfg: Any) -> str:
    """``prp``, or ``prr`` with dimensions kept and gap."""
    if cfg.path.dims_to_keep is None:
        return "prp"
    return f"prr_{cfg.path.dims_to_keep}_gap_{cfg.path.inflation_gap}"


def main(words: list[str]) -> None:
    """All runs of the command line."""
    options = {w.partition("=")[0]: w.partition("=")[2] for w in words if "=" in w}
    file = HERE / "few_numbers.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for folder in (Path(word) for word in words if "=" not in word):
        cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
        data, steps = instantiate(cfg.data.source), int(options.get("steps", 30))
        flow = InvertibleFlow.of(folder, Heun(steps))
        own = [cfg.path.dims_to_keep] if cfg.path.dims_to_keep else []
        keep = options["keep"].split(",") if "keep" in options else [784, *own]
        fid = judged(data, folder.parent / "cache")
        count = int(options.get("images", 1000))
        found, rows = of_flow(flow, data, fid, count, [int(d) for d in keep])
        name = name_of(cfg)
        results |= {f"{name}.{key}": value for key, value in found.items()}
        file.write_text(json.dumps(results, indent=1) + "\n")
        made_of = f"{cfg.data.name}, {name.replace('_', ' ')}, heun, {steps} steps"
        figures.save(drawn(rows, made_of), HERE / f"few-{name}.png", pdf=False)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
