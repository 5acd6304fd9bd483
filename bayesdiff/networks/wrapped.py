"""A network inside another one, whose head it takes over: ``model.wrapper``."""

from typing import Any

from torch import Tensor, nn


class WrappedNetwork(nn.Module):
    """forward = fold(head(features(x, t, y))), of a network whose own head is replaced.

    A subclass gives ``features`` and a ``head``.

    Args:
        net: with ``features``, ``head`` and ``fold``.
    """

    head: nn.Module

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    @property
    def num_classes(self) -> int | None:
        """Of the network."""
        return getattr(self.net, "num_classes", None)

    @property
    def embedding_size(self) -> int | None:
        """Of the network."""
        return getattr(self.net, "embedding_size", None)

    @property
    def last_block(self) -> nn.Module:
        """Of the network."""
        block: nn.Module = self.net.last_block
        return block

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Output for states ``(B, C, ...)`` at times ``t (B,)``."""
        return self.fold(self.head(self.features(x, t, y)))

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head; the network's own."""
        features: Tensor = self.net.features(x, t, y)
        return features

    def fold(self, output: Tensor) -> Tensor:
        """The network's."""
        folded: Tensor = self.net.fold(output)
        return folded
