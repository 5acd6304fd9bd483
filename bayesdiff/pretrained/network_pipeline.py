"""The least pipeline: a network of one's own, its scheduler, and a decoder where it has one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Generators = torch.Generator | list[torch.Generator] | None


class Images(NamedTuple):
    """What pipelines return: ``(N, C, H, W)`` in [0, 1], or ``(N, H, W, C)`` of NumPy."""

    images: Any


@dataclass(eq=False, repr=False)
class NetworkPipeline:
    """A module ``forward(x, timesteps)`` that was trained somewhere else, with a scheduler.

    What diffusers' pipelines do, for a network that diffusers does not know: a loop over the
    scheduler's steps, and a decoder at the end. ``BayesianPipeline`` takes it as any other::

        pipe = NetworkPipeline(MyNet(), DDIMScheduler(clip_sample=False), (1, 28, 28))
        bayes = BayesianPipeline.of(pipe).fit(images)

    Args:
        network: its argument for the time is called ``timestep`` or ``timesteps``.
        scheduler: of diffusers, with the schedule of the training.
        shape: of a state, ``(C, H, W)``.
        vae: decoder of states with ``config.scaling_factor``; None where they are images.
        time_shift: what the network's time is more than the scheduler's.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        ...     def forward(self, x, timestep):
        ...         return self.head(torch.relu(self.body(x)))
        >>> pipe = NetworkPipeline(Net(), DDIMScheduler(clip_sample=False), shape=(1, 8, 8))
        >>> pipe(num_images=2, num_inference_steps=5).images.shape
        torch.Size([2, 1, 8, 8])
    """

    network: nn.Module
    scheduler: Any
    shape: Sequence[int]
    vae: Any = None
    time_shift: float = 0.0

    def __post_init__(self) -> None:
        self.shape = tuple(self.shape)

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name."""
        return {"network": self.network, "scheduler": self.scheduler, "vae": self.vae}

    def set_progress_bar_config(self, **options: Any) -> None:
        """Nothing: it has none."""

    def __call__(
        self,
        num_images: int = 1,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pt",
    ) -> Images:
        """Images without a condition."""
        made = self._images(num_images, None, None, 1.0, num_inference_steps, generator)
        return _as(output_type, made)

    @torch.no_grad()
    def _images(
        self,
        count: int,
        labels: Tensor | None,
        nothing: Tensor | None,
        guidance: float,
        steps: int,
        generator: Generators,
    ) -> Tensor:
        """The loop; with labels, and "no class" where images are guided away from it."""
        weight = next(self.network.parameters())
        drawn = generator if isinstance(generator, list) else [generator] * count
        x = torch.stack([torch.randn(self.shape, generator=each) for each in drawn]).to(weight)
        given = [each.to(x.device) for each in (labels, nothing) if each is not None]
        self.scheduler.set_timesteps(steps)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda state, _: state)
        for t in self.scheduler.timesteps:
            seen = scaled(torch.cat([x] * max(len(given), 1)), t)
            time = torch.full((len(seen),), float(t) + self.time_shift, device=x.device)
            output: Any = self.network(seen, time, *([torch.cat(given)] if given else []))
            output = output if isinstance(output, Tensor) else output[0]
            if nothing is not None:
                shown, free = output.chunk(2)
                output = free + guidance * (shown - free)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor)[0]
        return (x / 2 + 0.5).clamp(0, 1)


@dataclass(eq=False, repr=False)
class ClassPipeline(NetworkPipeline):
    """A module ``forward(x, timesteps, y)`` of classes as a pipeline, with guidance.

    As in::

        net = UViT(...).load_weights(path)
        pipe = ClassPipeline(net, scheduler, (4, 32, 32), vae, time_shift=1, nothing=1000)

    Args:
        nothing: number of "no class"; the others are those of ``NetworkPipeline``.
    """

    nothing: int = field(kw_only=True)

    def __call__(  # type: ignore[override]  # what it takes is what it is told apart by
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pt",
    ) -> Images:
        """One image for each class."""
        labels = torch.tensor(list(class_labels))
        nothing = None if guidance_scale == 1 else torch.full_like(labels, self.nothing)
        given = labels, nothing, guidance_scale, num_inference_steps, generator
        return _as(output_type, self._images(len(labels), *given))


def _as(output_type: str, images: Tensor) -> Images:
    wide = images.float().cpu()
    return Images(wide.permute(0, 2, 3, 1).numpy() if output_type == "np" else images)
