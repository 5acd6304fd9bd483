"""What of the package is public: what a user imports, and what a configuration instantiates."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hydra.utils import get_object

import bayesdiff
from bayesdiff.checks import UserError

ROOT = Path(__file__).parents[2]


def exported() -> Iterator[str]:
    """What the packages' ``__init__`` and the pipeline list as theirs.

    Yields:
        Full names, as a user imports them.
    """
    for found in pkgutil.walk_packages(bayesdiff.__path__, "bayesdiff."):
        if found.ispkg or found.name == "bayesdiff.pipeline":
            module = importlib.import_module(found.name)
            yield from (f"{found.name}.{name}" for name in getattr(module, "__all__", ()))


def targets() -> Iterator[str]:
    """What the configurations instantiate.

    Yields:
        Full names.
    """
    for path in (ROOT / "configs").rglob("*.yaml"):
        yield from re.findall(r"_target_: *(bayesdiff\.[\w.]+)", path.read_text(encoding="utf-8"))


def texts() -> Iterator[str]:
    """Python of the README, the documentation and the tutorials.

    Yields:
        Code.
    """
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        yield from re.findall(r"^```python.*?\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    for path in (ROOT / "docs" / "tutorials").glob("*.py"):
        yield path.read_text(encoding="utf-8")


def imported() -> Iterator[str]:
    """What those texts import.

    Yields:
        Full names.
    """
    for text in texts():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayesdiff"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def importable() -> dict[str, object]:
    """The public classes and functions by the names that they are imported by."""
    error = f"{UserError.__module__}.{UserError.__name__}"
    names = sorted({*exported(), *targets(), *imported(), error})
    things = {name: get_object(name) for name in names}
    return {
        name: thing
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith("bayesdiff.")
    }


@cache
def public_names() -> dict[str, object]:
    """The same by the full names of their definitions."""
    things = importable().values()
    return {n: t for n, t in sorted((f"{t.__module__}.{t.__qualname__}", t) for t in things)}
