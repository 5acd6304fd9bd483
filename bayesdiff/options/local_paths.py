"""Paths of a configuration as this machine has them: settled once, before anything reads one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from bayesdiff.checks import UserError

# Of an option that holds a path, by its last word; a logger's addresses are its own business.
_NAMES = re.compile(r"(^|\.)(\w+_(dir|path|root)|root|path|init_from)$")
_FOREIGN = ("hydra", "logger", "callbacks")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FOLDERS = ("output_dir", "run_dir")

Container = DictConfig | ListConfig


def settle(cfg: DictConfig) -> None:
    """Expand ``~`` in every value, in place, and refuse what is no local path.

    Two readers of one option then mean one place, whoever of them would have expanded it.

    Raises:
        UserError: for an empty path, an address, a NUL character, the home of nobody, or a folder
            that is a file.
    """
    for node, key, name, value in list(_texts(cfg)):
        if "\0" in value:
            raise UserError(f"{name}={value!r} has a NUL character; take it out")
        is_path = bool(_NAMES.search(name)) and not name.startswith(_FOREIGN)
        if is_path:
            _require_local(name, value)
        if value == "~" or re.match(r"~[\w.-]*/|~\w[\w.-]*$", value):
            there = os.path.expanduser(value)
            if is_path and there == value:
                raise UserError(f"{name}={value} is the home of nobody here; correct it")
            with read_write(cfg):
                node[key] = there
    for name in _FOLDERS:
        if isinstance(value := cfg.get(name), str):
            _require_folder(name, Path(value))


def _texts(node: Container, place: str = "") -> Iterator[tuple[Container, Any, str, str]]:
    """Container, key, whole name and value of every text in a configuration.

    Yields:
        All but what is Hydra's own.
    """
    keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        name = f"{place}.{key}" if place else str(key)
        if name == "hydra" or OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, Container):
            yield from _texts(value, name)
        elif isinstance(value, str):
            yield node, key, name, value


def _require_local(name: str, value: str) -> None:
    if not value.strip():
        raise UserError(f"{name}= is empty (an unset variable?); give a path, or leave it out")
    if _ADDRESS.match(value):
        raise UserError(
            f"{name}={value} is an address, not a path on this machine; give a local one, "
            "such as where that storage is mounted"
        )


def _require_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is, or lies below, a file."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise UserError(f"{name}={folder}: {place} is a file; choose a folder")
