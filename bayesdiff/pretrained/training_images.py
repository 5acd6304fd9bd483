"""Images that a posterior is fitted to: a tensor, a folder, a zip, or any data set of theirs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
            images: ``(N, C, H, W)``, uint8 or float in [0, 1]; path of a folder or a zip; or a
                data set whose items are such images ``(C, H, W)``, or tuples that begin with one.

        Raises:
            UserError: for anything else, or nothing.
        """
        labels = None
        if isinstance(images, str | Path):
            images, labels = _read(Path(images))
        tensor = isinstance(images, Tensor) and images.dim() == 4
        if not tensor and (isinstance(images, Tensor) or not hasattr(images, "__getitem__")):
            raise UserError(
                "images must be a tensor (N, C, H, W), a folder, a zip, or a data set of images, "
                f"got {type(images).__name__}"
            )
        if not len(images):
            raise UserError("there are no images to fit the posterior to; give at least one")
        made = cls(images, labels)
        made.batch(0, 1)
        return made

    def __len__(self) -> int:
        return len(self.items)

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
        images = [each[0] if isinstance(each, tuple | list) else each for each in chosen]
        for image in images:
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape != images[0].shape:
                raise UserError(
                    "a data set of images must give tensors (C, H, W) of one size, got "
                    f"{tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__}"
                )
        return _in_unit_range(torch.stack(images))


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
