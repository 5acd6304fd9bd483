"""How FID and CMMD depend on the number of generated images, and the FID of infinitely many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.metrics.cmmd import cmmd_of_subsets
from bayesdiff.metrics.scores import Reference
from bayesdiff.metrics.seeds import t_quantile
from bayesdiff.metrics.subsets import Pool
from bayesdiff.studies.filtering.gains import spread_of_one


def sample_size_curve(
    images: Pool,
    reference: Reference,
    sizes: Sequence[int],
    *,
    encoder: str,
    seed: int,
    subsets: int = 20,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """FID and CMMD of random subsets of growing size.

    Args:
        images: the generated images.
        reference: of the real images, the one behind the pool; CMMD reads its subset.
        sizes: images in a subset, from 2 to N.
        encoder: the feature space, for the table.
        seed: fixes the subsets; a larger one holds the smaller ones.
        subsets: number of subsets of each size, at least 2.
        level: of the intervals.

    Returns:
        One row for each size: ``images``, ``encoder``, and of ``fid`` and ``cmmd`` the mean,
        ``_sd`` over the subsets, and ``_low`` to ``_high``, where a fresh set of so many images
        lies. Subsets of one pool share images, so for that interval their spread is divided by
        sqrt(1 - n / N), which is exact for a mean; NaN for n = N, where all subsets are the pool.

    Raises:
        UserError: if a size is above N.
    """
    at_least("subsets", subsets, 2)
    for size in sizes:
        if at_least("size of a subset", size, 2) > len(images):
            raise UserError(
                f"size of a subset must be at most {len(images)}, the images in the "
                f"pool; got {size}"
            )
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack(
        [torch.randperm(len(images), generator=generator) for _ in range(subsets)]
    )
    parts = [orders[:, :size] for size in sizes]
    cmmd = cmmd_of_subsets(
        images.features,
        torch.from_numpy(reference.subset),
        [subset for part in parts for subset in part],
    )
    rows = []
    for size, part, values in zip(sizes, parts, cmmd.split(subsets), strict=True):
        row: dict[str, Any] = {"images": size, "encoder": encoder}
        shared = (1 - size / len(images)) ** 0.5
        for name, found in {"fid": images.figures(part)["fid"], "cmmd": values}.items():
            mean, sd = float(found.mean()), float(found.std())
            half = spread_of_one(sd, subsets, level) / shared if shared else torch.nan
            row |= {name: mean, f"{name}_sd": sd}
            row |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
        rows.append(row)
    return rows


def fid_of_infinity(
    images: Pool,
    *,
    seed: int,
    splits: int = 5,
    repeats: int = 3,
    parts: int = 10,
    level: float = 0.95,
) -> dict[str, float]:
    """FID that infinitely many images would have, by a straight line over 1 / N.

    A finite set's FID is too high by about a constant over N. Source: Chong and Forsyth,
    "Effectively unbiased FID and Inception Score and where to find them" (2020), section 3.2.
    Here the line goes through the whole pool, its halves, thirds and so on: as every image is in
    one of them, what is particular to the images is the same in all points. It holds for sets
    well above the number of features.

    Args:
        images: the generated images, at least 2 ``parts`` and 2 ``splits``.
        seed: fixes the splits.
        splits: points of the line, the last one at N / ``splits`` images.
        repeats: random splits of each kind.
        parts: groups of images; each left out in turn gives the interval (jackknife).
        level: of the interval.

    Returns:
        ``fid_infinity`` with ``_sd`` and ``_low`` to ``_high``, and ``fid_slope``: the excess of a
        set of N images is about this over N.

    Raises:
        UserError: for fewer images.
    """
    at_least("splits", splits, 2)
    count = len(images)
    least = max(4 * splits, 2 * at_least("parts", parts, 2))
    if count < least:
        raise UserError(f"FID at infinity needs {least} images, got {count}")
    generator = torch.Generator().manual_seed(seed)

    def line(rest: Tensor) -> Tensor:
        """Intercept and slope for these images."""
        inverse, fid = [], []
        for split in range(1, splits + 1):
            size = len(rest) // split
            orders = [rest[torch.randperm(len(rest), generator=generator)] for _ in range(repeats)]
            chosen = torch.stack(orders)[:, : size * split].reshape(-1, size)
            fid.append(images.figures(chosen[: None if split > 1 else 1])["fid"].mean())
            inverse.append(1 / size)
        basis = torch.tensor([[1.0, each] for each in inverse], dtype=torch.float64)
        return torch.linalg.lstsq(basis, torch.stack(fid)[:, None]).solution.flatten()

    shuffled = torch.randperm(count, generator=generator)
    intercept, slope = line(shuffled).tolist()
    chunks = shuffled.tensor_split(parts)
    left = [torch.cat([*chunks[:k], *chunks[k + 1 :]]) for k in range(parts)]
    each = torch.stack([line(rest)[0] for rest in left])
    sd = float((each - each.mean()).square().sum() * (parts - 1) / parts) ** 0.5
    half = t_quantile(parts, level) * sd
    found = {"fid_infinity": intercept, "fid_infinity_sd": sd, "fid_slope": slope}
    return found | {"fid_infinity_low": intercept - half, "fid_infinity_high": intercept + half}
