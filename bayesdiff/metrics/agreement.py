"""How well one set of uncertainty maps agrees with another: ranking, size, and its own figures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Values ranked at once in a bootstrap; bounds its memory to some tens of megabytes.
BLOCK = 1 << 20

# Statistics by name, each with its values per image.
Figures = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def image_rank(a: Tensor, b: Tensor) -> float:
    """Spearman correlation, over images, of the summed variance of two sets of maps.

    Args:
        a: variance maps (N, ...), such as (N, C, H, W).
        b: variance maps of the same images, same shape.

    Returns:
        A number in [-1, 1]; NaN when all sums of one side are equal.
    """
    return float(spearman(*_sums(a, b)))


def pixel_rank(a: Tensor, b: Tensor) -> float:
    """Mean over images of the Spearman correlation, over pixels, of two maps.

    Args:
        a: variance maps (N, ...), such as (N, C, H, W); every value of an image counts.
        b: variance maps of the same images, same shape.

    Returns:
        A number in [-1, 1]; images with a constant map are left out, NaN when none is left.
    """
    return float(pixel_ranks(a, b).nanmean())


def spread_ratio(a: Tensor, b: Tensor) -> float:
    """Typical size of the variance of ``a`` over that of ``b``.

    Args:
        a: variance maps (N, ...), such as (N, C, H, W).
        b: variance maps of the same images, same shape.

    Returns:
        The exponential of the median, over images, of the log-ratio of the summed variances: 1
        for equal size, 1/60 for maps 60 times too small. Images where a sum is not positive
        have no log-ratio and are left out; NaN when none is left.
    """
    return float(_median_ratio(_log_ratios(a, b)))


def agreement(
    a: Tensor, b: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, float]:
    """The three figures above, each with its bootstrap interval over images.

    Args:
        a: variance maps under test (N, ...).
        b: reference maps of the same images, same shape.
        seed: fixes the resampled images.
        resamples: their number.
        level: share of the bootstrap samples inside the interval.

    Returns:
        ``image_rank``, ``image_rank_low``, ``image_rank_high``, the same for ``pixel_rank`` and
        ``spread_ratio``.
    """
    figures: Figures = {
        "image_rank": (spearman, _sums(a, b)),
        "pixel_rank": (mean, (pixel_ranks(a, b),)),
        "spread_ratio": (_median_ratio, (_log_ratios(a, b),)),
    }
    return with_intervals(figures, seed=seed, resamples=resamples, level=level)


def with_intervals(
    figures: Figures, *, seed: int, resamples: int, level: float
) -> dict[str, float]:
    """Figures by name, each with ``_low`` and ``_high``, its bootstrap interval over images.

    Args:
        figures: a statistic and its values, as for ``bootstrap_interval``.
        seed: fixes the resampled images.
        resamples: their number.
        level: share of the bootstrap samples inside the interval.
    """
    found: dict[str, float] = {}
    for name, (statistic, values) in figures.items():
        low, high = bootstrap_interval(
            statistic, *values, seed=seed, resamples=resamples, level=level
        )
        found |= {name: float(statistic(*values)), f"{name}_low": low, f"{name}_high": high}
    return found


def bootstrap_interval(
    statistic: Callable[..., Tensor],
    *values: Tensor,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over resampled images.

    Args:
        statistic: maps one tensor (..., N) per entry of ``values`` to (...).
        *values: one number per image, each (N,); an image keeps its numbers together.
        seed: fixes the resampled images.
        resamples: their number.
        level: share of the bootstrap samples inside the interval.

    Returns:
        Lower and upper end; samples where the statistic is NaN do not count.
    """
    size = len(values[0])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for first in range(0, resamples, block := max(BLOCK // size, 1)):
        shape = (min(block, resamples - first), size)
        index = torch.randint(size, shape, generator=generator)
        found.append(statistic(*(value.cpu()[index] for value in values)))
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.cat(found).double().nanquantile(ends).tolist()
    return low, high


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation along the last axis, ties sharing their mean rank.

    Args:
        a: values (..., N).
        b: values of the same shape.

    Returns:
        Correlations (...), float64; NaN where one side is constant.
    """
    ranks_a, ranks_b = (own - own.mean(-1, keepdim=True) for own in (ranks(a), ranks(b)))
    # Ranks of ties are exact halves, so a constant side gives exactly 0 / 0.
    return (ranks_a * ranks_b).sum(-1) / (
        ranks_a.square().sum(-1) * ranks_b.square().sum(-1)
    ).sqrt()


def variance_statistics(
    variance: Tensor, labels: Tensor | None = None, classes: Sequence[str] = ()
) -> dict[str, float]:
    """Flat figures of one set of maps, for TensorBoard.

    Args:
        variance: variance maps (N, C, H, W).
        labels: classes of the images, int64 (N,), or None.
        classes: their names; a class without one goes by its number.

    Returns:
        ``mean`` and, of several, ``sd`` over images of the summed variance, ``negative_share`` of
        all values and, with labels, the mean per class as ``class_<name>``.
    """
    sums = variance.double().flatten(1).sum(1)
    found = {
        "mean": float(sums.mean()),
        **({"sd": float(sums.std(correction=0))} if len(sums) > 1 else {}),
        "negative_share": float((variance < 0).double().mean()),
    }
    if labels is None:
        return found
    present, index = labels.to(sums.device).unique(return_inverse=True)
    totals = torch.zeros(len(present), dtype=sums.dtype, device=sums.device)
    means = totals.index_add(0, index, sums) / index.bincount()
    # A slash would begin another group of scalars in TensorBoard.
    names = [
        str(classes[k]).replace("/", "-") if k < len(classes) else k for k in present.tolist()
    ]
    return found | {f"class_{n}": mean for n, mean in zip(names, means.tolist(), strict=True)}


def ranks(values: Tensor) -> Tensor:
    """Mean ranks along the last axis, from 0, ``(..., N) -> (..., N)`` float64."""
    ordered, order = values.sort(dim=-1)
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    new = torch.ones_like(order, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    first = place.where(new, 0).cummax(-1).values
    # The last place of a run of ties is one before the next run's first place.
    ends = new.roll(-1, dims=-1)
    last = place.where(ends, values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    found = (first + last).double() / 2
    # A NaN has no rank; it makes the correlation NaN instead of counting as the largest value.
    return torch.empty_like(found).scatter(-1, order, found).where(~values.isnan(), torch.nan)


def ranks_within(values: Tensor, groups: Tensor) -> Tensor:
    """Mean ranks among those of the same group ``(N,)``, as shares of it, ``(K, N) -> (K, N)``."""
    within = torch.empty_like(values, dtype=torch.float64)
    for group in groups.unique():
        own = groups == group
        within[:, own] = (ranks(values[:, own]) + 0.5) / int(own.sum())
    return within


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"maps must be two equal shapes (N, ...), got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(a, b)
    return a.double().flatten(1).sum(1), b.double().flatten(1).sum(1)


def pixel_ranks(a: Tensor, b: Tensor) -> Tensor:
    """Spearman correlation, over pixels, of the two maps of each image, ``(N,)`` float64.

    Args:
        a: variance maps (N, ...).
        b: variance maps of the same images, same shape.
    """
    _check_shapes(a, b)
    return torch.cat(
        [
            spearman(part_a.flatten(1), part_b.flatten(1))
            for part_a, part_b in zip(a.split(1024), b.split(1024), strict=True)
        ]
    )


def _log_ratios(a: Tensor, b: Tensor) -> Tensor:
    sums_a, sums_b = _sums(a, b)
    ratios = sums_a.log() - sums_b.log()  # a sum of zero or less gives NaN or an infinity
    return ratios.where(ratios.isfinite(), torch.nan)


def _median_ratio(log_ratios: Tensor) -> Tensor:
    return log_ratios.nanquantile(0.5, dim=-1).exp()


def mean(values: Tensor) -> Tensor:
    """Mean along the last axis; NaN does not count."""
    return values.nanmean(-1)
