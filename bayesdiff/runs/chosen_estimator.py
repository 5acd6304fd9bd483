"""Which estimator makes the maps of a run, as its configuration implies."""

import logging
from dataclasses import fields, replace

from omegaconf import open_dict, read_write

from bayesdiff.checks import UserError
from bayesdiff.laplace.block.layers import in_words
from bayesdiff.runs.build import Run, is_main_process, plain
from bayesdiff.runs.setup import starts
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.chosen import sample_numbers
from bayesdiff.uncertainty.few_maps import for_few_maps
from bayesdiff.uncertainty.wider import for_wider

log = logging.getLogger(__name__)


def settle_estimator(this: Run, solver: Solver, estimator: Estimator) -> tuple[Run, Estimator]:
    """The estimator that makes the maps, see ``for_few_maps``; the configuration then names it.

    Its studies' maps count as well. The run remembers what was asked for.
    """
    cfg = this.cfg
    numbers = sample_numbers(estimator, this)
    own = estimator.num_images if numbers is None else len(numbers)
    unfit, subset = _unfit(this, estimator), plain(cfg.laplace).get("subset", "head")
    maps = own + sum(study.map_count for study in this.studies.values())
    chosen, reason = for_wider(estimator, subset)
    if not reason:
        chosen, reason = for_few_maps(estimator, starts(this, solver)([0]), maps, unfit)
    if not reason:
        return this, estimator
    if is_main_process():
        log.info("uncertainty: %s", reason)
    options = {f.name: plain(getattr(chosen, f.name)) for f in fields(chosen)}
    with read_write(cfg), open_dict(cfg):
        cfg.uncertainty = {
            "_target_": f"bayesdiff.uncertainty.{type(chosen).__name__}",
            **options,
            "times": list(chosen.times),
        }
    why = "which this run cannot have" if unfit else "for few maps"
    why = why if subset == "head" else f"which is of the head alone, not of {in_words(subset)}"
    return replace(this, instead_of=f"{estimator.name}, {why}"), chosen


def _unfit(this: Run, estimator: Estimator) -> str:
    """Why the estimator refuses this run, nothing if it does not."""
    try:
        estimator.check_run(this)
        estimator.check_data(this.data.data)
    except UserError as error:
        return str(error)
    return ""
