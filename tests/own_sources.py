"""Data sets and networks that a user might bring: nothing in the package knows them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from bayesdiff.data.images import ImageData, hold_out
from bayesdiff.data.sources import digits


def whole_digits():
    """All digits, (1797, 1, 8, 8) uint8, and their classes."""
    data = digits()
    images = torch.cat([data.images, data.test_images])
    return images, torch.cat([data.labels, data.test_labels]), data.classes


def digits_with_angles(labelled=True, **_) -> ImageData:
    """Digits with (cos, sin) of their class's place on a circle."""
    images, labels, classes = whole_digits()
    angles = 2 * math.pi * labels / 10
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    if not labelled:
        labels, classes = None, ()
    return hold_out("angles", images, labels, classes, 1 / 6, 0, vectors)


def wide_digits(width=12, **_) -> ImageData:
    """Digits with the left part of the next one beside them, 8 x ``width``."""
    images, labels, classes = whole_digits()
    wide = torch.cat([images, images.roll(-1, 0)], 3)[..., :width].contiguous()
    return hold_out("wide", wide, labels, classes, 1 / 6, 0)


class Foreign(nn.Module):
    """A convolutional net as others write it: nothing of it is named as here."""

    def __init__(self, channels=1, width=6):
        super().__init__()
        self.inner = nn.Conv2d(channels, width, 3, padding=1)
        self.clock = nn.Linear(1, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, images, times):
        hidden = F.gelu(
            self.inner(images) + self.clock(times[:, None].to(images))[..., None, None]
        )
        return self.out(hidden)


class Tokens(nn.Module):
    """A small transformer on 2x2 patches of 8x8 images; what follows its last layer is a fold."""

    def __init__(self, width=6, classes=10, room=1):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.label = nn.Embedding(classes + room, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.final = nn.ModuleDict({"norm": nn.LayerNorm(width), "linear": nn.Linear(width, 4)})

    def forward(self, x, t, y):
        tokens = self.embed(x).flatten(2).mT + self.place
        tokens = tokens + self.label(y)[:, None] + t[:, None, None].to(x)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.unpatchify(self.final["linear"](self.final["norm"](tokens)))

    def unpatchify(self, tokens):
        return F.pixel_shuffle(tokens.mT.unflatten(2, (4, 4)), 2)


class AngleNet(nn.Module):
    """One convolution, moved by time and a vector; the head sees what comes out."""

    def __init__(self, in_channels, embedding_size, width=6):
        super().__init__()
        self.body = nn.Conv2d(in_channels, width, 3, padding=1)
        self.given = nn.Linear(embedding_size + 1, width)
        self.head = nn.Conv2d(width, in_channels, 1)

    def features(self, x, t, y=None):
        y = torch.cat([t[:, None].to(x), y.to(x)], 1)
        return F.silu(self.body(x) + self.given(y)[:, :, None, None])

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))
