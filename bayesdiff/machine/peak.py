"""What a piece of work takes beside the tensors that it is given: bytes and operations."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Made = TypeVar("Made")


@dataclass(frozen=True)
class Work:
    """What a call took.

    Attributes:
        memory: bytes of tensors that it made and held at once, at most.
        operations: floating-point operations of its products and convolutions.
    """

    memory: int
    operations: float


def worked(function: Callable[[], Made], fused: bool = False) -> tuple[Made, Work]:
    """Call a function and count what it takes, with real tensors or those of the meta device.

    What libraries take inside of one operation is not seen.

    Args:
        function: without arguments.
        fused: whether attention is counted as a fused kernel, which holds its output alone, and is
            not computed; for the meta device, where it would be written out.
    """
    counter, held = FlopCounterMode(display=False), _Held()
    attention = _Fused()
    with counter, held:
        if fused:
            with attention:
                made = function()
        else:
            made = function()
    operations = counter.get_total_flops() + attention.operations
    return made, Work(held.most, float(operations))


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, and takes away those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        given = {_place(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and (key := _place(each)) not in given | set(self.sizes):
                self.sizes[key] = each.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(each.untyped_storage(), self._freed, key)
        return output

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel has it: products counted, the matrix of weights never made."""

    operations = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        query, key, value = (given[name] for name in names)
        pairs = query[..., 0].numel() * key.shape[-2]
        self.operations += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])
