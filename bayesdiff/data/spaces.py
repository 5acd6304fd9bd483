"""What a state of the model is to the data: pixels, points, latents of a coder."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.data.ranges import to_model_range, to_uint8
from bayesdiff.options.targets import arguments
from bayesdiff.options.values import plain
from bayesdiff.storage.artefacts import key_of, weights_key
from bayesdiff.storage.source_code import code_of

if TYPE_CHECKING:
    from bayesdiff.data.images import ImageData


class Space(Protocol):
    """The states in which a model trains and samples, and what they look like.

    ``data.space`` of the configuration makes one for a data set, as ``target(data, **options)``.
    The network, the path, the solvers and every variance know states alone; what a map shows is
    the variance of ``values``.

    Attributes:
        shape: of one state.
        pictures: whether values are images ``(C, H, W)`` in [-1, 1]; scores and studies of
            pictures refuse others.
        decoded: whether values are other than the states; what works pixel by pixel on states
            refuses that.
        figures: full name of what draws samples and maps, see ``report.pictures``.
        decoded_figures: of what draws them where states are of another kind and decode to these.
        scores: full name of what compares samples with the data, see ``runs.scores``.
        fingerprint: changes with whatever states depend on beside data and options.
    """

    shape: tuple[int, ...]
    pictures: bool
    decoded: bool
    figures: str
    decoded_figures: str
    scores: str
    fingerprint: str

    def encode(self, data: Tensor) -> Tensor:
        """Data as it is stored, ``(N, ...)``, to float32 states ``(N, *shape)``, same device."""
        ...

    def values(self, states: Tensor) -> Tensor:
        """What states look like, in the units of maps, ``(N, *shape)`` in; differentiable."""
        ...

    def decode(self, states: Tensor) -> Tensor:
        """States ``(N, *shape)`` to data as it is stored."""
        ...


class Pixels:
    """States are the images themselves, in [-1, 1].

    Args:
        data: of uint8 images.
    """

    pictures, decoded = True, False
    figures = "bayesdiff.report.pictures.Pictures"
    decoded_figures = "bayesdiff.report.pictures.DecodedPictures"
    scores = "bayesdiff.runs.scores.FeatureScores"
    fingerprint = ""

    def __init__(self, data: "ImageData") -> None:
        self.shape = tuple(data.images.shape[1:])

    def encode(self, data: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` to [-1, 1]."""
        return to_model_range(data)

    def values(self, states: Tensor) -> Tensor:
        """The states."""
        return states

    def decode(self, states: Tensor) -> Tensor:
        """Images in [-1, 1], values beyond are clipped, to uint8."""
        return to_uint8(states)


class Points:
    """States are points, as they are stored.

    Those in the plane have maps over it beside the figures of all points.

    Args:
        data: of float32 points ``(N, D)``, about standardised: the noise is.

    Raises:
        UserError: for data of another shape.
    """

    pictures, decoded = False, False
    decoded_figures = "bayesdiff.report.points.PointFigures"
    scores = "bayesdiff.runs.scores.PointScores"
    fingerprint = ""

    def __init__(self, data: "ImageData") -> None:
        self.shape = tuple(data.images.shape[1:])
        if len(self.shape) != 1:
            raise UserError(
                f"data.space=Points holds points (N, D), {data.name} is "
                f"{tuple(data.images.shape)}; leave data.space out"
            )
        own = {(2,): "bayesdiff.report.plane.PlaneFigures"}
        self.figures = own.get(self.shape, "bayesdiff.report.points.PointFigures")

    def encode(self, data: Tensor) -> Tensor:
        """The points."""
        return data

    def values(self, states: Tensor) -> Tensor:
        """The states."""
        return states

    def decode(self, states: Tensor) -> Tensor:
        """The states."""
        return states


def require_pixels(data: "ImageData", who: str, cure: str) -> None:
    """Refuse data whose states are no pixels.

    Args:
        data: with their space.
        who: works pixel by pixel, for the message.
        cure: what to do instead.

    Raises:
        UserError: for points, and for latents.
    """
    space = data.space
    if not space.pictures:
        raise UserError(f"{who} is about pictures, and {data.name} has none; {cure}")
    if space.decoded:
        raise UserError(
            f"{who} works on pixels, and {data.name} is trained in latents (data.space); {cure}"
        )


def in_space(data: "ImageData", options: DictConfig | None) -> "ImageData":
    """The data in the space that ``data.space`` makes for them, with a fingerprint of both."""
    if options is None:
        return data
    known = arguments(str(options.get("_target_")))
    extra = [name for name in plain(options) if known and name not in {"_target_", *known}]
    if extra:
        raise UserError(
            f"data.space.{extra[0]} is no option of {options._target_}; leave it out, or the "
            "space that is chosen beside another one, as by model=inflation"
        )
    space: Space = instantiate(options, _partial_=True)(data)
    settings = plain(options)
    parts = settings, code_of(settings), space.fingerprint
    fingerprint = key_of(data.fingerprint, *parts)
    return replace(data, states=space, fingerprint=fingerprint, stored=data.images_fingerprint)


def space_of(data: Any) -> Space:
    """The space of a data set; pixels for a record of one's own that names none."""
    return getattr(data, "space", None) or Pixels(data)


class Coder(Protocol):
    """What takes images to latents and back; any ``nn.Module`` with these two will do."""

    def encode(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [-1, 1] to latents ``(N, ...)``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, differentiable."""
        ...


class Latents:
    """States are the latents of a coder; images, and the maps of their pixels, are decoded.

    Args:
        data: of uint8 images.
        coder: fixed; it is moved to where it is used.

    Raises:
        UserError: for points, a coder without ``encode`` and ``decode``, or one that does not give
            back images of the size it is given.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> space = Latents(data := digits(), Rotation(size=64))
        >>> torch.equal(space.decode(space.encode(data.images)), data.images)
        True
    """

    pictures, decoded = True, True
    figures = decoded_figures = "bayesdiff.report.pictures.DecodedPictures"
    scores = "bayesdiff.runs.scores.FeatureScores"

    def __init__(self, data: "ImageData", coder: nn.Module) -> None:
        if data.images.ndim != 4:
            raise UserError(
                f"data.space=Latents decodes images, and {data.name} has none; leave space= out"
            )
        missing = [n for n in ("encode", "decode") if not callable(getattr(coder, n, None))]
        if missing:
            raise UserError(
                f"data.space.coder={type(coder).__name__} has no {' and no '.join(missing)}; "
                "give a module with encode(images) and decode(latents)"
            )
        self.pixels = Pixels(data)
        self.coder = coder.eval().requires_grad_(False)
        self.fingerprint = weights_key(coder)
        states, again = self.encode(data.images[:1]), self.encode(data.images[:1])
        if not isinstance(states, Tensor) or not torch.equal(states, again):
            raise UserError(
                f"data.space.coder={type(coder).__name__}.encode must give one fixed tensor, got "
                f"{type(states).__name__} or other values each time; return the mean of a "
                "distribution, as by .latent_dist.mode()"
            )
        self.shape = tuple(states.shape[1:])
        shown = tuple(self.values(states).shape[1:])
        if shown != self.pixels.shape:
            raise UserError(
                f"data.space.coder={type(coder).__name__} decodes to {shown}, the images are "
                f"{self.pixels.shape}; give a decoder of the same size"
            )

    @torch.no_grad()
    def encode(self, data: Tensor) -> Tensor:
        """uint8 ``(N, C, H, W)`` to latents."""
        return self._at(data).encode(self.pixels.encode(data))

    def values(self, states: Tensor) -> Tensor:
        """Decoded images, about in [-1, 1]."""
        return self._at(states).decode(states)

    def decode(self, states: Tensor) -> Tensor:
        """Decoded images, clipped, as uint8."""
        return self.pixels.decode(self.values(states))

    def _at(self, like: Tensor) -> Coder:
        self.coder.to(like.device)
        return self.coder  # type: ignore[return-value]  # checked when it was given


class Rotation(nn.Module):
    """An orthogonal coder: images turned by one random rotation of all their values.

    Args:
        size: values of an image, C * H * W.
        seed: of the rotation, uniform over all.

    Example:
        >>> coder, images = Rotation(size=64), torch.randn(2, 1, 8, 8)
        >>> torch.allclose(coder.decode(coder.encode(images)), images, atol=1e-5)
        True
    """

    matrix: Tensor

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed_of("data.space.coder.seed", seed))
        shape = (at_least("data.space.coder.size", size), size)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        orthogonal, triangle = torch.linalg.qr(normal)
        # Signs that make the decomposition unique, and its result uniform (Mezzadri 2007).
        self.register_buffer("matrix", orthogonal * triangle.diagonal().sign())

    def encode(self, images: Tensor) -> Tensor:
        """Turned images, of the same shape."""
        return self._turned(images, self.matrix)

    def decode(self, latents: Tensor) -> Tensor:
        """Images turned back."""
        return self._turned(latents, self.matrix.T)

    def _turned(self, x: Tensor, matrix: Tensor) -> Tensor:
        rows = x.flatten(1)
        if rows.shape[1] != len(matrix):
            raise UserError(
                f"data.space.coder.size={len(matrix)}, but an image has {rows.shape[1]} values; "
                "give that number"
            )
        return (rows @ matrix.T.to(rows)).reshape(x.shape)
