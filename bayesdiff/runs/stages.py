"""The stages after training: images, uncertainty maps, validation; each is made once per key."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.machine.progress import per_image, track
from bayesdiff.machine.ranks import dealt, world_size
from bayesdiff.machine.shared_rows import Batch, Rows, shared_rows
from bayesdiff.metrics.validation import (
    COLUMNS,
    Validation,
    reference_at_once,
    reference_of,
    validate,
)
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup, starts
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.calibration import Calibration
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.stored import from_arrays, to_arrays

log = logging.getLogger(__name__)


def made_rows(
    file: Artefact, numbers: range, size: int, batch: Batch, what: str, each: float = 0
) -> Rows:
    """Rows of samples, made once; their batches are shared by all processes.

    Args:
        file: keeps them.
        numbers: of the samples.
        size: samples in a batch.
        batch: gives tensors ``(n, ...)`` of n samples, on the CPU.
        what: for the log and the progress.
        each: network evaluations that a sample is expected to take, see ``track``.
    """

    def make() -> Rows:
        log.info("%s: %d to make, %d at once%s", what, len(numbers), size, per_image(each))
        return shared_rows(numbers, size, batch, what, each)

    return file.arrays(make)


@torch.inference_mode()
def make_images(run: Run, solver: Solver, count: int, file: Artefact) -> Tensor:
    """The model's own samples 0 ... count - 1, ``(count, C, H, W)`` uint8, shared by all cells."""
    start_of = starts(run, solver)

    def batch(numbers: list[int]) -> Rows:
        start = start_of(numbers)
        images = integrate(start.field(), start.steps(), start.initial(), start.draw)
        return {"images": run.data.space.decode(images).cpu()}

    size, first = run.cfg.metrics.batch_size, start_of([0])
    return made_rows(file, range(count), size, batch, "images", first.nfe)["images"]


def make_maps(
    at: Setup, file: Artefact, seed: int | None = None, numbers: Sequence[int] | None = None
) -> Samples:
    """Images with their uncertainty maps, made once.

    Args:
        at: what they are made with.
        file: keeps them.
        seed: of their noise; None is the run's own.
        numbers: of the samples; None for 0, 1, ... as many as the estimator is asked for.
    """
    return from_arrays(file.arrays(lambda: to_arrays(maps_of(at, seed, numbers))))


def make_calibrated(file: Artefact, samples: Samples, calibration: Calibration) -> Samples:
    """The maps in their calibrated size, kept beside those they are of."""
    return from_arrays(file.arrays(lambda: to_arrays(calibration.applied(samples))))


def maps_of(at: Setup, seed: int | None, numbers: Sequence[int] | None) -> Samples:
    """Images with their maps, made now; every process gets all of them.

    Args:
        at: what they are made with.
        seed: of their noise; None is the run's own.
        numbers: of the samples; None for 0, 1, ... as many as the estimator is asked for.
    """
    run, solver, posterior = at.run, at.solver, at.posterior
    # Fitted on the run's own seed, so that the pools of a study share what is fitted.
    ready = at.estimator.for_run(run).fit(at.starts, posterior, run.folder)
    start_of = starts(run, solver, seed)
    size = images_at_once(ready, solver, run.model, run.data.space.shape)
    chosen = torch.arange(ready.num_images) if numbers is None else torch.tensor(list(numbers))
    batches = list(chosen.split(size))
    each = ready.evaluations(start_of([int(chosen[0])]))
    log.info("maps: %d, %d at once, by %s%s", len(chosen), size, ready.name, per_image(each))
    mine = {}
    for number in track(
        dealt(range(len(batches))), "maps", "images", lambda k: len(batches[k]), each
    ):
        mine[number] = ready.mapped(start_of, batches[number].tolist(), posterior)
    samples = Samples.join([part for _, part in sorted(_share(mine).items())])
    return replace(samples.in_unit_range() if ready.units == "unit" else samples, numbers=chosen)


def make_validation(at: Setup, samples: Samples, file: Artefact) -> Validation:
    """The first maps against a reference ensemble, made once."""

    def make() -> dict[str, Any]:
        found = _validation(at, samples)
        columns = {name: getattr(found, name).tolist() for name in COLUMNS}
        return {"metrics": found.metrics(at.run.cfg.seed), "images": columns}

    columns = file.record(make)["images"]
    return Validation(*(torch.tensor(columns[name], dtype=torch.float64) for name in COLUMNS))


def _validation(at: Setup, samples: Samples) -> Validation:
    run, estimator, start_of = at.run, at.estimator, at.starts
    reference = reference_of(estimator)
    size = reference_at_once(estimator, at.solver, run.model, run.data.space.shape)
    maps = samples.in_model_range().variance[: estimator.validate_images]
    numbers = range(len(maps)) if samples.numbers is None else samples.numbers.tolist()
    log.info("validation: %d maps, %d members", len(maps), reference.members)
    return validate(
        maps, lambda rows: start_of([numbers[row] for row in rows]), at.posterior, reference, size
    )


def _share(mine: dict[int, Samples]) -> dict[int, Samples]:
    """Every process's parts, on every process."""
    if world_size() == 1:
        return mine
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return {number: part for parts in gathered for number, part in parts.items()}
