"""Fully connected layers, for states that are no images: forward = fold(head(features))."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least

# Radians per unit of time: the slowest and the fastest wave that a time is told by.
_SLOWEST, _FASTEST = 1.0, 100.0


class _Block(nn.Module):
    """Two layers beside an identity, modulated by the embedding, ``(B, D)`` to the same."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.modulate = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(width, width)
        # Each block starts as the identity, as those of the U-Net.
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = F.silu(self.inner(x) + self.modulate(embedding))
        return x + self.outer(self.dropout(hidden))


class MLP(nn.Module):
    """Residual fully connected network with a public last layer, for states of any shape.

    Args:
        shape: of a state; it is flattened.
        num_classes: labels are 0 ... num_classes - 1, and num_classes is the "no class" label of
            guidance; None for an unconditional network.
        width: of every layer; the number of features D of the head.
        blocks: residual blocks of two layers each.
        dropout: inside the blocks.

    Raises:
        UserError: for a width, a number of blocks or a dropout that cannot work.

    Example:
        >>> net = MLP(shape=(2,), num_classes=3, width=16)
        >>> x, t = torch.randn(5, 2), torch.rand(5)
        >>> y = torch.tensor([0, 1, 2, 3, 3])  # 3 is "no class"
        >>> features = net.features(x, t, y)
        >>> features.shape, torch.equal(net(x, t, y), net.fold(net.head(features)))
        (torch.Size([5, 16]), True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int | None = None,
        width: int = 128,
        blocks: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        at_least("net.blocks", blocks)
        if at_least("net.width", width, 2) % 2:
            raise UserError(f"net.width={width} must be even, for sines and cosines of t")
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise UserError(f"net.dropout must be in [0, 1), got {dropout}")
        self.shape = tuple(shape)
        self.num_classes = num_classes
        size = math.prod(self.shape)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction for states ``(B, *shape)`` at times ``t (B,)``: ``(B, *shape)``."""
        return self.fold(self.head(self.features(x, t, y)))

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head, ``(B, *shape), (B,), (B,) -> (B, D)``."""
        embedding = F.silu(self._embed(t, y))
        hidden = self.stem(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return F.silu(self.norm(hidden))

    @property
    def last_block(self) -> nn.Module:
        """The residual block before the head."""
        return self.blocks[-1]

    def fold(self, output: Tensor) -> Tensor:
        """Outputs of the head as states, ``(B, prod(shape)) -> (B, *shape)``."""
        return output.unflatten(-1, self.shape)

    def _embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        half = self.stem.out_features // 2
        ends = math.log(_SLOWEST), math.log(_FASTEST)
        rates = torch.linspace(*ends, half, dtype=torch.float64, device=t.device).exp()
        angles = t[:, None] * rates.to(self.stem.weight)
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        if self.classes is None:
            return embedding
        if y is None:
            y = torch.full(t.shape, self.classes.num_embeddings - 1, device=t.device)
        return embedding + self.classes(y)
