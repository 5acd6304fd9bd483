"""The one matrix a last-layer Laplace posterior needs: the Gram matrix of the head's inputs.

The head is linear in its weights, so for a Gaussian likelihood the GGN of all its weights is
``I_C (x) G / sigma^2`` with ``G = sum phi phi^T`` over images and pixels, phi the k x k feature
patch with a trailing 1 (Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 3.54).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bayesdiff.laplace.head import HeadGeometry

# Pixels in one float32 sum: 4096 are a tenth faster and 20 times less accurate.
_PIXELS = 1024
# Doubles of padded features handled at once: they stay in the cache for all shifts.
_DOUBLES = 1_000_000

_Pair = tuple[int, int]


@torch.no_grad()
def gram(head: nn.Module, features: Tensor) -> Tensor:
    """Gram matrix of the patches of a batch, float64 ``(P, P)`` on the features' device.

    A convolution never unfolds its patches: the block of the kernel offsets d and d' is
    ``sum_p f(p + d) f(p + d')^T``, so it depends on the shift d' - d but for a border strip.

    Float32 features on a CPU are multiplied in float32, in sums of at most 1024 pixels that are
    added in float64. The rounding is independent from image to image: for 32 images, 1e-4 of an
    eigenvalue 1e6 times below the largest, less for more. Pass ``features.double()`` for float64
    products at four times the price. Other devices always use float64.

    Args:
        head: the last layer; only its geometry is read.
        features: ``(B, D, h, w)`` in any memory format, or ``(B, ..., D)`` for a linear head.

    Example:
        >>> head, features = nn.Conv2d(8, 1, kernel_size=1), torch.randn(2, 8, 4, 4)
        >>> phi = torch.cat([features, torch.ones(2, 1, 4, 4)], 1).movedim(1, -1).reshape(-1, 9)
        >>> torch.allclose(gram(head, features).float(), phi.T @ phi, atol=1e-4)
        True
    """
    geometry = HeadGeometry.of(head)
    geometry.check(features)
    features = geometry.read(features)
    if not geometry.kernel_size:
        rows = features.reshape(-1, geometry.features).double()
        matrix = rows.new_empty(geometry.size, geometry.size)
        matrix[: rows.shape[1], : rows.shape[1]] = rows.T @ rows
        return _fill_ones(matrix, rows.sum(0), len(rows))
    k, (height, width) = geometry.kernel_size, features.shape[2:]
    plan = _plan(k, height, width)
    single = features.device.type == "cpu" and features.dtype != torch.float64
    planes = _shifts_single(features.float(), k) if single else _shifts_double(features, k)
    sums: dict[_Term, Tensor] = {}
    for term in {term for block in plan.values() for _, term in block}:
        (dy, dx), rows_of_q, _ = term
        sums[term] = planes[dy, dx + k - 1] if rows_of_q is None else _strip(features, term)
    return _assemble(plan, sums, _sum_images(features, 1), len(features), geometry)


def _shifts_single(features: Tensor, k: int) -> Tensor:
    """Correlations ``(k, 2 k - 1, D, D)`` at the shifts dy = 0..k-1, |dx| < k, float32 products.

    They are the weight gradient of a convolution whose output gradient is its own input.
    """
    channels, height, width = features.shape[1:]
    shape, reach = (channels, channels, k, 2 * k - 1), k - 1
    sums = features.new_zeros(shape, dtype=torch.float64)
    if k == 1:  # one shift: a batch of small products is up to three times faster
        planar = features.is_contiguous()
        pixels = features.flatten(2).mT if planar else features.permute(0, 2, 3, 1).flatten(1, 2)
        for part in pixels.split(_PIXELS, 1):
            sums[:, :, 0, 0] += torch.bmm(part.mT, part).sum(0, dtype=torch.float64)
        return sums.permute(2, 3, 0, 1)
    images, rows = max(1, _PIXELS // (height * width)), max(1, _PIXELS // width)
    for chunk in features.split(images):
        padded = F.pad(chunk, (reach, reach, 0, reach))
        for top in range(0, height, rows):
            band = chunk[:, :, top : top + rows]
            window = padded[:, :, top : top + rows + reach]
            sums += conv2d_weight(window, shape, band)
    return sums.permute(2, 3, 0, 1)


def _shifts_double(features: Tensor, k: int) -> Tensor:
    """Blocks of all shifts, by float64 products, one per shift."""
    channels, height, width = features.shape[1:]
    sums = features.new_zeros(k, 2 * k - 1, channels, channels, dtype=torch.float64)
    reach = k - 1
    images = max(1, _DOUBLES // ((height + reach) * (width + reach) * channels))
    for chunk in features.permute(0, 2, 3, 1).split(images):
        # Zeros to the right and below: no flat shift carries a pixel onto a wrong one.
        flat = F.pad(chunk.double(), (0, 0, 0, reach, 0, reach)).flatten(0, 2)
        for dy in range(k):
            for dx in range(-reach if dy else 0, k):
                shift = dy * (width + reach) + dx
                sums[dy, dx + reach].addmm_(flat[: len(flat) - shift].T, flat[shift:])
    return sums


@torch.no_grad()
def gram_diagonal(head: nn.Module, features: Tensor) -> Tensor:
    """Diagonal of ``gram(head, features)``, float64 ``(P,)``, in one read of the features.

    Float32 features are squared in float32: 1e-7 relative.
    """
    geometry = HeadGeometry.of(head)
    geometry.check(features)
    features = geometry.read(features)
    if geometry.kernel_size:
        sums = _tap_sums(_sum_images(features, 2), geometry)
        count = len(features) * features.shape[2] * features.shape[3]
    else:
        rows = features.reshape(-1, geometry.features).double()
        sums, count = rows.square().sum(0), len(rows)
    return torch.cat([sums, sums.new_full((int(geometry.bias),), count)])


# A shift and the rows and columns of f(q) that take part; None: the whole plane.
_Term = tuple[_Pair, _Pair | None, _Pair | None]


def _offsets(k: int) -> list[_Pair]:
    """Kernel offsets (dy, dx) in the order of ``F.unfold``."""
    reach = range(-(k // 2), k // 2 + 1)
    return [(y, x) for y in reach for x in reach]


def _plan(k: int, height: int, width: int) -> dict[_Pair, list[tuple[int, _Term]]]:
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
            strips: list[tuple[int, _Pair, _Pair]] = [
                (-1, rows, all_columns),
                (-1, all_rows, columns),
                (1, rows, columns),
            ]
            block: list[tuple[int, _Term]] = [(1, (s, None, None))]
            block += [(i, (s, y, x)) for i, y, x in strips if y[0] < y[1] and x[0] < x[1]]
            plan[a, b] = block
    return plan


def _inside(s: int, size: int) -> _Pair:
    """The interval of q in [0, size) with q + s in [0, size)."""
    return max(0, -s), min(size, size - s)


def _outside(d: int, s: int, size: int) -> _Pair:
    """The part of ``_inside(s, size)`` with q - d outside [0, size)."""
    start, stop = _inside(s, size)
    return (start, min(stop, d)) if d >= 0 else (max(start, size + d), stop)


def _strip(features: Tensor, term: _Term) -> Tensor:
    """Sum of f(q) f(q + s)^T over some rows and columns of q, ``(B, D, h, w) -> (D, D)``."""
    (dy, dx), rows, columns = term
    (top, bottom), (start, stop) = rows or (0, 0), columns or (0, 0)
    left = features[:, :, top:bottom, start:stop]
    right = features[:, :, top + dy : bottom + dy, start + dx : stop + dx]
    left, right = (side.transpose(0, 1).flatten(1).double() for side in (left, right))
    return left @ right.T


def _assemble(
    plan: dict[_Pair, list[tuple[int, _Term]]],
    sums: dict[_Term, Tensor],
    total: Tensor,
    images: int,
    geometry: HeadGeometry,
) -> Tensor:
    """Put the blocks into phi's channel-major order and add the row of the trailing 1."""
    taps, end = geometry.taps, geometry.taps * geometry.features
    matrix = total.new_empty(geometry.size, geometry.size)
    for (a, b), terms in plan.items():
        block = sums[terms[0][1]].clone()
        for sign, term in terms[1:]:
            block.add_(sums[term], alpha=sign)
        block = (block + block.T) / 2 if a == b else block
        matrix[a:end:taps, b:end:taps], matrix[b:end:taps, a:end:taps] = block, block.T
    count = images * total.shape[0] * total.shape[1]
    return _fill_ones(matrix, _tap_sums(total, geometry), count)


def _sum_images(features: Tensor, power: int) -> Tensor:
    """Sum of powers over images, ``(B, D, h, w) -> (h, w, D)`` 4 at a time, summed in float64."""
    wide = torch.promote_types(features.dtype, torch.float32)
    sums = features.new_zeros(features.shape[1:], dtype=torch.float64)
    for images in features.split(4):
        sums += images.to(wide).pow(power).sum(0)
    return sums.permute(1, 2, 0)


def _tap_sums(total: Tensor, geometry: HeadGeometry) -> Tensor:
    """Sum over pixels of every patch entry, from one image ``(h, w, D)`` that sums all images."""
    height, width = total.shape[:2]
    sums = []
    for dy, dx in _offsets(geometry.kernel_size):
        (top, bottom), (start, stop) = _inside(-dy, height), _inside(-dx, width)
        sums.append(total[top:bottom, start:stop].sum((0, 1)))
    return torch.stack(sums, 1).flatten()


def _fill_ones(matrix: Tensor, sums: Tensor, count: int) -> Tensor:
    """Fill the row and column of phi's trailing 1, where the matrix has one."""
    if len(matrix) > len(sums):
        matrix[-1, :-1] = matrix[:-1, -1] = sums
        matrix[-1, -1] = count
    return matrix
