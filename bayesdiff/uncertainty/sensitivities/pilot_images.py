"""The pilot pass: a few images with every product, from which left-out products are predicted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.solvers import Field, Step, integrate
from bayesdiff.uncertainty.sensitivities.predicted_products import Rule
from bayesdiff.uncertainty.sensitivities.products import (
    Product,
    TangentField,
    answer_coefficients,
    undecided,
)
from bayesdiff.uncertainty.start import Start, Starts

# Samples that no user's run reaches: pilots must not be the images that are mapped.
FIRST = 1_000_000_000
IMAGES, DRAWS = 32, 8


@dataclass(frozen=True)
class Pilot:
    """Pilot images followed with every product.

    Attributes:
        starts: trajectory of the samples with these numbers.
        deltas: ``(M, C_out, P)`` weight directions.
        answers: r of every evaluation, each ``(M, B, C, H, W)``.
        totals: summed variance after every step.
    """

    starts: Starts
    deltas: Tensor
    answers: list[Tensor]
    totals: list[float]

    @classmethod
    @torch.no_grad()
    def follow(cls, starts: Starts, deltas: Tensor, product: Product) -> "Pilot":
        """Follow the pilot images; the costly part, done once for any number of rules."""
        start = starts(range(FIRST, FIRST + IMAGES))
        field = _Exact(start.field(), deltas.to(start.device), product)
        return cls(starts, field.deltas, field.answers, _totals(start, field))

    @torch.no_grad()
    def rule(self, nodes: frozenset[int], product: Product) -> Rule:
        """Coefficients that predict the products at all evaluations but the ``nodes``.

        Args:
            nodes: numbers of the evaluations with a product.
            product: how these are computed; the answers they are fitted to stay as they are.
        """
        start = self.starts(range(FIRST, FIRST + IMAGES))
        field = _Fitted(start.field(), self, nodes, product)
        totals = _totals(start, field)
        correction = [a / b if b > 0 else 1.0 for a, b in zip(self.totals, totals, strict=True)]
        return Rule(
            nodes, torch.stack(field.coefficients), torch.tensor(correction, dtype=torch.float64)
        )


class _Exact(TangentField):
    """Keeps every answer."""

    def __init__(self, field: Field, deltas: Tensor, product: Product) -> None:
        super().__init__(field, deltas, product)
        self.answers: list[Tensor] = [torch.empty(0)]

    def computed(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        p, q = answer_coefficients(self.field, t, x)
        response = self.product(self.field, x, output, d, t)
        self.answers.append(p * d + q * response)
        return response


class _Fitted(TangentField):
    """Fits the prediction of each evaluation to the exact answer, then goes on with it."""

    def __init__(
        self, field: Field, pilot: Pilot, nodes: frozenset[int], product: Product
    ) -> None:
        super().__init__(field, pilot.deltas, product)
        self.answers, self.nodes = pilot.answers, nodes
        self.coefficients = [torch.zeros(2, 5, dtype=torch.float64)]

    def computed(self, x: Tensor, output: Tensor, d: Tensor, forced: Tensor, t: float) -> Tensor:
        p, q = answer_coefficients(self.field, t, x)
        gate = undecided(self.field, x, output, t)
        fitted = self.memory.fit(self.answers[self.number], d, forced, gate)
        self.coefficients.append(fitted)
        guess = self.memory.predict(fitted, d, forced, gate)
        if self.number not in self.nodes:
            return (guess - p * d) / q
        response = self.product(self.field, x, output, d, t)
        self.memory.learn(p * d + q * response, guess)
        return response


def _totals(start: Start, field: TangentField) -> list[float]:
    """Summed variance after every step."""
    totals: list[float] = []

    def observe(step: Step, rows: Tensor) -> None:
        totals.append(float(rows[1:].double().square().sum()))

    x_0 = start.initial()
    rows = torch.cat([x_0[None], x_0.new_zeros(len(field.deltas), *x_0.shape)])
    integrate(field, start.steps(), rows, noise_of(start, len(field.deltas)), observe)
    return totals


def noise_of(start: Start, still: int) -> Callable[[], Tensor]:
    """The sampler's noise for row 0, none for the ``still`` rows after it."""

    def noise() -> Tensor:
        z = start.draw()
        return torch.cat([z[None], z.new_zeros(still, *z.shape)])

    return noise
