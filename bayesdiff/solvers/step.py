"""A solver is coefficients: every step is affine in the state and the network outputs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.paths import Coefficient, ProbabilityPath, convert
from bayesdiff.paths.coefficient import (
    as_coefficient,
    as_key,
    at_times,
    have_tensors,
    is_finite,
    is_one,
    is_zero,
    like,
)
from bayesdiff.solvers.grid import Grid, time_grid
from bayesdiff.solvers.step_checks import check_steps

Row = tuple[Coefficient, ...]
# The time of a sample that is predicted from the state at t = 1, told apart from the state's.
PREDICTED = math.nextafter(1.0, 2.0)


@dataclass(frozen=True)
class Step:
    """One step x -> x' with one or more network evaluations g_0, g_1, ...

    Evaluation i sees u_i = inputs[i][0] x + sum_j inputs[i][1 + j] g_j (j < i) at ``times[i]``;
    then x' = output[0] x + sum_j output[1 + j] g_j + sum_j history[j] k_j + noise z, z ~ N(0, I).
    With one evaluation that is x' = a x + b g(x, t) + c z. Every coefficient is a number, or a
    tensor that broadcasts against a sample ``(C, H, W)``.

    Multistep methods need more: k_0, k_1, ... is what earlier steps kept, the latest first. A
    step keeps one combination of x, its outputs and the k_j for each row of ``kept``; those come
    before all that was kept earlier. Steps can so reach back as far as they like.

    Attributes:
        times: time of each evaluation.
        inputs: lower triangular coefficients of the evaluations' inputs.
        output: coefficients (a, b_0, b_1, ...) of the new state.
        noise: c, standard deviation of the fresh noise.
        end: time of the new state.
        kept: rows (p, q_0, q_1, ...) of what later steps may use, each with a coefficient for
            every evaluation and then as many r_0, r_1, ... of the k_j as needed.
        history: coefficients of k_0, k_1, ... in the new state.

    Example:
        >>> from bayesdiff.solvers import integrate
        >>> step = Step(times=(0.0,), inputs=((1.0,),), output=(0.5, 2.0), noise=0.0, end=1.0)
        >>> integrate(lambda x, t: x + t, [step], torch.tensor([3.0]), torch.randn)  # 0.5 x + 2 g
        tensor([7.5000])
    """

    times: tuple[float, ...]
    inputs: tuple[Row, ...]
    output: Row
    noise: Coefficient
    end: float
    kept: tuple[Row, ...] = ()
    history: Row = ()

    @property
    def stochastic(self) -> bool:
        """Whether the step draws fresh noise."""
        return not is_zero(self.noise)

    @property
    def reach(self) -> int:
        """How many of the k_j it reads."""
        count = 1 + len(self.times)
        return max(len(self.history), *(len(row) - count for row in self.kept), 0)

    def coefficients(self) -> Iterator[Coefficient]:
        """All of them, row by row.

        Yields:
            Numbers and tensors.
        """
        for row in (*self.inputs, self.output, *self.kept, self.history):
            yield from row
        yield self.noise

    def like(self, x: Tensor) -> "Step":
        """The step with its tensors in the precision and on the device of ``x``."""
        if not have_tensors(self.coefficients()):
            return self

        def ready(row: Row) -> Row:
            return tuple(like(value, x) for value in row)

        return replace(
            self,
            inputs=tuple(map(ready, self.inputs)),
            output=ready(self.output),
            noise=like(self.noise, x),
            kept=tuple(map(ready, self.kept)),
            history=ready(self.history),
        )

    def to_data(self, alpha: Coefficient) -> "Step":
        """The step with its last state alpha x_1 divided by alpha."""
        output, history = (tuple(c / alpha for c in row) for row in (self.output, self.history))
        return replace(self, output=output, noise=self.noise / alpha, history=history)

    def from_data(self, alpha: Coefficient) -> "Step":
        """The step as it starts from data x_1 in the place of alpha x_1."""

        def scaled(row: Row) -> Row:
            return (row[0] * alpha, *row[1:])

        inputs, kept = (tuple(map(scaled, rows)) for rows in (self.inputs, self.kept))
        return replace(self, inputs=inputs, output=scaled(self.output), kept=kept)

    def numbers(self) -> list:
        """All that tells the step from another, as JSON can hold it."""
        sizes = [*map(len, self.inputs), *map(len, self.kept)]
        return [self.times, self.end, sizes, [as_key(value) for value in self.coefficients()]]


@dataclass(frozen=True)
class Solver(ABC):
    """A sampler: how many steps, and the coefficients of each.

    A solver of one's own is a subclass with a ``name``, ``steps`` and, if it is not for every path
    or draws noise, ``check`` and ``stochastic``.

    Attributes:
        name: what a user types for it, as in ``solver=euler``.
        stages: network evaluations of a step, at most.
        skips: whether it can take one step where it had several.
        num_steps: steps from noise to data.
        guidance: classifier-free guidance scale, 1 for none.
        grid: how the times of the steps are spread, see ``time_grid``.
        denoise: whether samples of a path with noise left at t = 1 end with one more prediction,
            of the data from that state; otherwise that noise stays in them.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> class Plain(Solver):
        ...     name = "plain"
        ...     def steps(self, path, prediction, times):  # x' = x + h v
        ...         spans = zip(times[:-1], times[1:])
        ...         return [Step((t,), ((1.0,),), (1.0, s - t), 0.0, s) for t, s in spans]
        >>> [step.output for step in plan(Plain(num_steps=2), CondOT(), "velocity")]
        [(1.0, 0.5), (1.0, 0.5)]
    """

    num_steps: int
    guidance: float = 1.0
    grid: Grid = "uniform"
    denoise: bool = False

    name: ClassVar[str]
    stages: ClassVar[int] = 1
    skips: ClassVar[bool] = True

    @abstractmethod
    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive ``times`` (n + 1 of them).

        The times increase; of a deterministic solver they may as well decrease, from data to
        noise.
        """

    @property
    def stochastic(self) -> bool:
        """Whether its steps draw noise."""
        return False

    def check(self, path: ProbabilityPath) -> None:  # noqa: B027 - most serve every path
        """Refuse a path it cannot follow, with a ``UserError``."""

    def times(self, path: ProbabilityPath, skip_interval: int = 1) -> list[float]:
        """Times from noise to data, every k-th of those it has and the last one."""
        return time_grid(self.grid, path, self.num_steps, skip_interval)


def plan(
    solver: Solver, path: ProbabilityPath, prediction: str, skip_interval: int = 1
) -> list[Step]:
    """Steps from noise to data, on every k-th of the solver's times.

    Where the path does not end in data, a last one takes what the network predicts of them; where
    it leaves noise, that is for ``solver.denoise`` to say.

    Raises:
        UserError: for steps that cannot be followed, see ``check_steps``.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import Euler
        >>> [step.end for step in plan(Euler(num_steps=4), CondOT(), "velocity")]
        [0.25, 0.5, 0.75, 1.0]
        >>> [step.end for step in plan(Euler(num_steps=4), CondOT(), "velocity", skip_interval=2)]
        [0.5, 1.0]
    """  # noqa: DOC502 - raised one level down
    times = solver.times(path, skip_interval)
    steps = solver.steps(path, prediction, times)
    check_steps(solver, times, steps)
    alpha, sigma = coefficients(path, [1.0])[0]
    if not path.ends_in_data or (solver.denoise and not is_zero(sigma)):
        return [*steps, _predicted(path, prediction)]
    return steps if is_one(alpha) else [*steps[:-1], steps[-1].to_data(alpha)]


def _predicted(path: ProbabilityPath, prediction: str) -> Step:
    """The step from the state at t = 1 to the data that the network predicts from it."""
    p, q = convert(prediction, "data", path.coefficients(torch.tensor(1.0, dtype=torch.float64)))
    output = as_coefficient(p), as_coefficient(q)
    return Step((PREDICTED,), inputs=((1.0,),), output=output, noise=0.0, end=PREDICTED)


def check_solver(solver: Solver, path: ProbabilityPath, conditional: bool) -> None:
    """Refuse a solver that does not fit the model.

    Raises:
        UserError: for a path it does not serve, an unknown grid, too many steps for a discrete
            schedule, or guidance of an unconditional model.
    """
    solver.check(path)
    at_least("solver.num_steps", solver.num_steps)
    if not isinstance(solver.denoise, bool):
        raise UserError(f"solver.denoise must be true or false, got {solver.denoise!r}")
    solver.times(path)
    if isinstance(solver.guidance, bool) or not isinstance(solver.guidance, (int, float)):
        raise UserError(f"solver.guidance must be a number, got {solver.guidance!r}; 1 is none")
    if not 0 <= solver.guidance < float("inf"):
        raise UserError(f"solver.guidance must be 0 or more, got {solver.guidance}; 1 is none")
    if solver.guidance != 1 and not conditional:
        raise UserError(
            f"solver.guidance={solver.guidance} needs a class-conditional model trained with "
            "model.class_dropout > 0; use solver.guidance=1"
        )


def check_finite(solver: Solver, prediction: str, steps: Sequence[Step]) -> None:
    """Refuse steps that the prediction leaves open.

    Raises:
        UserError: if a coefficient is not finite.
    """
    for step in steps:
        if not all(map(is_finite, step.coefficients())):
            raise UserError(
                f"solver={solver.name} has no finite step from t={step.times[0]:g} to "
                f"t={step.end:g} with model.prediction={prediction} on this path; use another "
                "solver, such as heun or ddim, or model.prediction=v on a path that preserves "
                "variance and velocity on any other"
            )


def coefficients(
    path: ProbabilityPath, times: Sequence[float]
) -> list[tuple[Coefficient, Coefficient]]:
    """Pairs (alpha, sigma) at the times: Python floats, or tensors of a path that has tensors."""
    c = path.coefficients(torch.tensor(times, dtype=torch.float64))
    return list(zip(at_times(c.alpha), at_times(c.sigma), strict=True))
