"""Times at which a solver stops, from noise at t = 0 to clean data at t = 1."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths import ProbabilityPath

GRIDS = ("uniform", "quadratic", "log_snr")


def time_grid(
    name: str, path: ProbabilityPath, num_steps: int, skip_interval: int = 1
) -> list[float]:
    """The n + 1 increasing times of n steps, from 0 to 1 exactly.

    - ``uniform``: t = k / n.
    - ``quadratic``: 1 - t = (1 - k / n)^2, finer towards data, as the quadratic subsequence of
      DDIM (Song et al. 2021, appendix D).
    - ``log_snr``: equal steps of lambda = ln(alpha / sigma), as in DPM-Solver (Lu et al. 2022),
      and a last one to clean data, where lambda is infinite. On a discrete schedule lambda runs
      from t = 0 to ``path.last_time``. A flow's lambda is infinite at t = 0 as well, so there it
      runs from 1 / n to 1 - 1 / n: the outermost steps are those of ``uniform``.

    On a discrete schedule the last two visit the schedule's own indices, each at most once: where
    they ask for more than one step per index, they get one.

    Args:
        name: which law the times follow.
        path: of the model.
        num_steps: n.
        skip_interval: k > 1 leaves every k-th of the times, and 1.

    Raises:
        UserError: for an unknown name, or more steps than a discrete schedule has indices.
    """
    if name not in GRIDS:
        raise UserError(f"unknown solver.grid {name!r}; choose from {', '.join(GRIDS)}")
    indices = path.num_steps_max
    if indices is not None and num_steps > indices:
        raise UserError(
            f"solver.num_steps={num_steps} is more than the {indices} steps of the path's "
            "schedule; choose fewer"
        )
    times = _times(name, path, num_steps)
    return [times[k] for k in range(0, num_steps, skip_interval)] + [times[-1]]


def _times(name: str, path: ProbabilityPath, num_steps: int) -> list[float]:
    """The n + 1 times, on a discrete schedule's indices where the law is not ``uniform``."""
    if name == "log_snr":
        times = _log_snr_times(path, num_steps)
    else:
        times = [k / num_steps for k in range(num_steps + 1)]
        if name == "quadratic":
            times = [1 - (1 - t) ** 2 for t in times]
    if name != "uniform" and path.num_steps_max is not None:
        times = _on_indices(times, path.num_steps_max)
    return times


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


def _log_snr_times(path: ProbabilityPath, num_steps: int) -> list[float]:
    if path.last_time < 1:
        first, last, inner = 0.0, path.last_time, num_steps
    else:
        first, last, inner = 1 / num_steps, 1 - 1 / num_steps, num_steps - 1
    low, high = log_snr(path, torch.tensor([first, last], dtype=torch.float64)).tolist()
    times = time_at(path, torch.linspace(low, high, inner, dtype=torch.float64)).tolist()
    return [0.0, *times[inner + 1 - num_steps :], 1.0]


def _on_indices(times: Sequence[float], indices: int) -> list[float]:
    """The times moved to the nearest nodes 1 - i / T, no two to the same one."""
    last = len(times) - 1
    nodes = [round((1 - t) * indices) for t in times]
    for k in range(1, last):
        # Below the node before, and above enough free ones for the nodes to come.
        nodes[k] = max(min(nodes[k], nodes[k - 1] - 1), last - k)
    return [1 - node / indices for node in nodes]
