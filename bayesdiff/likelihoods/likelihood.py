"""What a likelihood is: the law of every data value given what the network's head says of it."""

from typing import Protocol

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
        sampled: whether ``emit`` draws, and has no derivative.
        predictions: what a network of this likelihood may predict.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - above, like those that follow

    @property
    def scaled(self) -> bool: ...  # noqa: D102

    @property
    def linear(self) -> bool: ...  # noqa: D102

    @property
    def sampled(self) -> bool: ...  # noqa: D102

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

    def emit(self, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """What a solver's step takes for the network's prediction, ``(B, C, ...)``.

        Standard normal ``noise`` of that shape is read where the likelihood is ``sampled``.
        """
        ...

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """Derivative of ``emit`` along directions ``(..., B, C K, ...)``."""
        ...
