"""One step of the Gaussian moments of every pixel, for single-step and multistep methods."""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from bayesdiff.paths.coefficient import matrix
from bayesdiff.solvers import Step


@dataclass(frozen=True)
class OutputMoments:
    """Moments of a step's R effective outputs for Gaussian x, per pixel.

    The first output is sum_i b_i g_i, what the step adds to a x. The others, of a step that keeps
    something, are what it adds to p x there.

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
    """Coefficients of a step's R effective outputs in its E evaluations.

    Returns:
        ``(R, E)``, or ``(R, E, C, H, W)`` where the step has tensors.
    """
    count = 1 + len(step.times)
    return matrix([step.output[1:], *(row[1:count] for row in step.kept)])


def effective(step: Step, outputs: Tensor) -> Tensor:
    """A step's effective outputs, ``(E, N, C, H, W) -> (R, N, C, H, W)``."""
    return product("re", "e...->r...", rows_of(step).to(outputs), outputs)


def product(letters: str, rest: str, rows: Tensor, *others: Tensor) -> Tensor:
    """An einsum of a matrix of coefficients, which may have pixels, with what has them."""
    each = "" if rows.ndim == len(letters) else "..."
    return torch.einsum(f"{letters}{each},{rest}", rows, *others)


def propagate(
    step: Step, mean: Tensor, covariance: Tensor, outputs: OutputMoments, held: int = 0
) -> tuple[Tensor, Tensor]:
    """Moments of x and of what is kept for later steps, after a step.

    With s = (x, k_0, k_1, ...), k_j what earlier steps kept, s' = L s + G: the first row of L is
    (a, history), then (p, r) for each kept combination, then what was kept earlier moves on, and

        Cov(s') = L Cov(s) L^T + L D + (L D)^T + Cov(G) + diag(c^2, 0),    D = Cov(s, G).

    G depends on k through x alone, so for Gaussian s Cov(k, G) = (Cov(k, x) / V) Cov(x, G). All
    columns of D are then Cov(s, x) times the slope Cov(x, G) / V, part by part of the variance;
    Cov(G) due to x is shared out as V is. What only moves on has a G of 0.

    Args:
        step: with coefficients a, p and c.
        mean: of s, ``(n, B, C, H, W)``, n = 1 + as many combinations as are held.
        covariance: of s, ``(n, n, P, B, C, H, W)`` in P parts that add up: the first grows by
            ``outputs.head``, a second one by c^2. Without a second one there is no c^2.
        outputs: G at x ~ N(mean[0], V), V the sum over the parts.
        held: how many combinations are held after this step, see ``held_after``.

    Returns:
        The same two of s'; a correlation never exceeds one.
    """
    linear = linear_part(step, len(mean), held).to(mean)
    moved = len(linear) - len(outputs.mean)
    whole = covariance[0, 0].sum(0)
    positive = whole > 0
    slope = torch.where(positive, outputs.with_x / whole, 0)
    share = torch.where(positive, covariance[0, 0] / whole, _image_share(covariance[0, 0]))
    with_outputs = covariance[0][:, None] * slope[None, :, None]
    of_outputs = share * outputs.within[:, :, None]
    of_outputs[:, :, 0] += outputs.head
    new = carried(linear, covariance, with_outputs, of_outputs)
    if step.stochastic:
        new[0, 0, 1] += step.noise**2
    added = _padded(outputs.mean, moved, 0) if moved else outputs.mean
    return product("oi", "i...->o...", linear, mean) + added, bounded(new)


def carried(
    linear: Tensor, covariance: Tensor, with_outputs: Tensor, of_outputs: Tensor
) -> Tensor:
    """L Cov(s) L^T + L D + (L D)^T + Cov(G), ``(n', n', ...)``.

    Args:
        linear: L, see ``linear_part``.
        covariance: of s, ``(n, n, ...)``.
        with_outputs: D = Cov(s, G), ``(n, R, ...)``.
        of_outputs: Cov(G), ``(R, R, ...)``; what only moves on has a G of 0.
    """
    cross = product("oi", "iq...->oq...", linear, with_outputs)
    if moved := len(linear) - len(of_outputs):
        cross = _padded(cross, moved, 1)
        of_outputs = _padded(_padded(of_outputs, moved, 0), moved, 1)
    return _both_sides(linear, covariance) + cross + cross.transpose(0, 1) + of_outputs


def _both_sides(linear: Tensor, covariance: Tensor) -> Tensor:
    """L Cov L^T."""
    if linear.ndim == 2:
        return torch.einsum("oi,ij...,qj->oq...", linear, covariance, linear)
    return torch.einsum("oi...,ij...,qj...->oq...", linear, covariance, linear)


def _padded(values: Tensor, count: int, dim: int) -> Tensor:
    """With ``count`` rows of zeros more."""
    zeros = torch.zeros_like(values.narrow(dim, 0, 1)).repeat_interleave(count, dim)
    return torch.cat([values, zeros], dim)


def _image_share(parts: Tensor) -> Tensor:
    """Shares ``(P, B, 1, ...)`` of the parts in an image's variance; the first has all of none.

    For pixels without variance: what varies there does so because of the others.
    """
    sums = parts.clamp(min=0).sum(tuple(range(2, parts.dim())), keepdim=True)
    first = torch.zeros_like(sums)
    first[0] = 1
    return torch.where(sums.sum(0) > 0, sums / sums.sum(0), first)


def bounded(covariance: Tensor) -> Tensor:
    """Correlations kept within [-1, 1], which estimates can leave, ``(n, n, ...)``."""
    size = len(covariance)
    if size == 1:
        return covariance
    diagonal = [covariance[i, i].clamp(min=0) for i in range(size)]
    rows = [[covariance[i, j] for j in range(size)] for i in range(size)]
    for i, j in combinations(range(size), 2):
        limit = (diagonal[i] * diagonal[j]).sqrt()
        rows[i][j] = rows[j][i] = torch.minimum(torch.maximum(rows[i][j], -limit), limit)
    return torch.stack([torch.stack(row) for row in rows])


def without_negative(covariance: Tensor) -> Tensor:
    """Variances of at least 0, and correlations that fit them."""
    places = range(len(covariance))
    rows = [
        [covariance[i, j].clamp(min=0) if i == j else covariance[i, j] for j in places]
        for i in places
    ]
    return bounded(torch.stack([torch.stack(row) for row in rows]))


def linear_part(step: Step, size: int, held: int) -> Tensor:
    """L, ``(n', size)`` with n' the state and the combinations that are held after the step."""
    count = 1 + len(step.times)
    rows = [(step.output[0], *step.history)]
    rows += [(row[0], *row[count:]) for row in step.kept]
    known = [(*row, *[0.0] * size)[:size] for row in rows]
    moved = max(0, min(size - 1, held - len(step.kept)))
    return matrix([*known, *([float(i == j + 1) for i in range(size)] for j in range(moved))])
