"""The reference: full trajectories under weights of the head drawn once each."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field
from bayesdiff.uncertainty.members.base import Members, Outputs
from bayesdiff.uncertainty.start import Start

# Other draws than an estimator of the same seed has: agreement must not come from sharing them.
_SALT = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Ensemble(Members):
    """Variance over members that keep one weight draw along the whole trajectory.

    All images meet the same draws; see ``Members`` for what else the members share.

    Args:
        members: weight draws, at least 2.

    Example:
        After the example of ``starts_of``:

        >>> samples = Ensemble(members=4).mapped(starts, [0, 1], posterior)
        >>> samples.variance.shape
        torch.Size([2, 1, 8, 8])
        >>> samples.nfe  # 4 of the image, 4 * 4 - 3 of members, which begin alike
        17
    """

    members: int = 16

    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)

    @property
    def count(self) -> int:
        """Weight draws."""
        return self.members

    def weights(self, posterior: HeadPosterior) -> Tensor:
        """The members' heads, ``(M, C_out, P)`` float64."""
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        return posterior.draw(self.members, generator)

    def outputs(self, field: Field, start: Start, posterior: HeadPosterior) -> Outputs:
        """The network under all draws of its head at once."""
        return MemberField(field, self.weights(posterior).to(start.device))


class MemberField:
    """The network under M heads at once, for states ``(m, B, C, H, W)`` with m = 1 or M.

    All members start from the same noise: their first features are computed once.
    """

    def __init__(self, field: Field, weights: Tensor) -> None:
        self.field = field
        self.weights = weights

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Outputs ``(M, B, C, H, W)``."""
        return self.emitted(self.features(x, t), t)

    def features(self, x: Tensor, t: float) -> Tensor:
        """What the heads see, ``(m, B, D, h, w)``."""
        return self.field.features(x.flatten(0, 1), t).unflatten(0, (len(x), -1))

    def emitted(self, features: Tensor, t: float) -> Tensor:
        """Outputs ``(M, B, C, H, W)`` of features of these states, or of one state for all."""
        net = self.field.model.net
        output = apply_head(net.head, features, self.weights)
        emitted = self.field.emit(net.fold(output.flatten(0, 1)), t)
        return emitted.unflatten(0, (len(output), -1))
