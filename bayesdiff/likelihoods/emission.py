"""What the likelihoods of countable values share: how they emit, and what their data cost."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.likelihoods.likelihood import Likelihood

# Antithetic pairs of draws where an expectation has no closed form.
PAIRS = 5
_FINAL = (None, "sample", "mode", "mean")


@dataclass(frozen=True, kw_only=True)
class Emission(ABC):
    """A law over countable values, and what solvers take of it; see ``Likelihood``.

    Args:
        sampled: whether a step takes a value drawn from the law, and not its mean.
        final: of the sample itself, where it is one more prediction (Bayesian flow networks):
            ``sample``, ``mode`` or ``mean``; None as on the way.

    Raises:
        UserError: for anything else.
    """

    sampled: bool = False
    final: str | None = None

    scaled: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    predictions: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        if not isinstance(self.sampled, bool):
            raise UserError(
                f"model.likelihood.sampled must be true or false, got {self.sampled!r}"
            )
        if self.final not in _FINAL:
            raise UserError(
                f"unknown model.likelihood.final {self.final!r}; choose sample, mode or mean, or "
                "null as on the way"
            )

    @property
    def draws(self) -> bool:
        """Whether it draws anywhere."""
        return self.sampled or self.final == "sample"

    @property
    def differentiable(self) -> bool:
        """Whether it takes the mean everywhere."""
        return self.way(False) == self.way(True) == "mean"

    def way(self, last: bool) -> str:
        """``sample``, ``mode`` or ``mean``."""
        return self.final if last and self.final else "sample" if self.sampled else "mean"

    @abstractmethod
    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value, ``(B, C, ...)``; there is no sigma_noise here."""

    def deviance(self, output: Tensor, target: Tensor) -> Tensor:
        """Minus twice the log-probability of every image, float64 ``(B,)``."""
        return -2 * self.log_prob(output.double(), target).flatten(1).sum(1)

    def code_length(self, output: Tensor, target: Tensor, spread: float) -> Tensor:
        """Minus the log-probability."""
        return -self.log_prob(output, target)


@dataclass(frozen=True)
class Levels(Emission):
    """A law over K levels of every value.

    Args:
        sampled: see ``Emission``.
        final: see ``Emission``.
        levels: K.
    """

    levels: int = 16

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("model.likelihood.levels", self.levels, 2)

    @property
    def name(self) -> str:
        """With the number of levels."""
        return f"{self.kind}-{self.levels}"


class GaussianBelief:
    """What likelihoods of numbers know before the network: a Gaussian of every value.

    N(0, 1) at first, N(mu, 1 / (1 + beta)) after transmissions of accuracy beta in all.
    """

    def belief(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """Its mean."""
        return (accuracy / (1 + accuracy)).sqrt() * x

    def belief_logits(self: Likelihood, x: Tensor, accuracy: Tensor) -> Tensor:
        """None, unless an output is a belief.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model.wrapper.residual=true is for classes, likelihood={self.name} is of numbers; "
            "use model.wrapper.residual=false"
        )


def required(noise: Tensor | None) -> Tensor:
    """The noise that a sampled emission needs.

    Raises:
        ValueError: if there is none.
    """
    if noise is None:
        raise ValueError("a sampled emission needs noise")
    return noise


def uniform(noise: Tensor | None, like: Tensor) -> Tensor:
    """Uniform numbers that standard normal noise stands for."""
    return torch.special.ndtr(required(noise).to(like))


def wide(output: Tensor) -> Tensor:
    """Logits in single precision or more."""
    return output if output.dtype == torch.float64 else output.float()


def draw(p: Tensor, noise: Tensor | None) -> Tensor:
    """Classes ``(B, C, ...)`` drawn from ``p (B, C, K, ...)`` by noise ``(B, C, ...)``."""
    # The last sum may be a rounding below 1, and the uniform number above it.
    return (p.cumsum(2)[:, :, :-1] <= uniform(noise, p)[:, :, None]).sum(2)


def drawn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, the same on every device for a generator of the CPU."""
    return torch.randn(x.shape, generator=generator).to(x)
