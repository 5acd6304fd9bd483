"""What code outside this package does to a run: hashes of the files behind ``_target_``."""

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import get_object

# Part of the key of every training, image and map. Raise it when this package makes other weights,
# images or maps of the same options, beyond rounding: what exists is then made again.
ARITHMETIC = 1

_PACKAGE = Path(__file__).parent.resolve()
_INSTALLED = tuple(
    Path(path).resolve() for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)  # fmt: skip


def code_of(*options: Any) -> dict[str, str]:
    """Hashes of the user's own files that the options are made by, by the names of their modules.

    Those of the classes and functions, of their base classes, and of what these files import of
    the user's own; not this package and what is installed, which have versions.

    Args:
        options: plain values in any nesting; every ``_target_`` in them counts.
    """
    waiting = [module for name in _targets(options) for module in _modules_of(name)]
    found: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        path = _own_file(module)
        if path is None or module.__name__ in found:
            continue
        found[module.__name__] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        waiting += _imported(module)
    return dict(sorted(found.items()))


def _targets(value: Any) -> Iterator[str]:
    """What plain values are made by.

    Yields:
        Every ``_target_`` in them.
    """
    if isinstance(value, dict):
        if isinstance(name := value.get("_target_"), str):
            yield name
        value = list(value.values())
    for part in value if isinstance(value, (list, tuple)) else ():
        yield from _targets(part)


def _modules_of(name: str) -> list[ModuleType]:
    """Where the object of this name, and its base classes, are written down."""
    try:
        found = get_object(name)
    except Exception:  # no name of an object after all, or one that instantiate will refuse
        return []
    while isinstance(found, partial):
        found = found.func
    parts = inspect.getmro(found) if inspect.isclass(found) else (inspect.unwrap(found), found)
    modules = [inspect.getmodule(part) for part in parts] if callable(found) else [found]
    # A function that was imported elsewhere under the name that was given.
    modules.append(sys.modules.get(name.rpartition(".")[0]))
    return [module for module in modules if isinstance(module, ModuleType)]


def _own_file(module: ModuleType) -> Path | None:
    """The file of a module of the user's own."""
    file = getattr(module, "__file__", None)
    path = Path(file).resolve() if file else None
    if path is None or not path.is_file() or path.is_relative_to(_PACKAGE):
        return None
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return None if installed or any(map(path.is_relative_to, _INSTALLED)) else path


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """What a module is made of.

    Yields:
        Modules that it, or an object in it, comes from.
    """
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else None
        if name is None and (inspect.isclass(value) or inspect.isroutine(value)):
            name = value.__module__
        other = sys.modules.get(name) if isinstance(name, str) else None
        if other is not None and other is not module:
            yield other
