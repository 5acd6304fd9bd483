"""The network of a run, from its options and what the data say of its states."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.likelihoods import Gaussian, Likelihood
from bayesdiff.models.conditions import Condition
from bayesdiff.networks import UNet
from bayesdiff.networks.trial import try_network
from bayesdiff.options.targets import arguments, fitting


def build_network(
    options: DictConfig,
    images: ImageData,
    condition: Condition | None,
    likelihood: Likelihood | None = None,
) -> nn.Module:
    """The network for these images.

    Raises:
        UserError: for options that it does not take, a condition that it would not read, and a
            network of a user's own that does not work as ``networks.trial`` tries it.
    """
    known = arguments(str(options.get("_target_")))
    size = size_of(images)
    lacking = {"in_channels", "image_size"} & (known or set()) - size.keys()
    if lacking:
        raise UserError(
            f"net._target_={options._target_} is for images and needs {min(lacking)}, states of "
            f"{images.name} have shape {images.space.shape}; use net=mlp"
        )
    given = {name: value for name, value in size.items() if known is None or name in known}
    if known is None and len(size) > 1:
        del given["shape"]  # who takes anything expects the sizes of an image
    needed = condition.options() if condition else {}
    if known is None or "num_classes" in known:
        given["num_classes"] = None
    for name, value in needed.items():
        if known is not None and name not in known:
            raise UserError(
                f"net._target_={options._target_} takes no {name} and would not see the "
                f"{condition.field if condition else ''}; give model.num_classes=null and "
                f"condition=labels for no condition, or let it take {name}"
            )
        given[name] = value
    outputs = (likelihood or Gaussian()).channels(images.channels)
    if outputs != images.channels:
        if known is not None and "out_channels" not in known:
            raise UserError(
                f"net._target_={options._target_} takes no out_channels, and the likelihood needs "
                f"{outputs} outputs for {images.channels} channels; let it take out_channels"
            )
        given["out_channels"] = outputs
    fitted = OmegaConf.create({"net": fitting(options, "net", UNet)}).net
    net: nn.Module = instantiate(fitted, **given, _convert_="all")
    # Pipelines are probed by bayesdiff.pretrained; an adapter holds a module of a user.
    target = str(options.get("_target_"))
    if not target.startswith("bayesdiff.") or target == "bayesdiff.networks.Adapter":
        shape = images.space.shape
        channels = given.get("out_channels", shape[0])
        try_network(net, shape, (channels, *shape[1:]), _conditions(condition))
    return net


def _conditions(condition: Condition | None) -> list[Tensor | None]:
    """What a network is given of two states: nothing, in each of its forms, and values."""
    if condition is None:
        return [None]
    values = condition.of_samples(range(2))
    hidden = condition.hide(values, torch.ones(2, dtype=torch.bool))
    return [condition.empty(values), hidden, values]


def wrapped(options: DictConfig | None, net: nn.Module, **context: Any) -> nn.Module:
    """The network in ``model.wrapper``, which takes what it names of the context."""
    if options is None:
        return net
    known = arguments(str(options.get("_target_")))
    given = {name: value for name, value in context.items() if known is None or name in known}
    made: nn.Module = instantiate(options, _partial_=True)(net, **given)
    return made


def size_of(images: ImageData) -> dict[str, Any]:
    """What a network can be told of the states of these data, as its arguments."""
    shape = images.space.shape
    if len(shape) != 3:
        return {"shape": shape}
    channels, height, width = shape
    side = height if height == width else (height, width)
    return {"shape": shape, "in_channels": channels, "image_size": side}
