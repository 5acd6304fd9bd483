"""From states to what they look like: variance lives in states, a map shows decoded variance."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.networks.forward_mode import jvp

# Images decoded at once: a decoder's layers are wider than the latents that the batch is cut for.
_AT_ONCE = 16
# States ``(N, *shape)`` to their values, differentiable; see ``Space.values``.
Decoder = Callable[[Tensor], Tensor]


def decoded(decoder: Decoder | None, states: Tensor, rows: bool = False) -> Tensor:
    """Values of states ``(B, *shape)``, or of rows of them ``(M, B, *shape)``, one row at a time.

    Args:
        decoder: None where states are their own values.
        states: to be decoded.
        rows: whether there are M of every image.
    """
    if decoder is None:
        return states
    if rows:
        return torch.stack([decoded(decoder, each) for each in states])
    return torch.cat([decoder(each) for each in states.split(_AT_ONCE)])


def decoded_sensitivities(decoder: Decoder | None, x: Tensor, d: Tensor) -> Tensor:
    """Derivative of the values at ``x (B, *shape)`` along each of ``d (M, B, *shape)``."""
    if decoder is None:
        return d

    def along(each: Tensor) -> Tensor:
        parts = zip(x.split(_AT_ONCE), each.split(_AT_ONCE), strict=True)
        return torch.cat([jvp(decoder, (point,), (direction,))[1] for point, direction in parts])

    return torch.stack([along(each) for each in d])
