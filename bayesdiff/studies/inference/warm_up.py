"""What the warm-up of a Hamiltonian sampler learns: step sizes, and variances as masses."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Dual averaging of Hoffman and Gelman (2014), section 3.2.1.
_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
# The step size settles for these shares of the warm-up before and after masses are fitted.
_FIRST, _LAST = 0.15, 0.2


class DualAverage:
    """Step sizes whose acceptance averages to a target."""

    def __init__(self, step_size: Tensor, target: float, boldness: float) -> None:
        self.target, self.count = target, 0
        self.centre = (boldness * step_size).log()
        self.error = torch.zeros_like(step_size)
        self.average = step_size.log()

    def update(self, probability: Tensor) -> Tensor:
        """The next step size, after one of this probability of acceptance."""
        self.count += 1
        rate = 1 / (self.count + _T0)
        self.error = (1 - rate) * self.error + rate * (self.target - probability)
        log_step = self.centre - math.sqrt(self.count) / _GAMMA * self.error
        weight = self.count**-_KAPPA
        self.average = weight * log_step + (1 - weight) * self.average
        return log_step.exp()

    @property
    def final(self) -> Tensor:
        """The average that the steps after the warm-up have."""
        return self.average.exp()


def windows(warmup: int) -> Iterator[tuple[int, bool]]:
    """Parts of a warm-up of so many draws: lengths, and whether masses are fitted after them.

    Yields:
        Length and flag.
    """
    first, last = math.ceil(_FIRST * warmup), math.ceil(_LAST * warmup)
    left, length = warmup - first - last, 25
    if left < length:
        yield from [(warmup, False)] if warmup else []
        return
    yield first, False
    while left:
        # What would be left over joins the last window.
        length = left if left < 3 * length else length
        yield length, True
        left, length = left - length, 2 * length
    yield last, False


def shrunk_variance(states: Tensor) -> Tensor:
    """Variance of all visits ``(N, C, P)``, pulled slightly to 1e-3 as few visits demand."""
    count = states.shape[0] * states.shape[1]
    variance = states.flatten(0, 1).var(0, correction=0)
    return (count * variance + 5e-3) / (count + 5)
