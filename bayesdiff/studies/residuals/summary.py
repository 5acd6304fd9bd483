"""Errors at many times in a few numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.studies.residuals.correlations import time_correlation

STATISTICS = ("lag_1", "half_width", "persistent_share")
_HALF = 0.5


def summary_of(errors: Tensor, times: Sequence[float], least: float = 0.0) -> dict[str, Any]:
    """How large errors are, and how much of them is common to times.

    Args:
        errors: ``(T, N, ...)``, at two times or more.
        times: rising, T of them.
        least: where the standard deviation over points is not above, errors are rounding.

    Returns:
        ``rms``: at every time, over points and coordinates; ``correlation``: of all pairs of
        times, ``(T, T)``, and ``by_lag``: its mean over pairs so many ``steps`` apart, ``lag`` of
        time in the mean; ``lag_1``: that of neighbours; ``half_width``: lag at which it falls
        below 0.5, None if it never does; ``persistent_share``: variance of the mean over times
        over the mean variance, both summed over coordinates, and ``white_share``: 1 / T, which it
        is for errors that are independent at all times; ``bias_share``: share of the mean square
        that the mean over points has. None where errors do not vary beyond rounding.
    """
    flat = errors.reshape(*errors.shape[:2], -1)
    square, variance = flat.new_zeros(2, len(flat), dtype=torch.float64)
    for number, each in enumerate(flat):  # one time at a time in float64
        square[number] = each.double().square().mean()
        variance[number] = each.double().var(0, correction=0).mean()
    total = float(square.mean())
    found: dict[str, Any] = {
        "rms": square.sqrt().tolist(),
        "bias_share": 1 - float(variance.mean()) / total if total else None,
        "white_share": 1 / len(flat),
    }
    if float(variance.mean()) <= least**2:
        nothing: dict[str, Any] = {"correlation": None, "by_lag": [], "persistent_share": None}
        return {**found, **nothing, "lag_1": None, "half_width": None}
    common = flat.mean(0, dtype=torch.float64).var(0, correction=0).mean()
    correlation = time_correlation(errors)
    lags = by_lag(correlation, times)
    return {
        **found,
        "correlation": correlation.tolist(),
        "by_lag": lags,
        "lag_1": lags[1]["correlation"],
        "half_width": half_width(lags),
        "persistent_share": float(common / variance.mean()),
    }


def by_lag(correlation: Tensor, times: Sequence[float]) -> list[dict[str, float]]:
    """Mean correlation, and mean lag, of pairs of times 0, 1, ... steps apart.

    Args:
        correlation: of all pairs, ``(T, T)``.
        times: rising, T of them.
    """
    t = torch.tensor(list(times), dtype=torch.float64)
    return [
        {
            "steps": steps,
            "lag": float((t[steps:] - t[: len(t) - steps]).mean()),
            "correlation": float(correlation.diagonal(steps).mean()),
        }
        for steps in range(len(t))
    ]


def half_width(lags: Sequence[dict[str, float]]) -> float | None:
    """The lag at which the correlation falls below 0.5 first, on lines between lags."""
    for before, after in zip(lags[:-1], lags[1:], strict=True):
        if after["correlation"] < _HALF:
            fall = before["correlation"] - after["correlation"]
            part = max(before["correlation"] - _HALF, 0.0) / fall if fall > 0 else 0.0
            return before["lag"] + part * (after["lag"] - before["lag"])
    return None


def curves_of(
    times: Sequence[float],
    errors: dict[str, Any],
    floor: dict[str, Any],
    published: Any,
    published_exact: Any,
) -> dict[str, Any]:
    """One row for every time.

    Args:
        times: rising.
        errors: their summary.
        floor: that of the second references.
        published: correlation of residuals with independent noise, ``(T, T)``; None for none.
        published_exact: that of the exact prediction in the network's place.

    Returns:
        ``rows``: ``rms`` of the errors and of the ``floor`` at every ``time``, and correlations
        with the last time, that of least noise, the reference of the paper: along the
        ``trajectory``, and ``published`` and ``published_exact``; ``above_floor``: how many times
        have errors larger than the floor.
    """
    columns = {
        "time": list(times),
        "rms": errors["rms"],
        "floor": floor["rms"],
        "trajectory": _with_last(errors["correlation"], times),
        "published": _with_last(published, times),
        "published_exact": _with_last(published_exact, times),
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"rows": rows, "above_floor": sum(row["rms"] > row["floor"] for row in rows)}


def _with_last(correlation: Any, times: Sequence[float]) -> list[float | None]:
    return [None] * len(times) if correlation is None else [row[-1] for row in correlation]
