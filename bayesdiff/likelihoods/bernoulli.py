"""The Bernoulli likelihood: the head says how likely every value is white, as a logit."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import UserError


@dataclass(frozen=True)
class Bernoulli:
    """Values -1 and 1 with log-odds that are the output; see ``Likelihood``.

    Args:
        sampled: whether a solver's step takes a value drawn from these odds, and not their mean.
    """

    sampled: bool = False

    name: ClassVar[str] = "bernoulli"
    scaled: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    predictions: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        check_sampled(self.sampled)

    def channels(self, data: int) -> int:
        """One logit per value."""
        return data

    def values(self, x_1: Tensor) -> Tensor:
        """Black and white, cut at the middle grey."""
        return torch.where(x_1 >= 0, 1.0, -1.0).to(x_1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-probability, in nats per value."""
        return F.binary_cross_entropy_with_logits(output, (target > 0).to(output))

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability of white, minus 1 where the value is white."""
        return output.sigmoid() - (target > 0).to(output)

    def hessian(self, output: Tensor) -> Tensor:
        """Variance p (1 - p), ``(B, C, 1, 1, ...)``."""
        return (output.sigmoid() * (-output).sigmoid())[:, :, None, None]

    def deviance(self, output: Tensor, target: Tensor) -> Tensor:
        """Minus twice the log-probability of every image, float64 ``(B,)``."""
        return -2 * self.log_prob(output.double(), target).flatten(1).sum(1)

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value."""
        return F.logsigmoid(torch.where(target > 0, output, -output))

    def emit(self, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean value 2 p - 1, or a value drawn by ``noise``."""
        logits = _wide(output)
        if not self.sampled:
            return (logits / 2).tanh()
        white = torch.special.ndtr(drawn(noise).to(logits)) < logits.sigmoid()
        return torch.where(white, 1.0, -1.0).to(logits)

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """2 p (1 - p) times the direction."""
        logits = _wide(output)
        return 2 * logits.sigmoid() * (-logits).sigmoid() * direction


def check_sampled(sampled: bool) -> None:
    """Refuse what is no switch.

    Raises:
        UserError: if it is not true or false.
    """
    if not isinstance(sampled, bool):
        raise UserError(f"model.likelihood.sampled must be true or false, got {sampled!r}")


def drawn(noise: Tensor | None) -> Tensor:
    """The noise that a sampled emission needs.

    Raises:
        ValueError: if there is none.
    """
    if noise is None:
        raise ValueError("a sampled emission needs noise")
    return noise


def _wide(output: Tensor) -> Tensor:
    """Logits in single precision or more."""
    return output if output.dtype == torch.float64 else output.float()
