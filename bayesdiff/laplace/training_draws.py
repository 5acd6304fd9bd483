"""What a pass over the data sees: images, each with noise and a time, the same for every pass."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.data.spaces import to_model_range
from bayesdiff.machine.progress import track
from bayesdiff.machine.ranks import dealt
from bayesdiff.models import GenerativeModel

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Draw:
    """One batch of images at their times.

    Attributes:
        t: ``(B,)`` in [0, 1).
        time: ``(B,)``, the same as the network takes it.
        x_t: ``(B, C, H, W)``.
        y: values of the model's condition ``(B, ...)``, or None.
        target: ``(B, C, H, W)``, what the network should say.
        generator: behind noise and times; what a pass draws further from it is as reproducible.
    """

    t: Tensor
    time: Tensor
    x_t: Tensor
    y: Tensor | None
    target: Tensor
    generator: torch.Generator


def draws_of(
    model: GenerativeModel,
    images: Tensor,
    given: Tensor | None,
    *,
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    what: str = "curvature",
    encode: Encode = to_model_range,
) -> Iterator[Draw]:
    """This process's share of the batches, each as often as there are draws.

    t is uniform, since a sampler visits all times alike. Draws depend on (seed, batch) only and
    whole batches are dealt to processes, so any number of processes sees the same.

    Args:
        model: gives path, prediction and condition.
        images: ``(N, C, H, W)`` uint8.
        given: values of the model's condition, ``(N, ...)``, or None.
        draws: (t, noise) draws per image.
        num_images: a random subset of this size; None for all.
        batch_size: images at once.
        seed: fixes subset and draws.
        what: the progress bar's name.
        encode: of the images' space: images as they are stored to states.

    Yields:
        The same in the same order whenever the arguments are the same.
    """
    device = next(model.parameters()).device
    order = torch.randperm(len(images), generator=_generator(seed, 0))[:num_images]
    numbered = list(enumerate(order.split(batch_size), start=1))
    log.info("%s: one pass over %d images, %d at once", what, len(order), batch_size)
    for number, chosen in track(dealt(numbered), what, "images", lambda each: len(each[1])):
        x_1 = encode(images[chosen]).to(device)
        y = None if given is None or model.condition is None else given[chosen].to(device)
        for draw in range(draws):
            generator = _generator(seed, number * draws + draw)
            x_0, t = _noise_and_times(x_1, generator)
            time = model.path.training_times(t)
            x_t, target = model.corrupt(x_1, x_0, time)
            yield Draw(t, time, x_t, y, target, generator)


def _noise_and_times(like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the images' shape and stratified uniform times, drawn on the CPU."""
    noise = torch.randn(like.shape, generator=generator).to(like.device)
    spread = torch.randperm(len(like), generator=generator) / len(like)
    t = (torch.rand(1, generator=generator) + spread) % 1
    return noise, t.to(like.device)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2_654_435_761 + number) % 2**32)
