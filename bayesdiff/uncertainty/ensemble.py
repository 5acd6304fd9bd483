"""The reference: full trajectories under weights drawn once each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.gram import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, SampleNoise, Solver, Step, integrate
from bayesdiff.solvers.integrate import Observe
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.samples import Recorder, Samples, Trajectory, check_skip_interval

# Other draws than an estimator of the same seed has: agreement must not come from sharing them.
_SALT = 1_000_003


@dataclass(frozen=True)
class Ensemble(Estimator):
    """Variance over members that keep one weight draw along the whole trajectory.

    Members share starting noise, sampler noise and the weight draws of all images, so their spread
    is the weights' doing alone; the variance over them is unbiased.

    With a skip interval k, members take one step where the image takes k. Weights are kept along
    the way, so their spread converges as steps get finer and a coarse grid estimates the same
    number; the image itself is never coarsened.

    A stochastic solver's own noise is told apart: further trajectories of the trained weights take
    the same starting noise and each its own noise on the way.

    Args:
        members: weight draws, at least 2.
        skip_interval: steps of the image per step of a member.
        noise_members: trajectories for the variance of a stochastic solver's noise, at least 2,
            or 0 for none; a deterministic solver needs none.
    """

    members: int = 16
    skip_interval: int = 1
    noise_members: int = 8

    name: ClassVar[str] = "ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)
        if at_least("uncertainty.noise_members", self.noise_members, 0) == 1:
            raise UserError("uncertainty.noise_members=1 has no variance; give 2 or more, or 0")

    def check(self, solver: Solver) -> None:
        """Refuse a skip interval beyond the solver's steps."""
        check_skip_interval(self.skip_interval, solver)

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once."""
        return max(self.members, self.noise_members) + 1

    @torch.inference_mode()
    def __call__(self, start: Trajectory, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance over the members."""
        steps = start.steps(self.skip_interval)
        recorder = Recorder(len(steps), self.times)
        wanted = recorder.wanted([step.end for step in steps])
        states: dict[float, Tensor] = {}

        def keep(step: Step, x: Tensor) -> None:
            if step.end in wanted:
                states[step.end] = x[wanted[step.end]].clone()

        def observe(step: Step, x: Tensor) -> None:
            recorder(step.end, states.get(step.end), x.var(0))

        field, x_0 = start.field(), start.draw()
        noise = start.noise.copy()
        image = integrate(field, start.steps(), x_0, start.draw, keep)
        members = self._members(field, start, posterior, x_0, noise, observe)
        of_noise = self._sampler_noise(field, start, x_0)
        name = f"ensemble, {self.members} members, skip {self.skip_interval}"
        return recorder.samples(
            image, members.var(0), start.labels, field.evaluations, name, of_noise
        )

    def weights(self, posterior: HeadPosterior) -> Tensor:
        """The members' heads, ``(M, C_out, P)`` float64."""
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        return posterior.draw(self.members, generator)

    @torch.inference_mode()
    def images(self, start: Trajectory, posterior: HeadPosterior) -> tuple[Tensor, Tensor]:
        """The trained model's images ``(B, C, H, W)`` and the members' ``(M, B, C, H, W)``."""
        field, x_0 = start.field(), start.draw()
        noise = start.noise.copy()
        image = integrate(field, start.steps(), x_0, start.draw)
        return image, self._members(field, start, posterior, x_0, noise)

    def _members(
        self,
        field: Field,
        start: Trajectory,
        posterior: HeadPosterior,
        x_0: Tensor,
        noise: SampleNoise,
        observe: Observe | None = None,
    ) -> Tensor:
        """Last states of the members; ``noise`` is where the image's own began after x_0."""
        weights = self.weights(posterior).to(start.device)
        fresh = _of_coarse_steps(noise, start.steps(), self.skip_interval)
        return integrate(
            MemberField(field, weights),
            start.steps(self.skip_interval),
            x_0[None],
            lambda: next(fresh).to(start.device),
            observe,
        )

    def _sampler_noise(self, field: Field, start: Trajectory, x_0: Tensor) -> Tensor | None:
        """Variance over the solver's noise from the same x_0, under the trained weights."""
        steps, count = start.steps(), self.noise_members
        if not count or not any(step.noise for step in steps):
            return None
        fresh = start.noise.fork(self.seed)

        def outputs(x: Tensor, t: float) -> Tensor:
            return field(x.flatten(0, 1), t).unflatten(0, (len(x), -1))

        def noise() -> Tensor:
            return torch.stack([fresh() for _ in range(count)]).to(x_0)

        return integrate(outputs, steps, x_0[None], noise).var(0)


class MemberField:
    """The network under M heads at once, for states ``(m, B, C, H, W)`` with m = 1 or M.

    All members start from the same noise: their first features are computed once.
    """

    def __init__(self, field: Field, weights: Tensor) -> None:
        self.field = field
        self.weights = weights

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Outputs ``(M, B, C, H, W)``."""
        net = self.field.model.net
        features = self.field.features(x.flatten(0, 1), t).unflatten(0, (len(x), -1))
        output = apply_head(net.head, features, self.weights)
        return net.fold(output.flatten(0, 1)).unflatten(0, (len(output), -1))


def _of_coarse_steps(
    noise: Callable[[], Tensor], fine: list[Step], skip_interval: int
) -> Iterator[Tensor]:
    """The image's noise once more; a coarse step gets the sum of what its fine steps had.

    Yields:
        Noise of the coarse steps that need it, ``(B, C, H, W)``, of unit variance.
    """
    for first in range(0, len(fine), skip_interval):
        drawn = [(s.noise, noise()) for s in fine[first : first + skip_interval] if s.noise]
        if len(drawn) == 1:
            yield drawn[0][1]
        elif drawn:
            size = sum(scale**2 for scale, _ in drawn) ** 0.5
            yield torch.stack([scale / size * z for scale, z in drawn]).sum(0)
