"""phi^T Sigma phi of every pixel in closed form, at the price of a few convolutions."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.laplace.head import HeadGeometry, convolve_separately
from bayesdiff.laplace.record import Curvature

# Floats of one block of outputs, or of squared features: they are used while in the cache.
_CHUNK_OUTPUTS = 2_500_000
_CHUNK_SQUARES = 400_000


@dataclass(frozen=True)
class QuadraticForm:
    """phi^T Sigma phi of every output, or of one where all are alike.

    Attributes:
        geometry: of the head.
        variances: of independent weights, ``(P,)`` or ``(C_out, P)``; None where they are not.
        factors: of the precision of dependent weights, one, or one for every output.
    """

    geometry: HeadGeometry
    variances: Tensor | None
    factors: list["TriangularFactor"]

    @classmethod
    def of(
        cls, matrix: Tensor, diagonal: bool, curvature: Curvature, like: Tensor
    ) -> "QuadraticForm":
        """From variances or a precision by blocks; ``like`` gives dtype and device."""
        geometry = curvature.geometry
        if diagonal:
            own = matrix if matrix.ndim == 1 else curvature.channels(matrix)
            return cls(geometry, own.to(like), [])
        matrices = [matrix] if matrix.ndim == 2 else list(_marginal(matrix, curvature))
        return cls(geometry, None, [TriangularFactor.of(m, geometry, like) for m in matrices])

    def __call__(self, features: Tensor, ones: float) -> Tensor:
        """``(B, D, h, w) -> (B, 1 or C_out, h, w)``; last axis for a linear head."""
        if self.variances is not None:
            return diagonal_variance(features, self.variances, self.geometry, ones)
        parts = [factor.variance(features, ones) for factor in self.factors]
        axis = 1 if self.geometry.kernel_size else -1
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _marginal(precision: Tensor, curvature: Curvature) -> Tensor:
    """Precisions ``(C_out, P, P)`` of every channel's own weights, those of its block left out."""
    size = curvature.geometry.size
    count = precision.shape[-1] // size
    if count > 1:
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        parts = covariance.unflatten(2, (count, size)).unflatten(1, (count, size))
        own = parts.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
        precision = torch.cholesky_inverse(torch.linalg.cholesky(own))
    groups = curvature.groups
    return precision if groups is None else precision[groups.flatten().argsort()]


@dataclass(frozen=True)
class TriangularFactor:
    """Rows of ``L^-1`` as kernels, ``L L^T`` the precision; ``|L^-1 phi|^2 = phi^T Sigma phi``.

    Phi is ordered with the 1 first, then tap by tap, so that the outputs of kernel row i see rows
    0..i only: for 3 x 3 that is two thirds of the work of one convolution with P outputs.

    Attributes:
        kernels: one per kernel row, ``(k D, D, i + 1, k)``; ``(D, D)`` for a linear head.
        biases: the column of the 1 for each of them, ``(k D,)``.
        constant: first entry of ``L^-1``, what the bias alone contributes.
    """

    kernels: list[Tensor]
    biases: list[Tensor]
    constant: float

    @classmethod
    def of(cls, precision: Tensor, geometry: HeadGeometry, like: Tensor) -> "TriangularFactor":
        """Factorise a float64 ``(P, P)`` precision; kernels get dtype and device of ``like``."""
        width, k, bias = geometry.features, geometry.kernel_size, int(geometry.bias)
        order = torch.arange(width * geometry.taps).reshape(width, geometry.taps).T.flatten()
        order = torch.cat([torch.full((bias,), len(precision) - 1), order])
        lower = torch.linalg.cholesky(precision[order][:, order])
        identity = torch.eye(len(lower), dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        kernels, biases = [], []
        for row in range(max(k, 1)):
            block = max(k, 1) * width
            rows = inverse[bias + row * block : bias + (row + 1) * block]
            kernel = rows[:, bias : bias + (row + 1) * block]
            if k:
                kernel = kernel.reshape(block, row + 1, k, width).permute(0, 3, 1, 2)
                kernel = kernel.contiguous(memory_format=torch.channels_last)
            kernels.append(kernel.to(like))
            biases.append((rows[:, 0] if bias else rows.new_zeros(block)).to(like))
        return cls(kernels, biases, float(inverse[0, 0]) if bias else 0.0)

    def variance(self, features: Tensor, ones: float) -> Tensor:
        """``(B, D, h, w) -> (B, 1, h, w)``; linear head: ``(B, ..., D) -> (B, ..., 1)``."""
        constant = (self.constant * ones) ** 2
        with full_precision(features):
            if self.kernels[0].ndim == 2:
                out = F.linear(features, self.kernels[0], self.biases[0] * ones)
                return out.square().sum(-1, keepdim=True) + constant
            outputs = len(self.kernels[0]) * features.shape[2] * features.shape[3]
            chunks = features.split(max(1, _CHUNK_OUTPUTS // outputs))
            return torch.cat([self._chunk(chunk, ones) for chunk in chunks]) + constant

    def _chunk(self, features: Tensor, ones: float) -> Tensor:
        height, margin = features.shape[2], len(self.kernels) // 2
        padded = F.pad(features, 4 * (margin,)).contiguous(memory_format=torch.channels_last)
        total = features.new_zeros(())
        for row, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            out = F.conv2d(padded[:, :, : height + row], kernel, bias * ones)
            total = total + out.permute(0, 2, 3, 1).square_().sum(-1)
        return total[:, None]


def diagonal_variance(
    features: Tensor, variances: Tensor, geometry: HeadGeometry, ones: float
) -> Tensor:
    """Sum of ``variances * phi^2``, with the shapes of ``TriangularFactor.variance``.

    Args:
        features: what the head reads.
        variances: ``(P,)`` in phi's order, of the dtype of the features, or ``(C_out, P)`` for as
            many channels of results.
        geometry: of the head.
        ones: the trailing entry of phi.
    """
    width, k = geometry.features, geometry.kernel_size
    rows = variances.reshape(-1, geometry.size)
    weights = rows[:, : width * geometry.taps]
    constant = rows[:, -1] * ones**2 if geometry.bias else rows.new_zeros(len(rows))
    with full_precision(features):
        if not k:
            return features.square() @ weights.T + constant
        kernel = weights.reshape(1, len(rows), width, k, k)
        chunks = features.split(max(1, _CHUNK_SQUARES // features[0].numel()))
        squares = (chunk.square()[None] for chunk in chunks)
        sums = torch.cat([convolve_separately(x, kernel)[0] for x in squares])
        return sums + constant[:, None, None]


@contextmanager
def full_precision(features: Tensor) -> Generator[None]:
    """No autocast and no TF32: small variances are differences of large features."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with torch.autocast(features.device.type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = kept
