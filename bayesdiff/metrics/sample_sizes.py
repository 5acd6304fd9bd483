"""How FID and CMMD depend on the number of generated images."""

from collections.abc import Sequence
from typing import Any

import torch

from bayesdiff.checks import UserError, at_least
from bayesdiff.metrics.cmmd import cmmd_of_subsets
from bayesdiff.metrics.gains import spread_of_one
from bayesdiff.metrics.pool import Pool
from bayesdiff.metrics.scores import Reference


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
