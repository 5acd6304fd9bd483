"""How many samples show two digits that can be read, and how many of these a held-out number?

    python experiments/bfn-mnist/two_digits.py outputs/RUN/samples-bfn-ensemble-KEY.npz

Adds its numbers to two_digit.json, and draws the first 16 samples as two-digit-samples.png. A
classifier reads each half of an image alone; it is trained on the halves of training images with
all numbers, in black and white, and judged on test images, whose digits it has never seen.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.cli import one_line_errors
from bayesdiff.data.binarised import binarised
from bayesdiff.data.images import ImageData
from bayesdiff.data.two_digits import two_digits
from bayesdiff.metrics.classifier import Classifier, train_classifier
from bayesdiff.report import figures
from bayesdiff.report.layout import GAP, picture, put, sheet
from bayesdiff.storage.artefacts import read_arrays

HERE = Path(__file__).parent
CONFIDENT = 0.9  # probability of the likeliest digit, of each half
TRAINING, EPOCHS = 20_000, 3


def halves(images: Tensor) -> Tensor:
    """Left and right half of every image, ``(n, C, H, W) -> (n, 2, C, H, W / 2)``."""
    return torch.stack(images.chunk(2, -1), 1)


def digits(labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Left and right digit of every label, ``(n,) -> (n, 2)``."""
    numbers = torch.tensor([int(name) for name in classes])[labels]
    return torch.stack([numbers // 10, numbers % 10], 1)


def reader(data: ImageData, epochs: int = EPOCHS) -> Classifier:
    """A classifier of single digits, trained on the halves of the training images."""
    given = []
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        assert labels is not None
        given += [halves(images).flatten(0, 1), digits(labels, data.classes).flatten()]
    return train_classifier(*given, 10, seed=0, epochs=epochs)


@torch.inference_mode()
def read(classifier: Classifier, images: Tensor) -> Tensor:
    """Probabilities of the ten digits in each half, ``(n, 2, 10)``."""
    parts = halves(images).flatten(0, 1).split(512)
    return torch.cat([classifier(part).softmax(1) for part in parts]).unflatten(0, (-1, 2))


def shares(probabilities: Tensor, held_out: Sequence[int], of: str = "") -> dict[str, float]:
    """Share of images with two confident digits, and of held-out numbers among these.

    Args:
        probabilities: of ten digits in each half, ``(n, 2, 10)``.
        held_out: numbers that no training image shows.
        of: which images, for the names.
    """
    sure, which = probabilities.max(2)
    confident = (sure >= CONFIDENT).all(1)
    numbers = (10 * which[:, 0] + which[:, 1])[confident]
    others = torch.isin(numbers, torch.tensor(list(held_out)))
    return {
        **share(f"two_confident_digits{of}", confident),
        **share(f"held_out_share{of}", others),
        f"different_numbers{of}": len(numbers.unique()),
    }


def share(name: str, hits: Tensor) -> dict[str, float]:
    """A share with its standard error, and of how many; of none there is no share."""
    if not len(hits):
        return {f"{name}.of": 0}
    mean = float(hits.double().mean())
    error = math.sqrt(mean * (1 - mean) / len(hits))
    return {name: mean, f"{name}.standard_error": error, f"{name}.of": len(hits)}


def drawn(samples: Tensor) -> Any:
    """The samples in rows of eight, each pixel as two."""
    height, width = (2 * side for side in samples.shape[-2:])
    rows = -(-len(samples) // 8)
    caption = f"Samples 0 to {len(samples) - 1} of the sampler, unselected."
    figure, axes = sheet(
        8 * (width + GAP) + GAP, rows * (height + GAP) + GAP, "Samples of two digits", caption
    )
    for number, image in enumerate(samples):
        row, column = divmod(number, 8)
        place = GAP + column * (width + GAP), GAP + row * (height + GAP)
        put(axes, picture(image), *place, (width, height))
    return figure


def main(file: Path) -> None:
    """All of it."""
    cfg = OmegaConf.load(file.parent / ".hydra" / "config.yaml")
    held_out = [int(number) for number in cfg.data.source.holdout_classes or []]
    data = two_digits("two_digit_mnist", cfg.data.root, False, images=TRAINING)
    data = binarised(data, "frozen")
    classifier = reader(data)
    samples = torch.as_tensor((read_arrays(file) or {})["images"])
    black_and_white = torch.where(samples >= 0, 255, 0).to(torch.uint8)
    made = shares(read(classifier, black_and_white), held_out)
    real = shares(read(classifier, data.test_images), held_out, "_real")
    found = {"classifier_accuracy": classifier.test_accuracy, **made, **real}
    place = HERE / "two_digit.json"
    kept = json.loads(place.read_text()) if place.is_file() else {}
    kept |= {f"two_digit.{name}": value for name, value in found.items()}
    place.write_text(json.dumps(kept, indent=1) + "\n")
    figures.save(drawn(samples[:16]), HERE / "two-digit-samples.png", pdf=False)


if __name__ == "__main__":
    with one_line_errors():
        if len(sys.argv) != 2:
            sys.exit("usage: two_digits.py SAMPLES.npz")
        main(Path(sys.argv[1]))
