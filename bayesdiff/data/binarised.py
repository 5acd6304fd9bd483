"""Black and white images, drawn from grey ones: a pixel v of 0 ... 255 is white with odds v/255.

Dynamic binarisation (Salakhutdinov & Murray 2008; Burda et al. 2016) draws the training images
anew in every epoch. All else sees one draw that never changes, and nobody sees the grey ones.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.counters import below, keys_of, words
from bayesdiff.data.images import ImageData, fingerprint_of
from bayesdiff.storage.artefacts import key_of

_MODES = ("dynamic", "frozen")
_TRAINING, _TESTS, _UNSEEN = range(3)  # parts of a data set, which share no random number
_AT_ONCE = 1 << 22  # pixels, for 64-bit numbers of which there is room


class Intensities:
    """What images are drawn from: grey levels that no one reads but to draw anew.

    Args:
        training: grey training images, uint8 ``(N, C, H, W)``.
        tests: grey test images, uint8 ``(M, C, H, W)``.
    """

    def __init__(self, training: Tensor, tests: Tensor) -> None:
        self._training, self._tests = training, tests

    def to(self, device: torch.device) -> "Intensities":
        """On the device that draws the training images."""
        return Intensities(self._training.to(device), self._tests)

    def training(self, places: Tensor, seed: int, epoch: int) -> Tensor:
        """Training images as an epoch sees them: a function of seed, epoch and place alone.

        Args:
            places: of the images, int64 ``(n,)``, on the device of the intensities.
            seed: of the run.
            epoch: from 0; epoch 0 of seed 0 is the draw that all else sees.

        Returns:
            uint8 ``(n, C, H, W)``, 0 and 255.
        """
        return _drawn(self._training[places], places, seed, epoch)

    def tests(self, draw: int = 0) -> Tensor:
        """One of many draws of all test images; the first is ``test_images``.

        Args:
            draw: its number, from 0.

        Returns:
            uint8 ``(M, C, H, W)``, 0 and 255.
        """
        return _whole(self._tests, _TESTS, at_least("draw", draw, 0))

    def entropy(self) -> float:
        """Nats per test image that the draw itself takes: no model says them with fewer."""
        p = self._tests.double().flatten(1) / 255
        return float((torch.special.entr(p) + torch.special.entr(1 - p)).sum(1).mean())


def binarised(data: ImageData, mode: str | None) -> ImageData:
    """The data in black and white, with a fingerprint of both.

    Args:
        data: grey images.
        mode: ``dynamic`` draws training images anew in every epoch, ``frozen`` once for all; None
            leaves the data as they are.

    Returns:
        Data whose images are all 0 and 255. They are held in memory.

    Raises:
        UserError: for another mode, and for data that are no grey images from 0 to 255.
    """
    if mode is None:
        return data
    if mode not in _MODES:
        raise UserError(f"data.binarise={mode} is unknown; use {', '.join(_MODES)} or null")
    _check(data, mode)
    images = _whole(data.images, _TRAINING)
    tests = _whole(data.test_images, _TESTS)
    fingerprint = key_of(data.fingerprint, "binarised", mode, fingerprint_of((images, tests), ()))
    grey = Intensities(data.images, data.test_images) if mode == "dynamic" else None
    others = data.unseen and replace(data.unseen, images=_whole(data.unseen.images, _UNSEEN))
    drawn = replace(data, images=images, test_images=tests, intensities=grey, unseen=others)
    return replace(drawn, fingerprint=fingerprint)


def _check(data: ImageData, mode: str) -> None:
    """Refuse what is no probability of white."""
    images = data.images
    if images.dtype != torch.uint8:
        raise UserError(
            f"data.binarise={mode} is about pictures, and {data.name} has none; leave it out"
        )
    if images.shape[1] != 1:
        raise UserError(
            f"data.binarise={mode} is about grey images, those of {data.name} have "
            f"{images.shape[1]} channels; convert them to grey"
        )
    if (brightest := int(images.max())) <= 1:
        raise UserError(
            f"data.binarise={mode}: the brightest pixel of {data.name} is {brightest} of 255, so "
            "that nearly all would be black; store images as 0 to 255"
        )


def _whole(grey: Tensor, part: int, draw: int = 0) -> Tensor:
    """A draw of all images of a part, a bounded number at once."""
    made = torch.empty_like(grey, memory_format=torch.contiguous_format)
    for places in torch.arange(len(grey)).split(max(_AT_ONCE // grey[0].numel(), 1)):
        some = grey[places].flatten(1)
        # Most pixels of most sets are black or white already, which takes no random number.
        image, pixel = ((some > 0) & (some < 255)).nonzero(as_tuple=True)
        keys = keys_of(places, 0, part, draw)[image]
        some[image, pixel] = _white(some[image, pixel], keys, pixel)
        made[places] = some.view(-1, *grey.shape[1:])
    return made


def _drawn(grey: Tensor, places: Tensor, seed: int, draw: int) -> Tensor:
    """Some training images, without a number that the processor would have to wait for."""
    keys = keys_of(places, seed, _TRAINING, draw)
    pixels = torch.arange(grey[0].numel(), device=grey.device)
    return _white(grey.flatten(1), keys[:, None], pixels).view(grey.shape)


def _white(grey: Tensor, keys: Tensor, pixels: Tensor) -> Tensor:
    # Of 255 equally likely numbers, v are below v: black stays black, and white stays white.
    return torch.where(below(words(keys, pixels), 255) < grey, 255, 0).to(torch.uint8)
