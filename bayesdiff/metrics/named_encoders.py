"""What ``metrics.features`` names: a function of that name here, which builds the extractor.

Each takes those of ``data``, ``cache_dir``, ``seed``, ``weights_path``, ``device`` and ``option``
that it needs, see `bayesdiff.metrics.features.build_extractor`. An encoder of one's own is named
by its ``_target_`` instead. Looking up a name imports no torch-fidelity.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch-fidelity costs seconds
    import torch
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

Weights = Path | str | None


def classifier(
    data: Any, cache_dir: Path | str, seed: int, device: "torch.device | str"
) -> "FeatureExtractorBase":
    """A small classifier of the data, trained once and cached."""
    from bayesdiff.metrics.classifier import load_or_train
    from bayesdiff.metrics.features import classifier_extractor

    return classifier_extractor(load_or_train(cache_dir, data, seed, device=device))


def untrained(data: Any, seed: int) -> "FeatureExtractorBase":
    """The same network with random weights."""
    from bayesdiff.metrics import features

    return features.classifier_extractor(features.untrained(data, seed))


def inception(weights_path: Weights, option: str) -> "FeatureExtractorBase":
    """Inception v3, of the FID that papers report."""
    from bayesdiff.metrics.features import inception_extractor

    return inception_extractor(weights_path, option=option)


def clip(weights_path: Weights, option: str) -> "FeatureExtractorBase":
    """CLIP ViT-B/32."""
    from bayesdiff.metrics.encoders import ClipFeatures, clip_weights

    return ClipFeatures(clip_weights(weights_path, option))


def dinov2(weights_path: Weights, option: str) -> "FeatureExtractorBase":
    """DINOv2 ViT-B/14."""
    from bayesdiff.metrics.encoders import DinoFeatures, dino_weights

    return DinoFeatures(dino_weights(weights_path, option))
