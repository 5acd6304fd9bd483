"""Other data than the model was trained on, to hold against the held-out images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.binarised import binarised
from bayesdiff.data.images import ImageData

# Another data set, or a change of the held-out images.
Shift = ImageData | Callable[[Tensor], Tensor]


def inverted(images: Tensor) -> Tensor:
    """Black for white, uint8 ``(N, C, H, W)``.

    Example:
        >>> inverted(torch.tensor([[[[0, 100, 255]]]], dtype=torch.uint8))
        tensor([[[[255, 155,   0]]]], dtype=torch.uint8)
    """
    return 255 - images


def shuffled(images: Tensor, seed: int = 0) -> Tensor:
    """All pixels in another order, the same for all images.

    Args:
        images: uint8 ``(N, C, H, W)``.
        seed: of the order.

    Example:
        >>> images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
        >>> other = shuffled(images)
        >>> other.flatten(1).sort().values.tolist()  # the same pixels
        [[0, 1, 2, 3], [4, 5, 6, 7]]
        >>> torch.equal(other[1] - other[0], images[1] - images[0])  # in one order for all images
        True
    """
    height, width = images.shape[2:]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
    return images.flatten(2)[:, :, order].unflatten(2, (height, width))


def shifted(shift: Shift, held_out: Tensor, binarise: str | None, chosen: Tensor) -> Tensor:
    """Shifted images, as many as held-out ones and treated as they are.

    Args:
        shift: another data set, whose test images are taken, or a function of images.
        held_out: uint8 ``(N, C, H, W)``, those that are chosen.
        binarise: of the training data: None leaves images grey.
        chosen: numbers ``(N,)`` among the test images, counted anew in a smaller set.

    Returns:
        uint8 ``(N, C, H, W)``.

    Raises:
        UserError: for images of another shape, too few of them, or no data at all.
    """
    if not isinstance(shift, ImageData):
        if not callable(shift):
            raise UserError(
                f"beliefs.shift={shift!r} gives no images; use shift@beliefs.shift=inverted, or "
                "another data source"
            )
        return shift(held_out)
    if shift.test_images.shape[1:] != held_out.shape[1:]:
        there, here = ("x".join(map(str, x.shape[1:])) for x in (shift.test_images, held_out))
        raise UserError(
            f"beliefs.shift={shift.name} has images of {there}, the model is of {here}; give "
            "its source resize=, or take other data"
        )
    if len(shift.test_images) < len(held_out):
        raise UserError(
            f"beliefs.shift={shift.name} has {len(shift.test_images)} test images, "
            f"beliefs.num_images={len(held_out)} are asked for; use fewer"
        )
    images = shift.test_images[chosen % len(shift.test_images)]
    few = replace(shift, images=images, test_images=images, intensities=None, unseen=None)
    # One draw that never changes, like that of the held-out images.
    return binarised(few, "frozen" if binarise else None).test_images


def name_of(shift: Any) -> str | None:
    """What a figure calls it; None for none."""
    if shift is None:
        return None
    function = getattr(shift, "func", shift)
    return str(getattr(shift, "name", getattr(function, "__name__", function)))
