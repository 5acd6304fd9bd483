"""Image files, from a folder or a zip, into one uint8 tensor."""

import io
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.progress import track

log = logging.getLogger(__name__)

# What Pillow and zipfile raise for damaged input.
DECODE_ERRORS = (
    *(OSError, RuntimeError, ValueError, SyntaxError, EOFError, struct.error, zlib.error),
    *(zipfile.BadZipFile, Image.DecompressionBombError),
)
_EXTENSIONS = (".png", ".jpg", ".jpeg")
# Only conversions that keep every pixel value: bilevel is grey, a palette is a list of RGB.
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
_CHUNK = 64  # images per thread job: few enough for a smooth bar and a quick stop on an error


def is_image(name: str) -> bool:
    """Whether a name with forward slashes is a PNG or JPEG file and not hidden."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name.lower().endswith(_EXTENSIONS) and not hidden


def image_names(base: Path) -> list[str]:
    """Sorted names of the images below ``base``, relative to it, with forward slashes.

    Raises:
        UserError: if a folder cannot be listed or there is no image.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}; check its permissions")

    # Class folders are often links into a larger collection.
    walk = os.walk(base, followlinks=True, onerror=refuse)
    found = (os.path.relpath(os.path.join(at, n), base) for at, _, ns in walk for n in ns)
    names = sorted(n for n in (f.replace(os.sep, "/") for f in found) if is_image(n))
    if not names:
        raise UserError(f"no PNG or JPEG images below {base}; set data.root to a folder of images")
    return names


def decode(names: list[str], read: Callable[[str], bytes], where: Path) -> Tensor:
    """Decode all images, with threads, into one uint8 tensor (N, C, H, W).

    Args:
        names: the images, at least one.
        read: gives the bytes of a named file; called from several threads.
        where: folder or zip, for messages.

    Raises:
        UserError: naming the file that cannot be read or differs from the first.
    """  # noqa: DOC502 - raised one level down
    first = _pixels(read, where, names[0])
    images = torch.empty((len(names), *first.shape), dtype=torch.uint8)
    log.info(
        "reading %d images from %s, %.0f MB in memory", len(names), where, images.nbytes / 1e6
    )

    def fill(start: int) -> None:
        for i, name in enumerate(names[start : start + _CHUNK], start):
            pixels = _pixels(read, where, name)
            _check_alike(where, (names[0], name), (first, pixels))
            images[i] = torch.from_numpy(pixels)

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    starts = range(0, len(names), _CHUNK)
    try:
        for done in track([pool.submit(fill, start) for start in starts], "reading images"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def one_line(error: BaseException) -> str:
    """The reason in one line of at most 160 characters, or the type of an empty one."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _pixels(read: Callable[[str], bytes], where: Path, name: str) -> np.ndarray:
    """Decode one image to uint8 (C, H, W): 1 channel for grey, 3 for colour.

    Raises:
        UserError: for a damaged file and for modes that would lose something.
    """
    try:
        with Image.open(io.BytesIO(read(name))) as image:
            mode, clear = image.mode, image.has_transparency_data
            pixels = np.array(image.convert(_MODES.get(mode)))
    except DECODE_ERRORS as error:
        raise UserError(
            f"cannot read {where / name} ({one_line(error)}); replace or remove it"
        ) from error
    if mode not in _MODES or clear:
        extra = " and transparency" if clear else ""
        raise UserError(
            f"{where / name} has mode {mode}{extra}; convert all images to 8-bit grey or RGB"
        )
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_alike(where: Path, names: tuple[str, str], pixels: tuple[np.ndarray, ...]) -> None:
    (a, b), (x, y) = names, pixels
    if len(x) != len(y):
        kinds = ["grey" if len(p) == 1 else "RGB" for p in pixels]
        raise UserError(
            f"mixed modes in {where}: {a} is {kinds[0]}, {b} is {kinds[1]}; "
            "convert all to grey or all to RGB"
        )
    if x.shape != y.shape:
        sizes = [f"{p.shape[2]}x{p.shape[1]}" for p in pixels]
        raise UserError(
            f"mixed sizes in {where}: {a} is {sizes[0]}, {b} is {sizes[1]} (width x height); "
            "resize all to one square size"
        )
