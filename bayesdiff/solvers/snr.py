"""Half the logarithm of a path's signal-to-noise ratio as a clock."""

import torch
from torch import Tensor

from bayesdiff.paths import ProbabilityPath


def log_snr(path: ProbabilityPath, t: Tensor) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio, ln(alpha / sigma), of the shape of t.

    The mean over pixels, where each has its own.
    """
    c = path.coefficients(t)
    lam = c.alpha.log() - c.sigma.log()
    return lam if lam.ndim == t.ndim else lam.flatten(t.ndim).mean(t.ndim)


def time_at(path: ProbabilityPath, lam: Tensor) -> Tensor:
    """Times with ``log_snr(path, time) = lam``, of the shape of ``lam``, in float64.

    Found by bisection on [0, ``path.last_time``], which holds for every path; a value beyond the
    path's gets the nearer end.
    """
    low = torch.zeros_like(lam, dtype=torch.float64)
    high = torch.full_like(low, path.last_time)
    for _ in range(54):  # float64 has no finer halves of [0, 1]
        middle = (low + high) / 2
        below = log_snr(path, middle) < lam
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
