"""Predictive variance from two point estimates, without a Hessian (McInerney & Kallus 2024)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.checks import UserError, positive

Scalar = Callable[[Tensor], Tensor]


def refit_variance(
    loss: Scalar, output: Scalar, weights: Tensor, step: float = 1.0, iterations: int | None = None
) -> float:
    """Variance of ``output`` from a refit that rewards it, ``|f(refit) - f(weights)| / step``.

    Hessian-free Laplace (arXiv 2403.10671): the refit maximises log posterior + step * output,
    starting at the trained weights. Where both are quadratic and linear, as for a head, any step
    gives ``phi^T P^-1 phi``: the variance under ``laplace.structure=full``.

    Args:
        loss: negative log posterior of the weights; weights that do not minimise it are taken as
            if they did, since what the pull adds is the same.
        output: one number, such as a pixel, of the weights.
        weights: of any shape, float64 for more than six digits.
        step: the reward's weight, positive.
        iterations: of conjugate gradients at most; None for ten times the number of weights.
    """
    positive("step", step)
    pull = step * torch.func.grad(output)(weights)
    moved = weights + _descend(loss, weights, pull, iterations or 10 * weights.numel())
    return float((output(moved) - output(weights)).abs()) / step


def _descend(loss: Scalar, weights: Tensor, pull: Tensor, iterations: int) -> Tensor:
    """The change of weights where the loss's gradient has changed by ``pull``.

    Conjugate gradients on derivatives of the gradient along one direction at a time; the matrix
    is never formed.

    Raises:
        UserError: if the loss does not curve upward, so that no refit exists.
    """
    gradient = torch.func.grad(loss)
    change, left = torch.zeros_like(pull), pull
    direction, size = left, float(left.square().sum())
    aim = size * (10 * torch.finfo(pull.dtype).eps) ** 2
    for _ in range(iterations):
        if size <= aim:
            break
        bent = torch.func.jvp(gradient, (weights,), (direction,))[1]
        curved = float((direction * bent).sum())
        if not (math.isfinite(curved) and curved > 0):
            raise UserError("the loss has no minimum near these weights; add a prior to it")
        change = change + size / curved * direction
        left = left - size / curved * bent
        before, size = size, float(left.square().sum())
        direction = left + size / before * direction
    return change
