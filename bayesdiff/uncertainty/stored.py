"""Samples as a file: what the arrays of an npz are called, and how they are read back."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.storage.artefacts import read_arrays
from bayesdiff.uncertainty.samples import Samples

_NAMES = tuple(field.name for field in fields(Samples))
_TEXTS = ("estimator", "units")


def to_arrays(samples: Samples) -> dict[str, Tensor | None]:
    """Every attribute as a tensor, texts as bytes; None for what the samples do not have."""
    values: dict[str, Any] = {name: getattr(samples, name) for name in _NAMES}
    values["nfe"] = torch.tensor(samples.nfe)
    for name in _TEXTS:
        values[name] = torch.tensor(list(values[name].encode()), dtype=torch.uint8)
    return values


def from_arrays(arrays: Mapping[str, Tensor]) -> Samples:
    """The samples behind ``to_arrays``, in the units they were stored in."""
    values: dict[str, Any] = {"labels": None, **{n: arrays[n] for n in _NAMES if n in arrays}}
    values["nfe"] = int(arrays["nfe"])
    for name in _TEXTS:
        values[name] = bytes(arrays[name].tolist()).decode()
    return Samples(**values)


def stored_samples(path: str | Path) -> Samples | None:
    """The samples in a file, images in [-1, 1]; None where there are none that can be read.

    Example:
        After the example of ``starts_of``:

        >>> import tempfile
        >>> from bayesdiff.storage.artefacts import write_arrays
        >>> from bayesdiff.uncertainty import Ensemble
        >>> samples = Ensemble(members=4).mapped(starts, [0, 1], posterior)
        >>> file = Path(tempfile.mkdtemp()) / "maps.npz"
        >>> write_arrays(file, "key", to_arrays(samples))  # as a run does
        >>> torch.equal(stored_samples(file).variance, samples.variance)
        True
    """
    arrays = read_arrays(Path(path))
    try:
        return None if arrays is None else from_arrays(arrays).in_model_range()
    except (KeyError, TypeError, ValueError):  # not all of them are there
        return None
