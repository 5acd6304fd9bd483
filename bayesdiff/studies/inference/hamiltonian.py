"""Hamiltonian Monte Carlo with many chains as one batched computation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, share
from bayesdiff.studies.inference.warm_up import DualAverage, shrunk_variance, windows

# Of a batch of states (C, P) -> (C,), up to a constant; differentiable, each row by itself.
LogDensity = Callable[[Tensor], Tensor]

# An error of the energy that only a leapfrog that left the typical set makes.
_DIVERGENT = 1000.0
# Step size before any warm-up.
_START = 0.1


@dataclass(frozen=True)
class Chains:
    """What the chains drew after their warm-up.

    Attributes:
        draws: ``(C, N, K)``, of what ``keep`` keeps of a state.
        log_density: of the states, ``(C, N)``.
        acceptance: mean probability of acceptance, ``(C,)``.
        step_size: of the leapfrog, ``(C,)``.
        divergences: number of trajectories that diverged, ``(C,)``.
        variance: of the parameters as the warm-up knows them, the inverse mass, ``(P,)``.
        state: the last ones, ``(C, P)``, from which to go on.
    """

    draws: Tensor
    log_density: Tensor
    acceptance: Tensor
    step_size: Tensor
    divergences: Tensor
    variance: Tensor
    state: Tensor


@dataclass(frozen=True)
class Hamiltonian:
    """Sampler by leapfrog trajectories of a random number of steps.

    The warm-up adapts the step size by dual averaging and one diagonal mass for all chains from
    the pooled variance of their draws, in windows that double.

    A step that suits the bulk of a density may be too long for narrow tails: chains then hardly
    enter them, and neither R-hat nor effective sample sizes say so. Where moments change with a
    ``target_acceptance`` of 0.97, the smaller one was too low.

    Attributes:
        draws: kept of every chain.
        warmup: trajectories before them, which are thrown away.
        leapfrog_steps: at most, of one trajectory; their number is uniform from 1, so that no
            period of the density meets trajectories of its own length.
        target_acceptance: what the step size aims at while it varies; the mean of its logarithm,
            which is kept, accepts some hundredths more.
        shared_step: one step size for all chains in the end, from their mean acceptance; else
            each its own.
    """

    draws: int = 1000
    warmup: int = 500
    leapfrog_steps: int = 20
    target_acceptance: float = 0.8
    shared_step: bool = True

    def __post_init__(self) -> None:
        at_least("draws", self.draws)
        at_least("warmup", self.warmup, 0)
        at_least("leapfrog_steps", self.leapfrog_steps)
        if not share("target_acceptance", self.target_acceptance):
            raise UserError("target_acceptance=0 has no step size; give 0.8")

    def sample(
        self,
        log_density: LogDensity,
        start: Tensor,
        generator: torch.Generator,
        keep: Callable[[Tensor], Tensor] = lambda state: state,
    ) -> Chains:
        """Draw from a density.

        Args:
            log_density: of states ``(C, P)``.
            start: of the chains, ``(C, P)``; spread it wider than the density.
            generator: of all randomness, on the device of ``start``.
            keep: which part ``(C, K)`` of a state is stored.

        Raises:
            UserError: for starts of density 0, or where it is not finite.
        """
        chain = _Sampler(log_density, start.detach().clone(), generator, self.leapfrog_steps)
        bad = ~chain.point.value.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise UserError(f"the log density at the start of chain {first} is not finite")
        self._warm_up(chain)
        kept, values = [], []
        acceptance = torch.zeros_like(chain.point.value)
        divergences = torch.zeros_like(chain.point.value, dtype=torch.long)
        for _ in range(self.draws):
            probability, diverged = chain.move()
            acceptance += probability / self.draws
            divergences += diverged
            kept.append(keep(chain.point.state).clone())
            values.append(chain.point.value)
        return Chains(
            torch.stack(kept, 1),
            torch.stack(values, 1),
            acceptance,
            chain.step_size,
            divergences,
            chain.variance,
            chain.point.state,
        )

    def _warm_up(self, chain: "_Sampler") -> None:
        for place, (length, fits_mass) in enumerate(windows(self.warmup)):
            settles = place > 0 and not fits_mass
            if settles:
                chain.step_size = self._pooled(chain.step_size)
            else:
                chain.reasonable_step()
            # Later acceptances would have to make up for those of a bold last start.
            average = DualAverage(chain.step_size, self.target_acceptance, 1 if settles else 10)
            visited = []
            for _ in range(length):
                probability, _ = chain.move()
                # A chain that starts far out needs shorter steps than the others at first.
                if settles and self.shared_step:
                    probability = probability.mean().expand_as(probability)
                chain.step_size = average.update(probability)
                visited.append(chain.point.state)
            chain.step_size = average.final
            if fits_mass:
                chain.variance = shrunk_variance(torch.stack(visited))
        chain.step_size = self._pooled(chain.step_size)

    def _pooled(self, step_size: Tensor) -> Tensor:
        if not self.shared_step:
            return step_size
        return step_size.log().mean().exp().expand_as(step_size)


@dataclass(frozen=True)
class Point:
    """Where chains are: ``state`` (C, P), its log density ``value`` (C,), ``gradient`` (C, P)."""

    state: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def at(cls, log_density: LogDensity, state: Tensor) -> "Point":
        """Evaluate the density at states ``(C, P)``."""
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            value = log_density(state)
            (gradient,) = torch.autograd.grad(value.sum(), state)
        return cls(state.detach(), value.detach(), gradient)

    def where(self, chosen: Tensor, other: "Point") -> "Point":
        """Itself for the chosen chains, the other elsewhere."""
        rows = chosen[:, None]
        return Point(
            torch.where(rows, self.state, other.state),
            torch.where(chosen, self.value, other.value),
            torch.where(rows, self.gradient, other.gradient),
        )


def leapfrog(
    log_density: LogDensity,
    start: Point,
    momentum: Tensor,
    step_size: Tensor,
    variance: Tensor,
    steps: int,
) -> tuple[Point, Tensor]:
    """Follow Hamilton's equations, reversibly and keeping volumes; the energy errs as step**2.

    Args:
        log_density: minus the potential energy; evaluated once per step.
        start: of all chains.
        momentum: ``(C, P)``.
        step_size: ``(C,)``.
        variance: inverse masses, ``(P,)``.
        steps: how many, at least 1.
    """
    size, point = step_size[:, None], start
    momentum = momentum + size / 2 * point.gradient
    for step in range(steps):
        point = Point.at(log_density, point.state + size * variance * momentum)
        momentum = momentum + (size if step < steps - 1 else size / 2) * point.gradient
    return point, momentum


class _Sampler:
    """All chains at their points, and how they move."""

    def __init__(
        self, log_density: LogDensity, state: Tensor, generator: torch.Generator, steps: int
    ) -> None:
        self.log_density, self.generator, self.most_steps = log_density, generator, steps
        self.point = Point.at(log_density, state)
        self.step_size = torch.full_like(self.point.value, _START)
        self.variance = torch.ones_like(state[0])

    def move(self) -> tuple[Tensor, Tensor]:
        """One trajectory: probability of acceptance ``(C,)``, and who diverged ``(C,)``."""
        steps = torch.randint(
            1, self.most_steps + 1, (1,), generator=self.generator, device=self.generator.device
        )
        end, error = self._trajectory(int(steps))
        probability = (-error).clamp(max=0).exp()
        uniform = torch.rand(
            error.shape, generator=self.generator, dtype=error.dtype, device=error.device
        )
        self.point = end.where(uniform < probability, self.point)
        return probability, error > _DIVERGENT

    def reasonable_step(self) -> None:
        """Double or halve step sizes until one step's acceptance crosses 1/2 (algorithm 4)."""
        grow = None
        for _ in range(60):
            easy = self._trajectory(1)[1] < math.log(2)
            grow = easy if grow is None else grow
            moving = easy == grow
            if not moving.any():
                return
            factor = torch.where(grow, 2.0, 0.5).to(self.step_size)
            self.step_size = torch.where(moving, self.step_size * factor, self.step_size)

    def _trajectory(self, steps: int) -> tuple[Point, Tensor]:
        """Its end, and by how much the energy rose."""
        state = self.point.state
        noise = torch.randn(
            state.shape, generator=self.generator, dtype=state.dtype, device=state.device
        )
        momentum = noise / self.variance.sqrt()
        end, last = leapfrog(
            self.log_density, self.point, momentum, self.step_size, self.variance, steps
        )
        kinetic = [(self.variance * m.square()).sum(1) / 2 for m in (momentum, last)]
        error = (self.point.value - kinetic[0]) - (end.value - kinetic[1])
        return end, torch.nan_to_num(error, nan=math.inf)
