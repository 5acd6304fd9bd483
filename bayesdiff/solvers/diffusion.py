"""Samplers of variance-preserving diffusion, as x' = a x + b g + c z."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bayesdiff.checks import UserError
from bayesdiff.paths import Coefficient, ProbabilityPath, convert
from bayesdiff.paths.coefficient import as_coefficient, is_zero, log, not_below
from bayesdiff.solvers.step import Row, Solver, Step, coefficients


@dataclass(frozen=True)
class Node:
    """A time of the grid with the path's coefficients there."""

    t: float
    alpha: Coefficient
    sigma: Coefficient

    @property
    def lam(self) -> Coefficient:
        """Half log-SNR, ln(alpha / sigma)."""
        return math.inf if is_zero(self.sigma) else log(self.alpha / self.sigma)


@dataclass(frozen=True)
class Span:
    """What the coefficients of one step depend on.

    Attributes:
        path: of the model.
        prediction: what the network predicts.
        start: where the step starts and evaluates the network.
        end: where it ends; before the start, where it goes from data to noise.
        before: where the step before started, None for the first one.
    """

    path: ProbabilityPath
    prediction: str
    start: Node
    end: Node
    before: Node | None = None

    @property
    def clean(self) -> bool:
        """Whether the step ends in clean data, where lambda is infinite."""
        return is_zero(self.end.sigma)

    @property
    def length(self) -> Coefficient:
        """h, the step in half log-SNR."""
        return self.end.lam - self.start.lam

    @property
    def beta(self) -> Coefficient:
        """1 - abar_t / abar_s of the step to s, less than 0 where s has more noise than t."""
        if self.end.t < self.start.t:
            return (self.end.alpha / self.start.alpha) ** 2 - 1
        return 1 - (self.start.alpha / self.end.alpha) ** 2

    def affine(self, data: Coefficient, noise: Coefficient) -> tuple[Coefficient, Coefficient]:
        """(a, b) with a x + b g = data x_1hat + noise x_0hat at the step's start."""
        return as_affine(self.path, self.prediction, self.start.t, data, noise)

    def step(
        self,
        a: Coefficient,
        b: Coefficient,
        noise: Coefficient = 0.0,
        kept: tuple[Row, ...] = (),
        history: Row = (),
    ) -> Step:
        """The step x' = a x + b g + sum_j history[j] k_j + noise z."""
        return Step((self.start.t,), ((1.0,),), (a, b), noise, self.end.t, kept, history)


@dataclass(frozen=True)
class DiffusionSolver(Solver):
    """What the samplers of diffusion share; each adds its ``name`` and ``steps``."""

    def check(self, path: ProbabilityPath) -> None:
        """Refuse a path with another variance.

        Raises:
            UserError: for the straight lines of a flow.
        """
        if not path.variance_preserving:
            raise UserError(
                f"solver={self.name} is for diffusion models, whose paths have "
                "alpha^2 + sigma^2 = 1, unlike a flow's; use solver=euler, heun, midpoint or rk4"
            )


@dataclass(frozen=True)
class DDIM(DiffusionSolver):
    """DDIM (Song et al. 2021, eq. 12) with any eta in [0, 1]; eta = 1 is DDPM with small variance.

    With s the next time: s_eta^2 = eta^2 (sigma_s / sigma_t)^2 (1 - abar_t / abar_s),
    a = alpha_s / alpha_t, b = sqrt(sigma_s^2 - s_eta^2) - a sigma_t, c = s_eta for a noise
    predictor.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> path, times = VariancePreserving(), [0.0, 0.5, 1.0]
        >>> [step.noise for step in DDIM(2).steps(path, "noise", times)]
        [0.0, 0.0]
        >>> [round(step.noise, 3) for step in DDIM(2, eta=1.0).steps(path, "noise", times)]
        [0.96, 0.0]
    """

    eta: float = 0.0

    name: ClassVar[str] = "ddim"

    def __post_init__(self) -> None:
        number = isinstance(self.eta, (int, float)) and not isinstance(self.eta, bool)
        if not number or not 0 <= self.eta <= 1:
            raise UserError(f"solver.eta must be between 0 and 1, got {self.eta!r}; 0 is no noise")

    @property
    def stochastic(self) -> bool:
        """Whether eta > 0."""
        return self.eta > 0

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [self._step(span) for span in spans(path, prediction, times)]

    def _step(self, span: Span) -> Step:
        start, end = span.start, span.end
        variance: Coefficient = 0.0
        if self.eta:  # else a step may well start at clean data, where sigma is 0
            variance = (self.eta * end.sigma / start.sigma) ** 2
            variance *= 1 - (start.alpha / end.alpha) ** 2
        # The mean in terms of data and noise stays finite where alpha vanishes.
        direction = not_below(end.sigma**2 - variance, 0.0) ** 0.5
        return span.step(*span.affine(end.alpha, direction), noise=variance**0.5)


@dataclass(frozen=True)
class DDPM(DiffusionSolver):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also between distant times.

    With al = abar_t / abar_s and be = 1 - al: a = 1 / sqrt(al), b = -be / (sigma_t sqrt(al)) for a
    noise predictor, and c^2 = be (``large``) or be sigma_s^2 / sigma_t^2 (``small``). The step to
    clean data has no noise, as in the algorithm.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> path, times = VariancePreserving(), [0.0, 0.5, 1.0]
        >>> [round(step.noise, 3) for step in DDPM(2).steps(path, "noise", times)]
        [1.0, 0.0]
        >>> steps = DDPM(2, variance="small").steps(path, "noise", times)
        >>> [round(step.noise, 3) for step in steps]
        [0.96, 0.0]
    """

    variance: str = "large"

    name: ClassVar[str] = "ddpm"

    def __post_init__(self) -> None:
        if self.variance not in ("large", "small"):
            raise UserError(f"unknown solver.variance {self.variance!r}; choose large or small")

    @property
    def stochastic(self) -> bool:
        """Always."""
        return True

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [self._step(span) for span in spans(path, prediction, times)]

    def _step(self, span: Span) -> Step:
        sigma, sigma_s = span.start.sigma, span.end.sigma
        ratio = span.start.alpha / span.end.alpha  # sqrt(al)
        beta = 1 - ratio**2
        # Posterior mean: (alpha_s be / sigma_t^2) x_1 + (sqrt(al) sigma_s^2 / sigma_t^2) x_t.
        a, b = span.affine(data=span.end.alpha * beta / sigma**2, noise=0.0)
        a += ratio * sigma_s**2 / sigma**2
        variance = beta * (sigma_s / sigma) ** 2 if self.variance == "small" else beta
        return span.step(a, b, noise=0.0 if span.clean else variance**0.5)


@dataclass(frozen=True)
class BayesianUpdate(DDPM):
    """Sampling of Bayesian flow networks (Graves et al. 2023, algorithm 9): DDPM, ``small``.

    A belief that receives y ~ N(x_1hat, 1 / a) moves to c mu + (1 - c) x_1hat + noise: that is the
    posterior of the later state given the earlier one and the data, in the states of
    ``paths.bayesian_flow``. Of classes, x_1hat is a class that the likelihood draws.

    Example:
        >>> from bayesdiff.paths import QuadraticAccuracy
        >>> from bayesdiff.solvers import plan
        >>> steps = plan(BayesianUpdate(num_steps=2), QuadraticAccuracy(), "data")
        >>> len(steps), steps[-1].stochastic  # the data are predicted from the last belief
        (3, False)
    """

    variance: str = "small"

    name: ClassVar[str] = "bfn"


@dataclass(frozen=True)
class SDEEuler(DiffusionSolver):
    """Euler-Maruyama on the reverse equation (Song et al. 2021, "Score-based", eq. 6).

    a = 1 + beta D / 2, b = -beta D / sigma_t, c^2 = beta D for a noise predictor, where beta D is
    1 - abar_t / abar_s: a discrete schedule's own beta_i over one index, and the same as
    -2 d ln alpha over the step to first order. Unlike the derivative it does not jump at the
    indices, and stays below 1 at the last ones of ``cosine``.

    The slope at clean data is infinite; the last step takes the data prediction, without noise.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> steps = SDEEuler(num_steps=2).steps(VariancePreserving(), "noise", [0.0, 0.5, 1.0])
        >>> [round(step.noise, 3) for step in steps]
        [1.0, 0.0]
    """

    name: ClassVar[str] = "sde"

    @property
    def stochastic(self) -> bool:
        """Always."""
        return True

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [_reverse_euler(span, 1.0) for span in spans(path, prediction, times)]


@dataclass(frozen=True)
class ProbabilityFlow(DiffusionSolver):
    """Euler on the probability-flow equation (Song et al. 2021, "Score-based", eq. 13).

    a = 1 + beta D / 2, b = -beta D / (2 sigma_t) for a noise predictor, with the beta D and the
    last step of ``SDEEuler``. First order; DDIM is the method that treats x exactly.

    Example:
        >>> from bayesdiff.paths import VariancePreserving
        >>> path, times = VariancePreserving(), [0.5, 0.6]
        >>> (flow,) = ProbabilityFlow(1).steps(path, "noise", times)
        >>> (sde,) = SDEEuler(1).steps(path, "noise", times)
        >>> flow.noise, round(sde.output[1] / flow.output[1], 6)  # half the score, and no noise
        (0.0, 2.0)
    """

    name: ClassVar[str] = "pf_ode"

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        return [_reverse_euler(span, 0.5) for span in spans(path, prediction, times)]


def _reverse_euler(span: Span, share: float) -> Step:
    """One Euler step; share 1 of the score with fresh noise, or 1/2 without."""
    start, end = span.start, span.end
    if span.clean:
        return span.step(*span.affine(data=end.alpha, noise=0.0))
    beta = span.beta
    p, b = span.affine(data=0.0, noise=-share * beta / start.sigma)
    return span.step(1 + beta / 2 + p, b, noise=beta**0.5 if share == 1 else 0.0)


def nodes_at(path: ProbabilityPath, times: Sequence[float]) -> list[Node]:
    """The times with their coefficients."""
    pairs = coefficients(path, times)
    return [Node(t, alpha, sigma) for t, (alpha, sigma) in zip(times, pairs, strict=True)]


def spans(path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Span]:
    """The stretches between consecutive times."""
    nodes = nodes_at(path, times)
    before = [None, *nodes[:-2]]
    return [
        Span(path, prediction, start, end, earlier)
        for start, end, earlier in zip(nodes[:-1], nodes[1:], before, strict=True)
    ]


def as_affine(
    path: ProbabilityPath, prediction: str, t: float, data: Coefficient, noise: Coefficient
) -> tuple[Coefficient, Coefficient]:
    """(a, b) with a x + b g = data x_1hat + noise x_0hat at time t."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    p_data, q_data = map(as_coefficient, convert(prediction, "data", c))
    p_noise, q_noise = map(as_coefficient, convert(prediction, "noise", c))
    return data * p_data + noise * p_noise, data * q_data + noise * q_noise
