"""The GGN of a head whose objective bends: Gram matrices with a weight at every output.

With H_p the Hessian of half the deviance in the K outputs of the value at p, the GGN of the head's
weights is ``sum_p H_p (x) phi_p phi_p^T``, phi the k x k feature patch with a trailing 1: one
matrix of K P rows for each group of outputs that say one value together. The head is linear, so
for these likelihoods it is the Hessian of the summed negative log-probability itself.

Exact, in float64, at a price: weights differ from pixel to pixel, so that the shifts that make the
Gaussian's Gram matrix cheap do not hold, and patches are unfolded. A pass takes ``N K^2 P^2`` for
each group, N values of a group in all images, instead of ``N P D`` for all of them; each
eigendecomposition takes ``(K P)^3``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.objective import CurvedObjective
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import Network

# Doubles of weighted patches held at once.
_CHUNK = 8_000_000
# Of all matrices; the eigendecomposition holds some six copies.
_MOST_BYTES = 6 * 2**30
_COPIES = 6


@torch.no_grad()
def groups_of(
    model: GenerativeModel, shape: Sequence[int], curved: CurvedObjective
) -> Tensor | None:
    """Which channels of the head say one value together, ``(G, K)``; None under the identity.

    Args:
        model: trained or not; left in the mode it was in.
        shape: of a state, ``(C, ...)``.
        curved: what the curvature is of.

    Raises:
        UserError: if the network's ``fold`` mixes positions of the head within one value, or
            leaves channels out.
    """
    net, weight = model.net, next(model.parameters())
    if not bends(curved):
        return None
    x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
    condition, training = model.condition, model.training
    y = None if condition is None else condition.of_samples([0]).to(x.device)
    output = net.head(model.eval().net.features(x, x.new_zeros(1), y))
    model.train(training)
    axis = 1 if HeadGeometry.of(net.head).kernel_size else -1
    count = output.shape[axis]
    numbers = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
    place = numbers.view(output.movedim(axis, -1).shape).movedim(-1, axis)
    folded = _by_value(net, place, curved.values).round().long()
    if bool((folded // count != folded[:, :1] // count).any()):
        raise UserError(
            f"{type(net).__name__}.fold puts outputs of several positions of the head into one "
            f"value, which {curved.said} cannot have; fold whole groups of channels"
        )
    groups = (folded % count).unique(dim=0).cpu()
    if groups.flatten().sort().values.tolist() != list(range(count)):
        raise UserError(
            f"{type(net).__name__}.fold uses some channels of the head not at all or for several "
            f"values, which {curved.said} cannot have; give each value its own"
        )
    return groups


def _by_value(net: Network, output: Tensor, count: int) -> Tensor:
    """Folded outputs of one image as rows of K for every value."""
    folded = net.fold(output)[0].unflatten(0, (-1, count))
    return folded.flatten(2).movedim(1, 2).flatten(0, 1)


@torch.no_grad()
def coupled_gram(
    curved: CurvedObjective,
    head: nn.Module,
    features: Tensor,
    output: Tensor,
    t: Tensor,
    groups: Tensor,
) -> Tensor:
    """``sum_p H_p (x) phi_p phi_p^T`` of a batch, float64 ``(G, K P, K P)``.

    Args:
        curved: gives H.
        head: the last layer; only its geometry is read.
        features: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear head.
        output: of the head, ``(B, C_out, h, w)`` or ``(B, ..., C_out)``.
        t: times ``(B,)``.
        groups: ``(G, K)``, channels of the head.
    """
    geometry = HeadGeometry.of(head)
    count, size = groups.shape[1], geometry.size
    total = features.new_zeros(len(groups), count, size, count, size, dtype=torch.float64)
    positions = output[0].numel() // output.shape[_axis(geometry)]
    # Of one image: weighted patches of one row of H, and H of all groups.
    images = max(1, _CHUNK // (count * max(size, groups.numel()) * positions))
    for part, outputs, times in zip(
        *(v.split(images) for v in (features, output, t)), strict=True
    ):
        phi, rows = patches(part, geometry), outputs.movedim(_axis(geometry), -1).flatten(0, -2)
        hessian = curved.hessian(
            rows[:, groups.flatten()].double(), times.repeat_interleave(positions)
        )
        assert hessian is not None
        for group in range(len(groups)):
            for k in range(count):
                weighted = hessian[:, group, k, k:, None] * phi[:, None]
                total[group, k, :, k:] += (phi.T @ weighted.flatten(1)).unflatten(1, (-1, size))
    return _symmetric(total.flatten(1, 2).flatten(2))


def _axis(geometry: HeadGeometry) -> int:
    return 1 if geometry.kernel_size else -1


def _symmetric(upper: Tensor) -> Tensor:
    """Matrices ``(G, K P, K P)`` of which the upper triangle is known."""
    return upper.triu() + upper.triu(1).mT


def patches(features: Tensor, geometry: HeadGeometry) -> Tensor:
    """Rows phi of every position of a batch, float64 ``(N, P)``."""
    k, features = geometry.kernel_size, geometry.read(features)
    if k:
        rows = F.unfold(features.double(), k, padding=k // 2).mT.flatten(0, 1)
    else:
        rows = features.double().flatten(0, -2)
    return torch.cat([rows, rows.new_ones(len(rows), int(geometry.bias))], 1)


def bends(curved: CurvedObjective) -> bool:
    """Whether its matrix differs from output to output."""
    return curved.hessian(torch.zeros(1, curved.values), torch.zeros(1)) is not None


def check_coupled(curved: CurvedObjective, outputs: int, size: int) -> int:
    """Weights of the head that one matrix is about, if there is memory for all matrices.

    Args:
        curved: what the curvature is of.
        outputs: C_out, channels of the head.
        size: P, weights of one of them.

    Raises:
        UserError: if there is none.
    """
    if not bends(curved):
        return size
    count = curved.values
    needed = _COPIES * 8 * outputs // count * (count * size) ** 2
    if needed > _MOST_BYTES:
        raise UserError(
            f"{curved.said} and this head need {outputs // count} matrices of "
            f"{count * size} x {count * size} and {needed / 2**30:.0f} GiB for their posterior; "
            "take a narrower head (net.head_kernel=1, net.patch=1, net.channels), or fewer "
            "model.likelihood.levels"
        )
    return count * size
