"""Options for a ``_target_`` other than the one that a group of configurations was written for."""

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from bayesdiff.checks import UserError
from bayesdiff.options.spelling import near
from bayesdiff.options.values import plain

log = logging.getLogger(__name__)


_FILE_NAME = re.compile(r"[\w.+-]+")


def instantiated(options: DictConfig, place: str, kind: type) -> Any:
    """What a group's options make, if it is of the kind that the group is for.

    Args:
        options: with ``_target_``.
        place: the group.
        kind: a class whose subclasses have a ``name``.

    Raises:
        UserError: for options without ``_target_``, a function or class of another kind, or a name
            that no file could have.
    """
    expected = f"a subclass of {kind.__module__}.{kind.__name__}"
    target = options.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{place} has no _target_; give that of {expected}, as in mine.MyClass")
    instance = instantiate(options)
    if not isinstance(instance, kind):
        cure = "leave _partial_ out" if options.get("_partial_") else f"give {expected}"
        raise UserError(f"{place}._target_={target} makes no {kind.__name__}; {cure}")
    name = getattr(instance, "name", None)
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise UserError(
            f"{place}._target_={target} has name={name!r}, and files are named by it; give the "
            "class a name of letters, digits, _ or -"
        )
    return instance


def import_fault(target: str) -> str:
    """Why nothing can be made of a target, in words, with the cure; empty where it is found."""
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            there: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if module == error.name or module.startswith(f"{error.name}."):
                continue  # a class, or not there
            return f"{module} cannot be imported: {error}"
        except Exception as error:
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
        for name in parts[count:]:
            if not hasattr(there, name):
                return f"{module} has no {name}{near(name, vars(there))}"
            there = getattr(there, name)
        return ""
    cure = f"the folder that {parts[0]}.py lies in belongs in PYTHONPATH"
    return f"there is no module {parts[0]}; {cure}"


def fitting(options: DictConfig, place: str, written_for: Callable[..., Any]) -> dict[str, Any]:
    """The options that their target takes.

    ``net._target_=mine.Net`` merges with the options of the U-Net that the group chose: those are
    left out, with a line, where the new target has no such argument. Anything else that it does
    not take was typed by the user, and is refused.

    Args:
        options: with ``_target_``.
        place: their name in the configuration.
        written_for: what the options of the group belong to.

    Raises:
        UserError: for an option of neither target.
    """
    values: dict[str, Any] = plain(options)
    used = taken(options)
    extra = [name for name in values if name not in used]
    for name in extra:
        if name not in inspect.signature(written_for).parameters:
            known = arguments(str(values["_target_"])) or ()
            raise UserError(
                f"{place}.{name} is no option of {values['_target_']}{near(name, known)}"
            )
    if extra:
        left = ", ".join(f"{place}.{name}" for name in extra)
        log.info("%s: not taken by %s and left out", left, values["_target_"])
    return used


def taken(options: Any) -> dict[str, Any]:
    """Those of the options, plain, that their target takes; all where that cannot be known."""
    values: dict[str, Any] = plain(options)
    known = arguments(str(values.get("_target_")))
    if known is None:
        return values
    return {k: v for k, v in values.items() if k.startswith("_") or k in known}


def arguments(target: str) -> set[str] | None:
    """Names that a target takes; None where it takes any, or cannot be looked at."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except Exception:  # instantiate says what is wrong with it
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def class_of(options: Any) -> type | None:
    """The class that options make, whatever name they give it; None for a function, or nothing."""
    try:
        made = get_object(str(options.get("_target_")))
    except Exception:  # instantiate says what is wrong with it
        return None
    while isinstance(made, partial):
        made = made.func
    return made if isinstance(made, type) else None


def word_of(choice: Any) -> Any:
    """A short name for a choice: a plain word as it is, the last word of a ``_target_``."""
    given = plain(choice)
    return str(given["_target_"]).rpartition(".")[2] if isinstance(given, dict) else given


def by_name(module: ModuleType, name: Any, option: str) -> Callable[..., Any]:
    """What a plain word stands for: the public function of that name in a module.

    Whatever is written elsewhere is named by its ``_target_``.

    Args:
        module: whose own functions are the choices.
        name: what the user gave.
        option: for the message.

    Raises:
        UserError: for any other name.
    """
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and key[0] != "_"
    }
    if not isinstance(name, str) or name not in own:
        raise UserError(
            f"unknown {option} {name!r}; choose from {', '.join(own)}, or give a _target_ of your "
            "own"
        )
    return own[name]
