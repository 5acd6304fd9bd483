"""Correlations of errors over pairs of times, against closed forms and numpy's own."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.studies.residuals.correlations import cross_correlation, time_correlation


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def residuals(gammas: tuple[float, ...], count: int, dimension: int = 1) -> Tensor:
    """D(y + n) - y of the exact denoiser of y ~ N(0, 1), with fresh noise at every time."""
    y = normals(count, dimension)
    noised = [
        y + math.sqrt(g) * normals(count, dimension, seed=k + 1) for k, g in enumerate(gammas)
    ]
    return torch.stack([x / (1 + g) - y for x, g in zip(noised, gammas, strict=True)])


@pytest.mark.parametrize(("gammas", "exact"), [((5e-4, 100.0), 0.0222), ((100.0, 1.0), 0.7036)])
def test_residuals_of_the_exact_denoiser(gammas, exact):
    errors = residuals(gammas, 200_000)
    closed = math.sqrt(math.prod(g / (1 + g) for g in gammas))
    assert closed == pytest.approx(exact, abs=1e-4)
    assert float(cross_correlation(*errors)) == pytest.approx(closed, abs=0.01)
    assert float(time_correlation(errors)[0, 1]) == pytest.approx(closed, abs=0.01)


def test_all_pairs_of_times_against_numpy():
    errors = normals(5, 40, 3).cumsum(0)
    slow = np.mean([np.corrcoef(errors[..., d].numpy()) for d in range(3)], 0)
    found = time_correlation(errors)
    assert torch.allclose(found, torch.from_numpy(slow))
    assert torch.allclose(found.diagonal(), torch.ones(5).double())
    assert torch.allclose(time_correlation(errors.view(5, 40, 1, 3).float()), found, atol=1e-6)


def test_all_pairs_of_coordinates_against_numpy():
    first, second = normals(50, 4), normals(50, 4, seed=1)
    second[:, 0] += first[:, 2]
    slow = np.corrcoef(first.T.numpy(), second.T.numpy())[:4, 4:]
    assert torch.allclose(cross_correlation(first, second), torch.from_numpy(slow))
    own = cross_correlation(first, first)
    assert torch.allclose(own.diagonal(), torch.ones(4).double()) and torch.allclose(own, own.T)


def test_scales_and_shifts_of_coordinates_and_times_do_not_matter():
    errors = normals(4, 60, 3).cumsum(0)
    scale = normals(4, 1, 3, seed=2).exp() * 1e3
    changed = errors * scale + normals(4, 1, 3, seed=3)
    assert torch.allclose(time_correlation(errors), time_correlation(changed))
    one, other = cross_correlation(*errors[:2]), cross_correlation(*changed[:2])
    assert torch.allclose(one, other)


def test_noise_and_one_error_at_all_times_are_told_apart():
    noise = time_correlation(normals(6, 3000, 2))
    assert (noise - torch.eye(6)).abs().max() < 0.06
    fixed = normals(1, 3000, 2) * torch.linspace(0.1, 2, 6)[:, None, None]
    assert torch.allclose(time_correlation(fixed), torch.ones(6, 6).double())


def test_coordinates_that_do_not_vary():
    errors = normals(3, 50, 2)
    still = torch.cat([errors, torch.full((3, 50, 1), 0.1).double()], -1)
    assert torch.allclose(time_correlation(still), time_correlation(errors))
    assert cross_correlation(still[0], still[1])[2].tolist() == [0, 0, 0]
    # Nothing to correlate with at the time when there is no error yet.
    late = torch.cat([torch.zeros(1, 50, 2), errors])
    assert time_correlation(late)[0].tolist() == [0, 0, 0, 0]
    assert torch.allclose(time_correlation(late)[1:, 1:], time_correlation(errors))


def test_refusals():
    for errors in (torch.zeros(3, 1, 2), torch.zeros(3, 5)):
        with pytest.raises(UserError, match="two samples or more"):
            time_correlation(errors)
    with pytest.raises(UserError, match="same two samples"):
        cross_correlation(torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(UserError, match="vary in no coordinate"):
        time_correlation(torch.ones(3, 5, 2))
