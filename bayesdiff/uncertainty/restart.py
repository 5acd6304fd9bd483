"""Maps of trajectories that begin in the middle, and whole samples of other noise."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bayesdiff.solvers import SampleNoise, Step
from bayesdiff.uncertainty.start import Start

# Other noise than alternatives, aleatoric scores and estimators take.
_FRESH = 5_000_011
_MOST = 10_007  # fresh samples of one image that have noise of their own


class RestartNoise(SampleNoise):
    """A state in place of the starting noise, then a sample's own noise of the later steps.

    Args:
        state: of the batch, ``(B, C, H, W)``.
        later: the samples' noise as it stands at that state.
    """

    def __init__(self, state: Tensor, later: SampleNoise) -> None:
        super().__init__(later.seed, later.indices, later.shape)
        self.generators = [generator.clone_state() for generator in later.generators]
        self.state: Tensor | None = state

    def __call__(self) -> Tensor:
        """The state, and from then on noise ``(B, C, H, W)``."""
        if self.state is None:
            return super().__call__()
        state, self.state = self.state, None
        return state


@dataclass(frozen=True)
class Restart(Start):
    """The rest of a trajectory as one of its own: any estimator follows the weights from there on.

    A map of it is the variance that the posterior adds from that state on; the state itself counts
    as certain.

    Attributes:
        times: where the steps begin and end; the first one is the time of the state.
    """

    times: tuple[float, ...] = ()

    @classmethod
    def of(cls, start: Start, times: list[float], state: Tensor, later: SampleNoise) -> Self:
        """From a state of the batch.

        Args:
            start: of the batch, from the noise on.
            times: of the state, and of the ends of the later steps.
            state: ``(B, C, H, W)``.
            later: the samples' noise as it stands at that state.
        """
        noise = RestartNoise(state, later)
        rest = start.device, start.decoder, tuple(times)
        return cls(start.model, start.solver, start.condition, noise, *rest)

    def initial(self) -> Tensor:
        """The state itself."""
        return self.draw()

    def steps(self, skip_interval: int = 1) -> list[Step]:
        """Steps on every k-th of the times, and on the last one."""
        times = [*self.times[:-1:skip_interval], self.times[-1]]
        return self.solver.steps(self.path, self.model.prediction, times)


def with_state(start: Start, state: Tensor) -> Start:
    """The batch from another starting noise ``(B, C, H, W)``; its own was drawn already."""
    noise = RestartNoise(state, start.noise)
    return Start(start.model, start.solver, start.condition, noise, start.device, start.decoder)


def fresh_start(start: Start, number: int, seed: int) -> Start:
    """Another sample of the same class in place of each, from noise of its own.

    Args:
        start: of the batch.
        number: of the fresh sample; with ``seed`` and the image's number it decides the noise.
        seed: of all of them.
    """
    noise = start.noise.fork(_FRESH + seed * _MOST + number)
    return Start(start.model, start.solver, start.condition, noise, start.device, start.decoder)
