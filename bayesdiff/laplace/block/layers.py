"""Which layers beside the head become Bayesian: ``laplace.subset``."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.networks import Network
from bayesdiff.options.spelling import near

# ``head``, ``last_block``, ``all``, or names of modules in the network.
Subset = str | Sequence[str]
SUBSETS = ("head", "last_block", "all")


def in_words(subset: Subset) -> str:
    """As it stands on a command line."""
    return subset if isinstance(subset, str) else f"[{','.join(subset)}]"


def check_names(subset: Subset) -> None:
    """Refuse what names no subset, before there is a network to look into.

    Raises:
        UserError: if it does not.
    """
    if isinstance(subset, str):
        if subset not in SUBSETS:
            raise UserError(
                f"laplace.subset must be one of {', '.join(SUBSETS)}, or a list of layers such "
                f"as [up.2,middle]; got {subset!r}"
            )
        return
    listed = isinstance(subset, Sequence) and subset and all(isinstance(n, str) for n in subset)
    if not listed:
        raise UserError(
            "laplace.subset must be head, last_block, all, or list names of layers, such as "
            f"[up.2,middle]; got {subset!r}"
        )


def layers_of(net: Network, subset: Subset) -> dict[str, nn.Module]:
    """Layers of a subset that have Kronecker factors, by name in the network, without the head.

    These are linear layers and dense, zero-padded convolutions. All else, such as the scale and
    shift of a normalisation or an embedding, keeps its trained values.

    Args:
        net: trained or not.
        subset: ``last_block``; ``all``; or names, each of which stands for the module and all that
            is inside it.

    Raises:
        UserError: if the network has no such layers.
    """
    modules = dict(cast(nn.Module, net).named_modules())
    if subset == "last_block":
        chosen: Iterable[nn.Module] = [_last_block(net)]
    elif subset == "all":
        chosen = [cast(nn.Module, net)]
    else:
        chosen = [_named(modules, name) for name in subset]
    inside = {id(module) for each in chosen for module in each.modules()}
    found = {
        name: module
        for name, module in modules.items()
        if id(module) in inside and module is not net.head and _is_treated(module)
    }
    if not found:
        where = "the last block" if subset == "last_block" else in_words(subset)
        raise UserError(
            f"laplace.subset={in_words(subset)}: {where} of {type(net).__name__} has no linear or "
            "convolution layer beside the head; use laplace.subset=head"
        )
    return found


def _last_block(net: Network) -> nn.Module:
    block = getattr(net, "last_block", None)
    if not isinstance(block, nn.Module):
        raise UserError(
            f"laplace.subset=last_block: {type(net).__name__} has no last block; give it a "
            "property last_block, the module before its head, or name layers instead"
        )
    return block


def _named(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules or not name:
        names = [each for each in modules if each]
        hint = near(name, names) or f"; the network has {', '.join(_short(names))}"
        raise UserError(f"laplace.subset names {name!r}, which the network has not{hint}")
    return modules[name]


def _short(names: Sequence[str], most: int = 12) -> list[str]:
    """Modules at the first level, and the first of a list's."""
    shown = [name for name in names if "." not in name]
    return [*shown[:most], "..."] if len(shown) > most else shown


def _is_treated(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def layer_matrix(layer: nn.Module) -> Tensor:
    """Weights of a linear or convolution layer, its bias as last column, float64 ``(C, P)``."""
    parts = [cast(Tensor, layer.weight).detach().flatten(1)]
    if isinstance(layer.bias, Tensor):
        parts.append(layer.bias.detach()[:, None])
    return torch.cat(parts, 1).double()


def layer_tensors(layer: nn.Module, matrices: Tensor) -> dict[str, Tensor]:
    """Weights and biases of ``(..., C, P)``, see ``layer_matrix``, in the layer's own dtype."""
    weight, bias = cast(Tensor, layer.weight), layer.bias
    found: dict[str, Any] = {}
    if isinstance(bias, Tensor):
        found["bias"] = matrices[..., -1].to(bias)
        matrices = matrices[..., :-1]
    lead = matrices.shape[:-2]
    return {"weight": matrices.reshape(*lead, *weight.shape).to(weight)} | found
