"""Images with their uncertainty: what every estimator takes and returns."""

from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.solvers import Field, SampleNoise, Solver, Step, time_grid


@dataclass(frozen=True)
class Samples:
    """Images and the variance that the posterior of the weights gives each of their pixels.

    Attributes:
        images: ``(B, C, H, W)``, the trained model's own samples, never perturbed; data lies in
            [-1, 1], samples are not clipped to it.
        variance: ``(B, C, H, W)`` in squared units of the images; epistemic (the weights' doing,
            the sampler's noise held fixed), and >= 0 except where a published recursion is kept
            unclamped.
        labels: ``(B,)``, None for an unconditional model.
        times: ``(S,)`` solver times at which ``summed`` was recorded.
        summed: ``(S, B)`` variance summed over channels and pixels.
        frames: ``(F, K, C, H, W)`` states of the first K images on the way.
        frame_variance: their variance, of the same shape.
        frame_times: ``(F,)``.
        nfe: network evaluations per image, for image and uncertainty together.
        estimator: which estimator made the variance, with its settings.
        sampler_noise: ``(B, C, H, W)``, variance due to a stochastic solver's noise under fixed
            weights; None for a deterministic solver.
    """

    images: Tensor
    variance: Tensor
    labels: Tensor | None
    times: Tensor
    summed: Tensor
    frames: Tensor
    frame_variance: Tensor
    frame_times: Tensor
    nfe: int
    estimator: str
    sampler_noise: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """One number per image, ``(B,)``: its variance summed over channels and pixels."""
        return self.variance.flatten(1).sum(1)

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """Batches put together; frames are kept from the first one."""
        first = parts[0]
        batched = {"images": 0, "variance": 0, "labels": 0, "summed": 1, "sampler_noise": 0}
        values = {f.name: getattr(first, f.name) for f in fields(cls)}
        for name, dim in batched.items():
            if values[name] is not None:
                values[name] = torch.cat([getattr(part, name) for part in parts], dim)
        return cls(**values)


@dataclass(frozen=True)
class Trajectory:
    """What is needed to start one batch: the estimators share it.

    Attributes:
        model: with its trained weights.
        solver: coefficients and guidance.
        labels: ``(B,)`` or None.
        noise: random inputs of the batch; its first draw is the starting noise.
        device: where to compute.
    """

    model: GenerativeModel
    solver: Solver
    labels: Tensor | None
    noise: SampleNoise
    device: torch.device

    @property
    def path(self) -> ProbabilityPath:
        """The model's path."""
        return self.model.path

    def field(self) -> Field:
        """The trained network at this batch's labels, with its own count of evaluations."""
        return Field(self.model, self.labels, len(self.noise.generators), self.solver.guidance)

    def steps(self, skip_interval: int = 1) -> list[Step]:
        """Steps on every k-th time of the image's own grid."""
        times = time_grid(self.solver.grid, self.path, self.solver.num_steps, skip_interval)
        return self.solver.steps(self.path, self.model.prediction, times)

    def draw(self) -> Tensor:
        """The next noise of the batch, ``(B, C, H, W)``."""
        return self.noise().to(self.device)


class Estimator(Protocol):
    """Carries the posterior of the head through a solver."""

    num_images: int
    batch_size: int

    def __call__(self, start: Trajectory, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance."""
        ...

    def check(self, solver: Solver) -> None:
        """Refuse settings that do not fit the solver."""
        ...


class Recorder:
    """Keeps what a figure over time needs, for the first few images only."""

    def __init__(self, num_steps: int, images: int = 8, frames: int = 9) -> None:
        chosen = torch.linspace(0, num_steps - 1, min(frames, num_steps)).round().long()
        self.chosen = set(chosen.tolist())
        self.images = images
        self.count = 0
        self.times: list[float] = []
        self.summed: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.frame_variance: list[Tensor] = []
        self.frame_times: list[float] = []

    def __call__(self, time: float, state: Tensor, variance: Tensor) -> None:
        """Record one step's state and variance, both ``(B, C, H, W)``."""
        self.times.append(time)
        self.summed.append(variance.flatten(1).sum(1).cpu())
        if self.count in self.chosen:
            self.frames.append(state[: self.images].cpu())
            self.frame_variance.append(variance[: self.images].cpu())
            self.frame_times.append(time)
        self.count += 1

    def samples(
        self,
        images: Tensor,
        variance: Tensor,
        labels: Tensor | None,
        nfe: int,
        estimator: str,
        sampler_noise: Tensor | None = None,
    ) -> Samples:
        """The finished record."""
        return Samples(
            images=images.cpu(),
            variance=variance.cpu(),
            labels=None if labels is None else labels.cpu(),
            times=torch.tensor(self.times),
            summed=torch.stack(self.summed),
            frames=torch.stack(self.frames),
            frame_variance=torch.stack(self.frame_variance),
            frame_times=torch.tensor(self.frame_times),
            nfe=nfe,
            estimator=estimator,
            sampler_noise=None if sampler_noise is None else sampler_noise.cpu(),
        )


def check_skip_interval(skip_interval: int, solver: Solver) -> None:
    """Refuse a skip interval that skips everything.

    Raises:
        UserError: if it is not a whole number between 1 and the solver's steps.
    """
    at_least("uncertainty.skip_interval", skip_interval)
    if skip_interval > solver.num_steps:
        raise UserError(
            f"uncertainty.skip_interval={skip_interval} is more than "
            f"solver.num_steps={solver.num_steps}; choose a smaller interval or more steps"
        )
