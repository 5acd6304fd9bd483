"""Masks of a network's own dropout layers, set from outside: no layer is replaced or copied."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Field

# Dimensions at the end of an input that one number of a mask covers.
_WHOLE: dict[type[nn.Module], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
}


def dropout_layers(net: nn.Module) -> list[nn.Module]:
    """The dropout layers that leave something out, in the network's order.

    Dropout that is no module of its own, such as that within ``nn.MultiheadAttention``, is not
    among them; nor is ``nn.AlphaDropout``, which does more than leave out.
    """
    return [m for m in net.modules() if type(m) in _WHOLE and 0 < cast(float, m.p) < 1]


def check_dropout(model: GenerativeModel) -> None:
    """Refuse a network in which no layer leaves anything out.

    Raises:
        UserError: with the way to one that has them.
    """
    if not dropout_layers(cast(nn.Module, model.net)):
        raise UserError(
            "uncertainty.where=network masks the network's own dropout layers, and this "
            f"{type(model.net).__name__} has none with p > 0; train one with net.dropout=0.1, or "
            "use uncertainty.where=head"
        )


class NetworkMasks:
    """Masks for M members of a network, each the same for all images of all batches.

    A mask is of one layer's input, without the batch: single units for ``nn.Dropout``, whole
    channels for ``nn.Dropout2d`` and its like, zero with the layer's p and 1 / (1 - p) otherwise.
    A layer that is met twice in an evaluation has the same mask both times, as guidance needs.

    Args:
        layers: of the network.
        seed: of all masks.
    """

    def __init__(self, layers: Sequence[nn.Module], seed: int) -> None:
        self.layers = layers
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}

    def renew(self) -> None:
        """Draw anew from here on."""
        self.drawn.clear()

    def mask(self, member: int, layer: int, x: Tensor) -> Tensor:
        """Of a member's layer, for an input ``(B, ...)``; booleans of a shape that broadcasts."""
        module = self.layers[layer]
        shape = _shape(module, x)
        key = member, layer, shape
        if key not in self.drawn:
            drawn = torch.rand(shape, generator=self.generator) >= cast(float, module.p)
            self.drawn[key] = drawn.to(x.device)
        return self.drawn[key]

    @contextmanager
    def of_member(self, member: int) -> Generator[None, None, None]:
        """The network as this member has it; in evaluation mode, its layers do nothing else."""

        def masked(layer: int) -> Any:
            keep = 1 - cast(float, self.layers[layer].p)

            def hook(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
                return output * (self.mask(member, layer, output).to(output) / keep)

            return hook

        hooks = [
            module.register_forward_hook(masked(layer)) for layer, module in enumerate(self.layers)
        ]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it passes over the layers within
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for hook in hooks:
                hook.remove()


class MaskedNetwork:
    """A field's network under the masks of M members, for states ``(m, B, C, H, W)``, m = 1 or M.

    Members are evaluated one after the other.

    Args:
        field: of the trained network, in evaluation mode.
        members: M.
        seed: of the masks.
        fresh: whether every evaluation has masks of its own.
    """

    def __init__(self, field: Field, members: int, seed: int, fresh: bool) -> None:
        self.field, self.members, self.fresh = field, members, fresh
        self.masks = NetworkMasks(dropout_layers(cast(nn.Module, field.model.net)), seed)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Outputs ``(M, B, C, H, W)``."""
        if self.fresh:
            self.masks.renew()
        outputs = []
        for member, own in enumerate(x.expand(self.members, *x.shape[1:])):
            with self.masks.of_member(member):
                outputs.append(self.field(own, t))
        return torch.stack(outputs)


def _shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Of a mask: that of one input, with 1 where a number covers a whole dimension."""
    sizes = list(x.shape[1:])
    whole = _WHOLE[type(module)]
    return tuple(sizes[: len(sizes) - whole] + [1] * whole)
