"""The network beside its derivative along weight directions of the head, in one pass."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from bayesdiff.laplace.head import apply_head
from bayesdiff.networks.forward_mode import jvp
from bayesdiff.paths import Coefficient, convert
from bayesdiff.paths.coefficient import as_coefficient, like
from bayesdiff.solvers import Field
from bayesdiff.uncertainty.sensitivities.predicted_products import Memory, Rule

# J d: (field, states (B, ...), their outputs, directions (M, B, ...), time) -> J d, (M, B, ...).
Product = Callable[[Field, Tensor, Tensor, Tensor, float], Tensor]
# Perturbation of a finite difference, root mean square over pixels. float32: rounding is 1e-4 of
# the response, and the network is straight over so little. bfloat16: the best compromise between
# its coarse rounding and the network's curvature; products correlate at 0.98 to 0.99 with exact
# ones and cost half.
_STEP = 3e-3
_COARSE_STEP = 0.03
_DECOUPLED = 1e-6  # a share of the output in the predicted data below which it has none


class Rows(Protocol):
    """Outputs for rows ``(1 + M, B, C, H, W)``, an image and its sensitivities, at a time."""

    @property
    def field(self) -> Field:
        """At the batch's condition; it counts evaluations."""

    @property
    def features(self) -> Mapping[int, Tensor]:
        """Of the evaluations that a rule reads."""

    def __call__(self, rows: Tensor, t: float) -> Tensor:
        """Outputs of all rows."""


class TangentField:
    """Network outputs for rows ``(1 + M, B, C, H, W)``: an image and its sensitivities.

    Row 0 is the state of the image, row m its sensitivity d_m to direction delta_m of the head's
    weights. A network linear in the head's weights has

        dg_m = J d_m + Phi(x) delta_m,

    with the derivative of the likelihood's emission before Phi, where that is not linear,

    so that following all rows through a solver's affine steps carries S' = (a I + b J) S + b Phi
    with the same weights at every step. Multistage and multistep solvers need no formula of their
    own: their steps are affine in the outputs.

    Args:
        field: the trained network at this batch's labels.
        deltas: ``(W, C_out, P)`` for the first W rows; further rows see no weights.
        product: how J d is computed.
        rule: leaves products out and predicts them; None computes all.
    """

    def __init__(
        self, field: Field, deltas: Tensor, product: Product, rule: Rule | None = None
    ) -> None:
        self.field, self.deltas, self.product, self.rule = field, deltas, product, rule
        self.memory = Memory()
        self.number = 0
        self.features: dict[int, Tensor] = {}  # at the nodes of the rule and at the end

    def __call__(self, rows: Tensor, t: float) -> Tensor:
        """Outputs of all rows at time ``t``."""
        x, d = rows[0], rows[1:]
        features = self.field.features(x, t)
        if self.rule is not None and self.number in {*self.rule.nodes, len(self.rule) - 1}:
            self.features[self.number] = features
        output = self.field.output(features)
        forced = self.field.likelihood.slope(output, self.forced(features))
        output = self.field.emit(output, t)
        respond = self.computed if self.rule is None else self.predicted
        response = respond(x, output, d, forced, t) if self.number else torch.zeros_like(d)
        self.number += 1
        weighted = response[: len(forced)] + forced
        return torch.cat([output[None], weighted, response[len(forced) :]])

    def forced(self, features: Tensor) -> Tensor:
        """Phi(x) delta of the rows with weights, ``(W, B, C K, H, W)``."""
        net = self.field.model.net
        output = apply_head(net.head, features[None], self.deltas, change=True)
        return net.fold(output.flatten(0, 1)).unflatten(0, (len(output), -1))

    def computed(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        """J d of every row."""
        return self.product(self.field, x, output, d, t)

    def predicted(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        """J d of the rows with weights by the rule, of the others by the product."""
        assert self.rule is not None
        known, others = d[: len(forced)], d[len(forced) :]
        p, q = answer_coefficients(self.field, t, x)
        gate = undecided(self.field, x, output, t)
        guess = self.memory.predict(self.rule.coefficients[self.number], known, forced, gate)
        if self.number in self.rule.nodes:
            response = self.product(self.field, x, output, d, t)
            self.memory.learn(p * known + q * response[: len(known)], guess)
            return response
        response = (guess - p * known) / q
        if not len(others):
            return response
        return torch.cat([response, self.product(self.field, x, output, others, t)])


def answer_coefficients(field: Field, t: float, x: Tensor) -> tuple[Coefficient, Coefficient]:
    """(p, q) of the answer r = p d + q J d: that of the predicted data, or J d itself.

    The second where the output says nothing of the data, as the velocity of a flow at t = 1.
    """
    p, q = data_coefficients(field, t, x)
    if isinstance(p, Tensor) or isinstance(q, Tensor):
        known = torch.as_tensor(q).abs() > _DECOUPLED
        return torch.where(known, p, 0.0), torch.where(known, q, 1.0)
    return (p, q) if abs(q) > _DECOUPLED else (0.0, 1.0)


def data_coefficients(field: Field, t: float, x: Tensor) -> tuple[Coefficient, Coefficient]:
    """(p, q) with predicted data = p x + q g at time ``t``, ready to meet ``x``."""
    model = field.model
    c = model.path.coefficients(torch.tensor(t, dtype=torch.float64))
    p, q = convert(model.prediction, "data", c)
    return like(as_coefficient(p), x), like(as_coefficient(q), x)


def undecided(field: Field, x: Tensor, output: Tensor, t: float) -> Tensor:
    """1 - x_1hat^2: near 0 where the predicted pixel is black or white, up to 1 between."""
    p, q = data_coefficients(field, t, x)
    return 1 - (p * x + q * output).clamp(-1, 1).square()


def differences(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward differences: one evaluation per row, the image's own is not repeated."""
    unit, size = _unit(d)
    moved = field((x + _STEP * unit).flatten(0, 1), t).unflatten(0, d.shape[:2])
    return (moved - output) * (size / _STEP)


def coarse_differences(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward differences in bfloat16, the image's own output included."""
    unit, size = _unit(d)
    moved = torch.cat([x[None], x + _COARSE_STEP * unit])
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        outputs = field(moved.flatten(0, 1), t).to(d).unflatten(0, moved.shape[:2])
    return (outputs[1:] - outputs[0]) * (size / _COARSE_STEP)


def _unit(d: Tensor) -> tuple[Tensor, Tensor]:
    """Every image's d at a root mean square of 1, and what that was, 0 for d = 0."""
    values = tuple(range(2, d.dim()))  # of one state
    largest = d.abs().amax(values, keepdim=True)  # squares of tiny numbers would vanish
    shape = d / torch.where(largest > 0, largest, 1)
    size = shape.square().mean(values, keepdim=True).sqrt()
    return shape / torch.where(size > 0, size, 1), largest * size


def derivatives(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward-mode differentiation; the image's own evaluation is repeated, once."""
    inside = copy(field)
    inside.layout, inside.evaluations = torch.preserve_format, 0

    def tangent(row: Tensor) -> Tensor:
        return jvp(lambda state: inside(state, t), (x,), (row,))[1]

    result = torch.func.vmap(tangent)(d)
    field.evaluations += inside.evaluations * (1 + len(d))
    return result


PRODUCTS: dict[str, Product] = {
    "exact": derivatives,
    "difference": differences,
    "bfloat16": coarse_differences,
}


class RememberingField(Field):
    """Knows the features of the image when they are asked for twice."""

    last: tuple[float, Tensor, Tensor] | None = None  # time, state, features

    def features(self, x: Tensor, t: float) -> Tensor:
        """Input of the head, computed once for the same state and time."""
        if len(x) != self.batch:
            return super().features(x, t)
        if self.last is None or self.last[0] != t or not torch.equal(self.last[1], x):
            self.last = (t, x.clone(), super().features(x, t))
        return self.last[2]
