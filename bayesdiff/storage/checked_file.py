"""Tensors and a record in one safetensors file with a checksum; loading never runs code."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.storage.artefacts import write_atomic

Built = TypeVar("Built")


def save_checked(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write both; a crash leaves the old file or none, never half.

    Args:
        path: of the file.
        kind: format and version, such as ``bayesdiff-curvature-3``.
        tensors: by name.
        facts: what JSON can hold.
    """
    found = {name: value.cpu().contiguous() for name, value in tensors.items()}
    record = json.dumps(facts)
    metadata = {"format": kind, "record": record, "checksum": checksum(found, record)}
    write_atomic(Path(path), lambda file: save_file(found, file, metadata))


def load_checked(
    path: str | Path,
    kinds: Sequence[str],
    what: str,
    cure: str,
    build: Callable[[str, dict[str, Tensor], dict[str, Any]], Built],
) -> Built:
    """Build what ``save_checked`` wrote.

    Args:
        path: of the file.
        kinds: formats that may be read, the present one first.
        what: the content's name for messages.
        cure: what to do about a file that cannot be read.
        build: makes it of format, tensors and facts.

    Raises:
        UserError: if the file is missing, truncated, changed, or something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in kinds:
                found = metadata.get("format", "no format")
                raise UserError(f"{path} is not a {kinds[0]} file (has {found}); {cure}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum(tensors, metadata["record"]) != metadata["checksum"]:
            raise UserError(f"{path} is damaged (its checksum differs); {cure}")
        return build(metadata["format"], tensors, json.loads(metadata["record"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as {what} ({reason}); {cure}") from error


def checksum(tensors: Mapping[str, Tensor], record: str) -> str:
    """SHA-256 over the bytes of the tensors, in order of their names, and the record."""
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
