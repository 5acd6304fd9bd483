"""Moments of a step's outputs over draws of its state."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.networks.forward_mode import jvp
from bayesdiff.solvers import Step
from bayesdiff.uncertainty.recursion.covariance import (
    covariance_between,
    covariance_with_input,
    shifts,
    stein_covariance,
)
from bayesdiff.uncertainty.recursion.propagate import OutputMoments, effective, rows_of
from bayesdiff.uncertainty.recursion.uncertain_head import (
    Evaluations,
    Noise,
    UncertainHead,
    evaluate,
)


@dataclass(frozen=True)
class Draws:
    """Draws x ~ N(m, diag V) and the network there, all draws at once.

    Attributes:
        head: network with the posterior of its head.
        count: S.
        covariance: estimator of Cov(x, g), see ``covariance_with_input``.
        var_x: whether the variance of the outputs over the draws is wanted.
        fresh: standard noise ``(B, C, H, W)``.
        weights: source of the weight draws.
    """

    head: UncertainHead
    count: int
    covariance: str
    var_x: bool
    fresh: Callable[[], Tensor]
    weights: torch.Generator

    def moments(
        self, step: Step, mean: Tensor, variance: Tensor, gam2: Tensor | None = None
    ) -> OutputMoments:
        """Moments of the step's outputs.

        Args:
            step: with its evaluations.
            mean: m, ``(B, C, H, W)``.
            variance: V, of the same shape.
            gam2: covariance due to the head's weights ``(R, R, B, C, H, W)``, None for its mean
                over the draws.
        """
        shifted = shifts(self.covariance, variance, self.count, self.fresh)
        x = (mean + shifted).flatten(0, 1)
        noise = self._noise(step)
        if self.covariance == "stein":
            drawn, probes, tangents = self._derivatives(step, x, noise)
            slopes = self._effective(step, tangents)
            with_x = stein_covariance(variance, self._by_draw(probes, 0), slopes)
        else:
            drawn = evaluate(self.head, step, x, noise)
        outputs = self._effective(step, drawn.outputs)
        if self.covariance != "stein":
            with_x = covariance_with_input(self.covariance, shifted, outputs)
        if gam2 is None:
            gam2 = self.head.covariance(drawn.features, rows_of(step))
            gam2 = self._by_draw(gam2, 2).mean(2)
        within = torch.zeros_like(gam2)
        if self.var_x:
            added = None if noise is None else self._effective(step, drawn.noises)
            within = self._within(outputs, added)
        return OutputMoments(outputs.mean(1), with_x, within, gam2)

    def _within(self, outputs: Tensor, added: Tensor | None) -> Tensor:
        """Covariance of the outputs, and of them with the noise of the same weights."""
        paired = self.covariance == "antithetic"
        within = covariance_between(outputs, outputs, paired)
        if added is None:
            return within
        cross = covariance_between(outputs, added, paired)
        return within + cross + cross.transpose(0, 1)

    def _derivatives(
        self, step: Step, x: Tensor, noise: Noise | None
    ) -> tuple[Evaluations, Tensor, Tensor]:
        """Evaluations, random signs, and the outputs' derivatives along them."""
        field = self.head.field
        before = field.evaluations
        signs = torch.stack([self.fresh() for _ in range(self.count)]).flatten(0, 1)
        probes = torch.where(signs > 0, 1.0, -1.0).to(x)

        def outputs(x: Tensor) -> tuple[Tensor, tuple]:
            found = evaluate(self.head, step, x, noise)
            return found.outputs, (found.features, found.noises)

        found: tuple = jvp(outputs, (x,), (probes,), has_aux=True)
        values, tangents, others = found
        field.evaluations += field.evaluations - before  # a derivative costs about as much again
        return Evaluations(values, *others), probes, tangents

    def _noise(self, step: Step) -> Noise | None:
        """What weights add to the inputs of later evaluations; None where it is not looked at."""
        if len(step.times) == 1 or (self.head.shared and not self.var_x):
            return None
        if self.head.shared:
            return self.head.shared_noise(self.count, self.weights)
        return self.head.fresh_noise(self.count, self.fresh)

    def _effective(self, step: Step, values: Tensor) -> Tensor:
        """``(E, S B, C, H, W) -> (R, S, B, C, H, W)``."""
        return self._by_draw(effective(step, values), 1)

    def _by_draw(self, values: Tensor, dim: int) -> Tensor:
        return values.unflatten(dim, (self.count, -1))
