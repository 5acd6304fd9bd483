"""Probability paths: x_t = alpha_t x_1 + sigma_t x_0 with noise at t = 0 and data at t = 1."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.paths.coefficient import Coefficient, is_one, like


@dataclass(frozen=True)
class PathCoefficients:
    """Coefficients of a path and their time derivatives.

    Each has the shape of ``t``; on a path with a schedule of its own for every pixel, the shape of
    ``t`` and then one of as many dimensions as a sample, which broadcasts against it.

    Example:
        >>> x_0, x_1 = torch.randn(2, 4, 1, 8, 8).unbind()  # noise and data
        >>> at = CondOT().coefficients(torch.tensor(0.25))
        >>> x_t = at.alpha * x_1 + at.sigma * x_0
        >>> velocity = at.d_alpha * x_1 + at.d_sigma * x_0
        >>> torch.allclose(x_t + 0.75 * velocity, x_1, atol=1e-6)
        True
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class ProbabilityPath(ABC):
    """What a model and a solver need to know of a path.

    Attributes:
        family: what a run with this path is called; nothing is decided by it.
        num_steps_max: indices of a discrete schedule, None for a continuous one.
        last_time: of training, the least noise that the network learns.
        smooth: whether alpha and sigma have derivatives at all times in [0, 1].
        variance_preserving: whether alpha^2 + sigma^2 = 1.
        noise_scale: standard deviation of the state at t = 0, a number or one per pixel.
        ends_in_data: whether the state at t = 1 is data; otherwise samples end with one more
            prediction, of the data from that state.

    Example:
        >>> class QuarterTurn(ProbabilityPath):
        ...     family, variance_preserving = "diffusion", True
        ...     def coefficients(self, t):
        ...         rate = math.pi / 2
        ...         sin, cos = (rate * t.double()).sin(), (rate * t.double()).cos()
        ...         return PathCoefficients(sin, cos, rate * cos, -rate * sin)
        >>> QuarterTurn().coefficients(torch.tensor([0.0, 1 / 3, 1.0])).alpha
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """

    family: str
    num_steps_max: int | None = None
    last_time: float = 1.0
    smooth: bool = True
    variance_preserving: bool = False
    noise_scale: Coefficient = 1.0
    ends_in_data: bool = True

    @abstractmethod
    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64."""

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times that a network has met, all alike often, for uniform numbers in [0, 1)."""
        return uniform * self.last_time

    def initial_state(self, noise: Tensor) -> Tensor:
        """State at t = 0 that standard noise ``(..., C, H, W)`` stands for."""
        if is_one(self.noise_scale):
            return noise
        return like(self.noise_scale, noise) * noise

    def for_likelihood(self, likelihood: Any) -> "ProbabilityPath":
        """The path made ready for data of this likelihood; most need nothing."""
        return self

    def for_space(self, space: Any) -> Self:
        """The path made ready for the states of this space; most need their shape at most."""
        return self.for_shape(space.shape)

    def for_shape(self, shape: Sequence[int]) -> Self:
        """The path made ready for samples of this shape; most need nothing."""
        return self


class CondOT(ProbabilityPath):
    """Straight lines from noise to data: alpha = t, sigma = 1 - t.

    Source: Lipman et al., "Flow Matching for Generative Modeling" (2023), eq. 20 with
    sigma_min = 0.

    Example:
        >>> at = CondOT().coefficients(torch.tensor([0.0, 0.25, 1.0]))
        >>> at.alpha + at.sigma
        tensor([1., 1., 1.], dtype=torch.float64)
        >>> at.d_alpha - at.d_sigma  # of the velocity x_1 - x_0
        tensor([2., 2., 2.], dtype=torch.float64)
    """

    family = "flow"

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64."""
        t = t.double()
        one = torch.ones_like(t)
        return PathCoefficients(alpha=t, sigma=1 - t, d_alpha=one, d_sigma=-one)


class VariancePreserving(ProbabilityPath):
    """Discrete diffusion schedules, alpha^2 + sigma^2 = 1, on the common time axis.

    The schedule's own index i = 0 (least noise) ... T - 1 (most) sits at t = 1 - (i + 1) / T, so
    t = 0 is index T - 1 and t = 1 is clean data (abar = 1). Between indices ln abar is linear.

    Schedules: ``linear`` (Ho et al. 2020), ``scaled_linear`` (linear in sqrt(beta), Rombach et al.
    2022) and ``cosine`` (Nichol and Dhariwal 2021, eq. 17, betas capped at 0.999).

    Example:
        >>> at = VariancePreserving("linear").coefficients(torch.tensor([0.0, 0.5, 1.0]))
        >>> at.alpha
        tensor([0.0064, 0.2803, 1.0000], dtype=torch.float64)
        >>> at.alpha**2 + at.sigma**2
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    family = "diffusion"
    smooth = False
    variance_preserving = True

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        at_least("path.timesteps", timesteps, 2)
        positive("path.beta_start", beta_start)
        if not beta_start < beta_end < 1:
            raise UserError(
                f"path.beta_end must lie between beta_start={beta_start} and 1, got {beta_end}"
            )
        betas = _betas(schedule, timesteps, beta_start, beta_end)
        self.num_steps_max = timesteps
        self.last_time = 1 - 1 / timesteps
        self.log_abar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64."""
        timesteps = len(self.log_abar) - 1
        table = self.log_abar.to(t.device)
        # Rounding keeps grid times on their nodes: T (1 - t) is inexact for most t.
        node = ((1 - t.double()) * timesteps * 2**20).round() / 2**20
        below = node.floor().clamp(0, timesteps - 1).long()
        slope = table[below + 1] - table[below]
        log_abar = table[below] + (node - below) * slope
        alpha = (0.5 * log_abar).exp()
        sigma = (-torch.expm1(log_abar)).sqrt()
        d_alpha = -0.5 * timesteps * slope * alpha
        return PathCoefficients(alpha, sigma, d_alpha, d_sigma=-alpha * d_alpha / sigma)


def _betas(schedule: str, timesteps: int, start: float, end: float) -> Tensor:
    if schedule == "linear":
        return torch.linspace(start, end, timesteps, dtype=torch.float64)
    if schedule == "scaled_linear":
        roots = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64)
        return roots**2
    if schedule == "cosine":
        grid = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        abar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise UserError(
        f"unknown path.schedule {schedule!r}; choose from linear, scaled_linear, cosine"
    )
