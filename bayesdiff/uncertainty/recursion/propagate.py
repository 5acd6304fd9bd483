"""One step of the Gaussian moments of every pixel, for single-step and multistep methods."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.solvers import Step


@dataclass(frozen=True)
class OutputMoments:
    """Moments of a step's R effective outputs for Gaussian x, per pixel.

    The first output is sum_i b_i g_i, what the step adds to a x. The second, of a step that keeps
    something, is what it adds to p x there.

    Attributes:
        mean: ``(R, B, C, H, W)``.
        with_x: covariance with x, ``(R, B, C, H, W)``.
        within: among the outputs due to x, ``(R, R, B, C, H, W)``.
        head: among them due to the weights of the head, of the same shape.
    """

    mean: Tensor
    with_x: Tensor
    within: Tensor
    head: Tensor

    @classmethod
    def at_point(cls, outputs: Tensor, head: Tensor | None = None) -> "OutputMoments":
        """Outputs ``(R, B, C, H, W)`` that do not vary with x; ``head`` None for no variance."""
        none = outputs.new_zeros(len(outputs), *outputs.shape)
        return cls(outputs, torch.zeros_like(outputs), none, none if head is None else head)


def rows_of(step: Step) -> Tensor:
    """Coefficients ``(R, E)`` of a step's effective outputs in its E evaluations."""
    kept = [] if step.kept is None else [step.kept[1:]]
    return torch.tensor([step.output[1:], *kept], dtype=torch.float64)


def effective(step: Step, outputs: Tensor) -> Tensor:
    """A step's effective outputs, ``(E, N, C, H, W) -> (R, N, C, H, W)``."""
    return torch.einsum("re,e...->r...", rows_of(step).to(outputs), outputs)


def propagate(
    step: Step, mean: Tensor, covariance: Tensor, outputs: OutputMoments
) -> tuple[Tensor, Tensor]:
    """Moments of x and of what a step keeps, after it.

    With s = (x, k), k what the step before kept, s' = L s + G: the first row of L is (a, history),
    the second (p, 0), and

        Cov(s') = L Cov(s) L^T + L D + (L D)^T + Cov(G) + diag(c^2, 0),    D = Cov(s, G).

    G depends on k through x alone, so for Gaussian s Cov(k, G) = (Cov(k, x) / V) Cov(x, G). Both
    columns of D are then Cov(s, x) times the slope Cov(x, G) / V, part by part of the variance;
    Cov(G) due to x is shared out as V is.

    Args:
        step: with coefficients a, p and c.
        mean: of s, ``(n, B, C, H, W)``, n = 2 after a step that kept something and else 1.
        covariance: of s, ``(n, n, P, B, C, H, W)`` in P parts that add up: the first grows by
            ``outputs.head``, a second one by c^2. Without a second one there is no c^2.
        outputs: G at x ~ N(mean[0], V), V the sum over the parts.

    Returns:
        The same two of s'; a correlation never exceeds one.
    """
    linear = _linear(step, len(mean)).to(mean)
    whole = covariance[0, 0].sum(0)
    positive = whole > 0
    slope = torch.where(positive, outputs.with_x / whole, 0)
    share = torch.where(positive, covariance[0, 0] / whole, _image_share(covariance[0, 0]))
    with_outputs = covariance[0][:, None] * slope[None, :, None]
    cross = torch.einsum("oi,iq...->oq...", linear, with_outputs)
    new = torch.einsum("oi,ij...,qj->oq...", linear, covariance, linear)
    new = new + cross + cross.transpose(0, 1) + share * outputs.within[:, :, None]
    new[:, :, 0] += outputs.head
    if step.noise:
        new[0, 0, 1] += step.noise**2
    return torch.einsum("oi,i...->o...", linear, mean) + outputs.mean, bounded(new)


def _image_share(parts: Tensor) -> Tensor:
    """Shares ``(P, B, 1, 1, 1)`` of the parts in an image's variance; the first has all of none.

    For pixels without variance: what varies there does so because of the others.
    """
    sums = parts.clamp(min=0).sum((-3, -2, -1), keepdim=True)
    first = torch.zeros_like(sums)
    first[0] = 1
    return torch.where(sums.sum(0) > 0, sums / sums.sum(0), first)


def bounded(covariance: Tensor) -> Tensor:
    """Correlations kept within [-1, 1], which estimates can leave, ``(n, n, ...)``."""
    if len(covariance) == 1:
        return covariance
    limit = (covariance[0, 0].clamp(min=0) * covariance[1, 1].clamp(min=0)).sqrt()
    off = torch.minimum(torch.maximum(covariance[0, 1], -limit), limit)
    return torch.stack(
        [torch.stack([covariance[0, 0], off]), torch.stack([off, covariance[1, 1]])]
    )


def without_negative(covariance: Tensor) -> Tensor:
    """Variances of at least 0, and correlations that fit them."""
    diagonal = [covariance[i, i].clamp(min=0) for i in range(len(covariance))]
    if len(diagonal) == 1:
        return diagonal[0][None, None]
    rows = [[diagonal[0], covariance[0, 1]], [covariance[1, 0], diagonal[1]]]
    return bounded(torch.stack([torch.stack(row) for row in rows]))


def _linear(step: Step, size: int) -> Tensor:
    """L, ``(1 or 2, size)``."""
    rows = [[step.output[0], step.history]]
    if step.kept is not None:
        rows.append([step.kept[0], 0.0])
    return torch.tensor(rows, dtype=torch.float64)[:, :size]
