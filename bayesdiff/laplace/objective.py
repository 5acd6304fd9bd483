"""What the curvature is the second derivative of: the likelihood, or the bound that was trained.

Under the likelihood every noisy image is a data point of its own, and counts the same at all
times. The bound of a Bayesian flow network weights the squared error of the expected data by the
accuracy's rate, so that its sum over images is minus the log-likelihood of the images themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import Likelihood, likelihood_of

OBJECTIVES = ("likelihood", "elbo")


class CurvedObjective(Protocol):
    """A deviance of outputs with its derivatives; output and target as in ``Likelihood``.

    Attributes:
        said: how a user asks for it, for messages.
        values: numbers of the output that say one value together, K.
    """

    @property
    def said(self) -> str: ...  # noqa: D102 - above, like the next

    @property
    def values(self) -> int: ...  # noqa: D102

    @property
    def scaled(self) -> bool:
        """Whether ``sigma_noise`` scales it."""
        ...

    def residual(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Gradient of half the deviance in the output at times ``t (B,)``, of its shape."""
        ...

    def hessian(self, output: Tensor, t: Tensor) -> Tensor | None:
        """Its Gauss-Newton matrix, ``(B, C, K, K, ...)``; None for the identity."""
        ...

    def deviance(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Of every image, float64 ``(B,)``."""
        ...


@dataclass(frozen=True)
class OfLikelihood:
    """The likelihood's own deviance, the same at all times."""

    likelihood: Likelihood

    @property
    def said(self) -> str:
        """By the likelihood's name."""
        return said_of(self.likelihood.name, "likelihood")

    @property
    def values(self) -> int:
        """The likelihood's."""
        return self.likelihood.channels(1)

    @property
    def scaled(self) -> bool:
        """The likelihood's."""
        return self.likelihood.scaled

    def residual(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The likelihood's."""
        return self.likelihood.residual(output, target)

    def hessian(self, output: Tensor, t: Tensor) -> Tensor | None:
        """The likelihood's."""
        return self.likelihood.hessian(output)

    def deviance(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The likelihood's."""
        return self.likelihood.deviance(output, target)


@dataclass(frozen=True)
class OfBound:
    """Twice the bound in nats, ``w(t) |mean(output) - target|^2``: a mean over t is the bound's.

    Attributes:
        likelihood: whose mean it is.
        weight: w of times ``(B,)``, float64, for an output in the target's units.
    """

    likelihood: Likelihood
    weight: Callable[[Tensor], Tensor]

    @property
    def said(self) -> str:
        """By the option."""
        return said_of(self.likelihood.name, "elbo")

    @property
    def values(self) -> int:
        """The likelihood's."""
        return self.likelihood.channels(1)

    @property
    def scaled(self) -> bool:
        """Never: it is in nats already."""
        return False

    def residual(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """``w J^T (mean - target)`` with J the derivative of the mean in the output."""
        jacobian = self._jacobian(output)
        error = (self.likelihood.mean(output) - target).unflatten(1, jacobian.shape[2:4])
        slope = torch.einsum("kbcv...,bcv...->bck...", jacobian, error).flatten(1, 2)
        return slope * self._spread(output, t)

    def hessian(self, output: Tensor, t: Tensor) -> Tensor:
        """``w J^T J``."""
        jacobian = self._jacobian(output)
        matrix = torch.einsum("kbcv...,lbcv...->bckl...", jacobian, jacobian)
        return matrix * self._spread(matrix, t)

    def deviance(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """``w |mean - target|^2``."""
        error = self.likelihood.mean(output.double()) - target
        return self.weight(t).to(error.device) * error.square().flatten(1).sum(1)

    def _jacobian(self, output: Tensor) -> Tensor:
        """Derivative of the V numbers of every value, ``(K, B, C, V, ...)``."""
        count = self.values
        unit = torch.eye(count, dtype=output.dtype, device=output.device)
        unit = unit.repeat(1, output.shape[1] // count).view(
            count, 1, -1, *[1] * (output.ndim - 2)
        )
        slope = self.likelihood.slope(output, unit.expand(count, *output.shape))
        return slope.unflatten(2, (output.shape[1] // count, -1))

    def _spread(self, like: Tensor, t: Tensor) -> Tensor:
        return self.weight(t).to(like).view(-1, *[1] * (like.ndim - 1))


def said_of(likelihood: str, objective: str) -> str:
    """How a user asks for what a curvature is of."""
    return (
        f"likelihood={likelihood}"
        if objective == "likelihood"
        else f"laplace.objective={objective}"
    )


def curved_objective(model: Any, name: str = "likelihood") -> CurvedObjective:
    """The objective of this name.

    Args:
        model: trained or not.
        name: ``likelihood`` or ``elbo``.

    Raises:
        UserError: for another name, or a model that has no such bound.
    """
    if name not in OBJECTIVES:
        raise UserError(f"unknown laplace.objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    likelihood = likelihood_of(model)
    if name == "likelihood":
        return OfLikelihood(likelihood)
    weight = getattr(getattr(model, "objective", None), "weight", None)
    if weight is None:
        raise UserError(
            "laplace.objective=elbo is the bound that a Bayesian flow network trains on, and this "
            "model trains on none; use model=bfn, or laplace.objective=likelihood"
        )
    if not bool(weight(torch.zeros(1)).isfinite()):
        raise UserError(
            f"laplace.objective=elbo has no finite weight at t = 0 for model.prediction="
            f"{model.prediction}; train with model.prediction=v or data, or use "
            "laplace.objective=likelihood"
        )
    return OfBound(likelihood, weight)
