"""The reference: full trajectories under weights drawn once each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.laplace.gram import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, Solver, Step, integrate
from bayesdiff.uncertainty.samples import Recorder, Samples, Trajectory, check_skip_interval


@dataclass(frozen=True)
class Ensemble:
    """Variance over members that keep one weight draw along the whole trajectory.

    Members share starting noise, sampler noise and the weight draws of all images, so their spread
    is the weights' doing alone; the variance over them is unbiased.

    With a skip interval k, members take one step where the image takes k. Weights are kept along
    the way, so their spread converges as steps get finer and a coarse grid estimates the same
    number; the image itself is never coarsened.

    Args:
        members: weight draws, at least 2.
        skip_interval: steps of the image per step of a member.
        num_images: images that get a map (read by the pipeline).
        batch_size: images at once; members come on top.
        seed: of the weight draws.
    """

    members: int = 16
    skip_interval: int = 1
    num_images: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("uncertainty.members", self.members, 2)
        at_least("uncertainty.num_images", self.num_images)
        at_least("uncertainty.batch_size", self.batch_size)
        at_least("uncertainty.seed", self.seed, 0)

    def check(self, solver: Solver) -> None:
        """Refuse a skip interval beyond the solver's steps."""
        check_skip_interval(self.skip_interval, solver)

    @torch.inference_mode()
    def __call__(self, start: Trajectory, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance over the members."""
        field = start.field()
        generator = torch.Generator().manual_seed(self.seed)
        weights = posterior.draw(self.members, generator).to(start.device)
        x_0 = start.draw()
        steps, fine = start.steps(self.skip_interval), start.steps()
        noises = [start.draw() if step.noise else x_0 for step in fine]
        recorder = Recorder(len(steps))
        states: dict[float, Tensor] = {}

        def keep(step: Step, x: Tensor) -> None:
            states[step.end] = x[: recorder.images].clone()

        image = integrate(field, fine, x_0, _replay(noises, fine), keep)
        spread = torch.zeros_like(image)

        def observe(step: Step, x: Tensor) -> None:
            nonlocal spread
            spread = x.var(0)
            recorder(step.end, states[step.end], spread)

        members = MemberField(field, weights)
        integrate(
            members, steps, x_0[None], _replay(noises[:: self.skip_interval], steps), observe
        )
        name = f"ensemble, {self.members} members, skip {self.skip_interval}"
        return recorder.samples(image, spread, start.labels, field.evaluations, name)


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


def _replay(noises: list[Tensor], steps: list[Step]) -> Callable[[], Tensor]:
    """Noise of the steps that need it, in order."""
    needed = iter([z for z, step in zip(noises, steps, strict=True) if step.noise])
    return lambda: next(needed)
