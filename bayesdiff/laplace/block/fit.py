"""Beyond the head: Kronecker factors of other layers, from one pass over the data.

The network is not linear in its weights, so this is an approximation where the head's posterior is
exact: a Gaussian around the trained weights whose precision is the GGN, independent from layer to
layer and Kronecker-factored in each (KFAC-expand, Martens and Grosse 2015; Eschenhagen et al.
2023, section 3.2, for layers that are shared over positions), computed by curvlinops.
"""

import warnings
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.block.layers import (
    Subset,
    in_words,
    layer_matrix,
    layers_of,
)
from bayesdiff.laplace.block.record import BlockFactors, LayerFactors
from bayesdiff.laplace.training_draws import Encode, draws_of
from bayesdiff.machine.ranks import total
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import Network

# Of an outer factor from fewer images, next to nothing is known.
_FEWEST_IMAGES = 10


def check_probes(probes: int | str) -> None:
    """Refuse what is no number of backward passes.

    Args:
        probes: see ``fit_block``.

    Raises:
        UserError: if it is none.
    """
    if probes != "all" and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise UserError(f"laplace.probes must be a whole number >= 1, or all; got {probes!r}")


def check_block(net: Network, images: int, subset: Subset = "last_block") -> None:
    """Refuse a network without these layers, or too few images for their factors."""
    layers_of(net, subset)
    if images < _FEWEST_IMAGES:
        raise UserError(
            f"laplace.subset={in_words(subset)} needs {_FEWEST_IMAGES} images or more, got "
            f"{images}; raise laplace.num_images or use laplace.subset=head"
        )


def fit_block(
    model: GenerativeModel,
    images: Tensor,
    labels: Tensor | None,
    *,
    source: str,
    subset: Subset = "last_block",
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    probes: int | str = 4,
    encode: Encode = to_model_range,
) -> BlockFactors:
    """Kronecker factors of the layers of a subset, over the images and draws of the head's pass.

    The likelihood is the head's, a Gaussian on every pixel and channel, so the curvature at the
    output is the identity: outer factors are sums of g g^T, g the layer's share of the gradient
    of ``z . output``. z runs over all outputs, or is standard normal: the same on average.

    Args:
        model: with its trained weights; neither they nor its mode are touched.
        images: ``(N, C, H, W)`` uint8.
        labels: values of the model's condition, ``(N, ...)``, or None.
        source: key of weights, data and pass, kept with the result.
        subset: which layers, see ``layers_of``.
        draws: (t, noise) draws per image.
        num_images: use a random subset of this size; None for all.
        batch_size: images per network evaluation.
        seed: fixes subset, draws and z.
        probes: backward passes through head and layers for every batch; ``all`` for one per
            output of an image, which leaves no chance in the outer factors.
        encode: of the images' space, see ``draws_of``.
    """
    net = cast(Network, deepcopy(model.net).eval().requires_grad_(False))  # type: ignore[attr-defined]
    layers, device = layers_of(net, subset), next(model.parameters()).device
    sums = _Sums(net, layers, probes, device)
    count = num_images or len(images)
    for seen in draws_of(
        model,
        images,
        labels,
        draws=draws,
        num_images=count,
        batch_size=batch_size,
        seed=seed,
        what="layers",
        encode=encode,
    ):
        probe = int(torch.randint(2**31, (), generator=seen.generator))
        sums.add({"x": seen.x_t, "t": seen.time, "y": seen.y}, seen.target, probe)
    return BlockFactors(sums.over_processes(draws, count), count, source)


class _Sums:
    """What the pass adds up, in float64."""

    def __init__(
        self, net: Network, layers: dict[str, nn.Module], probes: int | str, device: torch.device
    ) -> None:
        self.model, self.probes = Flat(net), probes
        self.layers = layers
        self.params = [
            parameter
            for layer in layers.values()
            for parameter in (layer.weight, layer.bias)
            if isinstance(parameter, nn.Parameter)
        ]
        for parameter in self.params:
            parameter.requires_grad_(True)
        self.input, self.output = {}, {}
        for name, layer in layers.items():
            rows, columns = layer_matrix(layer).shape
            kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
            self.input[name] = torch.zeros(columns, columns, **kind)
            self.output[name] = torch.zeros(rows, rows, **kind)

    def add(self, inputs: dict[str, Any], target: Tensor, seed: int) -> None:
        """Add one batch."""
        with warnings.catch_warnings():
            # Here, as training and sampling have no use for it; its own imports are deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            from curvlinops import FisherType, KFACLinearOperator

        chance = self.probes != "all"
        operator = KFACLinearOperator(
            self.model,
            nn.MSELoss(reduction="sum"),
            self.params,
            [(inputs, target.flatten(1))],
            check_deterministic=False,
            seed=seed,
            fisher_type=FisherType.MC if chance else FisherType.TYPE2,
            mc_samples=int(self.probes) if chance else 1,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(target),
            batch_size_fn=lambda batch: len(batch["x"]),
        )
        with torch.inference_mode(False), torch.enable_grad():
            operator.compute_kronecker_factors()
        for name in self.layers:
            # Its inner factor is a mean over the batch; its loss lacks the half.
            inner = operator._input_covariances[f"net.{name}"].double()
            outer = operator._gradient_covariances[f"net.{name}"].double()
            self.input[name] += inner * len(target)
            self.output[name] += outer / 2

    def over_processes(self, draws: int, images: int) -> dict[str, LayerFactors]:
        """Factors of all processes; their product counts every image once."""
        return {
            name: LayerFactors(
                _symmetric(total(self.input[name]) / (draws * images)).cpu(),
                _symmetric(total(self.output[name]) / draws).cpu(),
                layer_matrix(layer).cpu(),
                isinstance(layer.bias, Tensor),
            )
            for name, layer in self.layers.items()
        }


class Flat(nn.Module):
    """The network as curvlinops takes it: one input, one row of outputs per image."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """Outputs ``(B, C H W)`` for states, times and conditions."""
        return self.net(inputs["x"], inputs["t"], inputs["y"]).flatten(1)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
