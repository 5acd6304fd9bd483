"""Centre crop and resize, for images of other sizes and shapes than the network's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.checks import UserError, at_least


@dataclass(frozen=True)
class Framing:
    """First the crop, then the resize; make it with `of`, which checks.

    Resizing is Pillow's antialiased Lanczos in 8 bits: with ``crop="square"`` the pixels are
    those that the dataset tools of StyleGAN and EDM write for ``center-crop``.

    Attributes:
        crop: side of the centred square that is cut out, ``"square"`` for the largest, or None.
        resize: side that the square is brought to, or None.
    """

    crop: int | str | None = None
    resize: int | None = None

    @classmethod
    def of(cls, crop: Any = None, resize: Any = None) -> Self:
        """From ``data.crop`` (number, ``[height, width]`` or ``square``) and ``data.resize``.

        Raises:
            UserError: for values that are none of these, and sides that differ.
        """
        if isinstance(crop, Sequence) and not isinstance(crop, str):
            sides = [at_least("data.crop", side) for side in crop]
            if len(sides) != 2 or sides[0] != sides[1]:
                raise UserError(
                    f"data.crop={sides} is no square [height, width]; networks take square "
                    "images: give one number, or data.crop=square"
                )
            crop = sides[0]
        if isinstance(crop, str) and crop != "square":
            raise UserError(
                f"data.crop={crop} is unknown; give the side in pixels, [height,width] or square"
            )
        if crop is not None and crop != "square":
            at_least("data.crop", crop)
        if resize is not None:
            at_least("data.resize", resize)
        return cls(crop, resize)

    def apply(self, image: Image.Image, name: str) -> Image.Image:
        """Crop and resize one grey or RGB image.

        Args:
            image: of mode L or RGB.
            name: of its file, for messages.

        Raises:
            UserError: for an image that is smaller than the crop, or that a resize would distort.
        """
        width, height = image.size
        if self.crop is not None:
            side = min(width, height) if isinstance(self.crop, str) else self.crop
            if side > min(width, height):
                raise UserError(
                    f"{name} is {width}x{height} (width x height), smaller than data.crop={side}; "
                    "use data.crop=square, the largest square of each image"
                )
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.resize is None:
            return image
        if image.size[0] != image.size[1]:
            raise UserError(
                f"{name} is {width}x{height} (width x height), which data.resize={self.resize} "
                "would distort; add data.crop=square, which keeps the centre"
            )
        return image.resize((self.resize, self.resize), Image.Resampling.LANCZOS)

    def of_tensor(self, images: Tensor, name: str) -> Tensor:
        """Crop and resize images that are in memory, uint8 (N, C, H, W)."""
        if self == Framing():
            return images
        return torch.stack(
            [self._one(image, f"{name} image {i}") for i, image in enumerate(images)]
        )

    def _one(self, image: Tensor, name: str) -> Tensor:
        array = image.permute(1, 2, 0).numpy()
        framed = self.apply(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), name)
        return torch.from_numpy(channels_first(np.array(framed)))


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) to (C, H, W)."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
