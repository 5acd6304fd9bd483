"""Between pixels as they are stored and the range of a model."""

import torch
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0 ... 255 to float32 in [-1, 1], channels-last in memory."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] (values beyond are clipped) to uint8 in 0 ... 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
