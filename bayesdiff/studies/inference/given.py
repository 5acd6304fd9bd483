"""What a user may give as a mixture."""

import math
from collections.abc import Sequence
from typing import Any

from bayesdiff.checks import UserError

_COMPONENTS = (2, 3)  # that the grid takes
_CURE = "give 2 or 3, which the grid that chains are held against takes"


def check_mixture(means: Any, scales: Any, weights: Any) -> None:
    """Refuse what is no mixture of two or three Gaussians.

    Raises:
        UserError: for rows that do not fit each other, scales or weights that are not positive,
            or weights that do not sum to 1.
    """
    shape = _shape("inference.means", means)
    if _shape("inference.scales", scales) != shape:
        raise UserError(
            f"inference.scales={plain_rows(scales)} must have as many rows and columns as "
            f"inference.means={plain_rows(means)}"
        )
    if min(value for row in scales for value in row) <= 0:
        raise UserError(f"inference.scales={plain_rows(scales)} must all be positive")
    count = shape[0]
    if count not in _COMPONENTS:
        raise UserError(f"inference.means has {count} Gaussians; {_CURE}")
    right = _is_row(weights) and len(weights) == count and min(weights) > 0
    if not right or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(
            f"inference.weights must be {count} positive numbers that sum to 1, got {weights!r}"
        )


def plain_rows(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """As lists of numbers."""
    return [[float(value) for value in row] for row in rows]


def _shape(name: str, rows: Any) -> tuple[int, int]:
    """Of a matrix that is given as rows."""
    outer = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0
    if not outer or not all(map(_is_row, rows)) or len({len(row) for row in rows}) != 1:
        raise UserError(f"{name} must be rows of numbers such as [[0,0],[1,0]], got {rows!r}")
    return len(rows), len(rows[0])


def _is_row(row: Any) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str) or not row:
        return False
    return all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in row
    )
