"""Files that say what they came from: content keys, atomic writes, loading without code."""

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesdiff.storage.atomic import write_atomic

# All that NumPy and zipfile raise over a damaged file.
BROKEN_NPZ = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def key_of(*parts: Any) -> str:
    """16 hex digits that change with any value in the parts (anything JSON can hold)."""
    text = json.dumps(_same_numbers(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _same_numbers(value: Any) -> Any:
    """The same for 1 and 1.0, which a command line may give for one another."""
    if isinstance(value, Mapping):
        return {key: _same_numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_same_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def weights_key(model: nn.Module) -> str:
    """16 hex digits that change with any weight or buffer of the model."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomic(path, lambda file: _write_text(file, text))


def finite(value: Any) -> Any:
    """Plain JSON: tensors as lists, numbers that are not finite as None, in any nesting."""
    if isinstance(value, Tensor):
        return finite(value.tolist())
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, or None if it is missing or not JSON (a write that never finished)."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_arrays(path: Path, key: str, arrays: Mapping[str, Tensor | None]) -> None:
    """Write tensors and the key of what they came from as one npz, atomically."""
    present = {name: value.cpu().numpy() for name, value in arrays.items() if value is not None}
    write_atomic(
        path, lambda file: np.savez(file, allow_pickle=False, key=np.array(key), **present)
    )


def read_arrays(path: Path, key: str | None = None) -> dict[str, Tensor] | None:
    """The tensors of an npz; None if it is missing, broken, or made from another ``key``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if key is not None and str(file["key"]) != key:
                return None
            return {name: torch.from_numpy(file[name]) for name in file.files if name != "key"}
    except BROKEN_NPZ:
        return None
