"""A small image classifier: the feature space of the scores for data that Inception never saw."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.machine.costs import making
from bayesdiff.machine.device import autocast_dtype
from bayesdiff.machine.progress import track
from bayesdiff.storage.checked_file import load_checked, save_checked
from bayesdiff.storage.locks import alone

log = logging.getLogger(__name__)

# Part of the cache key: raise it when the network or its training changes.
ARCHITECTURE = 1
_KIND = "bayesdiff-classifier-1"
FEATURES = 128
BATCH_SIZE = 256


class Classifier(nn.Module):
    """Four convolutions, mean over the pixels and a linear layer; images of 8 x 8 to 64 x 64.

    Args:
        channels: image channels C.
        num_classes: number of classes K.
        stride: stride of the first convolution; 4 keeps images above 32 pixels affordable.
        test_accuracy: share of held-out images it names rightly, NaN when there are none.
    """

    def __init__(
        self, channels: int, num_classes: int, *, stride: int = 2, test_accuracy: float = math.nan
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.stride = stride
        self.test_accuracy = test_accuracy
        self.body = nn.Sequential(
            *_block(channels, 32, kernel=5, stride=stride),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, FEATURES),
            *_block(FEATURES, FEATURES),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, uint8 ``(B, C, H, W) -> (B, 128)``."""
        features: Tensor = self.body(images.float() / 127.5 - 1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, uint8 ``(B, C, H, W) -> (B, K)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def train_classifier(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor | None,
    test_labels: Tensor | None,
    num_classes: int,
    *,
    seed: int,
    epochs: int,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier with AdamW and a one-cycle learning rate.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), from 0 to ``num_classes - 1``.
        test_images: held-out images, uint8 (M, C, H, W); None or empty leaves the accuracy NaN.
        test_labels: held-out labels, int64 (M,).
        num_classes: number of classes K.
        seed: fixes the initial weights and the order of the images; the global state is kept.
        epochs: passes over the images.
        device: where to train; the result stays there.

    Returns:
        The classifier in eval mode, channels-last, with ``test_accuracy`` set.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stride = 4 if max(images.shape[-2:]) > 32 else 2
        network = Classifier(images.shape[1], num_classes, stride=stride)
    network = network.to(memory_format=torch.channels_last).to(device).train()
    batches = _batches(len(images), epochs, torch.Generator().manual_seed(seed))
    _fit(network, images.to(device), labels.to(device), batches)
    network.eval()
    if test_images is not None and test_labels is not None and len(test_images):
        network.test_accuracy = _accuracy(network, test_images, test_labels)
    return network


def load_or_train(
    cache_dir: Path | str,
    data: Any,
    seed: int,
    *,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """The classifier of a data set, from the cache when it was trained on the same content.

    Args:
        cache_dir: folder of the ``classifier-<hash>.safetensors`` files.
        data: record with ``images``, ``labels``, ``test_images``, ``test_labels``,
            ``num_classes``, ``name`` and ``images_fingerprint``.
        seed: see `train_classifier`; part of the cache key.
        epochs: passes over the images; None chooses by their number.
        device: where to train, and where the result lies.

    Returns:
        The classifier in eval mode.

    Raises:
        UserError: if the data set has no labels to train on.
    """  # noqa: DOC502 - raised one level down
    check_classifiable(data, "set metrics.features=inception or give it labels")
    epochs = _epochs(len(data.images)) if epochs is None else epochs
    path = cache_path(cache_dir, data.images_fingerprint, seed, epochs)
    with alone(path):
        cached = _read_cache(path)
        if cached is not None:
            return cached.to(device)
        log.info("classifier of %s: %d passes over %d images", data.name, epochs, len(data.images))
        given = data.images, data.labels, data.test_images, data.test_labels, data.num_classes
        with making("classifier"):
            network = train_classifier(*given, seed=seed, epochs=epochs, device=device)
        log.info("classifier of %s: held-out accuracy %.4f", data.name, network.test_accuracy)
        save_classifier(network, path, data=data.name, fingerprint=data.images_fingerprint)
    return network


def cache_path(cache_dir: Path | str, fingerprint: str, seed: int, epochs: int) -> Path:
    """File of the classifier trained on the data with this fingerprint."""
    key = json.dumps([ARCHITECTURE, FEATURES, BATCH_SIZE, fingerprint, seed, epochs])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(cache_dir) / f"classifier-{digest}.safetensors"


def kept_classifier(cache_dir: Path | str, data: Any, seed: int) -> tuple[Path, bool]:
    """File of the classifier that ``load_or_train`` would give, and whether it is there, whole."""
    path = cache_path(cache_dir, data.images_fingerprint, seed, _epochs(len(data.images)))
    return path, _read_cache(path) is not None


def save_classifier(network: Classifier, path: Path, **notes: str) -> None:
    """Write weights, shape and a checksum in one step: a reader never meets half a file."""
    shape = {name: getattr(network, name) for name in ("channels", "num_classes", "stride")}
    facts = {"shape": shape, "test_accuracy": network.test_accuracy, **notes}
    save_checked(path, _KIND, network.state_dict(), facts)


def load_classifier(path: Path | str) -> Classifier:
    """Read a classifier file onto the CPU, in eval mode; never runs code from it.

    Raises:
        UserError: if it is missing, damaged, or something else.
    """  # noqa: DOC502 - raised one level down

    def build(kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Classifier:
        network = Classifier(**facts["shape"], test_accuracy=facts["test_accuracy"])
        network.load_state_dict(tensors)
        return network.to(memory_format=torch.channels_last).eval()

    return load_checked(path, [_KIND], "a classifier", "delete it to train it again", build)


def _read_cache(path: Path) -> Classifier | None:
    if not path.exists():
        return None
    try:
        return load_classifier(path)
    except UserError as error:
        log.warning("%s; done now", error)
        return None


def _block(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _epochs(size: int) -> int:
    """Enough passes for small sets, 6 for 60 000 images, never fewer than 2."""
    return min(max(360_000 // size, 2), 40)


def _batches(size: int, epochs: int, generator: torch.Generator) -> list[Tensor]:
    """Index batches of all epochs; a last short batch is dropped unless it is the only one."""
    batch = min(BATCH_SIZE, max(size // 16, 2))
    orders = [torch.randperm(size, generator=generator) for _ in range(epochs)]
    return [part for order in orders for part in order[: size // batch * batch].split(batch)]


def _fit(network: Classifier, images: Tensor, labels: Tensor, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, total_steps=len(batches), pct_start=0.2
    )
    dtype = autocast_dtype(images.device)
    for index in track(batches, "training the classifier", "steps"):
        index = index.to(images.device)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits = network(images[index].contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    device = network.head.weight.device
    guesses = [network(part.to(device)).argmax(1).cpu() for part in images.split(512)]
    return float((torch.cat(guesses) == labels.cpu()).double().mean())


def check_classifiable(data: ImageData, cure: str) -> None:
    """Refuse data that a classifier cannot learn from.

    Raises:
        UserError: for data without labels, or of one class, ending in the cure.
    """
    if data.labels is None:
        raise UserError(
            f"data set {data.name} has no labels for metrics.features=classifier; {cure}"
        )
    if data.num_classes < 2:
        raise UserError(
            f"data set {data.name} has one class; metrics.features=classifier needs two (class "
            f"folders look like data.root/cat/1.png and data.root/dog/2.png); {cure}"
        )
