"""The calibration stage: the factor that gives maps the size of what retraining changes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.held_out import DRAWS, held_out_gaps
from bayesdiff.likelihoods import check_noise_level
from bayesdiff.machine.progress import stage, track
from bayesdiff.machine.ranks import dealt, gather_rows
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import values_of
from bayesdiff.runs.build import Run
from bayesdiff.runs.retrained import check_retraining, retrained, retraining_key
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.stages import maps_of
from bayesdiff.solvers import Step, integrate
from bayesdiff.storage.artefacts import Artefact, key_of
from bayesdiff.uncertainty import DeepEnsemble, Estimator, Samples, Start
from bayesdiff.uncertainty.calibration import (
    HELD_OUT,
    Calibration,
    fitted,
    held_out_factor,
    pair_sizes,
    same_time,
    size_factor,
)
from bayesdiff.uncertainty.chosen import sample_numbers
from bayesdiff.uncertainty.decoded import decoded
from bayesdiff.uncertainty.members.base import NetworkField
from bayesdiff.uncertainty.members.other_trainings import OtherTrainings
from bayesdiff.uncertainty.memory import images_at_once

log = logging.getLogger(__name__)

# The first number that a calibration takes: far from those that anybody maps.
FIRST = 3_000_000_000


def check_calibration(run: Run, estimator: Estimator) -> None:
    """Refuse, before any work, a calibration that could not be made.

    Raises:
        UserError: one line with the value and the cure.
    """
    asked = estimator.calibrate
    if asked is None:
        return
    if isinstance(estimator, DeepEnsemble):
        raise UserError(
            f"uncertainty.calibrate={asked} gives maps the size of what retraining changes, and "
            "uncertainty=deep_ensemble has it; leave calibrate out"
        )
    if asked == HELD_OUT:
        _check_held_out(run, estimator)
    elif isinstance(asked, int):
        check_retraining(run, asked)
    else:
        _others(asked).check(run)


def calibration_at(setup: Setup) -> Artefact | None:
    """The file of the factor, None where maps stay as they are."""
    run, estimator = setup.run, setup.estimator
    if estimator.calibrate is None:
        return None
    times = list(estimator.times) if estimator.calibrate_per_time else []
    parts = [setup.made_from, setup.of_maps, calibration_numbers(run, estimator), times]
    key = key_of(*parts, *_sources(run, estimator))
    name = f"calibration-{setup.solver.name}-{estimator.name}-{key[:8]}.json"
    return Artefact(run.folder / name, key, "calibration")


def make_calibration(setup: Setup, file: Artefact) -> Calibration:
    """The factor, made once."""
    with stage("calibration"):
        found = Calibration.of(file.record(lambda: _made(setup).record()))
    log.info("calibration: %s", found.said)
    return found


def calibration_numbers(run: Run, estimator: Estimator) -> list[int]:
    """Samples that are compared with those of other trainings, none of them among the maps."""
    mapped = set(sample_numbers(estimator, run) or ())
    numbers = range(FIRST, FIRST + estimator.calibrate_images + len(mapped))
    return [number for number in numbers if number not in mapped][: estimator.calibrate_images]


def _sources(run: Run, estimator: Estimator) -> list[Any]:
    """What the reference comes from."""
    asked = estimator.calibrate
    if asked == HELD_OUT:
        return [HELD_OUT, DRAWS]
    if isinstance(asked, int):
        return [retraining_key(run, number + 1) for number in range(asked)]
    return sorted(_others(asked).networks(run.model, run.folder))


def _others(asked: Any) -> OtherTrainings:
    needs = "a calibration compares with networks that are not this one"
    return OtherTrainings(tuple(asked), "uncertainty.calibrate", needs, among=False)


def _made(setup: Setup) -> Calibration:
    run, asked = setup.run, setup.estimator.calibrate
    if asked == HELD_OUT:
        return _held_out(setup)
    if isinstance(asked, int):
        others = [retrained(run, number + 1) for number in range(asked)]
    else:
        found = _others(asked).networks(run.model, run.folder)
        others = [network.to(run.device) for network in found.values()]
    return _by_trainings(setup, [run.model, *others])


def _by_trainings(setup: Setup, networks: Sequence[GenerativeModel]) -> Calibration:
    """The factor by the variance over networks, at the noise of the same samples."""
    run, estimator = setup.run, setup.estimator
    numbers = calibration_numbers(run, estimator)
    # The map is all that counts.
    mapping = replace(estimator, aleatoric=0, aleatoric_time=None, likelihood_probes=0)
    alone = replace(setup, estimator=mapping)
    samples = maps_of(alone, None, numbers).in_model_range()
    states = _states(samples) if estimator.calibrate_per_time else {}
    sizes = _pairs(setup, networks, numbers, list(states))
    factor, low, high = fitted(_summed(samples.variance), sizes[-1], seed=run.cfg.seed)
    pairs = zip(states.values(), sizes[:-1], strict=True)
    own = {
        time: float(size_factor(maps, reference.mean(0)))
        for time, (maps, reference) in zip(states, pairs, strict=True)
    }
    for time, found in own.items():
        if not 0 < found < float("inf"):
            raise UserError(
                f"the maps at t={time:.3g} have no size that a factor could mend; leave that time "
                "out of uncertainty.times, or use uncertainty.calibrate_per_time=false"
            )
    counts = len(networks), len(numbers)
    return Calibration(factor, low, high, *counts, tuple(own), tuple(own.values()))


def _states(samples: Samples) -> dict[float, Tensor]:
    """Summed variance ``(N,)`` of the states at each recorded time before t = 1, in order."""
    if samples.requested_times is None or samples.state_variance is None:
        return {}
    recorded = zip(samples.requested_times.tolist(), samples.state_variance, strict=True)
    return {
        time: _summed(variance)
        for time, variance in sorted(recorded, key=lambda each: each[0])
        if time < 1
    }


def _summed(variance: Tensor) -> Tensor:
    return variance.double().flatten(1).sum(1)


def _pairs(
    setup: Setup, networks: Sequence[GenerativeModel], numbers: list[int], times: list[float]
) -> Tensor:
    """``pair_sizes`` of the states at ``times`` and, last, of the images, ``(T + 1, P, N)``."""
    run, estimator, solver = setup.run, setup.estimator, setup.solver
    like = DeepEnsemble(
        networks=tuple(networks), noise_members=0, batch_size=estimator.batch_size,
        max_memory=estimator.max_memory,
    )  # fmt: skip
    cure = "lower solver.num_steps"
    size = images_at_once(like, solver, run.model, run.data.space.shape, cure)
    batches = dealt(torch.arange(len(numbers)).split(size))
    each = len(networks) * setup.starts([0]).nfe
    log.info("calibration: %d images of %d networks", len(numbers), len(networks))
    rows = []
    for places in track(batches, "calibration", "images", len, each):
        start = setup.starts([numbers[place] for place in places.tolist()])
        rows.append(torch.stack(list(_sizes(start, networks, times))).movedim(2, 0).cpu())
    shape = (0, len(times) + 1, len(networks) * (len(networks) - 1) // 2)
    found = torch.cat(rows) if rows else torch.zeros(shape, dtype=torch.float64)
    where = torch.cat(batches) if batches else torch.zeros(0, dtype=torch.long)
    return gather_rows(found, where, len(numbers)).movedim(0, 2)


@torch.inference_mode()
def _sizes(
    start: Start, networks: Sequence[GenerativeModel], times: Sequence[float]
) -> Iterator[Tensor]:
    """Of one batch, ``(P, B)`` each: at every time, then of the images.

    Yields:
        ``pair_sizes``.
    """
    kept: dict[float, Tensor] = {}

    def observe(step: Step, x: Tensor) -> None:
        for time in times:
            if same_time(time, step.end):
                kept[time] = pair_sizes(x)

    field = NetworkField(start.field(), networks)
    end = integrate(field, start.steps(), start.initial()[None], start.draw, observe)
    yield from (kept[time] for time in times)
    yield pair_sizes(decoded(start.decoder, end, rows=True))


def _held_out(setup: Setup) -> Calibration:
    """The factor by the held-out error of the network's output."""
    run, model = setup.run, setup.run.model
    data, condition = run.data.data, model.condition
    given = None if condition is None else getattr(data, f"test_{condition.field}")
    gaps, variance = held_out_gaps(
        model,
        setup.posterior,
        (data.images, values_of(condition, data)),
        (data.test_images, given),
        seed=run.cfg.seed,
        encode=run.data.space.encode,
    )
    numbers = held_out_factor(gaps, variance, seed=run.cfg.seed)
    return Calibration(*numbers, trainings=1, images=len(gaps))


def _check_held_out(run: Run, estimator: Estimator) -> None:
    """Refuse maps that the head's predictive variance says nothing of."""
    asked = f"uncertainty.calibrate={HELD_OUT}"
    check_noise_level(run.model, asked, run.cfg.laplace.get("objective", "likelihood"))
    cure = "use uncertainty.calibrate=1"
    if not estimator.of_posterior:
        raise UserError(
            f"{asked} scales the posterior of the head, and uncertainty={estimator.name} does not "
            f"look at it; {cure}"
        )
    if run.cfg.laplace.subset != "head":
        raise UserError(
            f"{asked} compares with the predictive variance of the head, and laplace.subset="
            f"{run.cfg.laplace.subset} is wider; {cure}"
        )
    if len(run.data.data.test_images) < 2:
        raise UserError(f"{asked} needs held-out images, {run.data.data.name} has none; {cure}")
