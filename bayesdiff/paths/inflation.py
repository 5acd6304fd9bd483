"""Inflationary flows: a variance-preserving path with coefficients per eigen-dimension.

Noise of variance gamma_i(tau) is added to the data's coordinate i in their eigenbasis, of variance
xi_i; tau runs from 0 at data to the duration T at noise. In whitened coordinates
z_i = x_i / sqrt(xi_i + gamma_i), with theta_i = atan sqrt(gamma_i / xi_i), that is
z = cos(theta) z_data + sin(theta) eps, the network of the paper predicts minus the v of ours, and
the probability-flow equation is dz = v dtheta.

Source: de Albuquerque and Pearson, "Inflationary Flows: Calibrated Bayesian Inference with
Diffusion-Based Models" (2024).
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.paths.probability_path import PathCoefficients, ProbabilityPath

log = logging.getLogger(__name__)

SCHEDULES = ("prp", "prr")
KERNELS = ("constant", "proportional")
ZERO_SUM = "zero_sum"
# The growth exponents of kept dimensions exceed those of compressed ones by at most this much:
# beyond it the noise of the compressed ones would shrink.
_MOST_GAP = 2.0
# Share of the data in a latent that is worth a word.
_SIGNAL = 0.1


class Inflation(ProbabilityPath):
    """Noise that grows as exp(rho G_i tau) along the data's eigenvectors.

    ``prp`` keeps the participation ratio: G_i = 1 for all dimensions. ``prr`` reduces it: G_i = 2
    for the d dimensions that are kept, and 2 less the inflation gap for the others, whose share of
    the latent's scaled variance shrinks as exp(-rho gap T).

    The kernel is what the noise grows from: ``constant``, gamma_i = gamma_0 exp(rho G_i tau), the
    same in all dimensions, as in the published runs; ``proportional``, gamma_i = xi_i (exp(rho G_i
    tau) - 1), as in the paper, which alone preserves the participation ratio of data that are not
    isotropic. The first leaves noise of variance gamma_0 at t = 1. Times: tau = T (1 - t), and
    T (1 - t)^2 for the second, whose angle grows as the root of tau.

    Args:
        schedule: ``prp`` or ``prr``.
        dims_to_keep: d of ``prr``; None for all, as ``prp`` has it.
        inflation_gap: by how much G of kept dimensions exceeds G of the others, in (0, 2], or
            ``zero_sum`` for D / (D - d), with which G is 1 in the mean.
        kernel: ``constant`` or ``proportional``.
        rho: rate of growth; None for 2 (``prp``) or 1 (``prr``), the same noise in what is kept.
        duration: T.
        gamma_0: variance of the noise at t = 1, constant kernel.
        variances: xi of a state's shape; see ``for_space``.

    Raises:
        UserError: for values out of range.

    Example:
        >>> variances = torch.tensor([4.0, 1.0, 0.25])  # of the data along their eigenvectors
        >>> path = Inflation("prr", dims_to_keep=1, duration=5.0, variances=variances)
        >>> path.growth
        tensor([2.0000, 0.9800, 0.9800], dtype=torch.float64)
        >>> path.latent_variance  # the two others are compressed
        tensor([1.0000, 0.0711, 0.0211], dtype=torch.float64)
    """

    family = "inflation"
    variance_preserving = True

    def __init__(
        self,
        schedule: str = "prp",
        dims_to_keep: int | None = None,
        inflation_gap: float | str = 1.02,
        kernel: str = "constant",
        rho: float | None = None,
        duration: float = 15.01,
        gamma_0: float = 5e-4,
        variances: Tensor | None = None,
    ) -> None:
        for name, value, known in (("schedule", schedule, SCHEDULES), ("kernel", kernel, KERNELS)):
            if value not in known:
                raise UserError(f"unknown path.{name} {value!r}; choose from {', '.join(known)}")
        if schedule == "prp" and dims_to_keep is not None:
            raise UserError(
                f"path.schedule=prp keeps all dimensions, not path.dims_to_keep={dims_to_keep}; "
                "use path.schedule=prr, or leave it out"
            )
        if schedule == "prr" and dims_to_keep is None:
            raise UserError("path.schedule=prr needs path.dims_to_keep, at least 1; give it")
        if dims_to_keep is not None:
            at_least("path.dims_to_keep", dims_to_keep)
        if inflation_gap != ZERO_SUM:
            number: Any = inflation_gap
            _checked_gap(positive("path.inflation_gap", number), "path.inflation_gap")
        self.schedule, self.dims_to_keep, self.kernel = schedule, dims_to_keep, kernel
        self.inflation_gap = inflation_gap
        self.rho = positive(
            "path.rho", (2.0 if schedule == "prp" else 1.0) if rho is None else rho
        )
        self.duration = positive("path.duration", duration)
        self.gamma_0 = positive("path.gamma_0", gamma_0)
        self.variances = None if variances is None else variances.double()

    def for_space(self, space: Any) -> Self:
        """With the variances of the data along its eigenvectors.

        Raises:
            UserError: for a space without, more dimensions to keep than it has, or a gap with
                which noise would shrink.
        """
        variances = getattr(space, "variances", None)
        if variances is None:
            raise UserError(
                "path=inflation works in the eigenbasis of the data, and data.space="
                f"{type(space).__name__} has none; use space=eigenbasis"
            )
        kept, size = self.dims_to_keep, variances.numel()
        if kept is not None and kept >= size:
            raise UserError(
                f"path.dims_to_keep={kept} of {size} dimensions leaves none to compress; give at "
                f"most {size - 1}, or use path.schedule=prp"
            )
        made = type(self)(
            self.schedule, kept, self.inflation_gap, self.kernel, self.rho, self.duration,
            self.gamma_0, variances,
        )  # fmt: skip
        if self.inflation_gap == ZERO_SUM:
            who = f"path.inflation_gap=zero_sum keeps {kept} of {size} dimensions and"
            _checked_gap(made.gap, who, f"path.dims_to_keep of at most {size // 2}, or ")
        _warn_of_signal(made)
        return made

    @property
    def gap(self) -> float:
        """The effective inflation gap, 0 where all dimensions are kept."""
        if self.dims_to_keep is None:
            return 0.0
        if self.inflation_gap == ZERO_SUM:
            size = self._known.numel()
            return size / (size - self.dims_to_keep)
        return float(self.inflation_gap)

    @property
    def growth(self) -> Tensor:
        """G_i, of a state's shape; dimensions lie in the order of falling variance."""
        xi = self._known
        growth = torch.ones(xi.numel(), dtype=torch.float64, device=xi.device)
        if self.dims_to_keep is not None:
            growth[: self.dims_to_keep] = 2.0
            growth[self.dims_to_keep :] = 2.0 - self.gap
        return growth.view(xi.shape)

    def log_gamma(self, t: Tensor) -> Tensor:
        """Logarithm of gamma_i, variance of the noise, float64 ``(*t.shape, *state)``."""
        grown = self._grown(t)
        if self.kernel == "constant":
            return math.log(self.gamma_0) + grown
        return self._known.to(t.device).log() + torch.expm1(grown).log()

    @property
    def latent_variance(self) -> Tensor:
        """Variance of the latents in the paper's units, A_0 = 1, of a state's shape.

        v_i = (xi_i + gamma_i(T)) / (xi_* + gamma_*(T)), whatever the data's distribution: those of
        kept dimensions are near 1, the others' the number that the paper calls epsilon.
        """
        t = torch.zeros((), dtype=torch.float64, device=self._known.device)
        return self.scale(t).square()

    def scale(self, t: Tensor) -> Tensor:
        """Factor from a state at times ``t`` to the paper's scaled one: ``(*t.shape, *state)``.

        sqrt((xi_i + gamma_i) / (xi_* + gamma_*)): whitened states have variance 1 at all times,
        scaled ones that of their share in the largest.
        """
        total = self._known.to(t.device) + self.log_gamma(t).exp()
        largest = total.flatten(t.ndim)[..., :1]
        return (total / largest.view(*t.shape, *[1] * self._known.ndim)).sqrt()

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t``: ``(*t.shape, *state)`` in float64."""
        xi = self._known.to(t.device)
        t = t.double()
        if self.kernel == "constant":
            log_ratio = self.log_gamma(t) - xi.log()
            alpha, sigma = torch.sigmoid(-log_ratio).sqrt(), torch.sigmoid(log_ratio).sqrt()
            turning = -0.5 * self.rho * self.growth.to(xi) * self.duration * alpha * sigma
            return PathCoefficients(alpha, sigma, -sigma * turning, alpha * turning)
        left, rate = self._outer(1 - t), self.rho * self.growth.to(xi) * self.duration
        grown = rate * left.square()
        alpha, sigma = (-grown / 2).exp(), (-torch.expm1(-grown)).sqrt()
        d_alpha = rate * left * alpha
        # sigma / (1 - t) has a limit at data, where both are 0.
        share = torch.where(grown > 0, -torch.expm1(-grown) / grown, 1.0)
        d_sigma = -alpha.square() * (rate / share).sqrt()
        return PathCoefficients(alpha, sigma, d_alpha, d_sigma)

    def _grown(self, t: Tensor) -> Tensor:
        """Rho G_i tau."""
        left = self._outer(1 - t.double())
        tau = self.duration * (left if self.kernel == "constant" else left.square())
        return self.rho * self.growth.to(t.device) * tau

    def _outer(self, t: Tensor) -> Tensor:
        return t.view(*t.shape, *[1] * self._known.ndim)

    @property
    def _known(self) -> Tensor:
        if self.variances is None:
            raise UserError("path=inflation has no variances yet; call for_space(space) first")
        return self.variances


def participation_ratio(variances: Tensor | Sequence[float]) -> float:
    """(tr S)^2 / tr(S^2) of a covariance with these eigenvalues: how many dimensions matter."""
    xi = torch.as_tensor(variances, dtype=torch.float64)
    return float(xi.sum() ** 2 / xi.square().sum())


def _checked_gap(gap: float, who: str, cure: str = "") -> None:
    if gap > _MOST_GAP:
        raise UserError(
            f"{who} gives a gap of {gap:g}, and beyond 2 the noise of compressed dimensions "
            f"would shrink; give {cure}a number in (0, 2]"
        )


def _warn_of_signal(path: Inflation) -> None:
    """Say where latents are not noise alone, so that samples should not start from it."""
    signal = path.coefficients(torch.zeros((), dtype=torch.float64)).alpha
    left = int((signal > _SIGNAL).sum())
    if left:
        log.warning(
            "path=inflation leaves data in its latents: %d of %d dimensions have alpha up to %.2g "
            "at t = 0, and samples start from pure noise; use a longer path.duration, a larger "
            "path.rho or a smaller path.inflation_gap",
            *(left, signal.numel(), float(signal.max())),
        )
