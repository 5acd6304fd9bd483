"""Cells of a sweep by what they have in common, and swept values as numbers and labels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

Row = Mapping[str, Any]
Values = tuple[Any, ...]

SEED = "seed"
# Lines that can be told apart.
MOST_LINES = 10


def axis_keys(swept_keys: Sequence[str]) -> list[str]:
    """Keys that get an axis: seeds do where nothing else was swept."""
    return [key for key in swept_keys if key != SEED] or list(swept_keys)


def short_names(keys: Sequence[str], among: Iterable[str] = ()) -> list[str]:
    """Last parts of dotted keys, whole keys where two end alike.

    Args:
        keys: each once.
        among: further keys that could be there.
    """
    every = [key.rpartition(".")[2] for key in {*keys, *among}]
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if every.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def series(
    rows: Sequence[Row], swept_keys: Sequence[str], key: str
) -> tuple[list[str], dict[Values, list[Row]]]:
    """The other keys but seeds, and the cells of each of their combinations that is there.

    No keys and one group with all cells where these are too many to tell apart.
    """
    others = [name for name in swept_keys if name not in (key, SEED)]
    known = [distinct(rows, name) for name in others]
    groups = {
        values: [row for row in rows if tuple(row.get(name) for name in others) == values]
        for values in product(*known)
    }
    groups = {values: cells for values, cells in groups.items() if cells}
    return (others, groups) if len(groups) <= MOST_LINES else ([], {(): list(rows)})


def depends(rows: Sequence[Row], swept_keys: Sequence[str], key: str, metric: str) -> bool:
    """Whether a metric differs between cells that differ in ``key`` alone.

    An FID does not over settings of a posterior, since all these cells share their images.
    """
    others = [name for name in swept_keys if name != key]
    groups: dict[Values, list[float]] = {}
    for row in (row for row in rows if finite(row.get(metric))):
        group = groups.setdefault(tuple(str(row.get(name)) for name in others), [])
        group.append(float(row[metric]))
    pairs = [group for group in groups.values() if len(group) > 1]
    if not pairs:
        return any(groups)  # no two cells can be compared: shown as it is
    return any(max(group) - min(group) > 1e-9 * abs(max(group)) for group in pairs)


def number(value: Any) -> float | None:
    """Number a swept value or a metric stands for; None where it is none (a flag, a name)."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return None


def finite(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    found = number(value)
    return found is not None and math.isfinite(found)


def text_of(value: Any) -> str:
    """A swept value as a label: ``10.0`` and ``10`` are the same value."""
    found = number(value)
    return str(value) if found is None else plain_number(found, 6)


def plain_number(value: float, digits: int = 4) -> str:
    """``0.02``, ``500`` or ``1e5``: few digits, and short."""
    return f"{value:.{digits}g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """Values of ``key``: numbers in order, else as they come."""
    values = list(dict.fromkeys(row[key] for row in rows if key in row))
    numeric = all(finite(value) for value in values)
    return sorted(values, key=float) if numeric else values
