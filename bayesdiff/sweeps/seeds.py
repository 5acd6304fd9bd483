"""Cells of a sweep that differ in their seed alone, as one row."""

from collections.abc import Mapping, Sequence
from typing import Any

from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.report import table
from bayesdiff.report.series import SEED, finite

Row = Mapping[str, Any]

_ENDS = ("_low", "_high")


def over_seeds(
    rows: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Means over seeds with Student's t intervals of 95 %, a row for each setting.

    Args:
        rows: flat, one for every cell; those that are not done do not count.
        keys: swept ones.
        metrics: whose means are taken, over the seeds that have them as finite numbers.

    Returns:
        Of each setting the other keys, ``seeds``, and of every metric its mean and ``_low`` to
        ``_high``, which are missing for a single seed. No rows where seeds were not swept, or
        nothing else was.
    """
    others = [key for key in keys if key != SEED]
    if SEED not in keys or not others:
        return []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "done":
            groups.setdefault(tuple(row[key] for key in others), []).append(row)
    found: list[dict[str, Any]] = []
    for values, cells in groups.items():
        line: dict[str, Any] = dict(zip(others, values, strict=True)) | {"seeds": len(cells)}
        for metric in metrics:
            given = [float(row[metric]) for row in cells if finite(row.get(metric))]
            if given:
                ends = zip(("", *_ENDS), mean_interval(given), strict=True)
                line |= {metric + end: value for end, value in ends if finite(value)}
        found.append(line)
    return found


def averaged(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """Columns of figures, without what a cell itself knows of their uncertainty."""
    names = table.columns_of(rows)
    own = {name + end for name in names for end in _ENDS}
    return [
        name
        for name in names
        if name not in own and name not in keys and any(finite(row.get(name)) for row in rows)
    ]


def said(row: Row, metric: str) -> str:
    """A mean and its interval as text, the mean alone where the seeds agree or there is one."""
    text, ends = table.cell(row.get(metric)), [row.get(metric + end) for end in _ENDS]
    if None in ends or ends[0] == ends[1]:
        return text
    return f"{text} [{table.cell(ends[0])}, {table.cell(ends[1])}]"
