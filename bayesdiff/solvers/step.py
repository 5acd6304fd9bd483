"""A solver is coefficients: every step is affine in the state and the network outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bayesdiff.checks import UserError, at_least
from bayesdiff.paths import ProbabilityPath
from bayesdiff.solvers.grid import time_grid

# What solver=... takes, by the family of paths.
NAMES = {
    "flow": "euler, heun, midpoint, rk4",
    "diffusion": "ddim, ddpm, dpm1, dpm2, dpmpp_2m, sde, pf_ode",
}


@dataclass(frozen=True)
class Step:
    """One step x -> x' with one or more network evaluations g_0, g_1, ...

    Evaluation i sees u_i = inputs[i][0] x + sum_j inputs[i][1 + j] g_j (j < i) at ``times[i]``;
    then x' = output[0] x + sum_j output[1 + j] g_j + history k + noise z with z ~ N(0, I).
    With one evaluation that is x' = a x + b g(x, t) + c z.

    k is what the step before kept: kept[0] x + sum_j kept[1 + j] g_j of that step. Multistep
    methods need it.

    Attributes:
        times: time of each evaluation.
        inputs: lower triangular coefficients of the evaluations' inputs.
        output: coefficients (a, b_0, b_1, ...) of the new state.
        noise: c, standard deviation of the fresh noise.
        end: time of the new state.
        kept: coefficients of what the next step may use, None for nothing.
        history: coefficient of what the step before kept.
    """

    times: tuple[float, ...]
    inputs: tuple[tuple[float, ...], ...]
    output: tuple[float, ...]
    noise: float
    end: float
    kept: tuple[float, ...] | None = None
    history: float = 0.0


class Solver(Protocol):
    """A sampler: how many steps, and the coefficients of each.

    Attributes:
        name: what a user types for it, as in ``solver=euler``.
        family: family of the paths it can follow, ``flow`` or ``diffusion``.
        stages: network evaluations of a step, at most.
        num_steps: steps from noise to data.
        guidance: classifier-free guidance scale, 1 for none.
        grid: how the times of the steps are spread, a name of ``time_grid``.
    """

    name: str
    family: str
    stages: int
    num_steps: int
    guidance: float
    grid: str

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Coefficients of the steps between consecutive ``times`` (n + 1 increasing numbers)."""
        ...


def check_solver(solver: Solver, path: ProbabilityPath, conditional: bool) -> None:
    """Refuse a solver that does not fit the model.

    Raises:
        UserError: for another family, an unknown grid, too many steps for a discrete schedule, or
            guidance of an unconditional model.
    """
    if solver.family != path.family:
        raise UserError(
            f"solver={solver.name} is for {solver.family} models, this model is a {path.family} "
            f"model; choose from {NAMES[path.family]}"
        )
    at_least("solver.num_steps", solver.num_steps)
    time_grid(solver.grid, path, solver.num_steps)
    if isinstance(solver.guidance, bool) or not isinstance(solver.guidance, (int, float)):
        raise UserError(f"solver.guidance must be a number, got {solver.guidance!r}; 1 is none")
    if not 0 <= solver.guidance < float("inf"):
        raise UserError(f"solver.guidance must be 0 or more, got {solver.guidance}; 1 is none")
    if solver.guidance != 1 and not conditional:
        raise UserError(
            f"solver.guidance={solver.guidance} needs a class-conditional model trained with "
            "model.class_dropout > 0; use solver.guidance=1"
        )


def coefficients(path: ProbabilityPath, times: Sequence[float]) -> list[tuple[float, float]]:
    """Pairs (alpha, sigma) at the times, as Python floats."""
    c = path.coefficients(torch.tensor(times, dtype=torch.float64))
    return list(zip(c.alpha.tolist(), c.sigma.tolist(), strict=True))
