"""What a likelihood is: the law of every data value given what the network's head says of it."""

from typing import Protocol

import torch
from torch import Tensor


class Likelihood(Protocol):
    """The law of data values in [-1, 1] given the outputs of the head, each value on its own.

    ``output`` is the folded output of the network, ``(B, C K, ...)``, with the K numbers of one
    value next to each other; ``target`` are data values ``(B, C, ...)``, as ``values`` gives them.

    Attributes:
        name: tells likelihoods apart in records, such as ``categorical-16``.
        scaled: whether ``sigma_noise`` scales it; the variance of the others follows from their
            mean.
        linear: whether ``emit`` gives the output as it is.
        discrete: whether values are classes.
        sampled: whether ``emit`` draws on the way to data.
        draws: whether it draws anywhere, and needs noise.
        differentiable: whether every emission follows from the output alone, and bends smoothly.
        predictions: what a network of this likelihood may predict.

    Example:
        >>> from bayesdiff.likelihoods import Bernoulli, Categorical, Gaussian
        >>> for law in Gaussian(), Bernoulli(), Categorical(levels=16):
        ...     law.name, law.channels(3)  # outputs of the network for RGB
        ('gaussian', 3)
        ('bernoulli', 3)
        ('categorical-16', 48)
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - above, like those that follow

    @property
    def scaled(self) -> bool: ...  # noqa: D102

    @property
    def linear(self) -> bool: ...  # noqa: D102

    @property
    def discrete(self) -> bool: ...  # noqa: D102

    @property
    def sampled(self) -> bool: ...  # noqa: D102

    @property
    def draws(self) -> bool: ...  # noqa: D102

    @property
    def differentiable(self) -> bool: ...  # noqa: D102

    @property
    def predictions(self) -> tuple[str, ...]: ...  # noqa: D102

    def channels(self, data: int) -> int:
        """Channels of the output for so many channels of data, C K."""
        ...

    def values(self, x_1: Tensor) -> Tensor:
        """Data in [-1, 1] as this likelihood knows them: the nearest values that it can say."""
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """What training minimises: a mean over all values, up to scale and constants."""
        ...

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Gradient of half the deviance in the output, of its shape."""
        ...

    def hessian(self, output: Tensor) -> Tensor | None:
        """Second derivative of half the deviance, ``(B, C, K, K, ...)``; None for the identity."""
        ...

    def deviance(self, output: Tensor, target: Tensor) -> Tensor:
        """Of every image, float64 ``(B,)``: minus twice its log-likelihood, without a scale."""
        ...

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability, or density, of every value, ``(B, C, ...)``."""
        ...

    def mean(self, output: Tensor) -> Tensor:
        """Expected prediction, ``(B, C, ...)``."""
        ...

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """What a solver's step takes for the network's prediction, ``(B, C, ...)``.

        Standard normal ``noise`` of that shape is read where the likelihood ``draws``; ``last``
        says that the prediction is the sample itself.
        """
        ...

    def belief(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """What a belief of this accuracy makes of a state, as a network is told it.

        Args:
            x: ``(B, C, ...)`` on a path of ``paths.bayesian_flow``.
            accuracy: beta, ``(B, 1, ...)``.
        """
        ...

    def belief_logits(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """The output that says of every value what its own belief says, ``(B, C K, ...)``.

        Raises:
            UserError: for a likelihood of numbers, whose output is no belief.
        """
        ...

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """KL of sender and receiver of a transmission, in nats, ``(B, C, ...)`` or by value.

        Data through a channel of this accuracy, against the mixture
        that the output says.

        Args:
            output: of the head, in units of data.
            target: data.
            accuracy: of the transmission, ``(B, 1, ...)``.
            generator: of the draws of those that need any.
        """
        ...

    def code_length(self, output: Tensor, target: Tensor, spread: float) -> Tensor:
        """Nats that say every value, ``(B, C, ...)``, once all transmissions are over.

        Args:
            output: of the head at t = 1, in units of data.
            target: data.
            spread: of numbers whose likelihood has none: standard deviation around the output.
        """
        ...

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """Derivative of ``emit`` along directions ``(..., B, C K, ...)``."""
        ...


class ClassLikelihood(Likelihood, Protocol):
    """A likelihood of classes, one that is ``discrete``.

    Example:
        >>> from bayesdiff.likelihoods import Bernoulli
        >>> law: ClassLikelihood = Bernoulli()
        >>> law.log_probabilities(torch.tensor([[2.0]])).exp()  # of black and of white
        tensor([[[0.1192, 0.8808]]])
        >>> law.index(torch.tensor([[-1.0, 1.0]]))
        tensor([[0, 1]])
    """

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Of the K classes of every value, ``(B, C, K, ...)``."""
        ...

    def index(self, target: Tensor) -> Tensor:
        """Classes that data values are of, int64 ``(B, C, ...)``."""
        ...
