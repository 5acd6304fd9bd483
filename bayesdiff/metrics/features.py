"""Feature extractors of the scores, in torch-fidelity's own form.

Importing this module imports torch-fidelity and torchvision, so only code that scores images does.
"""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.registry import register_feature_extractor

from bayesdiff.checks import UserError
from bayesdiff.metrics.classifier import Classifier, load_classifier, load_or_train
from bayesdiff.progress import track

CLASSIFIER = "bayesdiff-classifier"
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Features:
    """What an extractor says of a set of images.

    Attributes:
        features: float32 (N, F), on the CPU; FID, KID, precision and recall compare these.
        logits: float32 (N, K), on the CPU; the inception score reads these.
    """

    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.features)


class ClassifierFeatures(FeatureExtractorBase):
    """A trained `Classifier` as a torch-fidelity feature extractor.

    Args:
        name: the registered name.
        features_list: any of ``penultimate`` and ``logits``.
        feature_extractor_weights_path: a ``classifier-<hash>.safetensors`` file, read unless
            ``classifier`` is given.
        classifier: the network itself.
        unused: torch-fidelity passes all its options to every extractor.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Path | str | None = None,
        classifier: Classifier | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(name, features_list)
        if classifier is None:
            if feature_extractor_weights_path is None:
                raise UserError(
                    f"feature extractor {name!r} needs a trained classifier; "
                    "give feature_extractor_weights_path=.../classifier-<hash>.safetensors"
                )
            classifier = load_classifier(feature_extractor_weights_path)
        self.classifier = classifier
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Requested features of uint8 images ``(B, C, H, W)``: each (B, F)."""
        penultimate = self.classifier.features(images)
        found = {"penultimate": penultimate, "logits": self.classifier.head(penultimate)}
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the two feature vectors."""
        return "penultimate", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, penultimate features for the distances."""
        return "logits" if metric == "isc" else "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        """The network is plain convolutions."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """One grey image."""
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception v3, which here also takes grey images."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Requested features of uint8 images ``(B, 1 or 3, H, W)``: each (B, F)."""
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features: tuple[Tensor, ...] = super().forward(rgb)
        return features


register_feature_extractor(CLASSIFIER, ClassifierFeatures)


def build_extractor(
    features: str,
    data: Any,
    *,
    cache_dir: Path | str,
    seed: int,
    weights_path: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractorBase:
    """The extractor that ``metrics.features`` names.

    Args:
        features: ``classifier`` (trained on the data, cached) or ``inception``.
        data: the record that `load_or_train` reads; ``inception`` does not touch it.
        cache_dir: folder of the trained classifiers.
        seed: seed of the classifier.
        weights_path: see `inception_extractor`.
        device: where the network lies.

    Returns:
        An extractor in eval mode.

    Raises:
        UserError: if the name is unknown.
    """
    if features == "inception":
        return inception_extractor(weights_path, device=device)
    if features != "classifier":
        raise UserError(f"metrics.features={features} is unknown; choose classifier or inception")
    network = load_or_train(cache_dir, data, seed, device=device)
    return classifier_extractor(network)


def classifier_extractor(classifier: Classifier) -> ClassifierFeatures:
    """Extractor for a trained classifier; it shares the network and its device."""
    return ClassifierFeatures(CLASSIFIER, ["penultimate", "logits"], classifier=classifier)


def inception_extractor(
    weights_path: Path | str | None = None, *, device: torch.device | str = "cpu"
) -> Inception:
    """Extractor of the FID that papers report.

    Args:
        weights_path: the weights file; None takes torch's download cache or the network.
        device: where the network lies.

    Returns:
        The network in eval mode, giving the 2048 features and the unbiased logits.

    Raises:
        UserError: if the weights cannot be had, or the file does not hold them.
    """
    weights = _inception_weights(weights_path)
    # torch-fidelity unpickles whatever it is given; hand it bytes that we wrote ourselves.
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    layers = [Inception.get_default_feature_layer_for_metric(name) for name in ("fid", "isc")]
    try:
        network = Inception(INCEPTION, layers, feature_extractor_weights_path=buffer)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"metrics.weights_path={weights_path} does not hold Inception weights; "
            f"give torch-fidelity's {INCEPTION_FILE} ({_first_line(error)})"
        ) from error
    return network.to(device)


def extract(
    extractor: FeatureExtractorBase,
    images: Tensor,
    batch_size: int = 256,
) -> Features:
    """Features and logits of a set of images, in float32, the same for every batch size.

    Args:
        extractor: from `classifier_extractor` or `inception_extractor`.
        images: uint8 (N, C, H, W), on any device.
        batch_size: images per call; changes the speed and the memory only.

    Returns:
        Features on the CPU, in the order of the images.

    Raises:
        ValueError: if the images are not a uint8 tensor of four dimensions.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"images must be uint8 (N, C, H, W) with N >= 1, got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    device = next(extractor.parameters()).device
    parts = []
    with torch.no_grad():
        for batch in track(images.split(batch_size), "extracting features"):
            parts.append([part.float().cpu() for part in extractor(batch.to(device))])
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return Features(features, logits)


def weights_hash(extractor: FeatureExtractorBase) -> str:
    """Content key of an extractor: its name and every weight."""
    digest = hashlib.sha256(extractor.get_name().encode())
    for name, value in extractor.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _inception_weights(weights_path: Path | str | None) -> dict[str, Tensor]:
    if weights_path is None:
        try:
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network, or damaged
            raise UserError(
                f"the Inception weights cannot be downloaded ({_first_line(error)}); "
                f"set metrics.weights_path to a copy of {INCEPTION_FILE}"
            ) from error
    try:
        weights: dict[str, Tensor] = torch.load(weights_path, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"metrics.weights_path={weights_path} does not exist; give a copy of {INCEPTION_FILE}"
        ) from error
    except Exception as error:  # the reader meets arbitrary bytes and may raise anything
        raise UserError(
            f"metrics.weights_path={weights_path} is not a plain weights file; "
            f"give a copy of {INCEPTION_FILE}"
        ) from error
    return weights


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
