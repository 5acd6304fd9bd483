"""MC dropout: members whose features are masked before the head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, share
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, Solver
from bayesdiff.uncertainty.members.base import Members, Outputs
from bayesdiff.uncertainty.members.ensemble import MemberField
from bayesdiff.uncertainty.start import Start

_SALT = 2_000_029
MASKS = ("fixed", "fresh")


@dataclass(frozen=True, kw_only=True)
class MCDropout(Members):
    """Variance over members that leave out random features of the head (Gal & Ghahramani 2016).

    A mask keeps each of the D features with probability q = 1 - p and scales what it keeps by
    1 / q; the bias is never masked. One entry masks a whole feature: all taps of a convolution
    head, all pixels, all images. A mask is then a draw of the head's weights, and with c_k what
    feature k adds to an output pixel, the variance of one evaluation is

        p / q sum_k c_k^2,

    for a linear head c_k = w_k phi_k.

    No training with dropout is needed, nor is the posterior of the head looked at.

    Args:
        members: masks at a time, at least 2.
        p: probability of leaving a feature out.
        mask: ``fixed``: a member keeps its mask along the whole trajectory, as a draw of weights;
            ``fresh``: every member has a new one at every network evaluation, as is often done;
            its variance then falls with the number of steps.
    """

    members: int = 16
    p: float = 0.1
    mask: str = "fixed"

    name: ClassVar[str] = "mc_dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)
        share("uncertainty.p", self.p)
        if self.mask not in MASKS:
            raise UserError(
                f"unknown uncertainty.mask {self.mask!r}; choose from {', '.join(MASKS)}"
            )

    def check(self, solver: Solver) -> None:
        """Refuse masks that leave nothing out, whose maps would be zero everywhere.

        Raises:
            UserError: for them, and for a skip interval beyond the solver's steps.
        """
        super().check(solver)
        if self.p == 0:
            raise UserError("uncertainty.p=0 leaves no feature out; give a probability above 0")

    @property
    def count(self) -> int:
        """Masks at a time."""
        return self.members

    @property
    def described(self) -> str:
        """With probability and kind of the masks."""
        return f"{super().described}, p {self.p}, {self.mask} masks"

    def masks(self, features: int) -> Iterator[Tensor]:
        """The same sequence of masks for every batch.

        Args:
            features: D.

        Yields:
            Float64 ``(M, D)``, entries 0 or 1 / q.
        """
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        keep = torch.full((self.members, features), 1 - self.p, dtype=torch.float64)
        while True:
            yield torch.bernoulli(keep, generator=generator) / keep

    def outputs(self, field: Field, start: Start, posterior: HeadPosterior) -> Outputs:
        """The network under all masked heads at once."""
        head = field.model.net.head
        geometry, trained = HeadGeometry.of(head), head_matrix(head)
        one = torch.ones(self.members, int(geometry.bias), dtype=torch.float64)
        columns = (
            torch.cat([mask.repeat_interleave(geometry.taps, 1), one], 1)
            for mask in self.masks(geometry.features)
        )
        heads = (trained * factors[:, None].to(trained) for factors in columns)
        if self.mask == "fixed":
            return MemberField(field, next(heads))
        return lambda x, t: MemberField(field, next(heads))(x, t)
