"""An encoder from outside of this package as one of torch-fidelity's extractors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from bayesdiff.checks import UserError
from bayesdiff.options.values import plain
from bayesdiff.storage.artefacts import key_of
from bayesdiff.storage.source_code import code_of

# Features (B, F), or these and class logits (B, K), of uint8 images (B, C, H, W).
Encoder = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class OwnFeatures(FeatureExtractorBase):
    """A callable of the user's own as an extractor.

    Args:
        encoder: gives uint8 images ``(B, C, H, W)`` features ``(B, F)``, or a pair of these and
            class logits ``(B, K)``; a module is put into eval mode.
        name: tells encoders, their options and their source apart, see ``weights_hash``.
        option: where it was given, for messages.
    """

    def __init__(self, encoder: Encoder, name: str, option: str) -> None:
        super().__init__(name, ["features", "logits"])
        self.encoder, self.option = encoder, option
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features ``(B, F)`` and logits ``(B, K)``, K = 0 without.

        Raises:
            UserError: if the encoder gives anything else.
        """
        made: Any = self.encoder(images)
        parts = made if isinstance(made, tuple) else (made, images.new_zeros(len(images), 0))
        if len(parts) != 2 or not all(_is_rows(part, len(images)) for part in parts):
            shapes = [tuple(getattr(part, "shape", ())) or type(part).__name__ for part in parts]
            raise UserError(
                f"{self.option} must give images {tuple(images.shape)} features "
                f"({len(images)}, F), or these and logits ({len(images)}, K), got {shapes}"
            )
        return tuple(part.float() for part in parts)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the two."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, features for the distances."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Nobody knows."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """One grey image."""
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


def own_extractor(encoder: Any, option: str) -> OwnFeatures:
    """The extractor of options with a ``_target_``, or of a callable.

    Raises:
        UserError: for anything else.
    """
    name = "own"
    if isinstance(encoder, Mapping) and "_target_" in encoder:
        options = plain(encoder)
        name = key_of(options, code_of(options))
        encoder = instantiate(encoder, _convert_="all")
    if not callable(encoder):
        raise UserError(
            f"{option}={encoder!r} is no encoder; give a name, or a _target_ that makes a "
            "callable of images (with _partial_: true where it is itself that function)"
        )
    return OwnFeatures(encoder, name, option)


def _is_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and len(value) == count
