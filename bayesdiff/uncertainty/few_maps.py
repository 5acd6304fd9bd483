"""Which estimator makes few maps: training a refiner costs more than it saves on them.

A question of the configuration alone. What lies in the run folder has no say, or tables would
depend on the order of their cells.
"""

import logging
from dataclasses import fields
from typing import Any

from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.sensitivities.linearised import evaluations
from bayesdiff.uncertainty.sensitivities.pilot_images import DRAWS, IMAGES
from bayesdiff.uncertainty.sensitivities.predicted_products import spread_nodes
from bayesdiff.uncertainty.sensitivities.refined import TARGET_DRAWS, TARGET_PRODUCTS, Refined
from bayesdiff.uncertainty.start import Start

log = logging.getLogger(__name__)

MEMBERS = 16


def for_few_maps(
    estimator: Estimator, start: Start, maps: int, unfit: str = ""
) -> tuple[Estimator, str]:
    """The estimator, or an ensemble of 16 where a refined one costs more network evaluations.

    Refined ones with options of their own are kept: who sets them means them.

    Args:
        estimator: as configured.
        start: of any image.
        maps: that the whole configuration asks for.
        unfit: why a refined one cannot serve this run, nothing where it can.

    Returns:
        The estimator and why it is another one, nothing if it is not.
    """
    if not isinstance(estimator, Refined) or not is_default(estimator):
        return estimator, ""
    shared = shared_options(estimator)
    ensemble = Ensemble(members=MEMBERS, **shared)
    if unfit:
        return ensemble, f"ensemble in place of refined: {unfit}"
    cost = maps * ensemble.evaluations(start)
    refined = training(estimator, start) + maps * estimator.evaluations(start)
    if refined <= cost:
        return estimator, ""
    return ensemble, (
        f"ensemble in place of refined, since {maps} maps take {cost:,.0f} network evaluations "
        f"by it and {refined:,.0f} by refined, which trains a network first; "
        "uncertainty=refined keeps that"
    )


def is_default(estimator: Estimator) -> bool:
    """Whether it is what ``uncertainty=auto`` stands for, without options of its own."""
    if not isinstance(estimator, Refined) or estimator.few_maps != "ensemble":
        return False
    return estimator == Refined(few_maps="ensemble", **shared_options(estimator))


def shared_options(estimator: Estimator) -> dict[str, Any]:
    """Options that all estimators have."""
    return {field.name: getattr(estimator, field.name) for field in fields(Estimator)}


def training(refined: Refined, start: Start) -> float:
    """Network evaluations before the first map: pilot, and images to learn from.

    The small network's own training is not among them.
    """
    count = evaluations(start)
    live, target = len(refined.nodes(count)), len(spread_nodes(count, TARGET_PRODUCTS))
    pilot = IMAGES * (3 * count + DRAWS * (count + live + target))
    each = count + refined.draws(count) * live + TARGET_DRAWS * target
    return (pilot + refined.train_images * each) * start.nfe / count
