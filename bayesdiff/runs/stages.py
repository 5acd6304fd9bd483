"""The stages after training: images, uncertainty maps, scores; each is made once per key."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.data.images import check_classifiable
from bayesdiff.data.module import to_uint8
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.progress import per_image, track
from bayesdiff.machine.ranks import barrier, rank, world_size
from bayesdiff.machine.shared_rows import Batch, Rows, shared_rows
from bayesdiff.metrics.validation import (
    COLUMNS,
    Validation,
    reference_at_once,
    reference_of,
    validate,
)
from bayesdiff.runs.build import Run, is_main_process
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import read_arrays, read_json, write_arrays, write_json
from bayesdiff.uncertainty import Estimator, Samples, Starts, starts_of
from bayesdiff.uncertainty.chosen import check_export
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.stored import from_arrays, to_arrays

if TYPE_CHECKING:  # these import torch-fidelity, which costs seconds
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    from bayesdiff.metrics.scores import Reference

log = logging.getLogger(__name__)

# Names that metrics.features takes.
ENCODERS = ("classifier", "inception", "clip", "dinov2")


def starts(run: Run, solver: Solver, seed: int | None = None) -> Starts:
    """Start of samples by their numbers; None takes the run's own seed."""
    shape = run.data.data.images.shape[1:]
    seed = run.cfg.seed if seed is None else seed
    return starts_of(run.model, solver, seed, shape, run.device)


def made_rows(
    path: Path, key: str, numbers: range, size: int, batch: Batch, what: str, each: float = 0
) -> Rows:
    """Rows of samples, made once; their batches are shared by all processes.

    Args:
        path: npz that keeps them.
        key: of all that they come from.
        numbers: of the samples.
        size: samples in a batch.
        batch: gives tensors ``(n, ...)`` of n samples, on the CPU.
        what: for the log and the progress.
        each: network evaluations that a sample is expected to take, see ``track``.
    """
    stored = read_arrays(path, key)
    barrier()  # nobody writes before everybody has looked
    if stored is not None:
        log.info("%s: %d made before", what, len(numbers))
        return stored
    log.info("%s: %d to make, %d at once%s", what, len(numbers), size, per_image(each))
    rows = shared_rows(numbers, size, batch, what, each)
    if rank() == 0:
        write_arrays(path, key, rows)
    return rows


@torch.inference_mode()
def make_images(run: Run, solver: Solver, count: int, path: Path, key: str) -> Tensor:
    """The model's own samples 0 ... count - 1, ``(count, C, H, W)`` uint8, shared by all cells."""
    start_of = starts(run, solver)

    def batch(numbers: list[int]) -> Rows:
        start = start_of(numbers)
        images = integrate(start.field(), start.steps(), start.initial(), start.draw)
        return {"images": to_uint8(images.cpu())}

    size, first = run.cfg.metrics.batch_size, start_of([0])
    return made_rows(path, key, range(count), size, batch, "images", first.nfe)["images"]


def make_maps(
    run: Run,
    solver: Solver,
    estimator: Estimator,
    posterior: HeadPosterior,
    path: Path,
    key: str,
    seed: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Samples:
    """Images with their uncertainty maps, made once.

    Args:
        run: with its trained model.
        solver: of the samples.
        estimator: of the maps.
        posterior: of the head.
        path: npz that keeps them.
        key: of all that they come from.
        seed: of their noise; None is the run's own.
        numbers: of the samples; None for 0, 1, ... as many as the estimator is asked for.
    """
    stored = read_arrays(path, key)
    barrier()
    if stored is not None:
        log.info("uncertainty: %d maps made before", len(stored["images"]))
        return from_arrays(stored)
    # Fitted on the run's own seed, so that the pools of a study share what is fitted.
    ready = estimator.fit(starts(run, solver), posterior, run.folder)
    start_of = starts(run, solver, seed)
    size = images_at_once(ready, solver, run.model, run.data.data.images.shape[1:])
    chosen = torch.arange(ready.num_images) if numbers is None else torch.tensor(list(numbers))
    batches = list(chosen.split(size))
    each = ready.evaluations(start_of([int(chosen[0])]))
    log.info("maps: %d, %d at once, by %s%s", len(chosen), size, ready.name, per_image(each))
    mine = {}
    own = range(rank(), len(batches), world_size())
    for number in track(own, "maps", "images", lambda k: len(batches[k]), each):
        mine[number] = ready(start_of(batches[number].tolist()), posterior)
    samples = Samples.join([part for _, part in sorted(_share(mine).items())])
    samples = replace(
        samples.in_unit_range() if ready.units == "unit" else samples, numbers=chosen
    )
    if rank() == 0:
        write_arrays(path, key, to_arrays(samples))
    return samples


def make_validation(
    run: Run,
    solver: Solver,
    estimator: Estimator,
    posterior: HeadPosterior,
    samples: Samples,
    path: Path,
    key: str,
) -> Validation:
    """The first maps against a reference ensemble, made once."""
    stored = read_json(path) or {}
    barrier()
    if stored.get("key") == key and set(COLUMNS) <= stored.get("images", {}).keys():
        log.info("validation: done before")
        columns = stored["images"]
        return Validation(*(torch.tensor(columns[name], dtype=torch.float64) for name in COLUMNS))
    reference = reference_of(estimator)
    size = reference_at_once(estimator, solver, run.model, run.data.data.images.shape[1:])
    maps = samples.in_model_range().variance[: estimator.validate_images]
    numbers = range(len(maps)) if samples.numbers is None else samples.numbers.tolist()
    start_of = starts(run, solver)
    log.info("validation: %d maps, %d members", len(maps), reference.members)
    found = validate(
        maps, lambda rows: start_of([numbers[row] for row in rows]), posterior, reference, size
    )
    if rank() == 0:
        columns = {name: getattr(found, name).tolist() for name in COLUMNS}
        write_json(path, {"key": key, "metrics": found.metrics(run.cfg.seed), "images": columns})
    return found


def _share(mine: dict[int, Samples]) -> dict[int, Samples]:
    """Every process's parts, on every process."""
    if world_size() == 1:
        return mine
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return {number: part for parts in gathered for number, part in parts.items()}


def check_metrics(cfg: DictConfig, run: Run) -> None:
    """Refuse scores that could not be computed once the images are there.

    Raises:
        UserError: for bad values, data without labels, or Inception weights that are not there.
    """
    check_export("metrics.export", cfg.export, run, cfg.num_images)
    at_least("metrics.batch_size", cfg.batch_size)
    seed_of("metrics.seed", cfg.seed)
    if cfg.features not in ENCODERS:
        raise UserError(
            f"unknown metrics.features {cfg.features!r}; choose from {', '.join(ENCODERS)}"
        )
    if at_least("metrics.num_images", cfg.num_images, 0) == 1:
        raise UserError("metrics.num_images=1 cannot be scored; give 2 or more, or 0 for none")
    if cfg.num_images and cfg.features != "classifier" and is_main_process():
        from bayesdiff.metrics.features import build_extractor

        weights = cfg.weights_path
        build_extractor(cfg.features, None, cache_dir="", seed=0, weights_path=weights)
    if cfg.num_images and cfg.features == "classifier":
        check_classifiable(
            run.data.data, "use metrics=inception, or metrics.num_images=0 for no scores"
        )


def make_scores(run: Run, images: Tensor, path: Path, key: str) -> dict[str, float]:
    """FID and its kin of the images, made once for all cells that share them."""
    stored = read_json(path) or {}
    barrier()  # nobody writes before everybody has looked
    if stored.get("key") == key and isinstance(stored.get("metrics"), dict):
        return stored["metrics"]
    metrics = score(run, images)
    if rank() == 0:
        write_json(path, {"key": key, "metrics": metrics})
    return metrics


def score(run: Run, images: Tensor) -> dict[str, float]:
    """FID, IS, KID, precision, recall and CMMD of the images, and of real test images.

    All processes extract features; the first one has the scores, the others nothing.
    """
    from bayesdiff.metrics.cmmd import cmmd
    from bayesdiff.metrics.features import extract
    from bayesdiff.metrics.scores import scores

    cfg, data = run.cfg.metrics, run.data.data
    extractor, reference = judge(run, shared=True)
    name, seed = cfg.features, cfg.seed
    known = torch.from_numpy(reference.subset)
    own = extract(extractor, images, cfg.batch_size, shared=True)
    # Test images often come sorted by class.
    mixed = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(seed))
    some = data.test_images[mixed[: len(images)]]
    real = extract(extractor, some, cfg.batch_size, shared=True)
    if rank():
        return {}
    values = scores(own, reference, seed=seed, extractor=name)
    values |= cmmd(own.features, known, encoder=name)
    if len(real) > 1:
        of_real = scores(real, reference, seed=seed, extractor=name)
        of_real |= cmmd(real.features, known, encoder=name)
        values |= {f"real/{key}": value for key, value in of_real.items()}
    accuracy = getattr(getattr(extractor, "classifier", None), "test_accuracy", None)
    if accuracy is not None:
        values["classifier_test_accuracy"] = float(accuracy)
    return values


def judge(
    run: Run, seed: int | None = None, shared: bool = False
) -> tuple["FeatureExtractorBase", "Reference"]:
    """The extractor that ``metrics`` names with the statistics of the training images under it.

    Args:
        run: gives both.
        seed: of a classifier; None is that of the run's scores.
        shared: whether all processes call it and share the work.
    """
    from bayesdiff.metrics.features import build_extractor, extract, weights_hash
    from bayesdiff.metrics.scores import reference_statistics

    cfg, data = run.cfg.metrics, run.data.data
    cache = Path(run.cfg.output_dir) / "cache"
    extractor = build_extractor(
        cfg.features,
        data,
        cache_dir=cache,
        seed=cfg.seed if seed is None else seed,
        weights_path=cfg.weights_path,
        device=run.device,
    )
    reference = reference_statistics(
        lambda: extract(extractor, data.images, cfg.batch_size, shared=shared),
        key=f"{data.fingerprint}-{weights_hash(extractor)}",
        cache_dir=cache,
        seed=cfg.seed,
        shared=shared,
    )
    return extractor, reference
