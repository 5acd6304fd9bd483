"""Images that a posterior is fitted to: a tensor, a folder, a zip, or any data set of theirs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.folders import folder_part, splits
from bayesdiff.data.framing import Framing
from bayesdiff.data.zips import zip_part


@dataclass(frozen=True)
class TrainingImages:
    """Images one batch at a time; a data set is read as they are needed.

    Attributes:
        items: a tensor ``(N, C, H, W)``, or what has a length and gives ``(C, H, W)`` by number.
        labels: of all, where the folder or zip has classes.
    """

    items: Any
    labels: list[int] | None = None

    @classmethod
    def of(cls, images: Any) -> "TrainingImages":
        """Images from whatever holds them.

        Args:
            images: a tensor ``(N, C, H, W)`` or an array ``(N, H, W, C)``, uint8 or float in
                [0, 1]; path of a folder or a zip; or a list or data set of such images or of PIL
                ones, whose items may be pairs of an image and its label or prompt.

        Raises:
            UserError: for anything else, or nothing.
        """
        labels = None
        if isinstance(images, str | Path):
            images, labels = _read(Path(images))
        if isinstance(images, np.ndarray):
            images = from_array(images, 4)
        tensor = isinstance(images, Tensor) and images.dim() == 4
        if not tensor and (isinstance(images, Tensor) or not hasattr(images, "__getitem__")):
            raise UserError(
                "images must be a tensor (N, C, H, W), an array (N, H, W, C), a folder, a zip, or "
                f"a list or data set of images, got {_described(images)}"
            )
        if not len(images):
            raise UserError("there are no images to fit the posterior to; give at least one")
        made = cls(images, labels)
        made.batch(0, 1)
        return made

    def __len__(self) -> int:
        return len(self.items)

    def second(self, kind: type) -> list[Any] | None:
        """What comes second in the items of a data set, or with the files; None for nothing.

        Args:
            kind: that it must be of: ``int`` for labels, ``str`` for prompts.
        """
        if isinstance(self.items, Tensor):
            return self.labels if kind is int else None
        found = []
        for number in range(len(self)):
            item = self.items[number]
            value = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
            if isinstance(value, np.generic) or isinstance(value, Tensor) and value.dim() == 0:
                value = value.item()
            if not isinstance(value, kind) or isinstance(value, bool):
                return None
            found.append(value)
        return found

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.batch(0, 1).shape[2:]
        return height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images, so many at a time.

        Yields:
            float32 in [0, 1], ``(n, C, H, W)``.
        """
        for first in range(0, len(self), size):
            yield self.batch(first, min(first + size, len(self)))

    def batch(self, first: int, end: int) -> Tensor:
        """Images first ... end - 1 as float32 in [0, 1]."""
        if isinstance(self.items, Tensor):
            return _in_unit_range(self.items[first:end])
        chosen = [self.items[number] for number in range(first, end)]
        images = [_one(each[0] if isinstance(each, tuple | list) else each) for each in chosen]
        for image in images:
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape != images[0].shape:
                raise UserError(
                    "a data set of images must give tensors (C, H, W), arrays (H, W, C) or PIL "
                    f"images, all of one size, got {_described(image)}"
                )
        return _in_unit_range(torch.stack(images))


def _described(given: Any) -> str:
    return f"{tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def _one(image: Any) -> Any:
    """A tensor of a PIL image or an array; anything else as it is."""
    if hasattr(image, "getbands"):
        if image.mode not in ("L", "RGB"):
            raise UserError(
                f"a PIL image has mode {image.mode}; bring images to grey levels or colours, as "
                "by image.convert('RGB')"
            )
        image = np.array(image)
    return from_array(image, 3) if isinstance(image, np.ndarray) else image


def from_array(array: np.ndarray, dims: int) -> Tensor:
    """Images or one image as PyTorch has them.

    Args:
        array: ``([N,] H, W)``, ``([N,] H, W, C)`` or ``([N,] C, H, W)``.
        dims: 4 with N, 3 without.

    Raises:
        UserError: for one whose channels could be in either place, or in none.
    """
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.dim() == dims - 1:
        return images.unsqueeze(-3)
    last, first = (images.dim() == dims and images.shape[k] in (1, 3) for k in (-1, -3))
    if last == first:
        raise UserError(
            f"an array of {tuple(images.shape)} does not say where its channels are; give a "
            f"tensor {'(N, C, H, W)' if dims == 4 else '(C, H, W)'}"
        )
    return images.movedim(-1, -3) if last else images


def _read(path: Path) -> tuple[Tensor, list[int] | None]:
    """Images of a folder or a zip in the order of their names, and their classes.

    Raises:
        UserError: if there is neither.
    """
    framing = Framing.of(None, None)
    if path.is_dir():
        part = folder_part(splits(path).train).decode(framing)
        images, labels = part.decoded.images, part.labels
    elif path.is_file():
        archive = zip_part(path, "images")
        images, (labels, _) = archive.decode(framing).images, archive.classes()
    else:
        raise UserError(f"no folder or zip of images at {path}; correct the path")
    return images, None if labels is None else labels.tolist()


def _in_unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1].

    Raises:
        UserError: for other values.
    """
    if images.dtype == torch.uint8:
        return images.float() / 255
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images must be uint8, or float in [0, 1], got values from {low:.3g} to {high:.3g}; "
            "bring them to [0, 1]"
        )
    return images.float()
