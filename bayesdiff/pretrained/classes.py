"""Which classes a network knows: the rows of the table that it looks them up in."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bayesdiff.checks import UserError, few
from bayesdiff.pretrained.listening import Heard, unflat


def class_rows(network: nn.Module, heard_with: Callable[[int], Heard]) -> int | None:
    """Rows of the embedding whose rows change with the class; None where there is no such one.

    Args:
        network: is run twice.
        heard_with: a run of the pipeline for one class, by its number.
    """
    zero, one = (_looked_up(network, heard_with(number)) for number in (0, 1))
    tables = [part for part, rows in one.items() if zero.get(part) != rows]
    return min((table.num_embeddings for table in tables), default=None)


@torch.no_grad()
def _looked_up(network: nn.Module, heard: Heard) -> dict[nn.Embedding, list[int]]:
    """Rows of every embedding that the first call of a run reads."""
    seen: dict[nn.Embedding, list[int]] = {}

    def note(table: Any, given: Any) -> None:
        seen.setdefault(table, []).extend(given[0].flatten().tolist())

    tables = [part for part in network.modules() if isinstance(part, nn.Embedding)]
    hooks = [table.register_forward_pre_hook(note) for table in tables]
    try:
        if hooks:
            args, kwargs = unflat(heard.calls[0].given)
            network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def check_classes(values: Iterable[Any], rows: int | None, who: str) -> None:
    """Refuse what is no number of a class.

    Args:
        values: asked for.
        rows: that the network has for them, the last often for "no class"; None for unknown.
        who: name of the pipeline.

    Raises:
        UserError: for others than whole numbers, and those that the network has no row for.
    """
    values = list(values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"class_labels are whole numbers, got {value!r}")
    beyond = [v for v in dict.fromkeys(values) if v < 0 or (rows is not None and v >= rows)]
    if beyond:
        last = "" if rows is None else f" to {rows - 1}"
        raise UserError(
            f"class_labels={few(beyond)}: the network of {who} has classes 0{last}; give these"
        )
