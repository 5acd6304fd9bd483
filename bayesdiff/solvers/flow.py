"""Runge-Kutta solvers of the flow's ordinary differential equation dx/dt = v(x, t)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bayesdiff.checks import UserError
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.solvers.step import Step

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RungeKutta:
    """Explicit Runge-Kutta method of a tableau (matrix A, weights w, nodes c).

    k_i = v(x + h sum_j A_ij k_j, t + c_i h), x' = x + h sum_i w_i k_i. A network that predicts
    something else than the velocity enters through k_i = p_i u_i + q_i g_i, so the step stays
    affine in its outputs g_i.
    """

    num_steps: int
    guidance: float = 1.0
    grid: str = "uniform"

    name: ClassVar[str]
    family: ClassVar[str] = "flow"
    stages: ClassVar[int]
    matrix: ClassVar[Matrix]
    weights: ClassVar[tuple[float, ...]]
    nodes: ClassVar[tuple[float, ...]]

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times.

        Noise says nothing of the velocity at t = 0, nor data at t = 1: a ``UserError`` there.
        """
        return [
            self._step(path, prediction, start, end)
            for start, end in zip(times[:-1], times[1:], strict=True)
        ]

    def _step(self, path: ProbabilityPath, prediction: str, start: float, end: float) -> Step:
        h = end - start
        at = [start + c * h for c in self.nodes]
        c = path.coefficients(torch.tensor(at, dtype=torch.float64))
        p, q = (values.tolist() for values in convert(prediction, "velocity", c))
        for t, numbers in zip(at, zip(p, q, strict=True), strict=True):
            if not all(map(math.isfinite, numbers)):
                raise UserError(
                    f"model.prediction={prediction} leaves the velocity at t={t:g} open, which "
                    f"solver={self.name} needs; use model.prediction=velocity"
                )
        size = len(at) + 1
        state = torch.eye(size, dtype=torch.float64)[0]  # coefficients of x itself
        slopes: list[torch.Tensor] = []
        inputs: list[tuple[float, ...]] = []
        for i, row in enumerate(self.matrix):
            point = state + h * sum((a * k for a, k in zip(row, slopes, strict=True)), 0 * state)
            inputs.append(tuple(point[: i + 1].tolist()))
            slope = p[i] * point
            slope[i + 1] += q[i]
            slopes.append(slope)
        output = state + h * sum(w * k for w, k in zip(self.weights, slopes, strict=True))
        return Step(tuple(at), tuple(inputs), tuple(output.tolist()), noise=0.0, end=end)


class Euler(RungeKutta):
    """First order, one evaluation: x' = x + h v(x, t)."""

    name = "euler"
    stages = 1
    matrix = ((),)
    weights = (1.0,)
    nodes = (0.0,)


class Heun(RungeKutta):
    """Second order, two evaluations: the mean of the slopes at both ends."""

    name = "heun"
    stages = 2
    matrix = ((), (1.0,))
    weights = (0.5, 0.5)
    nodes = (0.0, 1.0)


class Midpoint(RungeKutta):
    """Second order, two evaluations: the slope in the middle, which half an Euler step reaches."""

    name = "midpoint"
    stages = 2
    matrix = ((), (0.5,))
    weights = (0.0, 1.0)
    nodes = (0.0, 0.5)


class RK4(RungeKutta):
    """Fourth order, four evaluations: the classical Runge-Kutta method."""

    name = "rk4"
    stages = 4
    matrix = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    nodes = (0.0, 0.5, 0.5, 1.0)
