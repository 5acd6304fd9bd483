"""Times at which a solver stops, from noise at t = 0 to clean data at t = 1."""

from collections.abc import Callable, Sequence
from typing import Any

from bayesdiff.checks import UserError
from bayesdiff.options.targets import by_name
from bayesdiff.paths import ProbabilityPath
from bayesdiff.solvers import time_laws

# From a path and a number of steps to the times; by name, or a callable of one's own.
TimeLaw = Callable[[ProbabilityPath, int], Sequence[float]]
Grid = str | TimeLaw


def time_grid(
    grid: Grid, path: ProbabilityPath, num_steps: int, skip_interval: int = 1
) -> list[float]:
    """The n + 1 increasing times of n steps, from 0 to 1 exactly.

    On a discrete schedule all laws but ``uniform`` visit the schedule's own indices, each at most
    once: where they ask for more than one step per index, they get one.

    Args:
        grid: the law that the times follow: the name of one in ``time_laws``, or a callable.
        path: of the model.
        num_steps: n.
        skip_interval: k > 1 leaves every k-th of the times, and 1.

    Raises:
        UserError: for an unknown name, more steps than a discrete schedule has indices, or a
            callable that gives no such times.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> time_grid("uniform", CondOT(), num_steps=4)
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> time_grid("uniform", CondOT(), num_steps=4, skip_interval=2)
        [0.0, 0.5, 1.0]
        >>> time_grid(lambda path, n: [(k / n) ** 2 for k in range(n + 1)], CondOT(), num_steps=4)
        [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """
    law: TimeLaw = grid if callable(grid) else by_name(time_laws, grid, "solver.grid")
    indices = path.num_steps_max
    if indices is not None and num_steps > indices:
        raise UserError(
            f"solver.num_steps={num_steps} is more than the {indices} steps of the path's "
            "schedule; choose fewer"
        )
    times = list(law(path, num_steps))
    if callable(grid):
        times = _checked(times, num_steps)
    if law is not time_laws.uniform and indices is not None:
        times = _on_indices(times, indices)
    return [times[k] for k in range(0, num_steps, skip_interval)] + [times[-1]]


def _checked(times: Any, num_steps: int) -> list[float]:
    """The times, if a solver can stop at them.

    Raises:
        UserError: if they are not n + 1 increasing numbers from 0 to 1.
    """
    given = [float(time) for time in times]
    rising = all(a < b for a, b in zip(given[:-1], given[1:], strict=True))
    if len(given) != num_steps + 1 or not rising or (given[0], given[-1]) != (0, 1):
        raise UserError(
            f"solver.grid must give {num_steps + 1} increasing times from 0 to 1, got {given}"
        )
    return given


def _on_indices(times: Sequence[float], indices: int) -> list[float]:
    """The times moved to the nearest nodes 1 - i / T, no two to the same one."""
    last = len(times) - 1
    nodes = [round((1 - t) * indices) for t in times]
    for k in range(1, last):
        # Below the node before, and above enough free ones for the nodes to come.
        nodes[k] = max(min(nodes[k], nodes[k - 1] - 1), last - k)
    return [1 - node / indices for node in nodes]
