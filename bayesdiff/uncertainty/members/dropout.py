"""MC dropout: members whose features are masked before the head, or all along the network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, share
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Field, Solver
from bayesdiff.uncertainty.members.base import Members, Outputs
from bayesdiff.uncertainty.members.ensemble import MemberField
from bayesdiff.uncertainty.members.network_masks import MaskedNetwork, check_dropout
from bayesdiff.uncertainty.start import Start

_SALT = 2_000_029
MASKS = ("fixed", "fresh")
PLACES = ("head", "network")
_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class MCDropout(Members):
    """Variance over members that leave something out at random (Gal & Ghahramani 2016).

    Before the head (``where="head"``), a mask keeps each of the D features with probability
    q = 1 - p and scales what it keeps by 1 / q; the bias is never masked. One entry masks a whole
    feature: all taps of a convolution head, all pixels, all images. A mask is then a draw of the
    head's weights, and with c_k what feature k adds to an output pixel, the variance of one
    evaluation is

        p / q sum_k c_k^2,

    for a linear head c_k = w_k phi_k. No training with dropout is needed.

    With ``where="network"`` the masks are those of the network's own dropout layers, which it was
    trained with, each with its own p: the method as it was published. A layer's mask has an entry
    for what that layer leaves out in training, a whole channel for ``nn.Dropout2d``, a single unit
    at a single position for ``nn.Dropout``, as the U-Net has them. A mask is the same for all
    images of all batches, so that a member is one network, a subnetwork of the trained one for
    images of this size; what varies from position to position in training varies so in it too.

    The posterior of the head is never looked at.

    Args:
        members: masks at a time, at least 2.
        where: ``head`` or ``network``.
        p: probability of leaving a feature of the head out; None for 0.1. The network's layers
            have their own.
        mask: ``fixed``: a member keeps its mask along the whole trajectory, as a draw of weights;
            ``fresh``: every member has a new one at every network evaluation, as is often done;
            its variance then falls with the number of steps.

    Example:
        After the example of ``starts_of``:

        >>> few = MCDropout(p=0.05, members=8).mapped(starts, [0, 1], posterior)
        >>> many = MCDropout(p=0.2, members=8).mapped(starts, [0, 1], posterior)
        >>> bool(many.variance.sum() > few.variance.sum())
        True
    """

    members: int = 16
    where: str = "head"
    p: float | None = None
    mask: str = "fixed"

    name: ClassVar[str] = "mc_dropout"
    of_posterior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)
        if self.where not in PLACES:
            raise UserError(
                f"unknown uncertainty.where {self.where!r}; choose from {', '.join(PLACES)}"
            )
        if self.p is not None:
            share("uncertainty.p", self.p)
            if self.where == "network":
                raise UserError(
                    f"uncertainty.p={self.p} is of the head's features; with "
                    "uncertainty.where=network every layer has its own, leave it at null"
                )
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

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a network without dropout layers, where they are to be masked."""
        super().check_model(model)
        if self.where == "network":
            check_dropout(model)

    @property
    def left_out(self) -> float:
        """Probability of leaving a feature of the head out."""
        return _SHARE if self.p is None else self.p

    @property
    def count(self) -> int:
        """Masks at a time."""
        return self.members

    @property
    def described(self) -> str:
        """With place, probability and kind of the masks."""
        if self.where == "network":
            return f"{super().described}, the network's dropout layers, {self.mask} masks"
        return f"{super().described}, p {self.left_out}, {self.mask} masks"

    def masks(self, features: int) -> Iterator[Tensor]:
        """The same sequence of masks of the head's features for every batch.

        Args:
            features: D.

        Yields:
            Float64 ``(M, D)``, entries 0 or 1 / q.
        """
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        keep = torch.full((self.members, features), 1 - self.left_out, dtype=torch.float64)
        while True:
            yield torch.bernoulli(keep, generator=generator) / keep

    def outputs(self, field: Field, start: Start, posterior: HeadPosterior) -> Outputs:
        """The network under all masked heads at once, or masked throughout, one by one."""
        if self.where == "network":
            check_dropout(field.model)
            fresh = self.mask == "fresh"
            return MaskedNetwork(field, self.members, self.seed + _SALT, fresh)
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
