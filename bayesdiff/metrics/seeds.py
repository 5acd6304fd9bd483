"""Numbers from several seeds as one: the mean and where it lies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.special import stdtrit

from bayesdiff.checks import UserError


def t_quantile(count: int, level: float = 0.95) -> float:
    """Two-sided quantile of Student's t for the mean of ``count`` numbers, at least 2."""
    return float(stdtrit(count - 1, (1 + level) / 2))


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of numbers from independent seeds, and the ends of Student's t interval of it.

    The ends are NaN for one number, all three for none.
    """
    found = torch.tensor(values, dtype=torch.float64)
    mean, half = float(found.mean()), torch.nan
    if len(found) > 1:
        half = t_quantile(len(found), level) * float(found.std()) / len(found) ** 0.5
    return mean, mean - half, mean + half


def over_seeds(
    tables: Sequence[Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    values: Sequence[str],
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """Rows of several seeds as one.

    Args:
        tables: the rows of each seed, the same ones in any order.
        names: what a row is found by.
        values: its figures, where it has them; None in a seed does not count.
        level: of the intervals.

    Returns:
        One row for each of the names: ``seeds``, and of every figure its mean and ``_low`` to
        ``_high``, see ``mean_interval``. Every seed has its own images, so the interval holds
        the spread of both.

    Raises:
        UserError: if the seeds hold different rows.
    """
    keyed = [{tuple(row[name] for name in names): row for row in table} for table in tables]
    if not keyed or any(table.keys() != keyed[0].keys() for table in keyed):
        raise UserError(
            f"the tables of {len(keyed)} seeds must hold the same scores, modes and fractions; "
            "evaluate every seed alike"
        )
    rows = []
    for key, first in keyed[0].items():
        row = dict(zip(names, key, strict=True)) | {"seeds": len(keyed)}
        for name in (name for name in values if name in first):
            given = [value for table in keyed if (value := table[key][name]) is not None]
            ends = (name, f"{name}_low", f"{name}_high")
            row |= dict(zip(ends, mean_interval(given, level), strict=True))
        rows.append(row)
    return rows
