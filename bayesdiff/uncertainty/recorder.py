"""What a figure over time needs, kept while an estimator follows its steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.uncertainty.samples import Samples

# Times closer than this are the same.
_SAME = 1e-9


class Recorder:
    """Keeps what a figure over time needs, for the first few images only, and requested times.

    Args:
        num_steps: how many steps will be recorded.
        times: requested times; all images are kept at the first step that ends at or after one.
        images: of the frames.
        frames: evenly over the steps.

    Example:
        >>> recorder, image = Recorder(num_steps=2), torch.zeros(3, 1, 8, 8)
        >>> recorder(0.5, image, image + 0.25)
        >>> recorder(1.0, image, image + 1)
        >>> samples = recorder.samples(image, image + 1, None, nfe=2, estimator="mine")
        >>> samples.summed  # over 64 pixels, for three images after two steps
        tensor([[16., 16., 16.],
                [64., 64., 64.]])
    """

    def __init__(
        self, num_steps: int, times: Sequence[float] = (), images: int = 8, frames: int = 9
    ) -> None:
        chosen = torch.linspace(0, num_steps - 1, min(frames, num_steps)).round().long()
        self.chosen = set(chosen.tolist())
        self.num_steps = num_steps
        self.images = images
        self.pending = sorted(times)
        self.requested: list[tuple[float, Tensor, Tensor]] = []
        self.count = 0
        self.times: list[float] = []
        self.summed: list[Tensor] = []
        self.spatial: list[Tensor] = []
        self.frames: list[Tensor] = []
        self.frame_variance: list[Tensor] = []
        self.frame_times: list[float] = []

    def recorded(self, ends: Sequence[float]) -> dict[float, slice]:
        """Which images' states will be kept, for those of the steps' ends where any are."""
        kept = {ends[number]: slice(self.images) for number in self.chosen}
        for time in self.pending:
            first = next((end for end in ends if time <= end + _SAME), ends[-1])
            kept[first] = slice(None)
        return kept

    def __call__(self, time: float, state: Tensor | None, variance: Tensor) -> None:
        """Record one step.

        Args:
            time: at the end of the step.
            state: ``(B, C, H, W)``, or as much of it as is ``recorded``, None for nothing.
            variance: ``(B, C, H, W)``.
        """
        self.times.append(time)
        self.summed.append(variance.flatten(1).sum(1).cpu())
        self.spatial.append(variance.flatten(1).var(1, correction=0).cpu())
        if state is not None and self.count in self.chosen:
            self.frames.append(state[: self.images].cpu())
            self.frame_variance.append(variance[: self.images].cpu())
            self.frame_times.append(time)
        self.count += 1
        last = self.count == self.num_steps
        while self.pending and state is not None and (last or self.pending[0] <= time + _SAME):
            self.pending.pop(0)
            self.requested.append((time, state.cpu(), variance.cpu()))

    def samples(
        self,
        images: Tensor,
        variance: Tensor,
        labels: Tensor | None,
        nfe: int,
        estimator: str,
        sampler_noise: Tensor | None = None,
        latents: tuple[Tensor, Tensor] | None = None,
    ) -> Samples:
        """The finished record; ``latents`` are states and their variance, if not what is shown."""
        times, states, variances = (
            zip(*self.requested, strict=True) if self.requested else 3 * [()]
        )
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
            requested_times=torch.tensor(times) if times else None,
            states=torch.stack(states) if times else None,
            state_variance=torch.stack(variances) if times else None,
            spatial=torch.stack(self.spatial),
            latents=None if latents is None else latents[0].cpu(),
            latent_variance=None if latents is None else latents[1].cpu(),
        )
