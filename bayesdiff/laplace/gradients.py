"""Gradients of each image's loss: their squares make an empirical Fisher, their sum an optimum.

The gradient of half an image's squared error in the head's weights is ``sum r phi`` over its
pixels, r the residual: one small product per image, since the unfolded residuals are few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.variance import full_precision
from bayesdiff.networks import Network

# Floats of unfolded residuals held at once.
_CHUNK = 4_000_000


@torch.no_grad()
def gradients(head: nn.Module, features: Tensor, residual: Tensor) -> Tensor:
    """Gradient of half of each image's squared error, ``sum r phi``, float64 ``(B, C_out, P)``.

    Float32 features on a CPU are multiplied in float32, everything else in float64.

    Args:
        head: the last layer; only its geometry is read.
        features: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear head.
        residual: of the head's own outputs, ``(B, C_out, h, w)`` or ``(B, ..., C_out)``.
    """
    geometry = HeadGeometry.of(head)
    geometry.check(features)
    features = geometry.read(features)
    single = features.device.type == "cpu" and features.dtype != torch.float64
    wide = torch.float32 if single else torch.float64
    images = max(1, _CHUNK // max(1, geometry.taps * residual[0].numel()))
    chunks = zip(features.split(images), residual.split(images), strict=True)
    with full_precision(features):
        parts = [_gradients(geometry, f.to(wide), r.to(wide)) for f, r in chunks]
    return torch.cat(parts).double()


def _gradients(geometry: HeadGeometry, features: Tensor, residual: Tensor) -> Tensor:
    """``sum_p r_p phi_p`` of every image, ``(B, C_out, P)``."""
    k = geometry.kernel_size
    if not k:
        rows = features.reshape(len(features), -1, geometry.features)
        errors = residual.reshape(len(residual), rows.shape[1], -1)
        parts = [errors.mT @ rows]
        sums = errors.sum(1)
    else:
        # f(p + d) meets r(p): unfolding r instead of the wider f mirrors the offsets d.
        errors = F.unfold(residual.contiguous(), k, padding=k // 2)
        taps = errors @ features.permute(0, 2, 3, 1).flatten(1, 2)
        taps = taps.unflatten(1, (-1, geometry.taps)).flip(2)
        parts = [taps.mT.flatten(2)]
        sums = residual.sum((2, 3))
    return torch.cat([*parts, sums[..., None]] if geometry.bias else parts, 2)


def unfolded(net: Network, output: Tensor, residual: Tensor) -> Tensor:
    """Residual of the image ``(B, C, H, W)`` in the shape of the head's own ``output``.

    The transpose of the network's ``fold``, which is linear and moves pixels only.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros_like(output, requires_grad=True)
        folded = net.fold(leaf)
        return torch.autograd.grad(folded, leaf, residual.to(folded.dtype).clone())[0]
