"""From states to what they look like: variance lives in states, a map shows decoded variance."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    return torch.stack([decoder(each) for each in states]) if rows else decoder(states)


def decoded_sensitivities(decoder: Decoder | None, x: Tensor, d: Tensor) -> Tensor:
    """Derivative of the values at ``x (B, *shape)`` along each of ``d (M, B, *shape)``."""
    if decoder is None:
        return d
    return torch.stack([torch.func.jvp(decoder, (x,), (each,))[1] for each in d])
