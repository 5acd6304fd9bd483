"""What training minimises: the likelihood of the data, or the bound of a Bayesian flow network."""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.likelihoods import Likelihood
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.paths.bayesian_flow import AccuracyPath, accuracy_path

log = logging.getLogger(__name__)

# Of rounding to eight bits and back, no more.
_EXACT = 1e-5


class Objective(Protocol):
    """Loss of a batch of outputs, made for one model's path, likelihood and prediction."""

    def times(self, t: Tensor) -> Tensor:
        """Times in [0, 1) at which it is defined, for times that are spread evenly."""
        ...

    def check_data(self, states: Tensor, name: str) -> None:
        """Refuse data, of which these are some and this is the name, that it is not about."""
        ...

    def __call__(
        self, output: Tensor, target: Tensor, x_t: Tensor, x_1: Tensor, t: Tensor
    ) -> Tensor:
        """The loss, a number.

        Args:
            output: of the network, ``(B, C K, ...)``.
            target: what it should say under its likelihood.
            x_t: state that it was given, ``(B, C, ...)``.
            x_1: data.
            t: ``(B,)``.
        """
        ...


class LikelihoodLoss:
    """The likelihood's own loss of the prediction, the same at all times.

    Args:
        path: of the model.
        likelihood: of the model.
        prediction: of the model.
    """

    def __init__(self, path: ProbabilityPath, likelihood: Likelihood, prediction: str) -> None:
        self.likelihood = likelihood

    def times(self, t: Tensor) -> Tensor:
        """All."""
        return t

    def check_data(self, states: Tensor, name: str) -> None:
        """Any data, as the likelihood knows them."""

    def __call__(
        self, output: Tensor, target: Tensor, x_t: Tensor, x_1: Tensor, t: Tensor
    ) -> Tensor:
        """The likelihood's loss."""
        return self.likelihood.loss(output, target)


class BayesianFlowLoss:
    """Bound on the code length of data by transmissions, in nats per value.

    Of continuous time, the bound is half the accuracy's rate times the squared error of the
    expected data: the losses of Graves et al. (2023) for continuous, discretised and discrete data
    are this one in the states of ``paths.bayesian_flow``. Of n steps it is n times the divergence
    of one transmission, of all its coordinates together.

    Args:
        path: of the model.
        likelihood: of the model.
        prediction: of the model.
        n_steps: n; None for continuous time.

    Raises:
        UserError: for a path without accuracy, or a number of steps that is none.

    Example:
        >>> from bayesdiff.likelihoods import Bernoulli
        >>> from bayesdiff.paths import QuadraticAccuracy
        >>> loss = BayesianFlowLoss(QuadraticAccuracy(), Bernoulli(), "data")
        >>> x_1, t = torch.tensor([[1.0, -1.0]]), torch.tensor([0.5])
        >>> loss(50 * x_1, x_1, x_1, x_1, t)  # log-odds that are sure, and right
        tensor(0.)
        >>> loss(0 * x_1, x_1, x_1, x_1, t)  # half the accuracy's rate, 2 * 9 * 0.5
        tensor(4.5000)
    """

    def __init__(
        self,
        path: ProbabilityPath,
        likelihood: Likelihood,
        prediction: str,
        n_steps: int | None = None,
    ) -> None:
        self.path: AccuracyPath = accuracy_path(path, "model.objective")
        self.likelihood, self.prediction = likelihood, prediction
        if n_steps is not None:
            at_least("model.objective.n_steps", n_steps)
        self.n_steps = n_steps

    def check_data(self, states: Tensor, name: str) -> None:
        """Refuse grey data of a likelihood of two values; of others, say what is rounded.

        Raises:
            UserError: where most of the data would be lost.
        """
        count = self.likelihood.channels(1)
        if self.likelihood.discrete and states.shape[1] % count:
            raise UserError(
                f"states of {name} have {states.shape[1]} channels, and likelihood="
                f"{self.likelihood.name} takes {count} for each value; leave data.space as "
                "data_type=discrete has it"
            )
        said = self.likelihood.values(states)
        off = float((said - states).abs().max())
        if off < _EXACT:
            return
        law = self.likelihood.name
        if count == 1:
            raise UserError(
                f"{name} is not black and white, and likelihood={law} says nothing else; use "
                "data.binarise=dynamic for grey images, or data_type=discretised or continuous"
            )
        log.warning("%s is told as %s: values are off by up to %.2g of [-1, 1]", name, law, off)

    def times(self, t: Tensor) -> Tensor:
        """All, or the starts of the n steps."""
        return t if self.n_steps is None else (t * self.n_steps).floor() / self.n_steps

    def __call__(
        self, output: Tensor, target: Tensor, x_t: Tensor, x_1: Tensor, t: Tensor
    ) -> Tensor:
        """Mean over images and values of the data."""
        nats = self.per_image(output, x_t, x_1, t)
        return nats.mean() / (x_1[0].numel() // self._axis)

    def per_image(
        self,
        output: Tensor,
        x_t: Tensor,
        x_1: Tensor,
        t: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Nats of every image, ``(B,)``, whose expectation over t is the bound.

        Args:
            output: of the network.
            x_t: states.
            x_1: data.
            t: ``(B,)``, among ``times``.
            generator: of the draws of a divergence without closed form.
        """
        n_steps = self.n_steps
        data = self.in_data(output, x_t, t)
        if n_steps is None:
            rate = self.path.accuracy_rate(t).to(data.dtype)
            error = (self.likelihood.mean(data) - x_1).square().flatten(1).sum(1)
            return rate / 2 * error
        # From the number of the step, not from a rounded time.
        start = (t.double() * n_steps).round() / n_steps
        step = self.path.accuracy(start + 1 / n_steps) - self.path.accuracy(start)
        step = step.to(data.dtype).view(-1, *[1] * (data.ndim - 1))
        nats = self.likelihood.step_divergence(data, x_1, step, generator)
        return n_steps * nats.flatten(1).sum(1)

    def in_data(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The output in units of data: itself, but for predictions of other mixes."""
        if self.prediction == "data":
            return output
        p, q = convert(self.prediction, "data", self.path.coefficients(t))
        p, q = (c.to(output.dtype).view(-1, *[1] * (output.ndim - 1)) for c in (p, q))
        return p * x_t + q * output

    def weight(self, t: Tensor) -> Tensor:
        """Of the output's squared error in twice the bound of continuous time, float64 ``(B,)``.

        The error of the expected data is that of the output times dx_1 / d(output).

        Raises:
            UserError: for a bound of n steps, which is no squared error.
        """
        if self.n_steps is not None:
            raise UserError(
                f"laplace.objective=elbo is of the bound of continuous time, and model.objective."
                f"n_steps={self.n_steps} trains on another; use null, or "
                "laplace.objective=likelihood"
            )
        q = convert(self.prediction, "data", self.path.coefficients(t))[1]
        return self.path.accuracy_rate(t) * q.double().square()

    @property
    def _axis(self) -> int:
        """Channels of a state that tell one value."""
        return self.likelihood.channels(1) if self.likelihood.discrete else 1


def made_objective(
    objective: Any, path: ProbabilityPath, likelihood: Likelihood, prediction: str
) -> Objective:
    """The objective for this model; None is the likelihood's own loss."""
    made: Objective = (objective or LikelihoodLoss)(path, likelihood, prediction)
    return made
