"""From a pipeline's states to images and back, through its own decoder."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, one_line
from bayesdiff.pretrained.listening import Answer, listen, sharing_copy

_BASE = 256  # digits of a place, exact in half precision
_GRAYS = (0.25, 0.5)  # no pipeline clips states of these values


class PipelineCoder(nn.Module):
    """States of a pipeline's loop to images in [-1, 1], and images to states.

    A decoder reads z = scale * state[places] + shift: values in another order, as packed tokens
    are, scaled and shifted. All three are read off the pipeline's own last lines.

    Args:
        coder: the autoencoder, None for states that are images, in whatever range.
        shape: of a state.
        latents: shape of what the decoder reads.
        places: of each of its values in a state, None for the same order.
        scale: broadcasts against it.
        shift: see there.
    """

    places: Tensor | None
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        coder: nn.Module | None,
        shape: tuple[int, ...],
        latents: tuple[int, ...],
        places: Tensor | None,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        super().__init__()
        self.coder, self.shape, self.latents = coder, shape, latents
        self.register_buffer("places", places)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    @property
    def trivial(self) -> bool:
        """Whether states are images in [-1, 1] themselves."""
        return self.coder is None and bool(self.scale == 1) and bool(self.shift == 0)

    def decode(self, states: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` about in [-1, 1], differentiable."""
        z = self.ordered(states) * self.scale.to(states) + self.shift.to(states)
        if self.coder is None:
            return z
        weight = next(self.coder.parameters())
        decode: Any = self.coder.decode
        image: Tensor = decode(z.to(weight.dtype))[0]
        return image.to(states.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to states, by the mean of the encoder's distribution."""
        if self.coder is None:
            z = images
        else:
            weight = next(self.coder.parameters())
            encode: Any = self.coder.encode
            try:
                law = encode(images.to(weight.dtype))
            except RuntimeError as error:
                raise UserError(
                    f"images of {tuple(images.shape[1:])} do not go through the pipeline's "
                    f"encoder: {one_line(error)}; give images like those that it makes"
                ) from error
            found = law.latent_dist.mode() if hasattr(law, "latent_dist") else law[0]
            z = found.to(images.dtype)
        if tuple(z.shape[1:]) != self.latents:
            raise UserError(
                f"images of {tuple(images.shape[1:])} are states of {tuple(z.shape[1:])}, and the "
                f"pipeline's are {self.latents}; give images of the size that it makes"
            )
        return self.from_ordered((z - self.shift.to(z)) / self.scale.to(z))

    def ordered(self, states: Tensor) -> Tensor:
        """Values in the decoder's order, ``(N, *shape) -> (N, *latents)``."""
        flat = states.flatten(1)
        return (flat if self.places is None else flat[:, self.places]).unflatten(1, self.latents)

    def arranged(self, noise: Tensor) -> Tensor:
        """Noise as the pipeline makes it, in the decoder's order, as states."""
        return self.from_ordered(noise.flatten(1).unflatten(1, self.latents))

    def from_ordered(self, values: Tensor) -> Tensor:
        """Values in the decoder's order as states."""
        flat = values.flatten(1)
        if self.places is not None:
            flat = flat[:, self.places.argsort()]
        return flat.unflatten(1, self.shape)


def coder_of(pipe: Any, shape: tuple[int, ...], **kwargs: Any) -> PipelineCoder:
    """The coder of a pipeline, by what it does with its last state.

    Args:
        pipe: of diffusers.
        shape: of a state.
        kwargs: arguments of one image.

    Raises:
        UserError: if it does something else than ordering, scaling and shifting.
    """
    module = next(
        (p for n in ("vae", "vqvae") if isinstance(p := pipe.components.get(n), nn.Module)), None
    )
    size = torch.Size(shape).numel()
    numbers = torch.arange(size)
    if module is None:
        return PipelineCoder(None, shape, shape, None, *_range_of_states(pipe, shape, **kwargs))
    planes = [torch.zeros(size), torch.ones(size)]
    while _BASE ** (len(planes) - 2) < size:
        planes.append(((numbers // _BASE ** (len(planes) - 2)) % _BASE).float())

    def told(plane: Tensor) -> Tensor:
        def last(state: Tensor) -> Tensor:
            return plane.reshape(1, *shape).to(state).expand_as(state)

        heard = listen(pipe, answer=silence(), last=last, **kwargs)
        if len(heard.decoded) != 1:
            raise UserError(
                f"{type(pipe).__name__} calls its decoder {len(heard.decoded)} times; "
                "bayesdiff follows pipelines that decode an image once"
            )
        return heard.decoded[0][:1].float()

    zero, one, *digits = [told(plane) for plane in planes]
    scale = one - zero
    read = [((digit - zero) / scale) for digit in digits]
    places = sum(digit.round().long() * _BASE**k for k, digit in enumerate(read)).flatten()
    if not torch.equal(places.sort().values, numbers):
        raise UserError(
            f"{type(pipe).__name__} does more to its last state than ordering and scaling it "
            "before the decoder; bayesdiff cannot follow that"
        )
    straight = torch.equal(places, numbers)
    return PipelineCoder(
        sharing_copy(module), shape, tuple(zero.shape[1:]), None if straight else places,
        _small(scale[0]), _small(zero[0]),
    )  # fmt: skip


def _range_of_states(pipe: Any, shape: tuple[int, ...], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift from states that are images to [-1, 1], by what comes of two gray ones."""
    answer = silence()
    if "output_type" not in inspect.signature(pipe.__call__).parameters:
        return torch.tensor(1.0), torch.tensor(0.0)

    def shown(gray: float) -> float:
        def last(state: Tensor) -> Tensor:
            return torch.full_like(state, gray, dtype=torch.float32)  # numpy knows no bfloat16

        heard = listen(pipe, answer=answer, last=last, **{**kwargs, "output_type": "np"})
        image = np.asarray(heard.result[0], dtype=float)
        if float(np.ptp(image)) > 1e-3:
            raise UserError(
                f"{type(pipe).__name__} does not show a gray state as a gray image; bayesdiff "
                "follows pipelines that scale their last state, and shift it"
            )
        return float(image.mean())

    dark, bright = map(shown, _GRAYS)
    slope = (bright - dark) / (_GRAYS[1] - _GRAYS[0])
    scale, shift = 2 * slope, 2 * (dark - slope * _GRAYS[0]) - 1
    return torch.tensor(round(scale, 3)), torch.tensor(round(shift, 3))


def _small(values: Tensor) -> Tensor:
    """One number, or one for each channel, where that is all there is."""
    if bool((values - values.flatten()[0]).abs().max() < 1e-6):
        return values.flatten()[0]
    channel = values.flatten(1)[:, :1].unflatten(1, [1] * (values.dim() - 1))
    return channel if bool((values - channel).abs().max() < 1e-6) else values


def silence() -> Answer:
    """An answer of zeros that never runs the network, once its shape is known."""
    shapes: list[Tensor] = []

    def answer(number: int, really: Callable[[], Tensor]) -> Tensor:
        if not shapes:
            shapes.append(really())
        return torch.zeros_like(shapes[0])

    return answer
