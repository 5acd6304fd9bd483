"""One-line refusals: name the value, name the cure, before any work is wasted."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """Something the user can mend; entry points show its one line and no traceback.

    Example:
        >>> try:
        ...     positive("path.beta_1", -1.0)
        ... except UserError as error:
        ...     str(error)
        'path.beta_1 must be positive and finite, got -1.0; give a number above 0'
    """


def one_line(error: BaseException, most: int = 160) -> str:
    """The reason in one line of at most so many signs, or the type of an empty one."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def few(items: Iterable[Any], most: int = 8) -> str:
    """The first ones, with commas, and three dots for the rest."""
    listed = [str(item) for item in items]
    return ", ".join([*listed[:most], *(["..."] if len(listed) > most else [])])


def positive(name: str, value: float, cure: str = "give a number above 0") -> float:
    """Return ``value`` if it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number, got {value!r}; {cure}")
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{name} must be positive and finite, got {value}; {cure}")
    return value


def at_least(name: str, value: int, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value


def share(name: str, value: float) -> float:
    """Return ``value`` if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name} must be a number from 0 to below 1, got {value!r}")
    return value


def seed_of(name: str, value: int) -> int:
    """A seed that every generator takes.

    Raises:
        UserError: if it is not a whole number from 0 to 2**32 - 1.
    """
    if at_least(name, value, 0) >= 2**32:
        raise UserError(f"{name} must be below 2**32 = {2**32}, got {value}")
    return int(value)


def listed(name: str, values: Any, like: str) -> list[Any]:
    """Return ``values`` as a list if they are one with something in it and nothing twice.

    Raises:
        UserError: if they are not; the message is one line with name, value and an example.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UserError(f"{name} must be a list such as {like}, got {values!r}")
    found = list(values)
    if any(value in found[:place] for place, value in enumerate(found)):
        raise UserError(f"{name}={found} names one twice; give each once")
    return found
