"""What every network here offers: a body of features and a last layer of its own."""

from typing import Protocol

from torch import Tensor, nn


class Network(Protocol):
    """forward = fold(head(features(x, t, y))); the head is what becomes Bayesian.

    A network may have a property ``last_block`` as well: the module, part of ``features``, whose
    linear and convolution layers become Bayesian with the head under
    ``laplace.subset=last_block``.

    Example:
        >>> class Linear(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(3, 2)
        ...     def features(self, x, t, y=None):  # (B, 2), (B,) -> (B, 3)
        ...         return torch.cat([x, t[:, None]], 1)
        ...     def fold(self, output):
        ...         return output
        ...     def forward(self, x, t, y=None):
        ...         return self.fold(self.head(self.features(x, t, y)))
        >>> Linear()(torch.randn(5, 2), torch.rand(5)).shape
        torch.Size([5, 2])
    """

    head: nn.Module

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head, ``(B, C, H, W), (B,), (B,) -> (B, D, h, w)``."""
        ...

    def fold(self, output: Tensor) -> Tensor:
        """Head channels back to pixels, ``(B, C_out, h, w) -> (B, C, H, W)``."""
        ...

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction of the images' shape."""
        ...
