"""One pass over the data: the Gram matrix of the head's features, residuals and gradients."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.coupled import check_coupled, coupled_gram, groups_of
from bayesdiff.laplace.gradients import gradients, unfolded
from bayesdiff.laplace.gram import gram
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.objective import CurvedObjective, curved_objective
from bayesdiff.laplace.record import Curvature, TimeBins
from bayesdiff.laplace.training_draws import Encode, draws_of
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.machine.ranks import total
from bayesdiff.models import GenerativeModel


@torch.inference_mode()
def fit_curvature(
    model: GenerativeModel,
    images: Tensor,
    labels: Tensor | None,
    *,
    source: str,
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    time_bins: int = 1,
    objective: str = "likelihood",
    encode: Encode = to_model_range,
) -> Curvature:
    """Sum phi phi^T over images, pixels and (t, noise) draws, and divide by the draws.

    Squared residuals, gradients of every image and their squares are summed beside it. Of a
    likelihood that bends, and of a bound, the deviance takes the place of these squares, and what
    ``coupled_gram`` says that of the matrix.

    What the pass sees is told in ``draws_of``; any number of processes gives the same sums.

    Args:
        model: with its trained weights; left in the mode it was in.
        images: ``(N, C, H, W)`` uint8.
        labels: values of the model's condition, ``(N, ...)``, or None.
        source: key of the weights and the data, kept with the result.
        draws: (t, noise) draws per image.
        num_images: use a random subset of this size; None for all.
        batch_size: images per network evaluation.
        seed: fixes subset and draws.
        time_bins: equal intervals of t whose sums are kept apart too; 1 for none.
        objective: ``likelihood`` or ``elbo``, see ``curved_objective``.
        encode: of the images' space, see ``draws_of``.
    """
    check_pass(draws, num_images, batch_size, len(images), time_bins)
    head, net, curved = model.net.head, model.net, curved_objective(model, objective)
    count = num_images or len(images)
    training = model.training
    model.eval()
    shape = encode(images[:1]).shape[1:]
    groups = groups_of(model, shape, curved)
    sums = _Sums(head, curved, groups, time_bins, next(model.parameters()).device)
    for seen in batches(model, images, labels, draws, count, batch_size, seed, encode):
        output = head(seen.features)
        folded = net.fold(output)
        residual = unfolded(net, output, curved.residual(folded, seen.target, seen.time))
        sums.add(seen, output, curved.deviance(folded, seen.target, seen.time), residual)
    model.train(training)
    bins = sums.over_processes(draws)
    return Curvature(
        gram=bins.gram.sum(0),
        num_images=count,
        draws=draws,
        squared_error=float(bins.squared_error.sum()),
        num_outputs=count * shape.numel(),
        mean=head_matrix(head).cpu(),
        source=source,
        geometry=sums.geometry,
        squared_gradients=bins.squared_gradients.sum(0),
        gradient=bins.gradient.sum(0),
        bins=bins if time_bins > 1 else None,
        likelihood=likelihood_of(model).name,
        objective=objective,
        groups=groups,
    )


@dataclass(frozen=True)
class Batch:
    """What the head sees of one batch, and what the network should say.

    Attributes:
        t: ``(B,)`` in [0, 1).
        time: ``(B,)``, the same as the network takes it.
        features: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear head.
        target: ``(B, C, H, W)``, of the folded output.
    """

    t: Tensor
    time: Tensor
    features: Tensor
    target: Tensor


def batches(
    model: GenerativeModel,
    images: Tensor,
    labels: Tensor | None,
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    encode: Encode = to_model_range,
) -> Iterator[Batch]:
    """What the head sees of ``draws_of``.

    Args:
        model: in evaluation mode.
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` or None.
        draws: (t, noise) draws per image.
        num_images: a random subset of this size; None for all.
        batch_size: images at once.
        seed: fixes subset and draws.
        encode: of the images' space, see ``draws_of``.

    Yields:
        The same batches in the same order whenever the arguments are the same.
    """
    for draw in draws_of(
        model,
        images,
        labels,
        draws=draws,
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        encode=encode,
    ):
        features = model.net.features(draw.x_t, draw.time, draw.y)
        yield Batch(draw.t, draw.time, features, draw.target)


class _Sums:
    """What the pass adds up, for each interval of t."""

    def __init__(
        self,
        head: nn.Module,
        curved: CurvedObjective,
        groups: Tensor | None,
        bins: int,
        device: torch.device,
    ) -> None:
        self.head, self.geometry = head, HeadGeometry.of(head)
        self.curved, self.groups = curved, groups
        size, channels = self.geometry.size, len(head_matrix(head))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(bins, *shape, dtype=torch.float64, device=device)

        matrices, count = ((), 1) if groups is None else ((len(groups),), groups.shape[1])
        self.gram = zeros(*matrices, count * size, count * size)
        self.squares, self.gradient = zeros(channels, size), zeros(channels, size)
        self.error, self.outputs = zeros(), zeros()

    def add(self, seen: Batch, output: Tensor, deviance: Tensor, residual: Tensor) -> None:
        """Add one batch: outputs of the head, deviance ``(B,)``, residuals of these outputs."""
        where = (seen.t.double() * len(self.gram)).long().clamp(max=len(self.gram) - 1)
        for number in where.unique().tolist():
            # Without bins the batch stays whole: a copy of the features would cost time.
            chosen = slice(None) if len(self.gram) == 1 else where == number
            self.gram[number] += self.matrix(
                seen.features[chosen], output[chosen], seen.time[chosen]
            )
        self.error.index_add_(0, where, deviance)
        values = deviance.new_full((len(deviance),), seen.target[0].numel())
        self.outputs.index_add_(0, where, values)
        slopes = gradients(self.head, seen.features, residual)
        self.squares.index_add_(0, where, slopes.square())
        self.gradient.index_add_(0, where, slopes)

    def matrix(self, features: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The Gram matrix of features, or those that the outputs weight."""
        if self.groups is None:
            return gram(self.head, features)
        return coupled_gram(self.curved, self.head, features, output, t, self.groups)

    def over_processes(self, draws: int) -> TimeBins:
        """The sums of all processes, divided by the draws."""
        sums = self.gram, self.error, self.outputs, self.squares, self.gradient
        return TimeBins(*[(total(value) / draws).cpu() for value in sums])


def check_pass_of(
    model: GenerativeModel, images: int, shape: Sequence[int], options: Mapping[str, Any]
) -> tuple[int, int]:
    """Refuse a pass that could not be made, or whose matrices would find no memory.

    Args:
        model: trained or not.
        images: that there are.
        shape: of a state, ``(C, ...)``.
        options: of ``fit_curvature``.

    Returns:
        Images of the pass, and rows of one matrix of its curvature.

    Raises:
        UserError: one line with the cure.
    """
    draws, count = options.get("draws", 1), options.get("num_images")
    bins = options.get("time_bins", 1)
    check_pass(draws, count, options.get("batch_size", 256), images, bins)
    curved, head = curved_objective(model, options.get("objective", "likelihood")), model.net.head
    if bins > 1 and not curved.scaled:
        raise UserError(
            f"laplace.time_bins={bins} is for noise levels over time, and {curved.said} has none; "
            "use laplace.time_bins=1"
        )
    size = check_coupled(curved, len(head_matrix(head)), HeadGeometry.of(head).size)
    groups_of(model, shape, curved)
    return count or images, size


def check_pass(
    draws: int, num_images: int | None, batch_size: int, available: int, time_bins: int = 1
) -> None:
    """Refuse settings of the pass that cannot work.

    Raises:
        UserError: for counts that are not positive, or more images or intervals than there are.
    """
    at_least("laplace.draws", draws)
    at_least("laplace.batch_size", batch_size)
    if num_images is not None and at_least("laplace.num_images", num_images) > available:
        raise UserError(
            f"laplace.num_images={num_images} is more than the {available} training images; "
            "use null for all"
        )
    count = num_images or available
    if at_least("laplace.time_bins", time_bins) > count:
        raise UserError(
            f"laplace.time_bins={time_bins} is more than the {count} images of the pass; use fewer"
        )
