"""A scheduler of diffusers as one of our solvers: its steps are found by probing it."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from bayesdiff.checks import UserError, one_line
from bayesdiff.options.spelling import near
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.paths.coefficient import Coefficient
from bayesdiff.pretrained.listening import Heard
from bayesdiff.pretrained.probing import probed_steps
from bayesdiff.pretrained.schedule import SchedulePath
from bayesdiff.solvers import Solver, Step


@dataclass(frozen=True)
class Scheduled(Solver):
    """The steps of a scheduler, with times of its own.

    Args:
        own: its steps, from standard noise to data, for outputs as the network gives them.
        called: the scheduler's name.
        takes: prediction that it takes, see ``SchedulePath``.
    """

    own: tuple[Step, ...] = ()
    called: str = ""
    takes: str | None = None

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
        """Its steps, from the path's first state and for this prediction.

        Raises:
            UserError: for other times than its own.
        """
        if list(times) != self.times(path):
            raise UserError(
                f"{self.called} goes from noise to data at times of its own; use one of our "
                "solvers, such as solver=pf_ode, for other times or the other way"
            )
        first, *others = self.own
        steps = [_from(first, path.noise_scale), *others]
        if self.takes in (None, prediction):
            return steps
        return [_for(step, path, prediction, self.takes) for step in steps]


def _from(step: Step, scale: Coefficient) -> Step:
    """The step from a state that is larger by this factor, where it should not be."""
    if scale == 1.0:
        return step

    def of(row: Sequence[Coefficient]) -> tuple[Coefficient, ...]:
        return (row[0] / scale, *row[1:])

    inputs, kept = tuple(map(of, step.inputs)), tuple(map(of, step.kept))
    return replace(step, inputs=inputs, output=of(step.output), kept=kept)


def _for(step: Step, path: ProbabilityPath, prediction: str, takes: str) -> Step:
    """A step that takes one prediction, for a network that gives a multiple of it."""
    here = path.coefficients(torch.tensor(step.times[0], dtype=torch.float64))
    factor = float(convert(prediction, takes, here)[1])

    def of(row: Sequence[Coefficient]) -> tuple[Coefficient, ...]:
        return (row[0], factor * row[1], *row[2:])

    return replace(step, output=of(step.output), kept=tuple(map(of, step.kept)))


def scheduled(
    heard: Heard, path: SchedulePath, guidance: float = 1.0, own_noise: bool = True
) -> Scheduled:
    """The solver that the scheduler of a pipeline is, from the noise that the pipeline gives it.

    Args:
        heard: a run of the pipeline.
        path: of the network, which knows our time at those of the schedule.
        guidance: of the solver.
        own_noise: whether it starts from the pipeline's noise though that is not what it asks for.
    """
    options = heard.steps[0].options
    first, *others = probed_steps(heard.scheduler, path.our_time, step_kwargs=options)
    steps = (_from(first, heard.unscaled_by) if own_noise else first, *others)
    called = type(heard.scheduler).__name__
    return Scheduled(len(steps), guidance, own=steps, called=called, takes=path.takes)


def another_scheduler(own: Any, name: str | None, options: Mapping[str, Any]) -> Any:
    """Another scheduler with the same training behind it.

    Args:
        own: scheduler of a pipeline.
        name: of the other one's class in diffusers; None for the same.
        options: of its configuration, in place of those of ``own``.

    Raises:
        UserError: for a name or an option that diffusers does not know.
    """
    import diffusers

    kind = type(own) if name is None else getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
        raise UserError(f"diffusers has no scheduler {name!r}{near(str(name), known)}")
    unknown = [each for each in options if each not in inspect.signature(kind).parameters]
    if unknown:
        known = list(inspect.signature(kind).parameters)
        raise UserError(f"{kind.__name__} has no option {unknown[0]!r}{near(unknown[0], known)}")
    try:
        return kind.from_config(own.config, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        who = kind.__name__
        raise UserError(f"{who} does not take these options: {one_line(error)}") from error
