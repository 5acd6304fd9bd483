"""The ensemble of a posterior that is wider than the head: whole networks as members."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import at_least
from bayesdiff.laplace.block.layers import layer_matrix, layer_tensors
from bayesdiff.laplace.block.posterior import LayersPosterior
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.members.base import NetworkMembers, twin
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.start import Starts

_SALT = 4_000_037


@dataclass(frozen=True, kw_only=True)
class BlockEnsemble(NetworkMembers):
    """Variance over members whose head and other layers are drawn once each.

    What ``uncertainty=ensemble`` is under a ``laplace.subset`` beyond the head. The heads are the
    very draws that ``Ensemble`` has under the same seed: the two differ by other layers alone.

    Args:
        members: weight draws, at least 2.
        block: posterior of the layers beside the head.
    """

    members: int = 16
    block: LayersPosterior

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
        return f"{super().described}, {self.block.described}"

    def sources(self, run: Training) -> list[Any]:
        """The posterior of the layers."""
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
    """Another model, its layers moved by the deviations, with this head."""
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
    for name, values in layer_tensors(layer, matrix).items():
        getattr(layer, name).copy_(values)
