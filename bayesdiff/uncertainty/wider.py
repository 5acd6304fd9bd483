"""Estimators under a posterior that is wider than the head: ``laplace.subset``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bayesdiff.checks import UserError
from bayesdiff.laplace.block.layers import Subset, in_words
from bayesdiff.laplace.block.posterior import LayersPosterior
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.few_maps import is_default, shared_options
from bayesdiff.uncertainty.members.block_ensemble import BlockEnsemble
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.sensitivities.layers_linearised import LayersLinearised
from bayesdiff.uncertainty.sensitivities.linearised import Linearised

# What follows the head alone, and what follows other layers as well.
_WIDER: Mapping[type[Estimator], Any] = {Ensemble: BlockEnsemble, Linearised: LayersLinearised}


def check_wider(estimator: Estimator, subset: Subset, study: str | None = None) -> None:
    """Refuse what knows the head alone, for a posterior of other layers as well.

    Args:
        estimator: as configured.
        subset: as configured, beyond the head.
        study: what else is asked for, such as ``ablation``.

    Raises:
        UserError: one line that names it and the cure.
    """
    asked = f"laplace.subset={in_words(subset)}"
    cure = "use uncertainty=ensemble or linearised, or laplace.subset=head"
    if type(estimator) not in _WIDER:
        raise UserError(
            f"{asked} is followed by members or sensitivities of whole networks, and "
            f"uncertainty={estimator.name} reads the head alone or weights of its own; {cure}"
        )
    if estimator.validate:
        raise UserError(
            f"uncertainty.validate=true compares with draws of the head alone, which {asked} is "
            "wider than; use uncertainty.validate=false"
        )
    if study:
        raise UserError(
            f"{study} follows the posterior of the head alone; use {study}=null, or "
            "laplace.subset=head"
        )


def for_wider(estimator: Estimator, subset: Subset) -> tuple[Estimator, str]:
    """What makes the maps by default where the posterior is wider than the head, and why.

    Sensitivities stay where the GGN describes the network; members drawn from a wide posterior
    do not, and rank no better (``experiments/retraining``).
    """
    if subset == "head" or not is_default(estimator):
        return estimator, ""
    reason = f"linearised in place of refined, for laplace.subset={in_words(subset)}"
    return Linearised(**shared_options(estimator)), reason


def with_block(estimator: Estimator, block: LayersPosterior | None) -> Estimator:
    """The estimator for this posterior of other layers; the same one where there is none."""
    if block is None:
        return estimator
    check_wider(estimator, "all")
    given = {field.name: getattr(estimator, field.name) for field in fields(estimator)}
    wider: Estimator = _WIDER[type(estimator)](**given, block=block)
    return wider
