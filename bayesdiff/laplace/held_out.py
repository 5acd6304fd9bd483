"""Errors of held-out images beyond those of training images, and the predictive variance."""

import torch
from torch import Tensor

from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.training_draws import Draw, Encode, draws_of
from bayesdiff.machine.ranks import rank, total, world_size
from bayesdiff.models import GenerativeModel

# Noise and times of every image: most of an image's error is those, and not the image's doing.
DRAWS = 4


@torch.inference_mode()
def held_out_gaps(
    model: GenerativeModel,
    posterior: HeadPosterior,
    training: tuple[Tensor, Tensor | None],
    held_out: tuple[Tensor, Tensor | None],
    *,
    draws: int = DRAWS,
    batch_size: int = 256,
    seed: int = 0,
    encode: Encode = to_model_range,
) -> tuple[Tensor, Tensor]:
    """Squared errors of held-out images less those of training images, and predicted variance.

    As many of both, in pairs that share noise and times, which then cancel from the gaps; means
    over the values of the network's output.

    Args:
        model: trained, with a Gaussian likelihood.
        posterior: of its head.
        training: images ``(N, C, H, W)`` uint8, and values of the condition or None.
        held_out: the same of images that training has not seen.
        draws: noise and times of every image.
        batch_size: images at once.
        seed: of choice, noise and times.
        encode: of the images' space.

    Returns:
        Gaps ``(n,)`` and the mean of both images' predictive variances ``(n,)``, float64, n the
        smaller number of images.
    """
    count = min(len(training[0]), len(held_out[0]))
    options = {"draws": draws, "num_images": count, "batch_size": batch_size, "seed": seed}
    names = ("training images", "held-out images")
    error, variance = torch.zeros(2, 2, count, dtype=torch.float64)
    for side, ((images, given), name) in enumerate(zip((training, held_out), names, strict=True)):
        passed = draws_of(model, images, given, what=name, encode=encode, **options)
        for number, draw in enumerate(passed):
            first = batch_size * (rank() + number // draws * world_size())
            rows = slice(first, first + len(draw.t))
            own = _of(model, posterior, draw)
            error[side, rows] += own[0].cpu() / draws
            variance[side, rows] += own[1].cpu() / draws
    error, variance = total(error), total(variance)
    return error[1] - error[0], variance.mean(0)


def _of(model: GenerativeModel, posterior: HeadPosterior, draw: Draw) -> tuple[Tensor, Tensor]:
    """Mean squared error and mean predictive variance of every image, ``(B,)`` float64 each."""
    net = model.net
    features = net.features(draw.x_t, draw.time, draw.y)
    output = net.fold(net.head(features)).double()
    variance = posterior.predictive_variance(features).double()
    return (output - draw.target).square().flatten(1).mean(1), variance.flatten(1).mean(1)
