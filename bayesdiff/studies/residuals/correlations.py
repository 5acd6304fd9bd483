"""Whether errors along a trajectory are noise, or one and the same error at all times.

A solver that treats a model's error as white noise assumes that errors at different times are
uncorrelated. The correlation over all pairs of times, of errors of one network on its own
trajectories, says whether they are.
"""

import torch
from torch import Tensor

from bayesdiff.checks import UserError


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of every coordinate of one error with every one of another, ``(D, D)``.

    Covariances over samples, over the outer product of both standard deviations; 0 where a
    coordinate does not vary.

    Args:
        first: errors ``(N, ...)`` at one time; all axes after the first are coordinates.
        second: errors of the same samples at another time, ``(N, ...)``.

    Raises:
        UserError: for errors of different samples, or fewer than two of them.
    """
    if first.shape != second.shape or len(first) < 2:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise UserError(f"errors must be of the same two samples or more, got {shapes}")
    one, other = (_standardised(errors.flatten(1)) for errors in (first, second))
    return one.T @ other / len(first)


def time_correlation(errors: Tensor) -> Tensor:
    """Correlation of errors at all pairs of times, ``(T, T)``, the mean over coordinates.

    Each coordinate is normalised by its own standard deviations at both times, so scales of
    coordinates and of times do not matter. Coordinates that vary at no time are left out; one that
    varies at some times counts as uncorrelated at the others.

    Args:
        errors: at each time of each sample, ``(T, N, ...)``.

    Raises:
        UserError: for fewer than two samples, or errors that do not vary at all.
    """
    if errors.ndim < 3 or errors.shape[1] < 2:
        shape = tuple(errors.shape)
        raise UserError(f"errors must be (times, two samples or more, ...), got {shape}")
    times, samples = errors.shape[:2]
    flat = errors.reshape(times, samples, -1)
    total = torch.zeros(times, times, dtype=torch.float64, device=errors.device)
    varying = 0
    # One coordinate at a time: all of them at once would be T^2 D numbers.
    for coordinate in flat.unbind(-1):
        standardised = _standardised(coordinate.T).T
        total += standardised @ standardised.T / samples
        varying += bool(standardised.any())
    if not varying:
        raise UserError("errors vary in no coordinate; they are of one and the same trajectory")
    return total / varying


def _standardised(errors: Tensor) -> Tensor:
    """Of each column of ``(N, D)``: mean 0 and variance 1, or 0 where it does not vary."""
    centred = errors.double() - errors.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    # Rounding of a constant's mean is no variation.
    constant = deviation <= 1e-12 * errors.double().abs().amax(0)
    return (centred / deviation.masked_fill(constant, 1)).masked_fill(constant, 0)
