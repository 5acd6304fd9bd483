"""Images that torchvision reads, and fetches where they are missing."""

import logging
from http.client import HTTPException
from pathlib import Path

import torch

from bayesdiff.checks import UserError, one_line
from bayesdiff.data.decode import Decoded
from bayesdiff.data.folders import Part
from bayesdiff.data.framing import Framing

log = logging.getLogger(__name__)

# What torchvision raises for a failed download and for damaged files.
_TORCHVISION_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError),
    HTTPException,
)
_FETCH = "set data.source.download=true"


def torchvision_part(
    dataset: str, root: Path, train: bool, download: bool, framing: Framing
) -> Part:
    """Training or test images of one of torchvision's sets.

    Args:
        dataset: class of ``torchvision.datasets``.
        root: folder in torchvision's own layout.
        train: training images, otherwise test images.
        download: fetch missing files.
        framing: of every image.

    Raises:
        UserError: if the files are missing and cannot be fetched, or are damaged.
    """
    from torchvision import datasets

    source = getattr(datasets, dataset)
    files = root / getattr(source, "base_folder", f"{dataset}/raw")
    # A failed download leaves the folder empty: that is missing, not damaged.
    there = next(files.glob("*"), None) is not None
    state = "is incomplete or damaged" if there else "is missing"
    try:
        try:
            data = source(str(root), train=train, download=False)
        except _TORCHVISION_ERRORS:
            if not download:
                raise
            log.info("%s %s; torchvision fetches what is missing", files, state)
            data = source(str(root), train=train, download=True)
    except _TORCHVISION_ERRORS as error:
        repair = "delete it to fetch it again" if there else "check the network"
        raise UserError(
            f"{dataset}: {files} {state} ({one_line(error)}); set data.root or BAYESDIFF_DATA to "
            f"a folder with {files.relative_to(root)}, or {repair if download else _FETCH}"
        ) from error
    pixels = torch.as_tensor(data.data)
    # The MNIST family is (N, H, W); CIFAR-10 is (N, H, W, C).
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(data.targets).long()
    decoded = Decoded(framing.of_tensor(images.contiguous(), dataset))
    return Part(decoded, labels, tuple(data.classes))
