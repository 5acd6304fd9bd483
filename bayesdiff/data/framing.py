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
        crop: (height, width) of the centred part that is cut out, ``"square"`` for the largest
            square, or None.
        resize: (height, width) that it is brought to, of the same shape, or None.
    """

    crop: tuple[int, int] | str | None = None
    resize: tuple[int, int] | None = None

    @classmethod
    def of(cls, crop: Any = None, resize: Any = None) -> Self:
        """From ``data.crop`` (number, ``[height, width]`` or ``square``) and ``data.resize``.

        Raises:
            UserError: for values that are none of these.
        """
        if isinstance(crop, str) and crop != "square":
            raise UserError(
                f"data.crop={crop} is unknown; give the side in pixels, [height,width] or square"
            )
        return cls(crop if crop == "square" else _sides("crop", crop), _sides("resize", resize))

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
            side = min(width, height)
            tall, wide = (side, side) if isinstance(self.crop, str) else self.crop
            if tall > height or wide > width:
                raise UserError(
                    f"{name} is {width}x{height} (width x height), smaller than "
                    f"data.crop={_shown((tall, wide))}; "
                    "use data.crop=square, the largest square of each image"
                )
            left, top = (width - wide) // 2, (height - tall) // 2
            image = image.crop((left, top, left + wide, top + tall))
        if self.resize is None:
            return image
        tall, wide = self.resize
        if image.size[0] * tall != image.size[1] * wide:
            raise UserError(
                f"{name} is {width}x{height} (width x height), which "
                f"data.resize={_shown(self.resize)} would distort; add data.crop=square, which "
                "keeps the centre, or crop and resize to [height,width] of one shape"
            )
        return image.resize((wide, tall), Image.Resampling.LANCZOS)

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


def _sides(option: str, given: Any) -> tuple[int, int] | None:
    """Height and width from one number, or from both."""
    if given is None:
        return None
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = (given, given)
    sides = [at_least(f"data.{option}", side) for side in given]
    if len(sides) != 2:
        raise UserError(f"data.{option}={sides} is not [height,width]; give one number, or both")
    return sides[0], sides[1]


def _shown(sides: tuple[int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[1] else f"[{sides[0]},{sides[1]}]"


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) to (C, H, W)."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
