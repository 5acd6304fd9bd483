"""What code outside this package does to a run: hashes of the files behind ``_target_``."""

import ast
import hashlib
import inspect
import logging
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import get_object

log = logging.getLogger(__name__)

# Part of the key of every training, image and map. Raise it when this package makes other weights,
# images or maps of the same options, beyond rounding: what exists is then made again.
ARITHMETIC = 1

_PACKAGE = Path(__file__).parents[1].resolve()
_INSTALLED = tuple(
    Path(path).resolve() for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """A file as it was when this process first saw its module loaded.

    Attributes:
        spec: of the module; reloading it makes another one.
        key: of the content.
        imports: modules that it names.
    """

    spec: Any
    key: str
    imports: tuple[str, ...]


_loaded: dict[str, _Read] = {}
_warned: set[tuple[str, str]] = set()


def code_of(*options: Any) -> dict[str, str]:
    """Hashes of the user's own files that the options are made by, by the names of their modules.

    Those of the classes and functions, of their base classes, and of what these files import of
    the user's own, wherever in them; not this package and what is installed, which have versions.
    A module that is loaded counts as what was in its file then: that is what runs.

    Args:
        options: plain values in any nesting; every ``_target_`` in them counts.
    """
    waiting = [module for name in _targets(options) for module in _modules_of(name)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = _own_file(name)
        if path is None or name in found:
            continue
        read = _read(name, path)
        found[name] = read.key
        waiting += [*_defined_elsewhere(name), *read.imports]
    return dict(sorted(found.items()))


def _read(name: str, path: Path) -> _Read:
    """What this process runs, or will run, under a module's name."""
    content = path.read_bytes()
    key = hashlib.sha256(content).hexdigest()[:16]
    spec = getattr(sys.modules.get(name), "__spec__", None)
    there = _loaded.get(name)
    if there is None or there.spec is not spec or name not in sys.modules:
        there = _Read(spec, key, tuple(_imported(name, path, content)))
        if name in sys.modules:
            _loaded[name] = there
    elif there.key != key and (name, key) not in _warned:
        _warned.add((name, key))
        log.warning(
            "%s was edited after this process loaded it, which goes on with what it loaded; "
            "the next command takes the edit",
            path,
        )
    return there


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


def _modules_of(name: str) -> list[str]:
    """Where the object of this name, and its base classes, are written down."""
    try:
        found = get_object(name)
    except Exception:  # no name of an object after all, or one that instantiate will refuse
        return []
    while isinstance(found, partial):
        found = found.func
    parts = inspect.getmro(found) if inspect.isclass(found) else (inspect.unwrap(found), found)
    modules = [inspect.getmodule(part) for part in parts] if callable(found) else [found]
    names = [module.__name__ for module in modules if isinstance(module, ModuleType)]
    # A function that was imported elsewhere under the name that was given.
    return [*names, name.rpartition(".")[0]]


def _own_file(name: str) -> Path | None:
    """The file of a module of the user's own."""
    module = sys.modules.get(name)
    # One that is not there is imported later, inside of a function.
    file = getattr(module, "__file__", None) if module else _origin(name)
    path = Path(file).resolve() if file else None
    if path is None or not path.is_file() or path.is_relative_to(_PACKAGE):
        return None
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return None if installed or any(map(path.is_relative_to, _INSTALLED)) else path


def _origin(name: str) -> str | None:
    """Where a module would be loaded from; nothing is imported, not even its packages."""
    places: list[str] | None = None
    spec: Any = None
    whole = ""
    for part in name.split("."):
        whole = f"{whole}.{part}" if whole else part
        spec = _spec(whole, places)
        if spec is not None and spec.has_location:
            places = list(spec.submodule_search_locations or ())
        else:  # a package without a file, whose spec needs its parents to be loaded
            places = [
                str(Path(place) / part) for place in (sys.path if places is None else places)
            ]
            places = [place for place in places if Path(place).is_dir()]
    return spec.origin if spec is not None and spec.has_location else None


def _spec(name: str, places: list[str] | None) -> Any:
    """What an import of this name would load, by the finders that an import asks."""
    for finder in sys.meta_path:
        try:
            if spec := finder.find_spec(name, places):
                return spec
        except Exception:  # a finder of anyone's: an import would meet the same
            continue
    return None


def _defined_elsewhere(name: str) -> Iterator[str]:
    """Modules that objects in a module come from, by whatever way they came.

    Yields:
        Their names.
    """
    for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
        if inspect.isclass(value) or inspect.isroutine(value):
            if isinstance(value.__module__, str):
                yield value.__module__
        elif isinstance(value, ModuleType):
            yield value.__name__


def _imported(name: str, path: Path, content: bytes) -> Iterator[str]:
    """What a file says that it imports: a constant does not tell where it comes from.

    Yields:
        Names of modules, and of what is imported from them, which may be modules.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(content)
    except SyntaxError:  # importing it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            try:
                source = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # beyond the top; importing it says so
                continue
            yield from _with_packages(source)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _with_packages(name: str) -> Iterator[str]:
    """A module and the packages that it is in, whose files run before it.

    Yields:
        Their names.
    """
    while name:
        yield name
        name = name.rpartition(".")[0]
