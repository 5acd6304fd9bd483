"""One number per image, from its map or from the image alone; ``member_scores`` has the others.

EVERY score here is oriented the same way: the higher, the more doubtful, the sooner discarded.

Images are in [-1, 1] and variances in the square of these units; answers are float64 ``(N,)``, and
no image's number depends on the others.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least, positive, share
from bayesdiff.data.spaces import to_uint8

if TYPE_CHECKING:
    from bayesdiff.uncertainty.samples import Samples

MapScore = Callable[[Tensor, Tensor], Tensor]
ImageScore = Callable[[Tensor], Tensor]

# What rounding to 8 bits adds to the variance of every pixel: less than that cannot be seen.
FLOOR = (1 / 127.5) ** 2 / 12
# Cells per side of PatchMax where no size of theirs is given: 7 x 7 pixels of a 28 x 28 image.
_GRID = 4


def total(variance: Tensor) -> Tensor:
    """Sum over channels and pixels; like all scores of maps, negative variances count as 0."""
    return _values(variance).sum(1)


def mean(variance: Tensor) -> Tensor:
    """Mean over channels and pixels."""
    return _values(variance).mean(1)


def mean_deviation(variance: Tensor) -> Tensor:
    """Mean standard deviation: a few very doubtful pixels weigh less than in the mean."""
    return _values(variance).sqrt().mean(1)


def mean_log(variance: Tensor, floor: float = FLOOR) -> Tensor:
    """Mean ln(V + floor): log-determinant of independent pixels, per value.

    Args:
        variance: ``(N, C, H, W)``.
        floor: variance of something too small to be seen, which a certain pixel has as well.
    """
    positive("floor", floor)
    return (_values(variance) + floor).log().mean(1)


def patch_max(variance: Tensor, patch: int | None = None) -> Tensor:
    """Largest mean over the cells of a grid: finds one bad spot in an otherwise fine image.

    Args:
        variance: ``(N, C, H, W)``.
        patch: side of a cell in pixels; cells at the lower and right edges may be smaller. None
            for a grid of 4 x 4 cells.

    Raises:
        UserError: if the patch is no whole number from 1 to the image's side.
    """
    height, width = variance.shape[-2:]
    size = (-(-height // _GRID), -(-width // _GRID))
    if patch is not None:
        if at_least("patch", patch) > min(height, width):
            raise UserError(
                f"patch={patch} is more than the image's {height} x {width} pixels; choose less"
            )
        size = (patch, patch)
    values = variance.double().clamp(min=0).mean(1, keepdim=True)
    return F.avg_pool2d(values, size, ceil_mode=True).flatten(1).amax(1)


def percentile(variance: Tensor, percent: float) -> Tensor:
    """Percentile over channels and pixels, linear between neighbours.

    Args:
        variance: ``(N, C, H, W)``.
        percent: from 0 to 100.

    Raises:
        UserError: for a percentage beyond.
    """
    if not 0 <= percent <= 100:
        raise UserError(f"percent must be between 0 and 100, got {percent}; 50 is the median")
    values = _values(variance).sort(1).values
    place = percent / 100 * (values.shape[1] - 1)
    low, high = math.floor(place), math.ceil(place)
    return torch.lerp(values[:, low], values[:, high], place - low)


def map_variance(variance: Tensor) -> Tensor:
    """Variance of the map's own values, divisor n: large where few places are uncertain."""
    return _values(variance).var(1, correction=0)


def top_mean(variance: Tensor, part: float = 0.01) -> Tensor:
    """Mean of the largest values.

    Args:
        variance: ``(N, C, H, W)``.
        part: which share of all values, rounded up to whole ones, at least 1.
    """
    values = _values(variance)
    count = max(1, math.ceil(share("part", part) * values.shape[1] - 1e-9))
    return values.topk(count, 1).values.mean(1)


def foreground_mean(variance: Tensor, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the foreground; over the whole image where there is none.

    Args:
        variance: ``(N, C, H, W)``.
        images: ``(N, C, H, W)``.
        mask: weights of the pixels ``(N, 1, H, W)``, bool or >= 0; None for ``otsu_mask``.

    Raises:
        UserError: for a mask of another shape.
    """
    mask = otsu_mask(images) if mask is None else mask
    if mask.shape != (len(variance), 1, *variance.shape[2:]):
        raise UserError(
            f"a mask for maps {tuple(variance.shape)} is (N, 1, H, W), got {tuple(mask.shape)}"
        )
    weights = mask.to(variance.device).double().flatten(1)
    values = variance.double().clamp(min=0).mean(1).flatten(1)
    area = weights.sum(1)
    inside = (weights * values).sum(1) / area.where(area > 0, 1)
    return inside.where(area > 0, values.mean(1))


def segmented(
    network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 256
) -> Tensor:
    """Masks of the foreground by a network of the user's own, for ``foreground_mean``.

    Args:
        network: any callable that gives images ``(N, C, H, W)`` in [-1, 1] a mask each,
            ``(N, 1, H, W)``, bool or weights >= 0; a module is put into eval mode.
        images: ``(N, C, H, W)``, where the network is.
        batch_size: images per call.

    Raises:
        UserError: if it gives anything else.
    """
    if isinstance(network, nn.Module):
        network.eval()
    expected = (1, *images.shape[2:])
    masks = []
    for batch in images.clamp(-1, 1).split(batch_size):
        with torch.no_grad():
            mask = network(batch)
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if not isinstance(mask, Tensor) or mask.shape != (len(batch), *expected):
            raise UserError(
                "a segmentation network must give masks (N, 1, H, W), here "
                f"{(len(batch), *expected)}, got {got}; wrap it in a callable that does"
            )
        mask = mask.double()
        if not mask.isfinite().all() or mask.min() < 0:
            raise UserError(
                "a segmentation network must give masks of true and false or of weights >= 0, "
                f"got values from {float(mask.min()):g} to {float(mask.max()):g}; apply a sigmoid"
            )
        masks.append(mask)
    return torch.cat(masks)


def otsu_mask(images: Tensor) -> Tensor:
    """The brighter part of each image, ``(N, C, H, W) -> (N, 1, H, W)`` bool.

    Made for bright objects on black, such as MNIST's; give others a mask of your own. The
    threshold makes the two parts' means differ most, in units of their scatter. It is exact,
    without a histogram, so brightness and contrast do not matter. An image of one grey has no
    foreground. Source: Otsu, "A threshold selection method from gray-level histograms" (1979).
    """
    grey = images.double().mean(1).flatten(1)
    ordered = grey.sort(1).values
    size = grey.shape[1]
    below = torch.arange(1, size, device=grey.device)
    sums = (ordered - ordered.mean(1, keepdim=True)).cumsum(1)[:, :-1]
    # With mean 0, the variance between the parts is sums^2 / (n_below n_above), up to a factor.
    between = sums.square() / (below * (size - below))
    apart = ordered[:, 1:] > ordered[:, :-1]
    best = between.where(apart, -1).argmax(1, keepdim=True)
    mask = (grey >= ordered.gather(1, best + 1)) & apart.any(1, keepdim=True)
    return mask.view(len(images), 1, *images.shape[2:])


def _values(variance: Tensor) -> Tensor:
    """``(N, C H W)``; recursions that are kept unclamped give negative variances."""
    return variance.double().clamp(min=0).flatten(1)


def _of_map(score: Callable[[Tensor], Tensor]) -> MapScore:
    return lambda variance, images: score(variance)


# Of variance and image, each ``(N, C, H, W)``.
MAP_SCORES: dict[str, MapScore] = {
    "sum": _of_map(total),
    "mean": _of_map(mean),
    "mean_deviation": _of_map(mean_deviation),
    "mean_log": _of_map(mean_log),
    "patch_max": _of_map(patch_max),
    "foreground_mean": foreground_mean,
    "percentile_50": _of_map(partial(percentile, percent=50)),
    "percentile_90": _of_map(partial(percentile, percent=90)),
    "percentile_99": _of_map(partial(percentile, percent=99)),
    "map_variance": _of_map(map_variance),
    "top_mean": _of_map(top_mean),
}


def map_score(samples: "Samples", name: str) -> Tensor:
    """A score of ``MAP_SCORES`` for all samples, ``(N,)``, whatever units they are stored in."""
    given = samples.in_model_range()
    return MAP_SCORES[name](given.variance, given.images)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the steps between neighbours, across and down: a busy image is doubtful."""
    seen = images.double().clamp(-1, 1)
    across = seen.diff(dim=-1).abs().flatten(1).sum(1)
    return across + seen.diff(dim=-2).abs().flatten(1).sum(1)


def compressed_size(images: Tensor) -> Tensor:
    """Bytes of the image at 8 bits under zlib: what does not compress is doubtful."""
    rows = to_uint8(images).flatten(1).cpu().numpy()
    sizes = [float(len(zlib.compress(row.tobytes(), 9))) for row in rows]
    return torch.tensor(sizes, dtype=torch.float64, device=images.device)


def saturation(images: Tensor) -> Tensor:
    """Share of values that are black or white at 8 bits: an image full of them is doubtful."""
    seen = to_uint8(images).flatten(1)
    return ((seen == 0) | (seen == 255)).double().mean(1)


def opposite(score: ImageScore) -> ImageScore:
    """A score that ranks the images from the other end."""
    return lambda images: -score(images)


# Of images ``(N, C, H, W)``. Neither end of these is bad by nature: clutter is busy and collapse
# is not, clipping saturates and so does MNIST's background. The plain name discards the busy and
# the saturated first, as rivals are usually described; ``opposite_`` discards the others first.
IMAGE_SCORES: dict[str, ImageScore] = {
    "total_variation": total_variation,
    "opposite_total_variation": opposite(total_variation),
    "compressed_size": compressed_size,
    "opposite_compressed_size": opposite(compressed_size),
    "saturation": saturation,
    "opposite_saturation": opposite(saturation),
}
