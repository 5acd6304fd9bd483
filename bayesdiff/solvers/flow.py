"""Runge-Kutta solvers of the flow's ordinary differential equation dx/dt = v(x, t)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.paths.coefficient import at_times
from bayesdiff.solvers.step import Row, Solver, Step

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RungeKutta(Solver):
    """Explicit Runge-Kutta method of a tableau (matrix A, weights w, nodes c).

    k_i = v(x + h sum_j A_ij k_j, t + c_i h), x' = x + h sum_i w_i k_i. A network that predicts
    something else than the velocity enters through k_i = p_i u_i + q_i g_i, so the step stays
    affine in its outputs g_i.
    """

    matrix: ClassVar[Matrix]
    weights: ClassVar[tuple[float, ...]]
    nodes: ClassVar[tuple[float, ...]]

    def check(self, path: ProbabilityPath) -> None:
        """Refuse a path without a velocity at all times.

        Raises:
            UserError: for a discrete schedule, whose slope jumps.
        """
        if not path.smooth:
            raise UserError(
                f"solver={self.name} needs a path that is smooth in time, as a flow's, and not "
                "a discrete diffusion schedule or a belief about numbers; use solver=ddim, or "
                "pf_ode for Euler's method"
            )

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
        p, q = convert(prediction, "velocity", c)
        for t, *pair in zip(at, p, q, strict=True):
            if not all(bool(values.isfinite().all()) for values in pair):
                raise UserError(
                    f"model.prediction={prediction} leaves the velocity at t={t:g} open, which "
                    f"solver={self.name} needs; use model.prediction=velocity"
                )
        size = len(at) + 1
        state = torch.eye(size, dtype=torch.float64)[0]  # coefficients of x itself
        state = state.view(size, *[1] * (p.ndim - 1))
        slopes: list[Tensor] = []
        inputs: list[Row] = []
        for i, row in enumerate(self.matrix):
            point = state + h * sum((a * k for a, k in zip(row, slopes, strict=True)), 0 * state)
            inputs.append(tuple(at_times(point[: i + 1])))
            slope = p[i] * point
            slope[i + 1] += q[i]
            slopes.append(slope)
        output = state + h * sum(w * k for w, k in zip(self.weights, slopes, strict=True))
        return Step(tuple(at), tuple(inputs), tuple(at_times(output)), noise=0.0, end=end)


class Euler(RungeKutta):
    """First order, one evaluation: x' = x + h v(x, t).

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> (step,) = Euler(num_steps=1).steps(CondOT(), "velocity", [0.5, 0.75])
        >>> step.output  # x' = 1 x + 0.25 v
        (1.0, 0.25)
    """

    name = "euler"
    stages = 1
    matrix = ((),)
    weights = (1.0,)
    nodes = (0.0,)


class Heun(RungeKutta):
    """Second order, two evaluations: the mean of the slopes at both ends.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> (step,) = Heun(num_steps=1).steps(CondOT(), "velocity", [0.5, 0.75])
        >>> step.times, step.inputs[1]  # the second evaluation is where Euler's step ends
        ((0.5, 0.75), (1.0, 0.25))
        >>> step.output
        (1.0, 0.125, 0.125)
    """

    name = "heun"
    stages = 2
    matrix = ((), (1.0,))
    weights = (0.5, 0.5)
    nodes = (0.0, 1.0)


class Midpoint(RungeKutta):
    """Second order, two evaluations: the slope in the middle, which half an Euler step reaches.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> (step,) = Midpoint(num_steps=1).steps(CondOT(), "velocity", [0.5, 0.75])
        >>> step.times, step.output  # the slope at 0.5 is not in the new state
        ((0.5, 0.625), (1.0, 0.0, 0.25))
    """

    name = "midpoint"
    stages = 2
    matrix = ((), (0.5,))
    weights = (0.0, 1.0)
    nodes = (0.0, 0.5)


class RK4(RungeKutta):
    """Fourth order, four evaluations: the classical Runge-Kutta method.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import integrate, plan
        >>> steps = plan(RK4(num_steps=4), CondOT(), "velocity")
        >>> integrate(lambda x, t: -x, steps, torch.ones(1), torch.randn)  # exp(-1) = 0.36788
        tensor([0.3679])
    """

    name = "rk4"
    stages = 4
    matrix = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    nodes = (0.0, 0.5, 0.5, 1.0)
