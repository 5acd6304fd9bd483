"""The ensemble of a posterior that is wider than the head: whole networks as members."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.block.fit import layer_matrix
from bayesdiff.laplace.block.posterior import BlockPosterior
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.uncertainty.estimator import Estimator, Training
from bayesdiff.uncertainty.members.base import NetworkMembers, twin
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.start import Starts

_SALT = 4_000_037


@dataclass(frozen=True, kw_only=True)
class BlockEnsemble(NetworkMembers):
    """Variance over members whose head and last block are drawn once each.

    What ``uncertainty=ensemble`` is with ``laplace.subset=last_block``. The heads are the very
    draws that ``Ensemble`` has under the same seed, so the two differ by the block alone.

    Args:
        members: weight draws, at least 2.
        block: posterior of the last block.
    """

    members: int = 16
    block: BlockPosterior

    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)

    @property
    def planned(self) -> int:
        """The draws."""
        return self.members

    @property
    def described(self) -> str:
        """Which members they are, for the record."""
        return f"{super().described}, last block"

    def sources(self, run: Training) -> list[Any]:
        """The posterior of the block."""
        return self.block.settings

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With all networks in memory."""
        model = starts([0]).model
        self.block.factors.require_source(weights_key(model))
        heads = Ensemble(members=self.members, seed=self.seed).weights(posterior)
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        deviations = self.block.deviations(self.members, generator)
        networks = []
        for number, head in enumerate(heads):
            networks.append(_moved(model, {k: v[number] for k, v in deviations.items()}, head))
        return replace(self, networks=tuple(networks))


def _moved(model: GenerativeModel, deviations: dict[str, Tensor], head: Tensor) -> GenerativeModel:
    """Another model, its block moved by the deviations, with this head."""
    member = twin(model)
    net = cast(nn.Module, member.net)
    for name, deviation in deviations.items():
        layer = net.get_submodule(name)
        matrix = layer_matrix(layer)
        _write(layer, matrix + deviation.to(matrix.device))
    _write(member.net.head, head)
    return member


@torch.no_grad()
def _write(layer: nn.Module, matrix: Tensor) -> None:
    """Set weights and bias from ``(C, P)``, see ``layer_matrix``."""
    weight, bias = cast(Tensor, layer.weight), layer.bias
    if isinstance(bias, Tensor):
        bias.copy_(matrix[:, -1])
        matrix = matrix[:, :-1]
    weight.copy_(matrix.reshape(weight.shape))


def check_block_ensemble(estimator: Estimator, study: str | None = None) -> None:
    """Refuse what knows the head alone, for a posterior of the last block.

    Args:
        estimator: as configured.
        study: what else is asked for, such as ``ablation``.

    Raises:
        UserError: one line that names it and the cure.
    """
    cure = "use uncertainty=ensemble, or laplace.subset=head"
    if not isinstance(estimator, Ensemble):
        raise UserError(
            f"laplace.subset=last_block needs an estimator that follows whole networks, and "
            f"uncertainty={estimator.name} does not draw them from a posterior; {cure}"
        )
    if estimator.validate:
        raise UserError(
            "uncertainty.validate=true compares with draws of the head alone, which "
            "laplace.subset=last_block is wider than; use uncertainty.validate=false"
        )
    if study:
        raise UserError(
            f"{study} follows the posterior of the head alone; use {study}=null, or "
            "laplace.subset=head"
        )


def with_block(estimator: Estimator, block: BlockPosterior | None) -> Estimator:
    """The estimator for this posterior of the last block; the same one where there is none."""
    if block is None:
        return estimator
    check_block_ensemble(estimator)
    given = {field.name: getattr(estimator, field.name) for field in fields(estimator)}
    return BlockEnsemble(**given, block=block)
