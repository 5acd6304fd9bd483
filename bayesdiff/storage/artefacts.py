"""Files that say what they came from: content keys, atomic writes, loading without code."""

import hashlib
import json
import logging
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bayesdiff.machine.costs import making
from bayesdiff.machine.ranks import barrier, rank
from bayesdiff.storage.atomic import write_atomic
from bayesdiff.storage.locks import together

log = logging.getLogger(__name__)

Made = TypeVar("Made")

# All that NumPy and zipfile raise over a damaged file.
BROKEN_NPZ = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def key_of(*parts: Any) -> str:
    """16 hex digits that change with any value in the parts (anything JSON can hold)."""
    text = json.dumps(_same_numbers(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _same_numbers(value: Any) -> Any:
    """With 1.0 as 1: a command line may give them for one another."""
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
        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:  # NumPy has none
            value = value.view(torch.int16)
        digest.update(value.numpy().tobytes())
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


@dataclass(frozen=True)
class Artefact:
    """A file that is made once, by whoever comes first, and the key of all that it comes from.

    Attributes:
        path: of the file.
        key: what the file must say of itself.
        stage: under which what it takes to make is kept; empty for a part of another stage.
    """

    path: Path
    key: str
    stage: str = ""

    def once(
        self,
        read: Callable[[], Made | None],
        make: Callable[[], Made],
        write: Callable[[Made], None],
    ) -> Made:
        """What the file holds, made and written where it holds nothing of this key.

        Every process of a run calls it; all of them make, since they share work, and the first
        one writes.

        Args:
            read: gives what the file holds, None for nothing of this key.
            make: makes it.
            write: keeps it.
        """
        with together(self.path):
            found = read()
            barrier()  # nobody writes before everybody has looked
            if found is not None:
                log.info("%s: made before", self.path.name)
                return found
            with making(self.stage):
                made = make()
            if rank() == 0:
                write(made)
            return made

    def arrays(self, make: Callable[[], Mapping[str, Tensor | None]]) -> dict[str, Tensor]:
        """Tensors, kept as an npz; None among those that are made is left out."""

        def present() -> dict[str, Tensor]:
            return {name: value for name, value in make().items() if value is not None}

        return self.once(
            lambda: read_arrays(self.path, self.key),
            present,
            lambda made: write_arrays(self.path, self.key, made),
        )

    def record(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Plain values, kept as JSON beside the key."""
        return self.once(
            self._read_record, make, lambda made: write_json(self.path, {"key": self.key, **made})
        )

    @property
    def is_made(self) -> bool:
        """Whether the file is there and says this key; npz and JSON."""
        if self.path.suffix == ".json":
            return self._read_record() is not None
        return read_arrays(self.path, self.key) is not None

    def _read_record(self) -> dict[str, Any] | None:
        found = read_json(self.path) or {}
        return found if found.get("key") == self.key else None
