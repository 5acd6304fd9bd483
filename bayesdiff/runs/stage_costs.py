"""What the stages of runs have taken: written into the run folder, read for the plan of others."""

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bayesdiff.laplace.block.kinds import Beside
from bayesdiff.machine.costs import kept_by
from bayesdiff.machine.device import device_name
from bayesdiff.machine.ranks import rank, world_size
from bayesdiff.options.trainer import weighty
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.setup import OF_THE_RUN, scored, with_effect
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.chosen import sample_numbers

NAME = "stages.jsonl"
_BESIDE = [field.name for field in fields(Beside)]
# Values of options that change numbers, and not how many of them are computed.
_VALUES = ("seed", "lr", "prior_precision", "sigma_noise", "n_eff")
# How long a training is, which its steps say.
_LENGTH = ("max_epochs", "max_steps", "min_epochs", "min_steps")


@dataclass(frozen=True)
class Kind:
    """What runs must have in common for a stage to take as long in one as in another.

    Attributes:
        key: of the options that count.
        amount: of work, in ``unit``.
        unit: of which twice as many take twice as long; empty where nothing is that plain, and
            the amount is one of the options.
    """

    key: str
    amount: float = 1
    unit: str = ""


@dataclass(frozen=True)
class Cost:
    """What a finished stage has taken, as it is quoted for another one.

    Attributes:
        seconds: of all its commands.
        memory: GiB that the process had held at most by its end.
        scale: by which the seconds are multiplied, 1 for a stage of equal size.
        unit: in which they are scaled.
    """

    seconds: float
    memory: float
    scale: float = 1.0
    unit: str = ""


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a stage runs: records of other places say nothing of this one."""
    return {
        "device": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def kinds_of(run: Run, solver: Solver, estimator: Estimator) -> dict[str, Kind]:
    """Kinds of all stages whose times are known beforehand, by their names."""
    cfg, data = run.cfg, run.data.data
    shape = list(run.data.space.shape)
    network = [plain(cfg.net), plain(cfg.path), plain(cfg.model), run.model.num_classes, shape]
    images = [cfg.data.get("name"), list(data.images.shape), len(data.test_images)]
    trainer = {k: v for k, v in weighty(cfg.trainer, True).items() if k not in _LENGTH}
    learning = [cfg.data.batch_size, cfg.data.flip, trainer, plain(cfg.callbacks), cfg.sample_from]
    sampled = [*network, plain(cfg.solver)]
    maps = [*sampled, with_effect(cfg.uncertainty, *OF_THE_RUN), list(estimator.times)]
    laplace: Any = plain(cfg.laplace)
    maps += [laplace.get(name) for name in ("structure", "rank", "time_bins", *_BESIDE)]
    at_once = [estimator.batch_size, estimator.max_memory]
    chosen = sample_numbers(estimator, run)
    count = estimator.num_images if chosen is None else len(chosen)
    # What an estimator prepares for all maps is not kept apart by all.
    apart = estimator.prepares or type(estimator).fit is Estimator.fit
    shown = plain(cfg.get("report")), plain(cfg.get("logger")), count, cfg.metrics.num_images
    seen = [cfg.laplace.get(name) for name in ("draws", "batch_size", "time_bins", "objective")]
    part = cfg.laplace.get("num_images") or len(data.images)
    return {
        "training": Kind(_key(network, images, learning), run.length[0], "steps"),
        "curvature": Kind(_key(network, seen), part, "images"),
        "block": Kind(
            _key(network, seen, [laplace.get(name) for name in _BESIDE]), part, "images"
        ),
        "images": Kind(_key(sampled, cfg.metrics.batch_size), cfg.metrics.num_images, "images"),
        "classifier": Kind(_key(images)),
        "scores": Kind(_key(images, scored(run), cfg.metrics.num_images)),
        "refiner": Kind(_key(maps)),
        "maps": Kind(_key(maps, at_once), count, "images")
        if apart
        else Kind(_key(maps, at_once, count)),
        "calibration": Kind(_key(maps, at_once, plain(cfg.uncertainty.get("calibrate")))),
        "validation": Kind(
            _key(sampled, at_once, estimator.validate_members), estimator.validate_images, "images"
        ),
        "image_scores": Kind(_key(sampled, images, shown)),
        "plane": Kind(_key(maps, count)),
        "report": Kind(_key(shape, plain(cfg.solver), estimator.validate, shown)),
    }


def recorded(run: Run, solver: Solver, estimator: Estimator) -> AbstractContextManager[None]:
    """Write what stages take into the run folder, a line for each that is made meanwhile."""
    kinds = kinds_of(run, solver, estimator)

    def write(stage: str, cost: dict[str, Any]) -> None:
        if rank() or (kind := kinds.get(stage)) is None or cost["seconds"] is None:
            return
        known = {"stage": stage, "kind": kind.key, "amount": kind.amount, "unit": kind.unit}
        known |= machine(run.device, world_size()) | cost
        known |= {name: round(cost[name], 3) for name in ("seconds", "memory")}
        if world_size() > 1 or not known.get("evaluations"):  # of this process, or not counted
            known.pop("evaluations", None)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            with (run.folder / NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(known) + "\n")
        except OSError:  # what is wrong with the disk is told by the results
            return

    return kept_by(write)


def records_in(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """What stages have taken in these run folders; half a line of a lost write is left out."""
    found = []
    for folder in folders:
        path = folder / NAME
        for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def cost_of(
    stage: str, kind: Kind, place: dict[str, Any], records: list[dict[str, Any]], share: float = 1
) -> Cost | None:
    """What stages of this kind have taken in this place, None where there were none.

    Args:
        stage: its name.
        kind: of the stage to be made.
        place: see ``machine``.
        records: of finished stages. Those of equal size count if there are any, of several the
            longest.
        share: of the stage that is still to be made.
    """
    asked = place | {"stage": stage, "kind": kind.key, "unit": kind.unit}
    there = [record for record in records if asked.items() <= record.items()]
    same = [record for record in there if record["amount"] == kind.amount]
    costs = []
    for record in same or there:
        scale = share * kind.amount / record["amount"]
        costs.append(Cost(scale * record["seconds"], record["memory"], scale, kind.unit))
    return max(costs, key=lambda cost: cost.seconds, default=None)


def _key(*parts: Any) -> str:
    return key_of(_counted(parts))


def _counted(value: Any) -> Any:
    """Options without those that only change numbers, in any nesting."""
    if isinstance(value, dict):
        return {name: _counted(each) for name, each in value.items() if name not in _VALUES}
    return [_counted(each) for each in value] if isinstance(value, list | tuple) else value
