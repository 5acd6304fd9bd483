"""The one matrix a last-layer Laplace posterior needs: the Gram matrix of the head's inputs.

The head is linear in its weights, so for a Gaussian likelihood the GGN of all its weights is
``I_C (x) G / sigma^2`` with ``G = sum phi phi^T`` over images and pixels, phi the k x k feature
patch with a trailing 1 (MacKay, "A practical Bayesian framework for backpropagation networks",
Neural Computation 1992, eq. 2.9; Daxberger et al., "Laplace Redux", NeurIPS 2021, eq. 8).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError

# Doubles of padded features handled at once: they stay in the cache for all shifts.
_CHUNK = 1_000_000

Offset = tuple[int, int]


@dataclass(frozen=True)
class HeadGeometry:
    """How a head reads its features.

    Attributes:
        features: D, channels (conv) or width (linear) of the features.
        kernel_size: k of a k x k convolution, 0 for a linear head.
        bias: whether phi ends with a 1.
    """

    features: int
    kernel_size: int
    bias: bool

    @classmethod
    def of(cls, head: nn.Module) -> "HeadGeometry":
        """Read the geometry of ``head``.

        Raises:
            UserError: if the head is not a linear layer or a plain "same" convolution.
        """
        if isinstance(head, nn.Linear):
            return cls(head.in_features, 0, head.bias is not None)
        if not isinstance(head, nn.Conv2d):
            raise UserError(
                f"the head is a {type(head).__name__}; last-layer Laplace needs an nn.Conv2d or"
                " nn.Linear as the network's last layer"
            )
        _check_conv(head)
        return cls(head.in_channels, head.kernel_size[0], head.bias is not None)

    @property
    def taps(self) -> int:
        """Feature vectors per patch: k * k, or 1 for a linear head."""
        return max(self.kernel_size, 1) ** 2

    @property
    def size(self) -> int:
        """P, the length of the patch vector phi."""
        return self.taps * self.features + int(self.bias)

    def check(self, features: Tensor) -> None:
        """Refuse features that do not fit this head.

        Raises:
            UserError: if their channels (or last axis, for a linear head) are not D.
        """
        axis = 1 if self.kernel_size else -1
        fits = features.ndim == 4 if self.kernel_size else features.ndim >= 2
        if not fits or features.shape[axis] != self.features:
            wanted = "(B, D, h, w)" if self.kernel_size else "(B, ..., D)"
            raise UserError(
                f"features must be {wanted} with D = {self.features}, got"
                f" {tuple(features.shape)}; pass what the network feeds its head"
            )


def _check_conv(head: nn.Conv2d) -> None:
    """Refuse every convolution that is not stride 1, dense, zero-padded and size-preserving.

    Raises:
        UserError: if it is not; the line names every wrong setting.
    """
    k = head.kernel_size[0]
    same = ("same", (k // 2, k // 2)) + (("valid",) if k == 1 else ())
    wrong = [
        f"{name}={value!r} (needs {needed!r})"
        for name, value, needed, ok in (
            ("kernel_size", head.kernel_size, "odd k x k", head.kernel_size == (k, k) and k % 2),
            ("stride", head.stride, 1, head.stride == (1, 1)),
            ("dilation", head.dilation, 1, head.dilation == (1, 1) or k == 1),
            ("groups", head.groups, 1, head.groups == 1),
            ("padding", head.padding, k // 2, head.padding in same),
            ("padding_mode", head.padding_mode, "zeros", head.padding_mode == "zeros" or k == 1),
        )
        if not ok
    ]
    if wrong:
        raise UserError(f"the convolution head cannot be treated: {', '.join(wrong)}")


def head_matrix(head: nn.Module) -> Tensor:
    """Weights and bias of the head as one matrix, float64 ``(C_out, P)``, in phi's order."""
    HeadGeometry.of(head)
    weight: Tensor = head.weight  # type: ignore[assignment]
    parts = [weight.detach().flatten(1)]
    if isinstance(head.bias, Tensor):
        parts.append(head.bias.detach()[:, None])
    return torch.cat(parts, 1).double()


def apply_head(head: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Outputs of the head under M sets of weights, without a loop and without touching the head.

    Args:
        head: gives the geometry only; its own weights are not used.
        features: ``(m, B, D, h, w)``, or ``(m, B, ..., D)`` for a linear head; m is M, or 1 when
            all draws see the same features.
        weights: ``(M, C_out, P)``; cast to the dtype of the features.

    Returns:
        ``(M, B, C_out, h, w)``, or ``(M, B, ..., C_out)`` for a linear head.

    Raises:
        UserError: if the shapes do not fit the head or each other.
    """
    geometry = HeadGeometry.of(head)
    draws, _, size = weights.shape
    if size != geometry.size or len(features) not in {1, draws}:
        raise UserError(
            f"weights {tuple(weights.shape)} and features {tuple(features.shape)} do not fit: the"
            f" head needs (M, C_out, {geometry.size}) and M or 1 sets of features"
        )
    geometry.check(features[0])
    weights = weights.to(features)
    kernel = weights[..., :-1] if geometry.bias else weights
    if geometry.kernel_size:
        out = _convolve(features, kernel, geometry.kernel_size)
        return out + weights[:, None, :, -1, None, None] if geometry.bias else out
    out = features.flatten(1, -2) @ kernel.mT
    out = out + weights[:, None, :, -1] if geometry.bias else out
    return out.unflatten(1, features.shape[1:-1])


def _convolve(features: Tensor, kernel: Tensor, k: int) -> Tensor:
    """Convolve ``(m, B, D, h, w)`` with ``(M, C_out, D k k)`` to ``(M, B, C_out, h, w)``."""
    kernel = kernel.reshape(*kernel.shape[:2], features.shape[2], k, k)
    if len(features) == len(kernel):
        return convolve_separately(features, kernel)
    out = F.conv2d(features[0], kernel.flatten(0, 1), padding=k // 2)
    return out.unflatten(1, kernel.shape[:2]).transpose(0, 1)


def convolve_separately(features: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each set of features with its own few output channels.

    One product gives every tap's response, then the taps are added where they belong: many times
    faster than a grouped convolution and 3 times faster than a convolution to one channel.

    Args:
        features: ``(M, B, D, h, w)``.
        kernel: ``(M, C, D, k, k)``.

    Returns:
        ``(M, B, C, h, w)``.
    """
    k = kernel.shape[-1]
    # Output p adds the response of tap d at p + d; fold adds column d of q at q + d: mirrored.
    taps = kernel.flip(3, 4).flatten(3).mT.flatten(1, 2)
    responses = taps[:, None] @ features.flatten(3)
    if k > 1:
        size = features.shape[3:]
        responses = F.fold(responses.flatten(0, 1), size, k, padding=k // 2)
    return responses.reshape(*features.shape[:2], kernel.shape[1], *features.shape[3:])


@torch.no_grad()
def gram(head: nn.Module, features: Tensor) -> Tensor:
    """Gram matrix of the patches of a batch, float64 ``(P, P)`` on the features' device.

    A convolution never unfolds its patches: the block of the kernel offsets d and d' is
    ``sum_p f(p + d) f(p + d')^T``, so it depends on the shift d' - d but for a border strip.
    ``2 k (k - 1) + 1`` shifts replace ``k^2 (k^2 + 1) / 2`` blocks. Products are float64
    because eigenvalues span six decades and float32 sums lose the small ones.

    Args:
        head: the last layer; only its geometry is read.
        features: ``(B, D, h, w)`` in any memory format, or ``(B, ..., D)`` for a linear head.
    """
    geometry = HeadGeometry.of(head)
    geometry.check(features)
    if not geometry.kernel_size:
        rows = features.reshape(-1, geometry.features).double()
        return _with_ones(rows.T @ rows, rows.sum(0), len(rows), geometry)
    planes = features.permute(0, 2, 3, 1)
    height, width = planes.shape[1:3]
    plan = _plan(geometry.kernel_size, height, width)
    terms = {term for block in plan.values() for _, term in block}
    sums = {term: planes.new_zeros(2 * [geometry.features], dtype=torch.float64) for term in terms}
    total = planes.new_zeros(planes.shape[1:], dtype=torch.float64)
    margin = geometry.kernel_size - 1
    images = max(1, _CHUNK // ((height + margin) * (width + margin) * geometry.features))
    for chunk in planes.split(images):
        # Zeros to the right and below: no flat shift carries a pixel onto a wrong one.
        padded = F.pad(chunk.double(), (0, 0, 0, margin, 0, margin))
        for term, correlation in sums.items():
            _correlate(padded, term, correlation)
        total += padded[:, :height, :width].sum(0)
    return _assemble(plan, sums, total, len(planes), geometry)


@torch.no_grad()
def gram_diagonal(head: nn.Module, features: Tensor) -> Tensor:
    """Diagonal of ``gram(head, features)``, float64 ``(P,)``, in one read of the features."""
    geometry = HeadGeometry.of(head)
    geometry.check(features)
    if geometry.kernel_size:
        squares = torch.stack([images.double().square().sum(0) for images in features.split(8)])
        sums = _tap_sums(squares.sum(0).permute(1, 2, 0), geometry)
        count = len(features) * features.shape[2] * features.shape[3]
    else:
        rows = features.reshape(-1, geometry.features).double()
        sums, count = rows.square().sum(0), len(rows)
    return torch.cat([sums, sums.new_full((int(geometry.bias),), count)])


# A shift and the rows and columns of f(q) that take part; None: the whole plane.
_Term = tuple[Offset, Offset | None, Offset | None]


def _offsets(k: int) -> list[Offset]:
    """Kernel offsets (dy, dx) in the order of ``F.unfold``."""
    reach = range(-(k // 2), k // 2 + 1)
    return [(y, x) for y in reach for x in reach]


def _plan(k: int, height: int, width: int) -> dict[Offset, list[tuple[int, _Term]]]:
    """Signed correlations whose sum is the block of each pair of kernel offsets a <= b.

    With q = p + d the block is the correlation at shift s = d' - d over all q, minus the rows
    and the columns of q whose p lies outside the image, plus their corner, counted twice.
    """
    offsets = _offsets(k)
    plan = {}
    for a, d in enumerate(offsets):
        for b, other in enumerate(offsets[a:], a):
            s = (other[0] - d[0], other[1] - d[1])
            rows, columns = _outside(d[0], s[0], height), _outside(d[1], s[1], width)
            all_rows, all_columns = _inside(s[0], height), _inside(s[1], width)
            strips: list[tuple[int, Offset, Offset]] = [
                (-1, rows, all_columns),
                (-1, all_rows, columns),
                (1, rows, columns),
            ]
            block: list[tuple[int, _Term]] = [(1, (s, None, None))]
            block += [(i, (s, y, x)) for i, y, x in strips if y[0] < y[1] and x[0] < x[1]]
            plan[a, b] = block
    return plan


def _inside(s: int, size: int) -> Offset:
    """The interval of q in [0, size) with q + s in [0, size)."""
    return max(0, -s), min(size, size - s)


def _outside(d: int, s: int, size: int) -> Offset:
    """The part of ``_inside(s, size)`` with q - d outside [0, size)."""
    start, stop = _inside(s, size)
    return (start, min(stop, d)) if d >= 0 else (max(start, size + d), stop)


def _correlate(padded: Tensor, term: _Term, correlation: Tensor) -> None:
    """Add sum_q f(q) f(q + s)^T of one term, ``(B, h, w, D)`` into ``(D, D)``."""
    (dy, dx), rows, columns = term
    if rows is None or columns is None:
        flat = padded.flatten(0, 2)
        shift = dy * padded.shape[2] + dx
        left, right = flat[: len(flat) - shift], flat[shift:]
    else:
        (top, bottom), (start, stop) = rows, columns
        left = padded[:, top:bottom, start:stop].flatten(0, 2)
        right = padded[:, top + dy : bottom + dy, start + dx : stop + dx].flatten(0, 2)
    correlation.addmm_(left.T, right)


def _assemble(
    plan: dict[Offset, list[tuple[int, _Term]]],
    sums: dict[_Term, Tensor],
    total: Tensor,
    images: int,
    geometry: HeadGeometry,
) -> Tensor:
    """Put the blocks into phi's channel-major order and add the row of the trailing 1."""
    width, taps = geometry.features, geometry.taps
    blocks = total.new_empty(taps, taps, width, width)
    for (a, b), terms in plan.items():
        block = torch.stack([sign * sums[term] for sign, term in terms]).sum(0)
        blocks[a, b], blocks[b, a] = block, block.T
    matrix = blocks.permute(2, 0, 3, 1).reshape(width * taps, width * taps)
    count = images * total.shape[0] * total.shape[1]
    return _with_ones(matrix, _tap_sums(total, geometry), count, geometry)


def _tap_sums(total: Tensor, geometry: HeadGeometry) -> Tensor:
    """Sum over pixels of every patch entry, from one image ``(h, w, D)`` that sums all images."""
    height, width = total.shape[:2]
    sums = []
    for dy, dx in _offsets(geometry.kernel_size):
        (top, bottom), (start, stop) = _inside(-dy, height), _inside(-dx, width)
        sums.append(total[top:bottom, start:stop].sum((0, 1)))
    return torch.stack(sums, 1).flatten()


def _with_ones(matrix: Tensor, sums: Tensor, count: int, geometry: HeadGeometry) -> Tensor:
    """Append the row and column of phi's trailing 1 and make the matrix exactly symmetric."""
    if geometry.bias:
        corner = sums.new_full((1,), count)
        matrix = torch.cat([matrix, sums[None]])
        matrix = torch.cat([matrix, torch.cat([sums, corner])[:, None]], 1)
    return (matrix + matrix.T) / 2
