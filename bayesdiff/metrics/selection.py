"""Which images a score keeps, which a random choice keeps, and how well a score finds marked ones.

A score is one number per image: the higher, the sooner the image is discarded. What is kept is a
matter of the images' numbers and scores, never of the order in which they are listed.
"""

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least


def kept(
    score: Tensor, fraction: float, groups: Tensor | None = None, numbers: Tensor | None = None
) -> Tensor:
    """The least doubtful images.

    Args:
        score: one number per image, floating (N,); infinity discards first.
        fraction: share that is kept, above 0 and at most 1.
        groups: class of each image, integers (N,): the same share of every class is kept. None
            keeps the least doubtful of all classes together.
        numbers: distinct numbers of the images, integers (N,), where they are listed with gaps or
            out of order; None is 0, 1, ... Of equal scores the lower number is kept.

    Returns:
        Places in the list, int64 (n,), on the CPU, the lowest number first. A share that is no
        whole number of images is rounded, half up, to at least one image.
    """
    score = checked_score(score)
    numbers = checked_numbers(numbers, len(score))
    return _least(
        score[None], checked_fraction(fraction), checked_groups(groups, len(score)), numbers
    )[0]


def random_kept(
    count: int,
    fraction: float,
    seed: int,
    groups: Tensor | None = None,
    numbers: Tensor | None = None,
    subsets: int = 10,
) -> Tensor:
    """Random choices of as many images, of as many of every class, as ``kept`` keeps.

    Args:
        count: number N of images.
        fraction: see ``kept``; a higher one adds images to those of a lower one.
        seed: fixes the choices.
        groups: see ``kept``.
        numbers: see ``kept``.
        subsets: number S of choices.

    Returns:
        Places in the list, int64 (S, n), on the CPU, the lowest number first.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (at_least("subsets", subsets), at_least("number of images", count))
    numbers = checked_numbers(numbers, count)
    # Lots go to numbers, so that the order of the list does not matter here either.
    lots = torch.empty(shape, dtype=torch.float64)
    lots[:, numbers.argsort()] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return _least(lots, checked_fraction(fraction), checked_groups(groups, count), numbers)


def lowest_scores(scores: Tensor, fraction: float, groups: Tensor | None = None) -> Tensor:
    """``kept`` for many scores at once, without its checks: ``(S, N) -> (S, n)``.

    Args:
        scores: on the CPU; equal scores are kept by lot, always the same.
        fraction: see ``kept``.
        groups: see ``kept``.
    """
    return _least(scores, fraction, groups, torch.arange(scores.shape[1]))


def auroc(score: Tensor, marked: Tensor) -> Tensor:
    """Probability that a marked image has the higher score of a pair, equal scores half.

    Args:
        score: (..., N).
        marked: the images to be found, bool or 0 and 1, (..., N).

    Returns:
        Area under the receiver operating characteristic, ``(...)`` float64; NaN where all images
        or none are marked.
    """
    marked = marked.double()
    ordered = score.sort(-1).values.contiguous()
    score = score.contiguous()
    # Mean of the first and the last place that equal scores share.
    below = torch.searchsorted(ordered, score)
    ranks = (below + torch.searchsorted(ordered, score, right=True) - 1).double() / 2
    found = marked.sum(-1)
    # Mann and Whitney's statistic, with ranks from 0.
    wins = (ranks * marked).sum(-1) - found * (found - 1) / 2
    return wins / (found * (marked.shape[-1] - found))


def top_recall(score: Tensor, marked: Tensor, fraction: float) -> float:
    """Share of the marked images among those that are discarded first.

    Args:
        score: see ``kept``, (N,).
        marked: the images to be found, bool (N,).
        fraction: share of all images that is discarded, below 1; where more are marked, not all
            can be found.
    """
    score, marked = checked_score(score), _marked(marked, len(score))
    left = kept(score, 1 - fraction)
    return 1 - float(marked[left].sum() / marked.sum())


def checked_score(score: Tensor, name: str = "score") -> Tensor:
    """One number per image, on the CPU.

    Raises:
        UserError: if they are not floating numbers (N,), or one is NaN.
    """
    if not score.is_floating_point() or score.ndim != 1 or not len(score):
        raise UserError(
            f"{name} must be floating numbers (N,) with N >= 1, got {score.dtype} "
            f"{tuple(score.shape)}; give one float per image"
        )
    missing = score.isnan().nonzero()
    if len(missing):
        raise UserError(
            f"{name} of image {int(missing[0])} is NaN ({len(missing)} of {len(score)} images); "
            "give every image a number, inf discards first"
        )
    return score.detach().cpu()


def checked_fraction(fraction: float) -> float:
    """A share of images to keep.

    Raises:
        UserError: if it is not a number above 0 and at most 1.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise UserError(f"keep fraction must be a number, got {fraction!r}; 0.8 keeps 80 %")
    if not 0 < fraction <= 1:
        raise UserError(
            f"keep fraction must be above 0 and at most 1, got {fraction}; 0.8 keeps 80 %"
        )
    return fraction


def checked_groups(groups: Tensor | None, count: int) -> Tensor | None:
    """Classes of the images, int64 (N,) on the CPU, or None."""
    return None if groups is None else _integers("groups", groups, count)


def checked_numbers(numbers: Tensor | None, count: int) -> Tensor:
    """Numbers of the images, int64 (N,) on the CPU; 0, 1, ... for None.

    Raises:
        UserError: if they are not whole numbers, one for each image, all different.
    """
    if numbers is None:
        return torch.arange(count)
    numbers = _integers("numbers", numbers, count)
    values, times = numbers.unique(return_counts=True)
    if len(values) < count:
        raise UserError(
            f"numbers must be distinct, got {int(values[times > 1][0])} more than once; "
            "give each image its own"
        )
    return numbers


def _least(scores: Tensor, fraction: float, groups: Tensor | None, numbers: Tensor) -> Tensor:
    """Places ``(S, n)`` of the least doubtful of S scores ``(S, N)``, by ascending number.

    Equal scores are kept in an order that the numbers alone decide, by lot: numbers often follow
    the classes in turn, and in their own order a constant score would keep a balanced set.
    """
    by_number = numbers.argsort()
    lots = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(len(numbers)))
    order = lots[scores[:, by_number[lots]].argsort(dim=-1, stable=True)]
    sizes = torch.tensor([scores.shape[1]])
    if groups is not None:
        _, group, sizes = groups[by_number].unique(return_inverse=True, return_counts=True)
        # Least doubtful first within each class, one class after the other.
        order = order.gather(-1, group[order].argsort(dim=-1, stable=True))
    starts = sizes.cumsum(0) - sizes
    shares = [kept_count(fraction, size) for size in sizes.tolist()]
    places = [
        torch.arange(start, start + share)
        for start, share in zip(starts.tolist(), shares, strict=True)
    ]
    return by_number[order[:, torch.cat(places)].sort(dim=-1).values]


def kept_count(fraction: float, size: int) -> int:
    """Images that a share keeps of ``size``, at least 1."""
    # 0.35 * 90 is 31.499999999999996.
    return max(int(round(fraction * size, 9) + 0.5), 1)


def _integers(name: str, values: Tensor, count: int) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.shape != (count,):
        raise UserError(
            f"{name} must be whole numbers, one for each of {count} images, got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    return values.detach().cpu().long()


def _marked(marked: Tensor, count: int) -> Tensor:
    marked = _integers("marked", marked, count).bool()
    if marked.all() or not marked.any():
        raise UserError(
            f"marked must name some of the {count} images, got {int(marked.sum())}; "
            "nothing can be found among them"
        )
    return marked
