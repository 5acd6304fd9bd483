"""Generated images, compared with the real ones once, for the figures of any of their subsets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.metrics.neighbours import features64, neighbours
from bayesdiff.metrics.scores import Reference
from bayesdiff.metrics.selection import checked_groups, checked_numbers
from bayesdiff.metrics.subset_scores import SubsetScores

# Feature values gathered at once for the FID of many subsets: 64 MiB of float64.
BLOCK = 1 << 23


@dataclass(frozen=True)
class Pool:
    """Images in the ascending order of their numbers; subsets are indices into this order.

    Attributes:
        features: float64 (N, F), on the CPU.
        inside: bool (N,), inside the manifold of the real images.
        mean: mean feature of the real images, float64 (F,).
        root: symmetric square root of their covariance, float64 (F, F).
        groups: classes of the images, int64 (N,), or None.
        order: places of the images in the caller's list, int64 (N,).
        more: scores beside FID and precision, None for those two alone.
    """

    features: Tensor
    inside: Tensor
    mean: Tensor
    root: Tensor
    groups: Tensor | None
    order: Tensor
    more: SubsetScores | None = None

    def __len__(self) -> int:
        return len(self.features)

    def figures(self, subsets: Tensor) -> dict[str, Tensor]:
        """Scores of each subset by name, indices ``(S, n) -> (S,)`` float64, n >= 2.

        They are ``fid`` and ``precision``, and where the pool has ``more``: ``is`` (of one split),
        ``kid`` (over all pairs), ``recall``, ``density``, ``coverage`` and ``cmmd``.
        """
        n, dims = subsets.shape[1], self.features.shape[1]
        at_least("kept images for the FID", n, 2)
        blocks = subsets.split(max(BLOCK // (2 * n * dims + 4 * dims**2), 1))
        return {
            "fid": torch.cat([self._fid(block) for block in blocks]),
            "precision": self.inside[subsets].double().mean(1),
            **({} if self.more is None else self.more(subsets)),
        }

    def _fid(self, subsets: Tensor) -> Tensor:
        features = self.features[subsets]
        mean = features.mean(1, keepdim=True)
        centred = features - mean
        covariance = centred.mT @ centred / (subsets.shape[1] - 1)
        # torch-fidelity's sum of the square roots of the eigenvalues of C_1 C_2, here from the
        # symmetric matrix with the same eigenvalues: several times as fast, and in batches.
        eigenvalues = torch.linalg.eigvalsh(self.root @ covariance @ self.root)
        cross = eigenvalues.clamp(min=0).sqrt().sum(-1)
        distance = (mean.squeeze(1) - self.mean).square().sum(-1)
        traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + self.root.square().sum()
        return distance + traces - 2 * cross


def pool(
    features: Tensor,
    reference: Reference,
    *,
    groups: Tensor | None = None,
    numbers: Tensor | None = None,
    k: int = 3,
    more: bool = False,
    logits: Tensor | None = None,
) -> Pool:
    """Compare generated images with real ones.

    Args:
        features: of the generated images (N, F), in any order.
        reference: of the real images, in the same feature space; precision reads its subset.
        groups: classes of the images, integers (N,), or None.
        numbers: distinct numbers of the images, integers (N,); None is 0, 1, ...
        k: neighbour that the balls of the real images reach, for precision.
        more: whether to prepare the scores beside FID and precision; takes two N x N matrices.
        logits: class scores of the images (N, K) for the inception score, or None.

    Returns:
        The pool, the same for every order of the list.
    """
    features = features64("generated", features.cpu())
    order = checked_numbers(numbers, len(features)).argsort()
    groups = checked_groups(groups, len(features))
    features, real = features[order], torch.from_numpy(reference.subset)
    eigenvalues, vectors = torch.linalg.eigh(torch.from_numpy(reference.covariance).double())
    return Pool(
        features=features,
        inside=neighbours(features, real, k).inside,
        mean=torch.from_numpy(reference.mean).double(),
        root=(vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT,
        groups=None if groups is None else groups[order],
        order=order,
        more=SubsetScores.of(features, real, _by_number(logits, order)) if more else None,
    )


def _by_number(logits: Tensor | None, order: Tensor) -> Tensor | None:
    """In the pool's order; None where there are no classes."""
    return None if logits is None or not logits.shape[1] else logits.cpu()[order]
