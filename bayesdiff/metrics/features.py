"""Feature extractors of the scores, in torch-fidelity's own form.

Importing this module imports torch-fidelity and torchvision, so only code that scores images does.
"""

import hashlib
import inspect
import io
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.registry import register_feature_extractor

from bayesdiff.checks import UserError
from bayesdiff.machine.device import all_threads
from bayesdiff.machine.shared_rows import Rows, own_rows, shared_rows
from bayesdiff.metrics import named_encoders
from bayesdiff.metrics.classifier import Classifier, load_classifier
from bayesdiff.metrics.encoders import (
    downloaded,
    first_line,
    in_colour,
    plain_weights,
)
from bayesdiff.metrics.own_encoder import own_extractor
from bayesdiff.options.targets import by_name

CLASSIFIER = "bayesdiff-classifier"
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Features:
    """What an extractor says of a set of images.

    Attributes:
        features: float32 (N, F), on the CPU; FID, KID, precision and recall compare these.
        logits: float32 (N, K), on the CPU; the inception score reads these. K is 0 for an encoder
            that knows no classes.
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
        features: tuple[Tensor, ...] = super().forward(in_colour(images))
        return features


register_feature_extractor(CLASSIFIER, ClassifierFeatures)


def build_extractor(
    features: Any,
    data: Any,
    *,
    cache_dir: Path | str,
    seed: int,
    weights_path: Path | str | None = None,
    device: torch.device | str = "cpu",
    option: str = "metrics.weights_path",
) -> FeatureExtractorBase:
    """The extractor of a name, or of an encoder of one's own.

    Args:
        features: name of a function of `bayesdiff.metrics.named_encoders`, options with a
            ``_target_``, or an `Encoder`.
        data: the record that `load_or_train` reads; encoders with weights do not touch it.
        cache_dir: folder of the trained classifiers.
        seed: seed of the classifier.
        weights_path: of encoders with weights; None takes torch's download cache or the network.
        device: where the network lies.
        option: what the user set to the path.

    Returns:
        An extractor in eval mode.

    Raises:
        UserError: if the name is unknown, or the path is none.
    """
    if not isinstance(weights_path, (str, Path, NoneType)):
        raise UserError(f"{option}={weights_path} is no path; give that of the weights file")
    if not isinstance(features, str):
        return own_extractor(features, option.replace("weights_path", "features")).to(device)
    make = by_name(named_encoders, features, "metrics.features")
    offered: dict[str, Any] = {
        "data": data,
        "cache_dir": cache_dir,
        "seed": seed,
        "weights_path": weights_path,
        "device": device,
        "option": option,
    }
    taken = inspect.signature(make).parameters
    extractor: FeatureExtractorBase = make(**{name: offered[name] for name in taken})
    return extractor.to(device)


def untrained(data: Any, seed: int, images: int = 1024) -> Classifier:
    """The project's classifier with random weights: what its architecture alone sees.

    Only the means and variances of its normalisations come from the data, so that its features
    have the scale of trained ones.

    Args:
        data: record with ``images``; labels are not needed.
        seed: of the weights; the global state is kept.
        images: how many of the data's first ones are normalised by.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        stride = 4 if max(data.images.shape[-2:]) > 32 else 2
        network = Classifier(data.images.shape[1], max(data.num_classes, 1), stride=stride)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # a plain mean of all batches, here of one
        network.train().features(data.images[:images])
    return network.eval()


def classifier_extractor(classifier: Classifier) -> ClassifierFeatures:
    """Extractor for a trained classifier; it shares the network and its device."""
    return ClassifierFeatures(CLASSIFIER, ["penultimate", "logits"], classifier=classifier)


def inception_extractor(
    weights_path: Path | str | None = None,
    *,
    option: str = "metrics.weights_path",
) -> Inception:
    """Extractor of the FID that papers report.

    Args:
        weights_path: the weights file; None takes torch's download cache or the network.
        option: what the user set to the path.

    Returns:
        The network in eval mode, giving the 2048 features and the unbiased logits.

    Raises:
        UserError: if the weights cannot be had, or the file does not hold them.
    """
    weights = _inception_weights(weights_path, option)
    # torch-fidelity unpickles whatever it is given; hand it bytes that we wrote ourselves.
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    layers = [Inception.get_default_feature_layer_for_metric(name) for name in ("fid", "isc")]
    try:
        network = Inception(INCEPTION, layers, feature_extractor_weights_path=buffer)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{option}={weights_path} does not hold Inception weights; "
            f"give torch-fidelity's {INCEPTION_FILE} ({first_line(error)})"
        ) from error
    return network


def extract(
    extractor: FeatureExtractorBase,
    images: Tensor,
    batch_size: int = 256,
    shared: bool = False,
) -> Features:
    """Features and logits of a set of images, in float32, the same for every batch size.

    Args:
        extractor: from `build_extractor`.
        images: uint8 (N, C, H, W), on any device.
        batch_size: images per call; changes the speed and the memory only.
        shared: whether all processes call it, and each takes some of the batches.

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
    held = next(iter(extractor.parameters()), next(iter(extractor.buffers()), None))
    device = torch.device("cpu") if held is None else held.device

    def batch(numbers: list[int]) -> Rows:
        parts = extractor(images[numbers].to(device))
        return dict(zip(("features", "logits"), (p.float().cpu() for p in parts), strict=True))

    make = shared_rows if shared else own_rows
    # Others than the classifier enlarge the images first.
    with torch.no_grad(), all_threads(not isinstance(extractor, ClassifierFeatures)):
        return Features(**make(range(len(images)), batch_size, batch, "extracting features"))


def weights_hash(extractor: FeatureExtractorBase) -> str:
    """Content key of an extractor: its name and every weight."""
    digest = hashlib.sha256(extractor.get_name().encode())
    for name, value in extractor.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _inception_weights(weights_path: Path | str | None, option: str) -> dict[str, Tensor]:
    if weights_path is not None:
        return plain_weights(weights_path, option, f"give a copy of {INCEPTION_FILE}")
    weights: dict[str, Tensor] = downloaded(
        lambda: torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True
        ),
        "Inception",
        option,
        INCEPTION_FILE,
    )
    return weights
