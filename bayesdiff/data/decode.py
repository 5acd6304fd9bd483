"""Image files, from a folder or a zip, into one uint8 tensor."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bayesdiff.checks import UserError, one_line
from bayesdiff.data.framing import Framing
from bayesdiff.data.listing import shown
from bayesdiff.data.pixels import DECODE_ERRORS, Pixels, read_pixels
from bayesdiff.machine.progress import track

log = logging.getLogger(__name__)

_CHUNK = 64  # images per thread job: few enough for a smooth bar and a quick stop on an error
_DARK = 16  # brightest of 255 where 16 bits hold 12


class _Colour(Exception):
    """Names an RGB image among palettes of greys, which are RGB then."""


@dataclass(frozen=True)
class Decoded:
    """The images of one part of a data set.

    Attributes:
        images: uint8 (N, C, H, W).
        either: all of them are palettes of greys: one channel or three equal ones are both exact.
    """

    images: Tensor
    either: bool = False

    def like(self, other: "Decoded") -> Tensor:
        """The images; palettes of greys have three channels where the other part has them."""
        if self.either and self.images.shape[1] < other.images.shape[1]:
            return self.images.expand(-1, other.images.shape[1], -1, -1).contiguous()
        return self.images


@dataclass
class _Notes:
    """Files of which the log says something, and how many are palettes of greys."""

    frames: list[str] = field(default_factory=list)
    deep: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    either: list[str] = field(default_factory=list)

    def add(self, name: str, pixels: Pixels) -> None:
        for kind in ("frames", "deep", "turned", "either"):
            if getattr(pixels, kind):
                getattr(self, kind).append(name)

    def say(self, where: Path, images: Tensor) -> None:
        if self.frames:
            _say(where, self.frames, "several frames, of which the first is read")
        if self.deep:
            _say(where, self.deep, "more than 8 bits per channel, rounded to 8")
            if len(self.deep) == len(images) and int(images.max()) <= _DARK:
                log.warning(
                    "%s: no image is brighter than %d of 255; their bits seem to hold fewer: "
                    "scale them first",
                    where,
                    int(images.max()),
                )
        if self.turned:
            _say(where, self.turned, "an EXIF orientation, which is applied", logging.INFO)


def _say(where: Path, names: list[str], what: str, level: int = logging.WARNING) -> None:
    example = shown(min(names))
    log.log(level, "%s: %d file(s) have %s (for example %s)", where, len(names), what, example)


def decode(
    names: list[str], read: Callable[[str], bytes], where: Path, framing: Framing | None = None
) -> Decoded:
    """Decode all images, with threads.

    Args:
        names: the images, at least one.
        read: gives the bytes of a named file; called from several threads.
        where: folder or zip, for messages.
        framing: crop and resize of every image.

    Raises:
        UserError: naming the file that cannot be read or differs from the first.
    """  # noqa: DOC502 - raised one level down

    def pixels(name: str) -> Pixels:
        try:
            content = read(name)
        except DECODE_ERRORS as error:
            raise UserError(
                f"cannot read {shown(where / name)} ({one_line(error)}); replace or remove it"
            ) from error
        return read_pixels(content, shown(where / name), framing or Framing())

    try:
        return _decode_like(names[0], names, pixels, where)
    except _Colour as colour:
        return _decode_like(str(colour), names, pixels, where)


def _decode_like(
    like: str, names: list[str], pixels: Callable[[str], Pixels], where: Path
) -> Decoded:
    """All images, if they are like the one of the name ``like``."""
    first = pixels(like)
    images = torch.empty((len(names), *first.values.shape), dtype=torch.uint8)
    log.info(
        "reading %d images from %s, %.0f MB in memory", len(names), where, images.nbytes / 1e6
    )
    notes = _Notes()

    def fill(start: int) -> None:
        for i, name in enumerate(names[start : start + _CHUNK], start):
            this = pixels(name)
            notes.add(name, this)
            if first.either and this.kind == "RGB":
                raise _Colour(name)
            _check_alike(where, (like, name), (first, this))
            images[i] = torch.from_numpy(this.values)  # a palette of greys fills three channels

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    starts = range(0, len(names), _CHUNK)
    try:
        for done in track(
            [pool.submit(fill, start) for start in starts], "reading images", "parts"
        ):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    notes.say(where, images)
    return Decoded(images, either=len(notes.either) == len(names))


def _check_alike(where: Path, names: tuple[str, str], both: tuple[Pixels, Pixels]) -> None:
    a, b = (shown(name) for name in names)
    x, y = (pixels.values for pixels in both)
    if len(x) != len(y) and not both[1].either:
        raise UserError(
            f"mixed modes in {where}: {a} is {both[0].kind}, {b} is {both[1].kind}; "
            "convert all to grey or all to RGB"
        )
    if x.shape[1:] != y.shape[1:]:
        sizes = [f"{p.shape[2]}x{p.shape[1]}" for p in (x, y)]
        raise UserError(
            f"mixed sizes in {where}: {a} is {sizes[0]}, {b} is {sizes[1]} (width x height); "
            "add data.resize=64 data.crop=square, or another side, to bring all to one size"
        )
