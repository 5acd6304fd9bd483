"""The network beside its derivative along weight directions of the head, in one pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.laplace.gram import apply_head
from bayesdiff.paths import convert
from bayesdiff.solvers import Field
from bayesdiff.uncertainty.response import Memory, Rule

# (field, states (B, ...), their outputs, directions (M, B, ...), time) -> J d, (M, B, ...).
Product = Callable[[Field, Tensor, Tensor, Tensor, float], Tensor]
# Perturbation of a finite difference, root mean square over pixels. float32: rounding is 1e-4 of
# the response, and the network is straight over so little. bfloat16: the best compromise between
# its coarse rounding and the network's curvature; products correlate at 0.98 to 0.99 with exact
# ones and cost half.
_STEP = 3e-3
_COARSE_STEP = 0.05


class TangentField:
    """Network outputs for rows ``(1 + M, B, C, H, W)``: an image and its sensitivities.

    Row 0 is the state of the image, row m its sensitivity d_m to direction delta_m of the head's
    weights. A network linear in the head's weights has

        dg_m = J d_m + Phi(x) delta_m,

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
        if self.rule and (self.number in self.rule.nodes or self.number + 1 == len(self.rule)):
            self.features[self.number] = features
        output = self.field.output(features)
        forced = self.forced(features)
        respond = self.predicted if self.rule else self.computed
        response = respond(x, output, d, forced, t) if self.number else torch.zeros_like(d)
        self.number += 1
        response[: len(forced)] += forced
        return torch.cat([output[None], response])

    def forced(self, features: Tensor) -> Tensor:
        """Phi(x) delta of the rows with weights, ``(W, B, C, H, W)``."""
        net = self.field.model.net
        output = apply_head(net.head, features[None], self.deltas)
        return net.fold(output.flatten(0, 1)).unflatten(0, (len(output), -1))

    def computed(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        """J d of every row."""
        return self.product(self.field, x, output, d, t)

    def predicted(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        """J d of the rows with weights by the rule, of the others by the product."""
        assert self.rule is not None
        count = len(forced)
        to_data = data_coefficients(self.field, t)
        gate = undecided(x, output, to_data)
        guess = self.memory.predict(self.rule.coefficients[self.number], d[:count], forced, gate)
        if self.number in self.rule.nodes:
            response = self.product(self.field, x, output, d, t)
            weighted = response[:count]
            self.memory.learn(to_data[0] * d[:count] + to_data[1] * weighted, guess, weighted)
            return response
        response = torch.empty_like(d)
        response[:count] = self.memory.response(guess, d[:count], to_data)
        if len(d) > count:
            response[count:] = self.product(self.field, x, output, d[count:], t)
        return response


def data_coefficients(field: Field, t: float) -> tuple[float, float]:
    """(p, q) with predicted data = p x + q g at time ``t``."""
    model = field.model
    c = model.path.coefficients(torch.tensor(t, dtype=torch.float64))
    p, q = convert(model.prediction, "data", c)
    return float(p), float(q)


def undecided(x: Tensor, output: Tensor, to_data: tuple[float, float]) -> Tensor:
    """1 - x_1hat^2: near 0 where the predicted pixel is black or white, up to 1 between."""
    return 1 - (to_data[0] * x + to_data[1] * output).clamp(-1, 1).square()


def differences(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward differences: one evaluation per row, the image's own is not repeated."""
    scale = _scale(d, _STEP)
    moved = field((x + scale * d).flatten(0, 1), t).unflatten(0, d.shape[:2])
    return (moved - output) / scale


def coarse_differences(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward differences in bfloat16, the image's own output included."""
    scale = _scale(d, _COARSE_STEP)
    moved = torch.cat([x[None], x + scale * d])
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        outputs = field(moved.flatten(0, 1), t).to(d).unflatten(0, moved.shape[:2])
    return (outputs[1:] - outputs[0]) / scale


def _scale(d: Tensor, step: float) -> Tensor:
    size = d.square().mean((-3, -2, -1), keepdim=True).sqrt()
    return torch.where(size > 0, step / size, torch.ones_like(size))


def derivatives(field: Field, x: Tensor, output: Tensor, d: Tensor, t: float) -> Tensor:
    """J d by forward-mode differentiation, the network itself evaluated once for all rows."""

    def tangent(row: Tensor) -> Tensor:
        return torch.func.jvp(lambda state: field(state, t), (x,), (row,))[1]

    before = field.evaluations
    result = torch.func.vmap(tangent)(d)
    per_row = field.evaluations - before
    field.evaluations = before + per_row * len(d)
    return result


PRODUCTS: dict[str, Product] = {
    "exact": derivatives,
    "difference": differences,
    "bfloat16": coarse_differences,
}
