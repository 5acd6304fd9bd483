"""Image scores from gathered features, with torch-fidelity's formulas: FID, IS, KID, PRC.

The functions take features, not images, so several processes can extract and one can score.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.machine.ranks import rank
from bayesdiff.storage.artefacts import BROKEN_NPZ
from bayesdiff.storage.atomic import write_atomic
from bayesdiff.storage.locks import alone, together

if TYPE_CHECKING:  # bayesdiff.metrics.features imports torch-fidelity, which costs seconds
    from bayesdiff.metrics.features import Features

log = logging.getLogger(__name__)

# Images that precision and recall compare on each side, at most: their cost is quadratic.
SUBSET = 10_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
# A split of fewer images would mostly measure how few they are.
IMAGES_PER_SPLIT = 100


@dataclass(frozen=True)
class Reference:
    """What the scores need of the real images.

    Attributes:
        mean: mean feature, float64 (F,).
        covariance: covariance of the features, float64 (F, F).
        subset: features of a random part of the images for KID and PRC, float32 (M, F).
        size: number of images behind mean and covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    subset: np.ndarray
    size: int


@dataclass(frozen=True)
class Conditions:
    """What `scores` lowered or fixed for the sizes at hand; belongs beside the numbers.

    Attributes:
        images: generated images scored.
        reference_images: real images behind the FID statistics.
        feature_dims: length F of a feature vector.
        fid_rank_deficient: fewer images than F + 1 on a side, so a covariance is singular.
        is_splits: parts whose inception scores are averaged, 10 where there are enough images.
        kid_subset_size: images per KID subset, 1000 where there are enough images.
        kid_subsets: number of KID subsets.
        prc_generated: generated images that precision and recall compare.
        prc_reference: real images that precision and recall compare.
        prc_neighbours: the k of their k-th nearest neighbour, 3 where there are enough images.
    """

    images: int
    reference_images: int
    feature_dims: int
    fid_rank_deficient: bool
    is_splits: int
    kid_subset_size: int
    kid_subsets: int
    prc_generated: int
    prc_reference: int
    prc_neighbours: int


def reference_statistics(
    compute: "Callable[[], Features]",
    *,
    key: str,
    cache_dir: Path | str | None,
    seed: int,
    subset: int = SUBSET,
    shared: bool = False,
) -> Reference:
    """Statistics of the real images, computed once per content key.

    Args:
        compute: extracts the features of the real images; called on a cache miss only.
        key: names the content: fingerprint of the images and `features.weights_hash`.
        cache_dir: folder of the ``reference-<hash>.npz`` files; None caches nothing.
        seed: chooses the random part for KID and PRC.
        subset: images in that part, at most.
        shared: whether all processes call it, and ``compute`` needs them all.

    Returns:
        The statistics, in float64.
    """
    if cache_dir is None:
        return _reference(compute(), seed, subset)
    digest = hashlib.sha256(json.dumps([1, key, seed, subset]).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"reference-{digest}.npz"
    with together(path) if shared else alone(path):
        if path.exists():
            try:
                return _read(path)
            except BROKEN_NPZ as error:
                log.warning("%s is not readable (%s); computing it again", path, error)
        reference = _reference(compute(), seed, subset)
        if not shared or rank() == 0:
            _write(path, reference)
    return reference


def conditions(images: int, reference: Reference) -> Conditions:
    """Sizes that `scores` uses for this many generated images.

    Returns:
        The full protocol of the papers where the sizes allow it, the nearest below it elsewhere.
    """
    part, dims = reference.subset.shape
    generated = min(images, SUBSET)
    return Conditions(
        images=images,
        reference_images=reference.size,
        feature_dims=dims,
        fid_rank_deficient=min(images, reference.size) <= dims,
        is_splits=min(10, max(1, images // IMAGES_PER_SPLIT)),
        kid_subset_size=min(KID_SUBSET_SIZE, images, part),
        kid_subsets=KID_SUBSETS,
        prc_generated=generated,
        prc_reference=part,
        prc_neighbours=min(3, generated - 1, part - 1),
    )


def scores(
    generated: "Features", reference: Reference, *, seed: int, extractor: str
) -> dict[str, float]:
    """FID, inception score, KID, precision and recall of generated images.

    Args:
        generated: gathered features of all generated images, at least 2.
        reference: from `reference_statistics`, in the same feature space.
        seed: chooses the KID subsets, the order of the IS splits and the PRC part.
        extractor: the feature space, for the names, such as ``classifier``.

    Returns:
        ``fid``, ``is``, ``is_sd``, ``kid``, ``kid_sd``, ``precision`` and ``recall``, each under
        a name with its conditions, such as ``fid@10k/classifier``; `conditions` has the rest.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    at_least("num_samples for the scores", len(generated), 2)
    used = conditions(len(generated), reference)
    own = fid_features_to_statistics(generated.features.double())
    real = {"mu": reference.mean, "sigma": reference.covariance}
    fid = fid_statistics_to_metric(own, real, verbose=False)
    values = {"fid": fid["frechet_inception_distance"]}
    if generated.logits.shape[1]:  # an encoder without classes has no inception score
        isc = isc_features_to_metric(generated.logits, splits=used.is_splits, rng_seed=seed)
        values |= {"is": isc["inception_score_mean"], "is_sd": isc["inception_score_std"]}
    values = {
        **values,
        **_neighbour_scores(generated.features, torch.from_numpy(reference.subset), used, seed),
    }
    suffix = f"@{size_name(used.images)}/{extractor}"
    return {name + suffix: float(value) for name, value in values.items()}


def size_name(size: int) -> str:
    """Short name of a sample count: 10000 is ``10k``, 5024 stays ``5024``."""
    return f"{size // 1000}k" if size and size % 1000 == 0 else str(size)


def _neighbour_scores(
    generated: Tensor, real: Tensor, used: Conditions, seed: int
) -> dict[str, float]:
    """KID (float64) and precision and recall (float32) of features ``(N, F)``, ``(M, F)``."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    kid = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=used.kid_subsets,
        kid_subset_size=used.kid_subset_size,
        rng_seed=seed,
        verbose=False,
    )
    prc = prc_features_to_metric(
        generated[_permutation(len(generated), seed)[: used.prc_generated]],
        real,
        prc_neighborhood=used.prc_neighbours,
        prc_batch_size=2000,  # bounds the memory: 2000 x 10k distances at a time
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "kid": kid["kernel_inception_distance_mean"],
        "kid_sd": kid["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def _reference(real: "Features", seed: int, subset: int) -> Reference:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    at_least("reference images for the scores", len(real), 2)
    statistics = fid_features_to_statistics(real.features.double())
    part = real.features[_permutation(len(real), seed)[:subset]]
    return Reference(statistics["mu"], statistics["sigma"], part.float().numpy(), len(real))


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _read(path: Path) -> Reference:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {field.name: stored[field.name] for field in fields(Reference)}
    size = int(arrays.pop("size"))
    return Reference(**arrays, size=size)


def _write(path: Path, reference: Reference) -> None:
    write_atomic(path, lambda file: np.savez(file, **asdict(reference)))
