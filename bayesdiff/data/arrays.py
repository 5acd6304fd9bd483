"""Images as NumPy arrays, in memory or mapped from disk: the recipe ``data=array``."""

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData, hold_out
from bayesdiff.data.pixels import one_line

_NAMES = (
    *("images", "labels", "embeddings", "classes"),
    *("test_images", "test_labels", "test_embeddings"),
)


def array_images(
    name: str,
    root: str | Path | None,
    mapped: bool = False,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Arrays ``images`` and, if wanted, ``labels``, ``classes``, ``embeddings``, and ``test_*``.

    Nothing is unpickled. Mapped images stay in their file: batches, passes and classifiers on a
    CPU read the rows that they need, and the operating system drops them when memory is short.

    Args:
        name: short name of the data set.
        root: ``.npz`` with arrays of these names, a folder of ``images.npy``, ``labels.npy`` and
            so on, or one ``.npy`` of images. ``images`` is uint8 ``(N, H, W)`` or
            ``(N, C, H, W)``, ``labels`` whole numbers ``(N,)``, ``classes`` their names,
            ``embeddings`` floats ``(N, E)``.
        mapped: leave images on disk; needs a folder with ``test_images.npy``.
        test_fraction: share to hold out, between 0 and 1; used without ``test_images``.
        seed: chooses which images are held out.

    Raises:
        UserError: for files that are missing, damaged or hold objects, and arrays that do not
            fit each other.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
        >>> np.savez(file, images=images, labels=np.arange(20) % 2, classes=["even", "odd"])
        >>> data = array_images("mine", file, test_fraction=0.1)
        >>> data.images.shape, len(data.test_images), data.classes
        (torch.Size([18, 1, 8, 8]), 2, ('even', 'odd'))
    """
    if root is None or not str(root):
        raise UserError("data.root is not set; give data.root=images.npz, or a folder of .npy")
    where = Path(str(root)).expanduser()
    arrays = _read(where, mapped)
    if "images" not in arrays:
        raise UserError(f"{where} has no array named images; it has {', '.join(arrays) or 'none'}")
    images, vectors = _images(arrays["images"]), _vectors(arrays, "embeddings")
    labels = _labels(arrays, "labels", where)
    classes = _classes(arrays, labels)
    if "test_images" not in arrays:
        if mapped:
            folder = where if where.is_dir() else where.parent
            raise UserError(
                f"data.source.mapped=true needs {folder / 'test_images.npy'}: holding out a share "
                "would copy all images into memory; save some apart"
            )
        if labels is not None and len(labels) != len(images):
            raise UserError(
                f"{where}: {len(labels)} labels for {len(images)} images; give as many"
            )
        return hold_out(name, images, labels, classes, test_fraction, seed, vectors)
    tests = _images(arrays["test_images"]), _labels(arrays, "test_labels", where)
    others = _vectors(arrays, "test_embeddings")
    if (vectors is None) != (others is None):
        raise UserError(f"{where}: only one of embeddings and test_embeddings; give both")
    both = None if vectors is None or others is None else (vectors, others)
    return ImageData.build(name, images, labels, *tests, classes, both)


def _read(where: Path, mapped: bool) -> dict[str, np.ndarray]:
    """The arrays by name."""
    if not where.exists():
        raise UserError(
            f"data.root={where} does not exist; give an .npz, .npy or a folder of .npy"
        )
    if mapped and where.suffix == ".npz":
        raise UserError(
            f"{where} is a zip, which cannot be mapped; save its arrays as .npy files in a folder"
        )
    if where.is_dir():
        files = {each: where / f"{each}.npy" for each in _NAMES}
        return {each: _load(path, mapped) for each, path in files.items() if path.is_file()}
    found = _load(where, mapped)
    return found if isinstance(found, dict) else {"images": found}


def _load(path: Path, mapped: bool) -> Any:
    """One array, or those of a zip."""
    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found
        with found:
            return {each: found[each] for each in _NAMES if each in found.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"cannot read {path} ({one_line(error)}); save plain arrays with numpy.save or savez"
        ) from error


def _images(array: np.ndarray) -> Tensor:
    """``(N, H, W)`` or ``(N, C, H, W)`` as a tensor on the same memory."""
    if array.dtype.kind not in "biuf" or not array.dtype.isnative:  # others are refused later
        raise UserError(f"images are {array.dtype}; give uint8, values 0 to 255")
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():  # nothing ever writes to images, so read-only memory will do
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        images = torch.from_numpy(array)
    return images[:, None] if images.ndim == 3 else images


def _labels(arrays: dict[str, np.ndarray], name: str, where: Path) -> Tensor | None:
    if name not in arrays:
        return None
    if arrays[name].dtype.kind not in "iu":
        raise UserError(f"{where}: {name} are {arrays[name].dtype}; give whole numbers from 0")
    return torch.from_numpy(np.array(arrays[name], dtype=np.int64))


def _classes(arrays: dict[str, np.ndarray], labels: Tensor | None) -> tuple[str, ...]:
    """Names that are given, else numbers."""
    if labels is None:
        return ()
    if "classes" in arrays:
        return tuple(str(each) for each in arrays["classes"].tolist())
    most = int(labels.max()) if len(labels) else -1
    if most >= len(arrays["images"]):  # numbers of something else; every class has an image
        raise UserError(f"labels go up to {most}; number the classes from 0")
    return tuple(str(number) for number in range(most + 1))


def _vectors(arrays: dict[str, np.ndarray], name: str) -> Tensor | None:
    if name not in arrays:
        return None
    return torch.from_numpy(np.array(arrays[name])).float()
