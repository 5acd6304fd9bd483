"""Steps that cannot be followed, or not as they say, are refused before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths.coefficient import is_zero

if TYPE_CHECKING:
    from bayesdiff.solvers.step import Solver, Step

_STEP_FIELDS = ("times", "inputs", "output", "noise", "end", "kept", "history")


def check_steps(solver: Solver, times: Sequence[float], steps: Any) -> None:
    """Refuse what is no list of steps between these times.

    Raises:
        UserError: for another number of steps than intervals, rows of another length than the
            evaluations have, history that no step before has kept, or noise of a solver that says
            it has none. The line names the step.
    """
    name = f"solver={solver.name}"
    rows = isinstance(steps, (list, tuple))
    if not rows or not all(hasattr(step, field) for step in steps for field in _STEP_FIELDS):
        given = type(steps).__name__ if not rows else "other things in it"
        raise UserError(f"{name}: steps must return a list of Step, got {given}")
    if len(steps) != len(times) - 1:
        raise UserError(
            f"{name}: steps returned {len(steps)} steps for {len(times)} times; return "
            f"{len(times) - 1}, one from each time to the next"
        )
    memory = 0
    for number, (step, end) in enumerate(zip(steps, times[1:], strict=True)):
        for flaw in _flaws(solver, step, end, memory):
            raise UserError(f"{name}: step {number} {flaw}")
        memory += len(step.kept)


def _flaws(solver: Solver, step: Step, end: float, memory: int) -> Iterator[str]:
    """What is wrong with a step before which so many combinations were kept."""
    for field in ("times", "inputs", "output", "kept", "history"):
        value = getattr(step, field)
        nested = value if field in ("inputs", "kept") and isinstance(value, (tuple, list)) else ()
        if any(not isinstance(row, (tuple, list)) for row in (value, *nested)):
            kind = "rows of numbers, as in ((1.0,),)" if nested else "a row, as in (1.0,)"
            yield f"has {field}={value!r}; give {kind}"
    odd = [value for value in step.coefficients() if not isinstance(value, (Real, Tensor))]
    if odd:
        yield f"has the coefficient {odd[0]!r}; give numbers or tensors"
    yield from _odd_times(step, end)
    yield from _odd_lengths(step)
    for field, row in [("kept", row[1 + len(step.times) :]) for row in step.kept] + [
        ("history", step.history)
    ]:
        missing = [k for k, value in enumerate(row) if k >= memory and not is_zero(value)]
        if missing:
            yield (
                f"reads k_{missing[0]} in {field}, and the steps before it kept {memory}; give "
                "earlier steps a row of kept for it, or this one no history"
            )
    if step.stochastic and not solver.stochastic:
        yield (
            f"has noise={step.noise!r}, and stochastic says that there is none; define the "
            "property stochastic, or give noise=0.0"
        )


def _odd_times(step: Step, end: float) -> Iterator[str]:
    if any(not isinstance(t, Real) for t in (*step.times, step.end)):
        yield f"has times={step.times!r} and end={step.end!r}; give numbers"
    if not math.isclose(step.end, end, abs_tol=1e-9):
        yield f"has end={step.end:g}, and the next time is {end:g}; end there"
    for t in step.times:
        if not -1e-9 <= t <= 1 + 1e-9:
            yield f"evaluates the network at t={t:g}; times are from 0, noise, to 1, data"


def _odd_lengths(step: Step) -> Iterator[str]:
    count = len(step.times)
    if not count or len(step.inputs) != count:
        yield (
            f"has {count} times and {len(step.inputs)} rows of inputs; give one of each for every "
            "network evaluation"
        )
    for number, row in enumerate(step.inputs):
        if len(row) != 1 + number:
            yield (
                f"has {len(row)} coefficients in inputs[{number}], and needs {1 + number}: of x "
                "and of the outputs before"
            )
    if len(step.output) != 1 + count:
        yield (
            f"has {len(step.output)} coefficients in output, and needs {1 + count}: of x and of "
            "each network output; those of earlier steps go into history"
        )
    for number, row in enumerate(step.kept):
        if len(row) < 1 + count:
            yield (
                f"has {len(row)} coefficients in kept[{number}], and needs {1 + count}: of x and "
                "of each network output"
            )
