"""The network beside its derivative along directions of any of its weights, in one pass."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesdiff.networks.forward_mode import jvp
from bayesdiff.solvers import Field
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS

# Directions of weights: names of the network's parameters to ``(M, *shape)``.
Directions = Mapping[str, Tensor]
# (field, state (B, ...), its output, sensitivities (M, B, ...), directions, time) -> (M, B, ...).
Response = Callable[[Field, Tensor, Tensor, Tensor, Directions, float], Tensor]
# Share of a direction that a finite difference goes. A direction is as long as a draw is far: the
# answer moves by some hundredths of itself at most, well above rounding and well below bends.
_SHARE = 0.01


class WeightTangentField:
    """Network outputs for rows ``(1 + M, B, C, H, W)``: an image and its sensitivities.

    Row 0 is the state of the image, row m its sensitivity d_m to direction delta_m of the
    network's weights, with

        dg_m = J_x d_m + J_w delta_m,

    both from one derivative along (d_m, delta_m) together. Nothing is linear in the weights here;
    a solver's affine steps carry d_m on as they carry the state.

    Args:
        field: the trained network at this batch's condition.
        directions: of the first M rows; further rows see no weights.
        derivative: how they are computed, a name in ``RESPONSES``.
    """

    def __init__(self, field: Field, directions: Directions, derivative: str = "exact") -> None:
        self.field, self.directions, self.derivative = field, directions, derivative
        self.features: Mapping[int, Tensor] = {}
        self.count = len(next(iter(directions.values())))

    def __call__(self, rows: Tensor, t: float) -> Tensor:
        """Outputs of all rows at time ``t``."""
        x, d = rows[0], rows[1:]
        output = self.field(x, t)
        moved = RESPONSES[self.derivative](
            self.field, x, output, d[: self.count], self.directions, t
        )
        parts = [output[None], moved]
        if len(d) > self.count:
            parts.append(PRODUCTS[self.derivative](self.field, x, output, d[self.count :], t))
        return torch.cat(parts)


class _Called(nn.Module):
    """A field whose network's weights can be given with the call."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.net: Any = field.model.net
        self.field = copy(field)
        self.field.layout, self.field.evaluations = torch.preserve_format, 0

    def forward(self, x: Tensor, t: float) -> Tensor:
        return self.field(x, t)

    def named(self, directions: Directions) -> dict[str, Tensor]:
        return {f"net.{name}": each for name, each in directions.items()}


def derivatives(
    field: Field, x: Tensor, output: Tensor, d: Tensor, directions: Directions, t: float
) -> Tensor:
    """J_x d + J_w delta by forward-mode differentiation, all directions at once."""
    called = _Called(field)
    weights = dict(called.net.named_parameters())
    trained = called.named({name: weights[name].detach() for name in directions})

    def tangent(row: Tensor, delta: dict[str, Tensor]) -> Tensor:
        return jvp(
            lambda state, moved: functional_call(called, moved, (state, t)),
            (x, trained),
            (row, delta),
        )[1]

    found: Tensor = torch.func.vmap(tangent)(d, called.named(directions))
    field.evaluations += called.field.evaluations * (1 + len(d))
    return found


def differences(
    field: Field, x: Tensor, output: Tensor, d: Tensor, directions: Directions, t: float
) -> Tensor:
    """J_x d + J_w delta by forward differences: one evaluation per direction."""
    called = _Called(field)
    weights = dict(called.net.named_parameters())
    found = []
    for number, row in enumerate(d):
        moved = {name: weights[name] + _SHARE * each[number] for name, each in directions.items()}
        given = (x + _SHARE * row, t)
        found.append((functional_call(called, called.named(moved), given) - output) / _SHARE)
    field.evaluations += called.field.evaluations
    return torch.stack(found)


RESPONSES: dict[str, Response] = {"exact": derivatives, "difference": differences}
