"""A scheduler of diffusers as one of our solvers: its steps are found by probing it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bayesdiff.checks import UserError
from bayesdiff.paths import ProbabilityPath
from bayesdiff.pretrained.listening import Heard
from bayesdiff.pretrained.probing import probed_steps
from bayesdiff.pretrained.schedule import SchedulePath
from bayesdiff.solvers import Solver, Step
from bayesdiff.solvers.step import Row


@dataclass(frozen=True)
class Scheduled(Solver):
    """The steps of a scheduler, with times of its own.

    Args:
        own: its steps, from noise to data.
        called: the scheduler's name.
    """

    own: tuple[Step, ...] = ()
    called: str = ""

    name: ClassVar[str] = "scheduler"
    skips: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        """Whether its steps draw noise."""
        return any(step.stochastic for step in self.own)

    def times(self, path: ProbabilityPath, skip_interval: int = 1) -> list[float]:
        """Times of its evaluations, and 1.

        Raises:
            UserError: for a skip interval: a scheduler has the steps that it has.
        """
        if skip_interval != 1:
            raise UserError(
                f"uncertainty.skip_interval={skip_interval} leaves out steps, and {self.called} "
                "is a scheduler of diffusers, whose steps belong together; use 1, or one of our "
                "solvers"
            )
        return [*(step.times[0] for step in self.own), 1.0]

    def steps(self, path: ProbabilityPath, prediction: str, times: Sequence[float]) -> list[Step]:
        """Its steps.

        Raises:
            UserError: for other times than its own.
        """
        if list(times) != self.times(path):
            raise UserError(
                f"{self.called} goes from noise to data at times of its own; use one of our "
                "solvers, such as solver=pf_ode, for other times or the other way"
            )
        return list(self.own)


def scheduled(heard: Heard, path: SchedulePath, guidance: float = 1.0) -> Scheduled:
    """The solver that the scheduler of a pipeline is, from the noise that the pipeline gives it.

    Args:
        heard: a run of the pipeline.
        path: of the network, which knows our time at those of the schedule.
        guidance: of the solver.
    """
    first, *others = probed_steps(heard.scheduler, path.our_time)
    steps = (_from_smaller(first, heard.unscaled_by), *others)
    return Scheduled(len(steps), guidance, own=steps, called=type(heard.scheduler).__name__)


def _from_smaller(step: Step, factor: float) -> Step:
    """A first step whose state is to be this much smaller."""
    if factor == 1:
        return step

    def smaller(row: Row) -> Row:
        return (row[0] / factor, *row[1:])

    return replace(
        step,
        inputs=tuple(map(smaller, step.inputs)),
        output=smaller(step.output),
        kept=tuple(map(smaller, step.kept)),
    )
