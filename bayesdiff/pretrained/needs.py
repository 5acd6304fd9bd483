"""What posterior and maps of a network take: memory, evaluations and time, before any of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bayesdiff.checks import at_least
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.machine.peak import Work, worked
from bayesdiff.models import GenerativeModel
from bayesdiff.pretrained.coder import PipelineCoder
from bayesdiff.pretrained.followed import Arguments, FollowedPipeline
from bayesdiff.solvers.integrate import CACHEFUL
from bayesdiff.uncertainty import Estimator, Start, starts_of
from bayesdiff.uncertainty.sensitivities.products import derivatives

GIB = 2**30
# Matrices of P x P doubles held at once: the sums, the matrix, its vectors, and what LAPACK's
# divide and conquer takes, a copy and twice a matrix of work.
_MATRICES = 6
_DRAWN = 4  # of a draw's weights: noise, two products, the sum
_DOUBLES = 8
_FLOATS = 4
_DECODED = 16  # states that are decoded at once
_STATES = 8  # of every network input: states, outputs, noise, and what adds them up


@dataclass(frozen=True)
class Sizes:
    """A network and its head.

    Attributes:
        weights: bytes of all of the pipeline's networks.
        network: what one evaluation of one input takes.
        features: bytes of one input's features, as the head reads them.
        state: numbers of a state.
        head: how the head reads its features.
        rows: outputs of the head.
        positions: that the head is applied to, of one input.
        decoder: what one state takes; None where states are images.
        row: bytes of a network input of the maps; 0 for those of the network.
    """

    weights: int
    network: Work
    features: int
    state: int
    head: HeadGeometry
    rows: int
    positions: int
    decoder: Work | None = None
    row: int = 0

    @property
    def matrix(self) -> int:
        """Bytes of one P x P matrix."""
        return _DOUBLES * self.head.size**2


@dataclass(frozen=True)
class Needs:
    """What a pipeline takes with its posterior.

    Attributes:
        weights: bytes that are there all the time.
        fit: bytes beside them for the pass over the images, and for the posterior.
        maps: bytes beside the weights for one batch of maps.
        images: of that batch.
        evaluations: of the network for an image with its map.
        operations: for an image with its map, decoder included.
        pass_operations: for an image of the pass.
    """

    weights: float
    fit: float
    maps: float
    images: int
    evaluations: float
    operations: float
    pass_operations: float

    @property
    def memory(self) -> float:
        """Bytes at most."""
        return self.weights + max(self.fit, self.maps)

    def __str__(self) -> str:
        weights, fit, maps = (value / GIB for value in (self.weights, self.fit, self.maps))
        return (
            f"memory: {self.memory / GIB:.2g} GiB, weights {weights:.2g} and the most of "
            f"{fit:.2g} for the posterior and {maps:.2g} for maps of {self.images} at once\n"
            f"work: {self.evaluations:.0f} evaluations and {self.operations / 1e12:.3g} TFLOP for "
            f"an image with its map, {self.pass_operations / 1e12:.2g} TFLOP for one of the pass"
        )


def fit_memory(sizes: Sizes, images: int, batch: int) -> float:
    """Bytes of the pass and of the posterior, the weights left out.

    Args:
        sizes: of the network.
        images: of the pass.
        batch: of them at once.
    """
    held = 2 * images * sizes.state * _FLOATS
    outputs = sizes.rows * sizes.positions * _FLOATS
    taps = sizes.head.taps  # of the unfolded residuals
    gradients = 2 * sizes.rows * sizes.head.size * _DOUBLES
    wide = 0 if sizes.head.kernel_size else 2 * sizes.features  # rows as doubles
    of_features = batch * (sizes.features + wide + (3 + taps) * outputs + gradients)
    network = batch * sizes.network.memory
    return held + max(max(network, of_features) + 2 * sizes.matrix, _MATRICES * sizes.matrix)


def maps_memory(
    sizes: Sizes, images: int, copies: int, guided: bool, at_once: int | None = None
) -> float:
    """Bytes of one batch of maps, the weights left out.

    Args:
        sizes: of the network.
        images: of the batch.
        copies: network inputs of an image, see ``Estimator.copies``.
        guided: whether features with and without a condition are held.
        at_once: inputs that the network is given at most, None for all.
    """
    inputs = images * copies
    running = min(inputs, at_once or inputs) * (sizes.row or sizes.network.memory)
    features = inputs * sizes.features * (3 if guided else 1)
    states = inputs * _STATES * sizes.state * _FLOATS
    drawn = _DRAWN * copies * sizes.rows * sizes.head.size * _DOUBLES
    decoding = 0 if sizes.decoder is None else min(images, _DECODED) * sizes.decoder.memory
    kept = inputs * sizes.features if guided else 0
    # Under many weights, every tap's response is there before they are added up.
    outputs = inputs * sizes.rows * sizes.positions * (sizes.head.taps + 2) * _FLOATS
    network = max(running + kept, features + outputs)
    return 2 * sizes.matrix + drawn + states + max(network, decoding)


def pass_operations(sizes: Sizes) -> float:
    """Of one image of the pass: its evaluation, and its share of the matrix."""
    head = sizes.head
    shifts = head.kernel_size * (2 * head.kernel_size - 1) if head.kernel_size else 1
    return sizes.network.operations + 2 * sizes.positions * shifts * head.features**2


@dataclass(frozen=True)
class Counts:
    """How much of everything there is.

    Attributes:
        steps: of the scheduler.
        images: that get a map.
        fitted_to: images of the pass.
        batch: of these at once.
    """

    steps: int
    images: int
    fitted_to: int
    batch: int

    def __post_init__(self) -> None:
        at_least("num_inference_steps", self.steps)
        at_least("num_images", self.images)
        at_least("fitted_to", self.fitted_to)
        at_least("batch_size", self.batch)


def needs_of(sizes: Sizes, estimator: Estimator, start: Start, counts: Counts) -> Needs:
    """All of it.

    Args:
        sizes: of the network.
        estimator: of the maps.
        start: of one image.
        counts: of images.
    """
    guided = start.nfe > sum(len(step.times) for step in start.steps())
    copies = estimator.copies(start.solver)
    together = min(counts.images, estimator.batch_size)
    at_once = CACHEFUL if start.device.type == "cpu" else None
    evaluations = estimator.evaluations(start) or start.nfe * copies
    decoder = 0.0 if sizes.decoder is None else copies * sizes.decoder.operations
    return Needs(
        weights=sizes.weights,
        fit=fit_memory(sizes, counts.fitted_to, counts.batch),
        maps=maps_memory(sizes, together, copies, guided, at_once),
        images=together,
        evaluations=evaluations,
        operations=evaluations * sizes.network.operations + decoder,
        pass_operations=pass_operations(sizes),
    )


def needs_of_pipeline(
    followed: FollowedPipeline, estimator: Estimator, counts: Counts, arguments: Arguments
) -> Needs:
    """What a pipeline needs, by one evaluation of its network.

    Args:
        followed: the pipeline.
        estimator: of the maps.
        counts: of steps and images.
        arguments: of the pipeline.
    """
    followed.require(arguments)
    asked = {**followed.asking_for(), **arguments}
    model, coder, solver = followed.ready([asked], counts.steps)
    start = starts_of(model, solver, 0, coder.shape, next(model.parameters()).device)([0])
    sizes = sizes_of(followed.pipe, model, coder)
    if getattr(estimator, "derivative", "") == "exact":
        sizes = replace(sizes, row=_row_of_product(start))
    return needs_of(sizes, estimator, start, counts)


def _row_of_product(start: Start) -> int:
    """Bytes of a row of an exact product, which writes attention out."""
    field, x = start.field(), start.initial()
    output = field(x, 0.5)

    def memory(rows: int) -> int:
        d = x.new_zeros(rows, *x.shape)
        return worked(lambda: derivatives(field, x, output, d, 0.5))[1].memory

    one, two = memory(1), memory(2)
    return max(two - one, two // 3)


@torch.no_grad()
def sizes_of(pipe: Any, model: GenerativeModel, coder: PipelineCoder) -> Sizes:
    """Sizes of a pipeline's network, by one evaluation of one input.

    Args:
        pipe: of diffusers.
        model: its network.
        coder: its coder.
    """
    like, head = next(model.parameters()), model.net.head
    x = torch.zeros(1, *coder.shape, device=like.device, dtype=torch.float32)
    t = torch.full((1,), 0.5, device=like.device, dtype=torch.float64)
    y = None if model.condition is None else model.condition.of_samples([0]).to(like.device)
    features, network = worked(lambda: model.net.features(x, t, y))
    output, geometry = head(features), HeadGeometry.of(head)
    rows = len(head_matrix(head))
    decoder = None if coder.coder is None else worked(lambda: coder.decode(x))[1]
    return Sizes(
        weights=bytes_of([*pipe.components.values(), model, coder]),
        network=network,
        features=features.numel() * features.element_size(),
        state=x.numel(),
        head=geometry,
        rows=rows,
        positions=output.numel() // rows,
        decoder=decoder,
    )


def bytes_of(parts: Iterable[Any]) -> int:
    """Of the weights and buffers of all modules among the parts, what they share counted once.

    Convolutions of a followed network may have another layout in memory than the pipeline's, and
    are then there twice.
    """
    modules = [part for part in parts if isinstance(part, nn.Module)]
    tensors = [each for part in modules for each in (*part.parameters(), *part.buffers())]
    sizes = {each.data_ptr(): each.numel() * each.element_size() for each in tensors}
    return sum(sizes.values())
