"""The stages after training: images, uncertainty maps and scores, each made once per key."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.artefacts import read_arrays, write_arrays
from bayesdiff.build import Run
from bayesdiff.data.module import to_uint8
from bayesdiff.distributed import barrier, gather_rows, rank, world_size
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.progress import track
from bayesdiff.solvers import SampleNoise, Solver, integrate
from bayesdiff.uncertainty import Estimator, Samples, Trajectory

log = logging.getLogger(__name__)


def trajectory(run: Run, solver: Solver, indices: Sequence[int]) -> Trajectory:
    """Start of the samples with these numbers: classes in turn, noise from (seed, number)."""
    classes = run.model.num_classes
    labels = torch.tensor(indices) % classes if classes else None
    noise = SampleNoise(run.cfg.seed, indices, run.data.data.images.shape[1:])
    return Trajectory(
        model=run.model,
        solver=solver,
        labels=None if labels is None else labels.to(run.device),
        noise=noise,
        device=run.device,
    )


@torch.inference_mode()
def make_images(run: Run, solver: Solver, count: int, path: Path, key: str) -> Tensor:
    """The model's own samples 0 ... count - 1, ``(count, C, H, W)`` uint8, shared by all cells."""
    stored = read_arrays(path, key)
    barrier()  # nobody writes before everybody has looked
    if stored is not None:
        log.info("images: %d made before", count)
        return stored["images"]
    size = run.cfg.metrics.batch_size
    parts, numbers = [], []
    batches = list(torch.arange(count).split(size))
    for indices in track(batches[rank() :: world_size()], "images"):
        start = trajectory(run, solver, indices.tolist())
        x_0 = start.draw()
        images = integrate(start.field(), start.steps(), x_0, start.draw)
        parts.append(to_uint8(images.cpu()))
        numbers.append(indices)
    shape = run.data.data.images.shape[1:]
    rows = torch.cat(parts) if parts else torch.zeros(0, *shape, dtype=torch.uint8)
    place = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long)
    images = gather_rows(rows, place, count)
    if rank() == 0:
        write_arrays(path, key, {"images": images})
    return images


def make_maps(
    run: Run, solver: Solver, estimator: Estimator, posterior: HeadPosterior, path: Path, key: str
) -> Samples:
    """The first images again, each with its uncertainty map."""
    stored = read_arrays(path, key)
    barrier()
    if stored is not None:
        log.info("uncertainty: %d maps made before", len(stored["images"]))
        return _from_arrays(stored)
    batches = list(torch.arange(estimator.num_images).split(estimator.batch_size))
    mine = {}
    for number in track(range(rank(), len(batches), world_size()), "uncertainty"):
        mine[number] = estimator(trajectory(run, solver, batches[number].tolist()), posterior)
    samples = Samples.join([part for _, part in sorted(_share(mine).items())])
    if rank() == 0:
        write_arrays(path, key, _to_arrays(samples))
    return samples


def _share(mine: dict[int, Samples]) -> dict[int, Samples]:
    """Every process's parts, on every process."""
    if world_size() == 1:
        return mine
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return {number: part for parts in gathered for number, part in parts.items()}


def _to_arrays(samples: Samples) -> dict[str, Tensor | None]:
    values = {f.name: getattr(samples, f.name) for f in fields(Samples)}
    values["nfe"] = torch.tensor(samples.nfe)
    values["estimator"] = torch.tensor(list(samples.estimator.encode()), dtype=torch.uint8)
    return values


def _from_arrays(arrays: dict[str, Tensor]) -> Samples:
    values: dict[str, Any] = {"labels": None, **arrays}
    values["nfe"] = int(arrays["nfe"])
    values["estimator"] = bytes(arrays["estimator"].tolist()).decode()
    return Samples(**values)


def score(run: Run, images: Tensor) -> dict[str, float]:
    """FID, IS, KID, precision and recall of the images, and of real test images beside them."""
    from bayesdiff.metrics.features import build_extractor, extract, weights_hash
    from bayesdiff.metrics.scores import reference_statistics, scores

    cfg, data = run.cfg.metrics, run.data.data
    cache = Path(run.cfg.output_dir) / "cache"
    extractor = build_extractor(
        cfg.features,
        data,
        cache_dir=cache,
        seed=cfg.seed,
        weights_path=cfg.weights_path,
        device=run.device,
    )
    key = f"{data.fingerprint}-{weights_hash(extractor)}"
    reference = reference_statistics(
        lambda: extract(extractor, data.images, cfg.batch_size),
        key=key,
        cache_dir=cache,
        seed=cfg.seed,
    )
    name, seed = cfg.features, cfg.seed
    values = scores(
        extract(extractor, images, cfg.batch_size), reference, seed=seed, extractor=name
    )
    # Test images often come sorted by class.
    mixed = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(seed))
    real = extract(extractor, data.test_images[mixed[: len(images)]], cfg.batch_size)
    if len(real) > 1:
        of_real = scores(real, reference, seed=seed, extractor=name)
        values |= {f"real/{key}": value for key, value in of_real.items()}
    accuracy = getattr(getattr(extractor, "classifier", None), "test_accuracy", None)
    if accuracy is not None:
        values["classifier_test_accuracy"] = float(accuracy)
    return values
