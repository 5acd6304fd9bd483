"""Files that say what they came from: content keys, atomic writes, loading without code."""

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.disk import write_atomic

# All that NumPy and zipfile raise over a damaged file.
BROKEN_NPZ = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def key_of(*parts: Any) -> str:
    """16 hex digits that change with any value in the parts (anything JSON can hold)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def read_arrays(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of an npz made from ``key``; None if it is missing, broken or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            return {name: torch.from_numpy(file[name]) for name in file.files if name != "key"}
    except BROKEN_NPZ:
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint as plain values and tensors; no code in it is ever run.

    Raises:
        UserError: if it is missing, truncated, holds code, or is no Lightning checkpoint.
    """
    import pickle

    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train first, or correct ckpt_path")
    damaged = (
        f"checkpoint {path} is truncated or corrupt; correct ckpt_path, or delete a run's own "
        "last.ckpt to train again"
    )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # torch reads past a wrong checksum
                if file.testzip() is not None:
                    raise UserError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds code or is no checkpoint, it was not run; "
            "save plain tensors and values instead"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the reader meets arbitrary bytes and may raise anything
        raise UserError(damaged) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} is not a Lightning checkpoint: it has no state_dict of tensors")
    return checkpoint


def note_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run it is of: key, config, data; empty in others' files."""
    note = read_checkpoint(path).get("bayesdiff")
    return note if isinstance(note, dict) else {}


def require_options(path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a checkpoint that was trained with other options, which no shape need betray.

    Args:
        path: of the checkpoint; those of other programs say nothing and are taken.
        config: options here, nested.
        names: of those that must be the same, such as ``model.prediction``; ``net`` is all of it.

    Raises:
        UserError: if one is not.
    """
    there = note_of(path).get("config")
    if not there:
        return
    for name in names:
        one, other = (_leaves(values, name) for values in (config, there))
        for leaf in one | other:
            if one.get(leaf) != other.get(leaf):
                raise UserError(
                    f"checkpoint {path} was trained with {leaf}={other.get(leaf)}, not "
                    f"{one.get(leaf)}; give the options it was trained with"
                )


def _leaves(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values at ``name`` and below it, by their full names."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key in value for k, v in _leaves(config, f"{name}.{key}").items()}


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a checkpoint's (averaged) weights into the model and return their key.

    Raises:
        UserError: if the checkpoint cannot be read, or belongs to another network.
    """  # noqa: DOC502 - raised one level down
    return load_state(model, read_checkpoint(path)["state_dict"], path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> str:
    """Load the weights that were read from ``path`` into the model and return their key.

    Raises:
        UserError: if they belong to another network.
    """
    own = model.state_dict()
    odd = [n for n in own.keys() | state.keys() if _shape(own, n) != _shape(state, n)]
    if odd:
        name = min(odd)
        raise UserError(
            f"checkpoint {path} belongs to another network: {name} is {_shape(state, name)} there "
            f"and {_shape(own, name)} here; give the options it was trained with"
        )
    model.load_state_dict(state)
    return weights_key(model)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "missing"
