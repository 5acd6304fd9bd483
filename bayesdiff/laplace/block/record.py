"""What the pass over the layers beside the head leaves, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.storage.checked_file import checksum, load_checked, save_checked

_FORMAT = "bayesdiff-block-2"
_INPUT, _OUTPUT, _MEAN = "input.", "output.", "mean."


@dataclass(frozen=True)
class LayerFactors:
    """Kronecker factors ``output (x) input`` of one layer's GGN, its weights being ``(C, P)``.

    Attributes:
        input: ``(P, P)`` float64, mean of a a^T over images and positions; a is the layer's input
            (a patch of it for a convolution), with a trailing 1 where there is a bias.
        output: ``(C, C)`` float64, sum over images and positions of the outer products of what
            half the squared error's curvature sends back to the layer's output.
        mean: ``(C, P)`` float64, the trained weights.
        bias: whether a ends with a 1.
    """

    input: Tensor
    output: Tensor
    mean: Tensor
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(C, P), of the layer's weights with its bias as last column."""
        return len(self.output), len(self.input)


@dataclass(frozen=True)
class BlockFactors:
    """What one pass over the data leaves: enough for every number and both structures.

    Attributes:
        layers: by their names in the network.
        num_images: N, images in the pass, each counted once whatever its draws.
        source: hash of the checkpoint, the data and the pass this came from.
    """

    layers: Mapping[str, LayerFactors]
    num_images: int
    source: str

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            for factor in (layer.input, layer.output):
                if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                    raise UserError(
                        f"a Kronecker factor of {name} must be square, got {tuple(factor.shape)}"
                    )
                if not bool(factor.isfinite().all()):
                    raise UserError(
                        f"what {name} reads or sends back holds values that are not finite; "
                        "train again"
                    )

    @cached_property
    def key(self) -> str:
        """16 hex digits that change with any number in the factors."""
        return checksum(self._tensors, json.dumps(self._facts))[:16]

    def require_source(self, source: str) -> None:
        """Refuse to pair these factors with other weights or data.

        Args:
            source: hash of weights and data, or one that begins with it.

        Raises:
            UserError: if they are not those the factors were computed from.
        """  # noqa: DOC502 - raised one level down
        require_same(self.source, source)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        values = {_INPUT + name: layer.input for name, layer in self.layers.items()}
        values |= {_MEAN + name: layer.mean for name, layer in self.layers.items()}
        values |= {_OUTPUT + name: layer.output for name, layer in self.layers.items()}
        return {name: value.cpu().contiguous() for name, value in values.items()}

    @property
    def _facts(self) -> dict[str, Any]:
        biases = {name: layer.bias for name, layer in self.layers.items()}
        return {"num_images": self.num_images, "source": self.source, "layers": biases}

    def save(self, path: str | Path) -> None:
        """Write the factors, whole or not at all."""
        save_checked(path, _FORMAT, self._tensors, self._facts)

    @classmethod
    def load(cls, path: str | Path) -> "BlockFactors":
        """Read what ``save`` wrote; what is damaged or something else is a ``UserError``."""
        cure = "delete it and run again"
        return load_checked(path, [_FORMAT], "factors of layers", cure, cls._of)

    @classmethod
    def _of(cls, _: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "BlockFactors":
        layers = {
            name: LayerFactors(
                tensors[_INPUT + name], tensors[_OUTPUT + name], tensors[_MEAN + name], bias
            )
            for name, bias in facts["layers"].items()
        }
        return cls(layers, facts["num_images"], facts["source"])


def require_same(own: str, source: str) -> None:
    """Refuse to pair what came from one source with another.

    Args:
        own: hash of weights, data and pass.
        source: hash of weights and data, or one that begins with it.

    Raises:
        UserError: if they are two.
    """
    mine, asked = (each.split("-")[:2] for each in (own, source))
    if mine[: len(asked)] != asked:
        raise UserError(
            f"the factors of layers were computed from {own}, not from {source}; delete the block "
            "file to compute them again, or give another run_dir"
        )
