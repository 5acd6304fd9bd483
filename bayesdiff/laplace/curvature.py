"""One pass over the data: the Gram matrix of the head's features, and the residuals."""

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.module import to_model_range
from bayesdiff.distributed import rank, total, world_size
from bayesdiff.laplace.gram import HeadGeometry, gram, head_matrix
from bayesdiff.laplace.record import Curvature
from bayesdiff.models import GenerativeModel
from bayesdiff.progress import track


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
) -> Curvature:
    """Sum phi phi^T over images, pixels and (t, noise) draws, and divide by the draws.

    t is uniform, since a sampler visits all times alike. Draws depend on (seed, batch) only and
    whole batches are dealt to processes, so any number of processes gives the same sums.

    Args:
        model: with its trained weights; left in the mode it was in.
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` or None.
        source: key of the weights and the data, kept with the result.
        draws: (t, noise) draws per image.
        num_images: use a random subset of this size; None for all.
        batch_size: images per network evaluation.
        seed: fixes subset and draws.
    """
    check_pass(draws, num_images, batch_size, len(images))
    head = model.net.head
    geometry = HeadGeometry.of(head)
    device = next(model.parameters()).device
    count = num_images or len(images)
    order = torch.randperm(len(images), generator=_generator(seed, 0))[:count]
    sums = torch.zeros(geometry.size, geometry.size, dtype=torch.float64, device=device)
    squared = torch.zeros((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    batches = list(enumerate(order.split(batch_size), start=1))
    for number, chosen in track(batches[rank() :: world_size()], "curvature"):
        x_1 = to_model_range(images[chosen]).to(device)
        y = None if labels is None or not model.num_classes else labels[chosen].to(device)
        for draw in range(draws):
            x_0, t = _noise_and_times(x_1, _generator(seed, number * draws + draw))
            x_t, target = model.corrupt(x_1, x_0, t * model.path.last_time)
            features = model.net.features(x_t, t * model.path.last_time, y)
            sums += gram(head, features)
            residual = model.net.fold(head(features)) - target
            squared += residual.double().square().sum()
    model.train(training)
    return Curvature(
        gram=(total(sums) / draws).cpu(),
        num_images=count,
        draws=draws,
        squared_error=float(total(squared)) / draws,
        num_outputs=count * images[0].numel(),
        mean=head_matrix(head).cpu(),
        source=source,
        geometry=geometry,
    )


def check_pass(draws: int, num_images: int | None, batch_size: int, available: int) -> None:
    """Refuse settings of the pass that cannot work.

    Raises:
        UserError: for counts that are not positive, or more images than there are.
    """
    at_least("laplace.draws", draws)
    at_least("laplace.batch_size", batch_size)
    if num_images is not None and at_least("laplace.num_images", num_images) > available:
        raise UserError(
            f"laplace.num_images={num_images} is more than the {available} training images; "
            "use null for all"
        )


def _noise_and_times(like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the images' shape and stratified uniform times, drawn on the CPU."""
    noise = torch.randn(like.shape, generator=generator).to(like.device)
    spread = torch.randperm(len(like), generator=generator) / len(like)
    t = (torch.rand(1, generator=generator) + spread) % 1
    return noise, t.to(like.device)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2_654_435_761 + number) % 2**32)
