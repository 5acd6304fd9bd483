"""How a solver's times are spread: what ``solver.grid`` names, a function of that name here.

Each takes the model's path and a number of steps n, and gives the n + 1 increasing times from 0 to
1. A law of one's own does the same, and is named by its ``_target_``.
"""

import torch

from bayesdiff.paths import ProbabilityPath
from bayesdiff.solvers import snr


def uniform(path: ProbabilityPath, num_steps: int) -> list[float]:
    """T = k / n."""
    return [k / num_steps for k in range(num_steps + 1)]


def quadratic(path: ProbabilityPath, num_steps: int) -> list[float]:
    """1 - t = (1 - k / n)^2, finer towards data.

    As the quadratic subsequence of DDIM (Song et al. 2021, appendix D).
    """
    return [1 - (1 - t) ** 2 for t in uniform(path, num_steps)]


def log_snr(path: ProbabilityPath, num_steps: int) -> list[float]:
    """Equal steps of lambda = ln(alpha / sigma), as in DPM-Solver (Lu et al. 2022).

    A last one leads to clean data, where lambda is infinite. On a discrete schedule lambda runs
    from t = 0 to ``path.last_time``. A flow's lambda is infinite at t = 0 as well, so there it
    runs from 1 / n to 1 - 1 / n: the outermost steps are those of ``uniform``. A path that does
    not end in data has a finite lambda at t = 1: even steps from 1 / n to there.
    """
    if path.last_time < 1:
        ends, count, inside = (0.0, path.last_time), num_steps, slice(1, None)
    elif path.ends_in_data:
        ends, count, inside = (1 / num_steps, 1 - 1 / num_steps), num_steps - 1, slice(None)
    else:
        ends, count, inside = (1 / num_steps, 1.0), num_steps, slice(-1)
    low, high = snr.log_snr(path, torch.tensor(ends, dtype=torch.float64)).tolist()
    times = snr.time_at(path, torch.linspace(low, high, count, dtype=torch.float64)).tolist()
    return [0.0, *times[inside], 1.0]
