"""Graded distortions of uint8 images; each takes images, its strength and a generator."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.v2.functional import gaussian_blur


def gaussian_noise(images: Tensor, sd: float, generator: Generator) -> Tensor:
    """Independent noise of this standard deviation, in grey levels, on every value."""
    noise = sd * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def blur(images: Tensor, sigma: float, _: Generator) -> Tensor:
    """A Gaussian filter of this width in pixels."""
    half = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [2 * half + 1] * 2, [sigma, sigma])


def salt_and_pepper(images: Tensor, share: float, generator: Generator) -> Tensor:
    """This share of the pixels is black or white, all channels alike."""
    chance = torch.rand(images[:, :1].shape, generator=generator).expand_as(images)
    return images.where(chance >= share, 255 * (chance < share / 2).to(torch.uint8))


def rectangle(images: Tensor, area: float, generator: Generator) -> Tensor:
    """One black rectangle that covers about this share of the image, at a random place."""
    count, _, height, width = images.shape
    aspect = 2 ** (2 * torch.rand(count, generator=generator) - 1)
    size = torch.tensor([height, width]) * area**0.5
    sides = (size * torch.stack([aspect**0.5, aspect**-0.5], 1)).round().clamp(min=1)
    sides = sides.minimum(torch.tensor([float(height), float(width)]))
    room = torch.tensor([height, width]) - sides
    first = (torch.rand(count, 2, generator=generator) * (room + 1)).floor()
    inside = [
        (torch.arange(n) >= first[:, k, None]) & (torch.arange(n) < (first + sides)[:, k, None])
        for k, n in enumerate((height, width))
    ]
    covered = inside[0][:, :, None] & inside[1][:, None, :]
    return images.masked_fill(covered[:, None], 0)


def jpeg(images: Tensor, quality: float, _: Generator) -> Tensor:
    """Compressed and read again; the lower the quality, the worse."""
    return torch.stack([decode_jpeg(encode_jpeg(image, int(quality))) for image in images])


def swirl(images: Tensor, angle: float, _: Generator) -> Tensor:
    """Turned by this angle in radians at the centre, and by less and less towards the border."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width),
                          indexing="ij")  # fmt: skip
    turned = torch.atan2(y, x) + angle * torch.exp(-3 * (x.square() + y.square()))
    radius = (x.square() + y.square()).sqrt()
    grid = radius[..., None] * torch.stack([turned.cos(), turned.sin()], -1)
    grid = grid.expand(len(images), -1, -1, -1)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=True)
    return moved.round().clamp(0, 255).to(torch.uint8)


def mode_drop(images: Tensor, labels: Tensor, dropped: float, generator: Generator) -> Tensor:
    """The images of this many classes, taken at random, give way to repeated ones of the rest."""
    classes = labels.unique()
    order = classes[torch.randperm(len(classes), generator=generator)]
    gone = torch.isin(labels, order[: int(dropped)])
    kept = (~gone).nonzero().flatten()
    index = torch.arange(len(images))
    chosen = torch.randint(len(kept), (int(gone.sum()),), generator=generator)
    index[gone] = kept[chosen]
    return images[index]


Distortion = Callable[[Tensor, float, Generator], Tensor]
PIXELS: dict[str, tuple[Distortion, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (5, 10, 20, 40, 80)),
    "blur": (blur, (0.4, 0.6, 1.0, 1.5, 2.5)),
    "salt_and_pepper": (salt_and_pepper, (0.005, 0.01, 0.03, 0.1, 0.3)),
    "rectangle": (rectangle, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "jpeg": (jpeg, (80, 40, 20, 10, 5)),
    "swirl": (swirl, (0.25, 0.5, 1.0, 2.0, 4.0)),
}
CLASSES = (1, 2, 4, 6, 8)
STRENGTHS = {name: strengths for name, (_, strengths) in PIXELS.items()} | {"mode_drop": CLASSES}


def distorted(images: Tensor, labels: Tensor, kind: str, level: int, seed: int) -> Tensor:
    """Images ``(N, C, H, W)`` uint8 at one level of a kind; level 0 leaves them as they are."""
    if not level:
        return images
    generator = torch.Generator().manual_seed(seed)
    strength = STRENGTHS[kind][level - 1]
    if kind == "mode_drop":
        return mode_drop(images, labels, strength, generator)
    return PIXELS[kind][0](images, strength, generator)
