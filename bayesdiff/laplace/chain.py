"""Hamiltonian Monte Carlo of the head's weights: the posterior without the Gaussian's formula.

Neal, "MCMC using Hamiltonian dynamics" (2011), sections 5.3 and 5.4, in coordinates where the
given covariance is the identity; that changes the speed of the chains and not where they go.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.machine.progress import track

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chains:
    """Draws of K independent chains, without those of the warm-up.

    Attributes:
        draws: ``(S, K, C_out, P)`` float64.
        acceptance: ``(K,)``, share of proposals taken.
    """

    draws: Tensor
    acceptance: Tensor


def sample_chains(
    loss: Loss,
    start: Tensor,
    root: Tensor,
    *,
    draws: int,
    warmup: int,
    generator: torch.Generator,
    step: float = 0.25,
    length: float = math.pi / 2,
) -> Chains:
    """Run K chains at once, with an exact Metropolis correction.

    The path of a Gaussian turns in a circle; a quarter of it forgets where it began. Steps are
    up to a fifth shorter or longer from one proposal to the next, so that no path is periodic.

    Args:
        loss: negative log posterior ``(K,)`` of weights ``(K, C_out, P)``, up to a constant;
            differentiable, each chain's alone.
        start: ``(K, C_out, P)`` float64.
        root: ``(P, P)`` or ``(C_out, P, P)``, a square root ``R R^T`` of about the covariance of
            one output channel.
        draws: kept from each chain.
        warmup: proposals before the first draw that is kept.
        generator: fixes momenta, steps and acceptance.
        step: of the leapfrog, in posterior standard deviations per unit momentum.
        length: of a path, in the same units.

    Raises:
        UserError: if the loss is not finite where a chain starts.
    """
    at_least("draws", draws)
    at_least("warmup", warmup, 0)
    count = max(1, round(positive("length", length) / positive("step", step)))

    def evaluate(z: Tensor) -> _State:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            value = loss(weights_at(leaf))
            return _State(z, value.detach(), torch.autograd.grad(value.sum(), leaf)[0])

    def weights_at(z: Tensor) -> Tensor:
        return start + (root @ z[..., None])[..., 0]

    state = evaluate(torch.zeros_like(start))
    if not bool(state.loss.isfinite().all()):
        raise UserError("the loss is not finite where the chains start; start them elsewhere")
    kept, taken = [], torch.zeros_like(state.loss)
    like: dict[str, Any] = {"dtype": start.dtype, "device": start.device, "generator": generator}
    for number in track(range(warmup + draws), "chains", "steps"):
        p = torch.randn(start.shape, **like)
        jitter, level = torch.rand(2, len(start), **like)
        size = step * (0.8 + 0.4 * jitter)[:, None, None]
        new, end = _leapfrog(evaluate, state, p, size, count)
        change = state.loss + _kinetic(p) - new.loss - _kinetic(end)
        # A path that ran off has a loss that is not finite, and is refused like any other.
        accept = level.log() < change.nan_to_num(nan=-math.inf)
        state = state.replaced(new, accept)
        if number >= warmup:
            kept.append(weights_at(state.z))
            taken += accept
    return Chains(torch.stack(kept), taken / draws)


@dataclass(frozen=True)
class _State:
    """Whitened coordinates ``(K, C_out, P)``, loss ``(K,)`` and gradient there."""

    z: Tensor
    loss: Tensor
    slope: Tensor

    def replaced(self, new: "_State", chosen: Tensor) -> "_State":
        wide = chosen[:, None, None]
        return _State(
            torch.where(wide, new.z, self.z),
            torch.where(chosen, new.loss, self.loss),
            torch.where(wide, new.slope, self.slope),
        )


def _leapfrog(
    evaluate: Callable[[Tensor], _State], state: _State, p: Tensor, size: Tensor, count: int
) -> tuple[_State, Tensor]:
    """Where the path ends and with what momentum (Neal 2011, eq. 5.18 to 5.20)."""
    for _ in range(count):
        p = p - size / 2 * state.slope
        state = evaluate(state.z + size * p)
        p = p - size / 2 * state.slope
    return state, p


def _kinetic(p: Tensor) -> Tensor:
    return 0.5 * p.square().sum((1, 2))


def effective_draws(draws: Tensor) -> Tensor:
    """Independent draws whose mean would be as accurate as that of these chains.

    ``S K / tau`` with tau the sum of the autocorrelations, from the variance within and between
    the chains, summed in pairs until one is negative, with no pair above the one before (Gelman
    et al., "Bayesian Data Analysis", 2013, section 11.5; Geyer 1992). More than S K where
    successive draws lie on opposite sides, though never by more than a factor log10(S K).

    Args:
        draws: ``(S, K, ...)``, S >= 4.

    Returns:
        ``(...)``.
    """
    count, chains = draws.shape[:2]
    at_least("draws of a chain", count, 4)
    centred = draws - draws.mean(0)
    spectrum = torch.fft.rfft(centred, n=2 * count, dim=0)
    products = torch.fft.irfft(spectrum.abs().square(), n=2 * count, dim=0)[:count] / count
    within, total = _variances(draws)
    # The autocovariance has the divisor S, the variance within the chains S - 1.
    unbiased = products.mean(1) * count / (count - 1)
    correlation = 1 - (within - unbiased) / total
    pairs = correlation[: count // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    rising = (pairs > 0).cumprod(0).bool()
    pairs = torch.where(rising, pairs, 0).cummin(0).values
    tau = (2 * pairs.sum(0) - 1).clamp(min=1 / math.log10(count * chains))
    return count * chains / tau


def scale_reduction(draws: Tensor) -> Tensor:
    """R-hat of chains ``(S, K, ...)``: 1 where all are alike (Gelman et al. 2013, eq. 11.4)."""
    within, total = _variances(draws)
    return (total / within).sqrt()


def _variances(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Variance within the chains, and the estimate of the whole that counts between them too."""
    within = draws.var(0).mean(0)
    between = draws.mean(0).var(0) if draws.shape[1] > 1 else torch.zeros_like(within)
    return within, within * (len(draws) - 1) / len(draws) + between
