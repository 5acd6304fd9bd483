"""Samplers of variance-preserving diffusion, as x' = a x + b g + c z."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bayesdiff.checks import UserError
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.solvers.step import Step, coefficients


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021, eq. 12) with any eta in [0, 1]; eta = 1 is DDPM with small variance.

    With s the next time: s_eta^2 = eta^2 (sigma_s / sigma_t)^2 (1 - abar_t / abar_s),
    a = alpha_s / alpha_t, b = sqrt(sigma_s^2 - s_eta^2) - a sigma_t, c = s_eta for a noise
    predictor.
    """

    num_steps: int
    guidance: float = 1.0
    eta: float = 0.0

    family: ClassVar[str] = "diffusion"

    def __post_init__(self) -> None:
        number = isinstance(self.eta, (int, float)) and not isinstance(self.eta, bool)
        if not number or not 0 <= self.eta <= 1:
            raise UserError(f"solver.eta must be between 0 and 1, got {self.eta!r}; 0 is no noise")

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        nodes = coefficients(path, times)
        steps = []
        for i, ((alpha, sigma), (alpha_s, sigma_s)) in enumerate(
            zip(nodes[:-1], nodes[1:], strict=True)
        ):
            variance = (self.eta * sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2)
            # The mean in terms of data and noise stays finite where alpha vanishes.
            direction = max(sigma_s**2 - variance, 0.0) ** 0.5
            a, b = _mean(path, prediction, times[i], data=alpha_s, noise=direction)
            steps.append(Step((times[i],), ((1.0,),), (a, b), variance**0.5, times[i + 1]))
        return steps


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also between distant times.

    With al = abar_t / abar_s and be = 1 - al: a = 1 / sqrt(al), b = -be / (sigma_t sqrt(al)) for a
    noise predictor, and c^2 = be (``large``) or be sigma_s^2 / sigma_t^2 (``small``). The step to
    clean data has no noise, as in the algorithm.
    """

    num_steps: int
    guidance: float = 1.0
    variance: str = "large"

    family: ClassVar[str] = "diffusion"

    def __post_init__(self) -> None:
        if self.variance not in ("large", "small"):
            raise UserError(f"unknown solver.variance {self.variance!r}; choose large or small")

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive times."""
        nodes = coefficients(path, times)
        steps = []
        for i, ((alpha, sigma), (alpha_s, sigma_s)) in enumerate(
            zip(nodes[:-1], nodes[1:], strict=True)
        ):
            ratio = alpha / alpha_s  # sqrt(al)
            beta = 1 - ratio**2
            # Posterior mean: (alpha_s be / sigma_t^2) x_1 + (sqrt(al) sigma_s^2 / sigma_t^2) x_t.
            on_data = alpha_s * beta / sigma**2
            a, b = _mean(path, prediction, times[i], data=on_data, noise=0.0)
            a += ratio * sigma_s**2 / sigma**2
            variance = beta * (sigma_s / sigma) ** 2 if self.variance == "small" else beta
            noise = variance**0.5 if sigma_s > 0 else 0.0
            steps.append(Step((times[i],), ((1.0,),), (a, b), noise, times[i + 1]))
        return steps


def _mean(
    path: ProbabilityPath, prediction: str, t: float, data: float, noise: float
) -> tuple[float, float]:
    """(a, b) with a x + b g = data x_1hat + noise x_0hat at time t."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    p_data, q_data = (float(v) for v in convert(prediction, "data", c))
    p_noise, q_noise = (float(v) for v in convert(prediction, "noise", c))
    return data * p_data + noise * p_noise, data * q_data + noise * q_noise
