"""One image file to 8-bit grey or RGB: as it looks, or refused by name, never cut in silence."""

import io
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from bayesdiff.checks import UserError, one_line
from bayesdiff.data.framing import Framing, channels_first

# What Pillow and zipfile raise for damaged input.
DECODE_ERRORS = (
    *(OSError, RuntimeError, ValueError, SyntaxError, EOFError, struct.error, zlib.error),
    *(TypeError, KeyError, IndexError, OverflowError),  # from headers that lie
    *(zipfile.BadZipFile, Image.DecompressionBombError),
)
_PHOTOMETRIC = 262  # TIFF's tag for whether 0 is black
_CURE = "convert all images to 8-bit grey or RGB"
# By EXIF orientation: what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats that store grey pictures as palettes; Pillow calls some of those L.
_PALETTES = ("GIF", "BMP", "DIB", "PCX")
# Channels of 16 bits that Pillow cuts to their high byte; BGR;16 is another thing, 5 + 6 + 5 bits.
_CUT = re.compile(r";16[BLN]$")


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats it reads as pictures.

    Films, data containers without a reader, and PostScript, which is a program, are none.
    """
    Image.init()
    stubs = ImageFile.StubImageFile
    return tuple(
        name
        for name, (reader, _) in Image.OPEN.items()
        if not (isinstance(reader, type) and issubclass(reader, stubs))
        and Image.MIME.get(name, "image/").startswith("image/")
    )


@cache
def readable_endings() -> frozenset[str]:
    """Endings of the files that hold such pictures: ``.png``, ``.jpg``, ``.webp``, ..."""
    formats = {*readable_formats(), "MPO"}  # MPO is a JPEG that holds more of them
    return frozenset(e for e, name in Image.registered_extensions().items() if name in formats)


@dataclass(frozen=True)
class Pixels:
    """One picture, and what a reader of the whole data set should be told.

    Attributes:
        values: uint8 (C, H, W), one channel for grey and three for colour.
        either: the file is a palette of greys: one channel or three equal ones are both exact.
        deep: it had more than 8 bits per channel, which are rounded to 8.
        frames: it has further frames, which are not read.
        turned: its EXIF orientation was not upright, and has been applied.
    """

    values: np.ndarray
    either: bool = False
    deep: bool = False
    frames: bool = False
    turned: bool = False

    @property
    def kind(self) -> str:
        """``grey``, ``a palette of greys`` or ``RGB``."""
        return "RGB" if len(self.values) == 3 else "a palette of greys" if self.either else "grey"


def read_pixels(content: bytes, name: str, framing: Framing) -> Pixels:
    """Decode, turn upright, crop and resize one image.

    Args:
        content: the bytes of the file.
        name: of the file, for messages.
        framing: crop and resize.

    Raises:
        UserError: naming a file that is damaged, or that 8-bit grey or RGB cannot hold.
    """
    try:
        return _read(content, name, framing)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"cannot read {name} (its content is no picture that Pillow knows); "
            "replace or remove it"
        ) from error
    except DECODE_ERRORS as error:
        raise UserError(f"cannot read {name} ({one_line(error)}); replace or remove it") from error


def _read(content: bytes, name: str, framing: Framing) -> Pixels:
    with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
        stored = _stored(image)  # known only until the picture is loaded
        image.load()
        frames = bool(getattr(image, "is_animated", False)) and image.format not in ("MPO", "PSD")
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        grey = image.mode in ("1", "L") and image.format in _PALETTES
        palette = grey or image.mode in ("P", "PA")
        deep = _deep(image, stored, content, name)
        flat = _flat(image, name) if deep is None else Image.fromarray(deep)
    upright = flat if turn is None else flat.transpose(turn)
    values = channels_first(np.array(framing.apply(upright, name)))
    if palette and len(values) == 3 and (values == values[:1]).all():
        values = values[:1]
    either = palette and len(values) == 1
    return Pixels(values, either, deep is not None, frames, turn is not None)


def _stored(image: Image.Image) -> tuple[str, int]:
    """How the file stores a pixel, in Pillow's words, empty where it does not say; a PPM's white.

    A PPM may call any number up to 65,535 white; of other formats it is 0.
    """
    tiles = getattr(image, "tile", None)
    args: Any = tiles[0][3] if tiles else ""
    args = args if isinstance(args, tuple) else (args,)
    rawmode = args[0] if args and isinstance(args[0], str) else ""
    white = args[-1] if image.format == "PPM" and isinstance(args[-1], int) else 0
    return rawmode, white


def _deep(
    image: Image.Image, stored: tuple[str, int], content: bytes, name: str
) -> np.ndarray | None:
    """Rounded pixels of a file with more than 8 bits per channel, None of one with 8 or fewer."""
    rawmode, white = stored
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if "transparency" in image.info:
            raise UserError(f"{name} has mode {image.mode} and transparency; {_CURE}")
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
            raise UserError(f"{name} has 16 bits of which 0 is white; {_CURE}, or save it as PNG")
        most = 4095 if rawmode == "I;12" else 65535
        return _rounded(np.array(image).astype(np.int64), most)
    if white > 255 and image.mode == "RGB":
        return np.array(image)  # rounded by Pillow
    bits = 16 if _CUT.search(rawmode) else _bits(image.format, content)
    if bits <= 8:
        return None
    if image.format == "PNG":
        return _deep_png(image, content, name)
    raise UserError(
        f"{name} has {bits} bits per channel, of which Pillow reads 8; {_CURE}, or save it as PNG"
    )


def _rounded(values: np.ndarray, most: int) -> np.ndarray:
    """0 ... ``most`` to 0 ... 255, to the nearest."""
    if values.size and (values.min() < 0 or values.max() > most):
        raise ValueError(f"values from {values.min()} to {values.max()}, not 0 to {most}")
    return ((values * 255 + most // 2) // most).astype(np.uint8)


def _deep_png(image: Image.Image, content: bytes, name: str) -> np.ndarray:
    """Pixels of a colour PNG with 16 bits per channel, which torchvision reads whole."""
    from torchvision.io import ImageReadMode, decode_image

    try:
        packed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        values = decode_image(packed, ImageReadMode.UNCHANGED).numpy().astype(np.int64)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{name} has 16 bits per channel, which this torchvision cannot read "
            f"({one_line(error, 60)}); {_CURE}"
        ) from error
    if len(values) in (2, 4):
        if values[-1].min() < 65535:
            raise UserError(f"{name} has mode {image.mode} and transparency; {_CURE}")
        values = values[:-1]
    elif "transparency" in image.info:
        raise UserError(f"{name} has mode {image.mode} and transparency; {_CURE}")
    pixels = _rounded(values, 65535)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def _bits(kind: str | None, content: bytes) -> int:
    """Bits per channel of the formats that Pillow cuts without a word; 8 of all others."""
    if kind == "JPEG2000":
        size = content.find(b"\xff\x4f\xff\x51")  # the codestream, and its size segment
        return (content[size + 42] & 127) + 1 if size >= 0 else 8
    if kind == "SGI":
        return 8 * content[3]
    if kind == "AVIF":
        # Of every plane: marker, profile and level, a bit for the tier and two for the depth.
        planes = re.findall(rb"av1C\x81.(.)", content, re.DOTALL)
        return max((8, 8, 10, 12)[plane[0] >> 5 & 3] for plane in [b"\0", *planes])
    return 8


def _flat(image: Image.Image, name: str) -> Image.Image:
    """The picture in mode L or RGB, if that changes no pixel."""
    mode = image.mode
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        raise UserError(f"{name} has mode {mode}; {_CURE}")
    grey = mode in ("1", "L", "LA", "La")
    if image.has_transparency_data or mode in ("La", "RGBa"):
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("LA" if grey else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UserError(
                f"{name} has mode {mode} and transparency; lay all images over one background: "
                f"{_CURE}"
            )
    return image.convert("L" if grey else "RGB")
