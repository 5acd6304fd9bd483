"""Single images and maps as PNG files, for other programs and other eyes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesdiff.data.spaces import to_uint8
from bayesdiff.report.figures import MAP_COLOURS
from bayesdiff.report.layout import image_range, standard_deviation
from bayesdiff.storage.atomic import file_name, write_folder
from bayesdiff.storage.locks import alone
from bayesdiff.uncertainty.scores.of_maps_and_images import map_score

if TYPE_CHECKING:
    from bayesdiff.uncertainty.samples import Samples

_LONGEST = 40  # characters of a class name in a file's name


def export_samples(folder: Path, samples: "Samples", classes: Sequence[str], stored: str) -> None:
    """Every image and every map as a file, made once; the folder is there whole or not at all.

    ``00017-sneaker-12.3.png`` is sample 17 with its class and its variance summed over channels
    and pixels, images in [-1, 1]: ``map.sum``. ``00017-map.png`` is its map at the image's own
    size. All maps have one scale of colours, which ``scale.json`` states.

    Args:
        folder: for the files; there is nothing to do where it is.
        samples: images with their maps.
        classes: names of the classes.
        stored: name of the file with the raw values.
    """
    from matplotlib import colormaps

    count = len(samples.images)
    numbers = torch.arange(count) if samples.numbers is None else samples.numbers
    maps = standard_deviation(samples.variance)
    finite = maps[np.isfinite(maps)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    scale = {
        "map": "standard deviation, the root of the variance's mean over the channels",
        "colours": MAP_COLOURS,
        "lowest": 0.0,
        "highest": top,
        "units": f"of images in {image_range(samples)}",
        "estimator": samples.estimator,
        "raw values": stored,
    }

    def fill(place: Path) -> None:
        names = _names(numbers, samples.labels, classes, map_score(samples, "sum"))
        images = to_uint8(samples.in_model_range().images)
        for number, name, image, values in zip(numbers.tolist(), names, images, maps, strict=True):
            _write(place / f"{name}.png", image.permute(1, 2, 0).numpy())
            colours = colormaps[MAP_COLOURS](np.nan_to_num(values / top, posinf=1), bytes=True)
            _write(place / f"{number:05d}-map.png", colours[..., :3])
        (place / "scale.json").write_text(json.dumps(scale, indent=2) + "\n")

    _once(folder, fill)


def export_images(
    folder: Path, images: Tensor, classes: Sequence[str], labels: Tensor | None
) -> None:
    """Samples 0, 1, ... as files ``00017-sneaker.png``, which every reader of folders takes.

    Args:
        folder: for the files; there is nothing to do where it is.
        images: ``(N, C, H, W)`` uint8.
        classes: names of the classes.
        labels: of the images, ``(N,)``, or None.
    """
    numbers = torch.arange(len(images))

    def fill(place: Path) -> None:
        for name, image in zip(_names(numbers, labels, classes), images, strict=True):
            _write(place / f"{name}.png", image.permute(1, 2, 0).numpy())

    _once(folder, fill)


def class_file_name(name: str) -> str:
    """A class name that every file system takes: ``T-shirt/top`` becomes ``T-shirt-top``."""
    return file_name(name, "-", ascii_only=False).strip("-._")[:_LONGEST] or "class"


def _names(
    numbers: Tensor, labels: Tensor | None, classes: Sequence[str], scores: Tensor | None = None
) -> list[str]:
    """Names of the images' files: number, class if there is one, score if there is one."""
    parts = [[f"{number:05d}"] for number in numbers.tolist()]
    if labels is not None:
        for part, label in zip(parts, labels.tolist(), strict=True):
            part.append(class_file_name(classes[label] if label < len(classes) else str(label)))
    if scores is not None:
        for part, score in zip(parts, scores.tolist(), strict=True):
            part.append(f"{score:.4g}")
    return ["-".join(part) for part in parts]


def _once(folder: Path, fill: Callable[[Path], None]) -> None:
    with alone(folder):
        if not folder.is_dir():
            write_folder(folder, fill)


def _write(path: Path, pixels: np.ndarray) -> None:
    """``(H, W)`` or ``(H, W, 1 or 3)`` uint8."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
                    ).save(path, format="PNG")  # fmt: skip
