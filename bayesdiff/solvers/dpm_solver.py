"""DPM-Solver: the linear part of the diffusion equation exactly, in steps of half log-SNR.

Sources: Lu et al., "DPM-Solver" (2022) and "DPM-Solver++" (2022). With lambda = ln(alpha / sigma)
and h = lambda_s - lambda_t for the step from t to s. Clean data has lambda = inf: there every
method takes the data prediction, x' = x_1hat. That is what the first-order formulas tend to for
h -> inf. Those of second order have no limit: their corrections extrapolate a slope in lambda over
the infinite step. A step from noise alone, where lambda = -inf, is of first order for the same
reason; there the formula is written as DDIM, whose terms stay finite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths import Coefficient, ProbabilityPath
from bayesdiff.paths.coefficient import expm1, is_zero, level
from bayesdiff.solvers.diffusion import DiffusionSolver, Node, Span, as_affine, nodes_at, spans
from bayesdiff.solvers.snr import time_at
from bayesdiff.solvers.step import Step


@dataclass(frozen=True)
class DPMSolver1(DiffusionSolver):
    """DPM-Solver-1 (Lu et al. 2022, eq. 3.7), the same as DDIM with eta = 0.

    a = alpha_s / alpha_t, b = -sigma_s (e^h - 1) for a noise predictor.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> from bayesdiff.solvers import DDIM
        >>> path, times = VariancePreserving(), [0.5, 0.6]
        >>> (step,) = DPMSolver1(1).steps(path, "noise", times)
        >>> (ddim,) = DDIM(1).steps(path, "noise", times)
        >>> torch.allclose(torch.tensor(step.output), torch.tensor(ddim.output))
        True
    """

    name: ClassVar[str] = "dpm1"

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [
            _long(span) if span.clean else span.step(*_first_order(span, span.end))
            for span in spans(path, prediction, times)
        ]


@dataclass(frozen=True)
class DPMSolver2(DiffusionSolver):
    """Single-step DPM-Solver-2 (Lu et al. 2022, algorithm 1 and its form for any r1).

    u is the first-order step to the time t_1 at lambda_t + r1 h; then with the noise predictions
    eps_t of x and eps_u of u at t_1

        x' = (alpha_s / alpha_t) x - sigma_s (e^h - 1) (eps_t + (eps_u - eps_t) / (2 r1)).

    Two evaluations per step, and one in the first-order step to clean data. A long step enlarges
    the difference of the predictions, and with it the network's error, by up to e^h: few steps
    on a ``uniform`` grid do not suit ``cosine``, whose first one is then long in lambda.

    Attributes:
        r1: where in the step the second evaluation lies, in (0, 1).

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> steps = DPMSolver2(num_steps=2).steps(VariancePreserving(), "noise", [0.0, 0.5, 1.0])
        >>> [len(step.times) for step in steps]  # evaluations; one in the step to clean data
        [2, 1]
    """

    r1: float = 0.5

    name: ClassVar[str] = "dpm2"
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        number = isinstance(self.r1, (int, float)) and not isinstance(self.r1, bool)
        if not number or not 0 < self.r1 < 1:
            raise UserError(
                f"solver.r1 must lie between 0 and 1, got {self.r1!r}; 0.5 is the middle"
            )

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        found = spans(path, prediction, times)
        inner = [level(s.start.lam + self.r1 * s.length) for s in found if _finite(s)]
        between = iter(
            nodes_at(path, time_at(path, torch.tensor(inner, dtype=torch.float64)).tolist())
        )
        return [self._step(s, next(between)) if _finite(s) else _long(s) for s in found]

    def _step(self, span: Span, middle: Node) -> Step:
        start = span.start
        a_u, b_u = _first_order(span, middle)
        a, b = _first_order(span, span.end)
        # One time lies differently in the steps of pixels that have schedules of their own.
        own = isinstance(span.length, Tensor)
        r1 = (middle.lam - start.lam) / span.length if own else self.r1
        weight = -span.end.sigma * expm1(span.length) / (2 * r1)
        # Each noise prediction as p (its input) + q (its output).
        p, q = as_affine(span.path, span.prediction, start.t, data=0.0, noise=1.0)
        p_u, q_u = as_affine(span.path, span.prediction, middle.t, data=0.0, noise=1.0)
        output = (
            a + weight * (p_u * a_u - p),
            b + weight * (p_u * b_u - q),
            weight * q_u,
        )
        return Step((start.t, middle.t), ((1.0,), (a_u, b_u)), output, noise=0.0, end=span.end.t)


@dataclass(frozen=True)
class DPMSolverPP2M(DiffusionSolver):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), one evaluation per step.

    With the data predictions D of this step and D_r of the one before, r0 = h_before / h and
    q = -alpha_s (e^-h - 1):

        x' = (sigma_s / sigma_t) x + q (D + (D - D_r) / (2 r0)).

    The first step, which has none before, and the one to clean data are of first order.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> times = [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> steps = DPMSolverPP2M(num_steps=4).steps(VariancePreserving(), "noise", times)
        >>> [any(step.history) for step in steps]  # which use the prediction before
        [False, True, True, False]
    """

    name: ClassVar[str] = "dpmpp_2m"

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [
            _long(span) if span.clean else _two_step(span)
            for span in spans(path, prediction, times)
        ]


def _finite(span: Span) -> bool:
    """Whether lambda is finite at both ends."""
    return not (span.clean or is_zero(span.start.alpha))


def _long(span: Span) -> Step:
    """A step to lambda = inf, or from -inf."""
    if span.clean:
        return span.step(*span.affine(data=span.end.alpha, noise=0.0))
    return span.step(*_first_order(span, span.end))


def _first_order(span: Span, end: Node) -> tuple[Coefficient, Coefficient]:
    """(a, b) of the step of DPM-Solver-1 from the span's start to ``end``."""
    start = span.start
    if is_zero(start.alpha):
        return as_affine(span.path, span.prediction, start.t, end.alpha, end.sigma)
    p, b = span.affine(data=0.0, noise=-end.sigma * expm1(end.lam - start.lam))
    return end.alpha / start.alpha + p, b


def _two_step(span: Span) -> Step:
    start, end = span.start, span.end
    data = span.affine(data=1.0, noise=0.0)
    q = -end.alpha * expm1(-span.length)
    correction: Coefficient = 0.0
    if span.before is not None:
        correction = q * span.length / (2 * (start.lam - span.before.lam))
    a = end.sigma / start.sigma + (q + correction) * data[0]
    b = (q + correction) * data[1]
    return span.step(a, b, kept=(data,), history=(-correction,))
