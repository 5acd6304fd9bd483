"""Layers beside the head by the leading directions of their GGN, where factors do not fit.

Kronecker factors of a wide layer are matrices of its inputs and outputs; the whole GGN of all
layers is larger still. Its leading eigenvectors come from products with vectors alone: Lanczos
iterations (scipy's eigsh) over curvlinops' GGN. What ties layers together is kept, which factors
leave out; all but ``rank`` directions are left to the prior.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.block.fit import Flat
from bayesdiff.laplace.block.layers import Subset, layer_matrix, layers_of
from bayesdiff.laplace.block.record import require_same
from bayesdiff.laplace.training_draws import Encode, draws_of
from bayesdiff.machine.ranks import total
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import Network
from bayesdiff.storage.checked_file import checksum, load_checked, save_checked

log = logging.getLogger(__name__)

_FORMAT = "bayesdiff-low-rank-1"
_VECTORS, _MEAN = "vectors.", "mean."


@dataclass(frozen=True)
class LowRankFactors:
    """Leading eigenpairs of the GGN of layers, half the squared error's, summed over the pass.

    Attributes:
        values: ``(R,)`` float64, descending.
        vectors: of every layer ``(R, C, P)``, its part of the orthonormal eigenvectors.
        means: of every layer ``(C, P)``, the trained weights with the bias as last column.
        num_images: N, images in the pass, each counted once whatever its draws.
        source: hash of the checkpoint, the data and the pass this came from.
    """

    values: Tensor
    vectors: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    num_images: int
    source: str

    @cached_property
    def key(self) -> str:
        """16 hex digits that change with any number."""
        return checksum(self._tensors, json.dumps(self._facts))[:16]

    def require_source(self, source: str) -> None:
        """Refuse to pair these directions with other weights or data, as a ``UserError``."""
        require_same(self.source, source)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"values": self.values}
        tensors |= {_VECTORS + name: value for name, value in self.vectors.items()}
        tensors |= {_MEAN + name: value for name, value in self.means.items()}
        return {name: value.cpu().contiguous() for name, value in tensors.items()}

    @property
    def _facts(self) -> dict[str, Any]:
        return {"num_images": self.num_images, "source": self.source, "layers": list(self.means)}

    def save(self, path: str | Path) -> None:
        """Write the directions, whole or not at all."""
        save_checked(path, _FORMAT, self._tensors, self._facts)

    @classmethod
    def load(cls, path: str | Path) -> "LowRankFactors":
        """Read what ``save`` wrote; what is damaged or something else is a ``UserError``."""
        cure = "delete it and run again"
        return load_checked(path, [_FORMAT], "directions of layers", cure, cls._of)

    @classmethod
    def _of(cls, _: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "LowRankFactors":
        vectors, means = (
            {name: tensors[part + name] for name in facts["layers"]} for part in (_VECTORS, _MEAN)
        )
        return cls(tensors["values"], vectors, means, facts["num_images"], facts["source"])


def fit_low_rank(
    model: GenerativeModel,
    images: Tensor,
    labels: Tensor | None,
    *,
    source: str,
    subset: Subset,
    rank: int,
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    encode: Encode = to_model_range,
) -> LowRankFactors:
    """Leading eigenpairs of the layers' GGN, over the images and draws of the head's pass.

    Some three products for each of the ``rank`` directions, and a product is a forward-mode and a
    reverse-mode pass over all the images: ``num_images`` bounds what it costs.

    Args:
        model: with its trained weights; neither they nor its mode are touched.
        images: ``(N, C, H, W)`` uint8.
        labels: values of the model's condition, ``(N, ...)``, or None.
        source: key of weights, data and pass, kept with the result.
        subset: which layers, see ``layers_of``.
        rank: R.
        draws: (t, noise) draws per image.
        num_images: use a random subset of this size; None for all.
        batch_size: images per network evaluation.
        seed: fixes subset, draws and the first vector.
        encode: of the images' space, see ``draws_of``.

    Raises:
        UserError: for as many directions as weights.
    """  # noqa: DOC502 - raised one level down
    net = cast(Network, deepcopy(model.net).eval().requires_grad_(False))  # type: ignore[attr-defined]
    layers = layers_of(net, subset)
    count = num_images or len(images)
    chosen: dict[str, Any] = {
        "draws": draws, "num_images": count, "batch_size": batch_size, "seed": seed
    }  # fmt: skip
    data = [
        ({"x": seen.x_t, "t": seen.time, "y": seen.y}, seen.target.flatten(1))
        for seen in draws_of(model, images, labels, what="layers", encode=encode, **chosen)
    ]
    params = [parameter for layer in layers.values() for parameter in layer.parameters()]
    sizes = [parameter.numel() for parameter in params]
    values, vectors = _leading(_product(net, params, data), sizes, rank, seed)
    means = {name: layer_matrix(layer).cpu() for name, layer in layers.items()}
    return LowRankFactors(values / draws, _by_layer(layers, vectors), means, count, source)


def check_rank(rank: int, size: int) -> None:
    """Refuse as many directions as weights, or none.

    Args:
        rank: directions.
        size: weights of the layers.

    Raises:
        UserError: if so.
    """
    if not 0 < rank < size:
        raise UserError(
            f"laplace.layers_rank={rank} must be below the {size} weights of these layers; use "
            "laplace.layers=kronecker for all of them"
        )


def _leading(
    product: Callable[[np.ndarray], np.ndarray], sizes: list[int], rank: int, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """Eigenvalues ``(R,)`` and the vectors' parts ``(R, size)`` for parameters of these sizes."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    size = sum(sizes)
    check_rank(rank, size)
    log.info("layers: Lanczos iterations for %d directions, some %d passes", rank, 3 * rank)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    first = np.random.default_rng(seed).standard_normal(size)
    values, vectors = eigsh(operator, k=rank, v0=first, tol=1e-4)
    order = np.argsort(values)[::-1]
    found = torch.from_numpy(vectors[:, order].copy()).T.split(sizes, 1)
    return torch.from_numpy(values[order].copy()).clamp(min=0), list(found)


def _product(net: Network, params: list[nn.Parameter], data: list[Any]) -> Any:
    """GGN times a vector of all weights in a row, summed over all processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from curvlinops import GGNLinearOperator

    for parameter in params:
        parameter.requires_grad_(True)
    operator = GGNLinearOperator(
        Flat(net), nn.MSELoss(reduction="sum"), params, data, check_deterministic=False,
        num_data=sum(len(target) for _, target in data), batch_size_fn=lambda b: len(b["x"]),
    )  # fmt: skip
    device, dtype = params[0].device, params[0].dtype

    def product(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector.reshape(-1)).to(device, dtype)
        with torch.inference_mode(False), torch.enable_grad():
            found = operator @ given.clone()
        # Its loss lacks the half.
        result: np.ndarray = (total(found.detach().double()) / 2).cpu().numpy()
        return result

    return product


def _by_layer(layers: dict[str, nn.Module], parts: list[Tensor]) -> dict[str, Tensor]:
    """Rows of every parameter as matrices ``(R, C, P)`` of every layer."""
    rows, found = iter(parts), {}
    for name, layer in layers.items():
        own = [next(rows).unflatten(1, parameter.shape) for parameter in layer.parameters()]
        columns = [own[0].flatten(2), *(each[..., None] for each in own[1:])]
        found[name] = torch.cat(columns, 2).double()
    return found
