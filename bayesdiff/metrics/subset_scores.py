"""Scores beside FID and precision of many subsets of the same generated images at once.

What all subsets share, kernels and neighbours, is computed once; a subset then costs a few sums,
so that thousands of them, as a bootstrap needs, take seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.metrics.cmmd import SCALE, WIDTH, directions
from bayesdiff.metrics.neighbours import (
    BLOCK,
    features64,
    radii,
    rounding,
    squared_distances,
)

Kernel = Callable[[Tensor, Tensor], Tensor]

# Of recall, and of density and coverage, as in their papers.
RECALL_K, DENSITY_K = 3, 5
# Nearest generated images among which the k-th kept one is looked for.
NEAREST = 64


@dataclass(frozen=True)
class Discrepancy:
    """Unbiased squared maximum mean discrepancy of any subset.

    Attributes:
        own: kernel between the generated images (N, N), 0 of an image with itself.
        across: mean kernel of each with the real images (N,).
        reference: mean kernel between two different real images.
    """

    own: Tensor
    across: Tensor
    reference: float

    @classmethod
    def of(cls, kernel: Kernel, generated: Tensor, real: Tensor) -> "Discrepancy":
        """From features (N, F) and (M, F)."""
        rows, m = max(BLOCK // max(len(generated), len(real)), 1), len(real)
        own = torch.cat([kernel(part, generated) for part in generated.split(rows)])
        across = torch.cat([kernel(part, real).mean(1) for part in generated.split(rows)])
        total = 0.0
        for number, part in enumerate(real.split(rows)):
            block = kernel(part, real)
            block.diagonal(number * rows).zero_()
            total += float(block.sum())
        return cls(own.fill_diagonal_(0), across, total / (m * (m - 1)))

    def __call__(self, counts: Tensor) -> Tensor:
        """Of subsets (S,) that hold each image so many times, (S, N); copies make no pair."""
        n = counts.sum(1)
        within = ((counts @ self.own) * counts).sum(1) / (n**2 - counts.square().sum(1))
        return within + self.reference - 2 * (counts @ self.across) / n


@dataclass(frozen=True)
class Manifold:
    """Recall of any subset: real images inside the balls that reach a kept image's k-th kept one.

    Attributes:
        near: the nearest other generated images of each, nearest first, (N, L).
        radii: squared distances to these, (N, L).
        inside: pairs of a generated and a real image within the largest of its balls, (2, P).
        squared: squared distances of these pairs, less what is rounding, (P,).
        real: number M of real images.
    """

    near: Tensor
    radii: Tensor
    inside: Tensor
    squared: Tensor
    real: int

    @classmethod
    def of(cls, generated: Tensor, real: Tensor) -> "Manifold":
        """From features (N, F) and (M, F)."""
        size, slack = min(NEAREST, len(generated) - 1), rounding(real)
        found = [
            part.topk(size + 1, dim=1, largest=False)
            for part in squared_distances(generated, generated)
        ]
        radii = torch.cat([each.values for each in found])[:, 1:]
        near = torch.cat([each.indices for each in found])
        # The image itself, first but for copies of it, is no neighbour.
        itself = near == torch.arange(len(near))[:, None]
        itself[:, -1] |= ~itself.any(1)
        near = near[~itself].view(-1, size)
        pairs, squared, first = [], [], 0
        for part in squared_distances(generated, real):
            rows = slice(first, first + len(part))
            pair = (part <= radii[rows, -1:] + slack).nonzero()
            squared.append(part[pair[:, 0], pair[:, 1]] - slack)
            pairs.append(pair + torch.tensor([first, 0]))
            first += len(part)
        return cls(near, radii, torch.cat(pairs).T, torch.cat(squared), len(real))

    def __call__(self, member: Tensor) -> Tensor:
        """Recall (S,) of subsets (S, N) bool.

        An image with fewer than k kept ones among its 64 nearest has the ball that reaches the
        last of these, which is too small.
        """
        size = max(len(self.squared), self.near.numel(), 1)
        return torch.cat([self._recall(part) for part in member.split(max(BLOCK // size, 1))])

    def _recall(self, member: Tensor) -> Tensor:
        enough = member[:, self.near].cumsum(2, dtype=torch.int16) >= RECALL_K
        enough[..., -1] = True
        place = enough.byte().argmax(2)
        radii = self.radii.expand(len(member), -1, -1).gather(2, place[..., None]).squeeze(2)
        radii = radii.where(member, -torch.inf)
        # Few of the pairs are within a ball of these subsets.
        near = self.squared <= radii.amax(0)[self.inside[0]]
        who, real = self.inside[:, near]
        # Subsets last: a pair's numbers lie side by side.
        hits = (self.squared[near, None] <= radii.T.contiguous()[who]).float()
        reached = hits.new_zeros(self.real, len(member)).index_add_(0, real, hits)
        return (reached > 0).double().mean(0)


@dataclass(frozen=True)
class SubsetScores:
    """Inception score, KID, recall, density, coverage and CMMD of any subset.

    Attributes:
        probability: of the classes (N, K), None for an encoder without classes.
        balls: real images' balls around each image, over k, (N,).
        covered: which images lie in which real image's ball, sparse (M, N).
        kid: with the polynomial kernel of KID, over all pairs instead of some.
        cmmd: with the Gaussian kernel of CMMD, times 1000.
        recall: of the manifold of the generated images.
    """

    probability: Tensor | None
    balls: Tensor
    covered: Tensor
    kid: Discrepancy
    cmmd: Discrepancy
    recall: Manifold

    @classmethod
    def of(cls, generated: Tensor, real: Tensor, logits: Tensor | None = None) -> "SubsetScores":
        """Everything that subsets share.

        Args:
            generated: features (N, F).
            real: features of the real images (M, F).
            logits: of the generated images (N, K); None leaves the inception score out.
        """
        generated, real = features64("generated", generated), features64("real", real)
        within = _within(generated, real)
        unit, real_unit = directions("generated", generated), directions("real", real)
        return cls(
            probability=None if logits is None else logits.double().softmax(1),
            balls=within.sum(1).double() / DENSITY_K,
            covered=within.T.to_sparse().double(),
            kid=Discrepancy.of(_polynomial, generated, real),
            cmmd=Discrepancy.of(_gaussian, unit, real_unit),
            recall=Manifold.of(generated, real),
        )

    def __call__(self, subsets: Tensor) -> dict[str, Tensor]:
        """Scores ``(S,)`` float64 of subsets, indices ``(S, n)``; some images may be in twice."""
        size = len(self.balls)
        counts = torch.zeros(len(subsets), size, dtype=torch.float64)
        counts.scatter_add_(1, subsets, torch.ones_like(subsets, dtype=torch.float64))
        member = counts > 0
        share = counts / counts.sum(1, keepdim=True)
        found = {} if self.probability is None else {"is": _inception(share, self.probability)}
        covered = (self.covered @ member.double().T > 0).double().mean(0)
        return found | {
            "kid": self.kid(counts),
            "recall": self.recall(member),
            "density": share @ self.balls,
            "coverage": covered,
            "cmmd": SCALE * self.cmmd(counts),
        }


def _inception(share: Tensor, probability: Tensor) -> Tensor:
    """exp(H(mean p) - mean H(p)), of one split."""
    entropy = torch.special.entr(probability).sum(1)
    return (torch.special.entr(share @ probability).sum(1) - share @ entropy).exp()


def _within(generated: Tensor, real: Tensor) -> Tensor:
    """Which images lie in which real image's ball, bool (N, M)."""
    slack = rounding(real)
    reach = radii(real, DENSITY_K).square() + slack
    return torch.cat([part <= reach for part in squared_distances(generated, real)])


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT / a.shape[1] + 1) ** 3


def _gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Kernel less 1, which drops out and would cost digits."""
    squared = (a.square().sum(1, keepdim=True) + b.square().sum(1)).addmm(a, b.mT, alpha=-2)
    return squared.clamp_(min=0).div_(-2 * WIDTH**2).expm1_()
