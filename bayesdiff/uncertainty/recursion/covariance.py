"""Moments of network outputs over a Gaussian input, from a few draws per pixel."""

from collections.abc import Callable

import torch
from torch import Tensor

COVARIANCES = ("uncentred", "centred", "antithetic", "stein")


def shifts(kind: str, variance: Tensor, count: int, fresh: Callable[[], Tensor]) -> Tensor:
    """Draws of x - E[x] with independent pixels, ``(B, C, H, W) -> (S, B, C, H, W)``.

    Args:
        kind: estimator of the covariance; ``antithetic`` gives the second half as the first one
            with the other sign.
        variance: of x; negative ones count as 0.
        count: S.
        fresh: standard noise of the shape of ``variance``.
    """
    distinct = count // 2 if kind == "antithetic" else count
    z = torch.stack([fresh() for _ in range(distinct)]).to(variance.device)
    shifted = variance.clamp(min=0).sqrt() * z
    return torch.cat([shifted, -shifted]) if kind == "antithetic" else shifted


def covariance_with_input(kind: str, shifted: Tensor, outputs: Tensor) -> Tensor:
    """Cov(x, g) of every pixel, ``(R, B, C, H, W)``.

    For g = kap (x - E[x]) + gbar and variance V of x, the variance of the estimate is
    (2 kap^2 V^2 + gbar^2 V) / S uncentred, about 2 kap^2 V^2 / (S - 1) centred and
    4 kap^2 V^2 / S antithetic (S / 2 pairs, free of gbar whatever the even part of g).

    Args:
        kind: ``uncentred``, ``centred`` or ``antithetic``.
        shifted: ``(S, B, C, H, W)`` from ``shifts``.
        outputs: ``(R, S, B, C, H, W)``, R outputs g at x = E[x] + shifted.
    """
    if kind == "uncentred":
        return (shifted * outputs).mean(1)
    if kind == "antithetic":
        odd, _ = _odd_and_even(outputs)
        return (shifted[: odd.shape[1]] * odd).mean(1)
    return ((shifted - shifted.mean(0)) * outputs).sum(1) / (len(shifted) - 1)


def stein_covariance(variance: Tensor, probes: Tensor, tangents: Tensor) -> Tensor:
    """Cov(x_p, g_p) = V_p E[dg_p / dx_p] for Gaussian x (Stein's lemma), ``(R, B, C, H, W)``.

    The diagonal of the Jacobian is E[z o J z] for random signs z (Hutchinson's estimator).

    Args:
        variance: ``(B, C, H, W)`` of x; negative ones count as 0.
        probes: ``(S, B, C, H, W)`` of +1 and -1.
        tangents: J z at the draws of x, ``(R, S, B, C, H, W)``.
    """
    return variance.clamp(min=0) * (probes * tangents).mean(1)


def covariance_between(first: Tensor, second: Tensor, paired: bool = False) -> Tensor:
    """Unbiased covariance of outputs over the draws, ``(R, S, ...), (Q, S, ...) -> (R, Q, ...)``.

    Args:
        first: R outputs.
        second: Q outputs at the same draws.
        paired: whether draws are antithetic. The odd parts of the pairs have mean 0, and draws of
            a pair are not independent: only the even parts are centred.
    """
    if not paired:
        return _products(first - first.mean(1, keepdim=True), second) / (first.shape[1] - 1)
    odd, even = _odd_and_even(first)
    odd_2, even_2 = _odd_and_even(second)
    pairs = odd.shape[1]
    return _products(odd, odd_2) / pairs + covariance_between(even, even_2)


def _products(first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("rs...,qs...->rq...", first, second)


def _odd_and_even(outputs: Tensor) -> tuple[Tensor, Tensor]:
    plus, minus = outputs.chunk(2, 1)
    return (plus - minus) / 2, (plus + minus) / 2
