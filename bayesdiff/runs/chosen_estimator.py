"""Which estimator makes the maps of a run, as its configuration implies."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, open_dict, read_write

from bayesdiff.runs.build import Run, is_main_process, plain
from bayesdiff.runs.stages import starts
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.chosen import sample_numbers
from bayesdiff.uncertainty.few_maps import for_few_maps

log = logging.getLogger(__name__)


def settle_estimator(this: Run, solver: Solver, estimator: Estimator) -> Estimator:
    """The estimator that makes the maps, see ``for_few_maps``; the configuration then names it."""
    cfg = this.cfg
    studies = [cfg[name] for name in ("filtering", "repair") if cfg.get(name) is not None]
    asked = [_maps_of(study) for study in studies]
    numbers = sample_numbers(estimator, this)
    maps = sum(asked) + (estimator.num_images if numbers is None else len(numbers))
    chosen, reason = for_few_maps(estimator, starts(this, solver)([0]), maps)
    if reason:
        if is_main_process():
            log.info("uncertainty: %s", reason)
        options = {f.name: plain(getattr(chosen, f.name)) for f in fields(chosen)}
        with read_write(cfg), open_dict(cfg):
            cfg.uncertainty = {
                "_target_": f"bayesdiff.uncertainty.{type(chosen).__name__}",
                **options,
                "times": list(chosen.times),
            }
    return chosen


def _maps_of(study: Any) -> int:
    """Maps that a study asks for; 0 for values that its own check is about to refuse."""
    options = plain(study) if isinstance(study, DictConfig) else {}
    count, seeds = options.get("num_images", 0), options.get("seeds", [0])
    return count * len(seeds) if isinstance(count, int) and isinstance(seeds, list) else 0


def in_words(settings: Mapping[str, Any]) -> str:
    """What made the maps of a run with these settings, and why if it is not what was asked for."""
    name = str(settings["uncertainty.name"])
    asked = settings.get("uncertainty.instead_of")
    if not asked:
        return name
    return f"{name}, cheaper than {asked} for so few; uncertainty={asked} keeps that"
