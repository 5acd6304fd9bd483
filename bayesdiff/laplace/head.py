"""The last layer: how it reads its features, and its outputs under many sets of weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError


@dataclass(frozen=True)
class HeadGeometry:
    """How a head reads its features.

    Attributes:
        features: D, channels (conv) or width (linear) of the features.
        kernel_size: k of a k x k convolution, 0 for a linear head.
        bias: whether phi ends with a 1.
        carried: channels behind the D that no weight sees: they are added to the outputs.

    Example:
        >>> geometry = HeadGeometry.of(nn.Conv2d(64, 1, kernel_size=3, padding=1))
        >>> geometry.features, geometry.size  # P = 64 * 3 * 3 + 1
        (64, 577)
    """

    features: int
    kernel_size: int
    bias: bool
    carried: int = 0

    @classmethod
    def of(cls, head: nn.Module) -> "HeadGeometry":
        """Read the geometry of ``head``.

        Raises:
            UserError: if the head is not a linear layer or a plain "same" convolution.
        """
        if isinstance(head, nn.Linear):
            return cls(head.in_features, 0, head.bias is not None, getattr(head, "carried", 0))
        if not isinstance(head, nn.Conv2d):
            raise UserError(
                f"the head is a {type(head).__name__}; last-layer Laplace needs an nn.Conv2d or"
                " nn.Linear as the network's last layer"
            )
        _check_conv(head)
        carried = getattr(head, "carried", 0)
        return cls(head.in_channels, head.kernel_size[0], head.bias is not None, carried)

    @property
    def taps(self) -> int:
        """Feature vectors per patch: k * k, or 1 for a linear head."""
        return max(self.kernel_size, 1) ** 2

    @property
    def size(self) -> int:
        """P, the length of the patch vector phi."""
        return self.taps * self.features + int(self.bias)

    @property
    def axis(self) -> int:
        """Of the features' channels and of the outputs', from the end."""
        return -3 if self.kernel_size else -1

    def read(self, features: Tensor) -> Tensor:
        """What the weights see of the features, which may have more leading axes."""
        return features.narrow(self.axis, 0, self.features) if self.carried else features

    def offset(self, features: Tensor) -> Tensor:
        """What is added to the outputs."""
        return features.narrow(self.axis, self.features, self.carried)

    def check(self, features: Tensor) -> None:
        """Refuse features that do not fit this head.

        Raises:
            UserError: if their channels (or last axis, for a linear head) are not D, with those
                that are carried.
        """
        axis = 1 if self.kernel_size else -1
        fits = features.ndim == 4 if self.kernel_size else features.ndim >= 2
        if not fits or features.shape[axis] != self.features + self.carried:
            expected = "(B, D, h, w)" if self.kernel_size else "(B, ..., D)"
            more = f" + {self.carried} carried" if self.carried else ""
            raise UserError(
                f"features must be {expected} with D = {self.features}{more}, got"
                f" {tuple(features.shape)}; pass what the network feeds its head"
            )


def _check_conv(head: nn.Conv2d) -> None:
    """Refuse every convolution that is not stride 1, dense, zero-padded and size-preserving."""
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
    """Weights and bias of the head as one matrix, float64 ``(C_out, P)``, in phi's order.

    Example:
        >>> head = nn.Conv2d(64, 3, kernel_size=3, padding=1)
        >>> matrix = head_matrix(head)
        >>> matrix.shape, torch.equal(matrix[:, -1], head.bias.detach().double())
        (torch.Size([3, 577]), True)
    """
    HeadGeometry.of(head)
    weight: Tensor = head.weight  # type: ignore[assignment]
    parts = [weight.detach().flatten(1)]
    if isinstance(head.bias, Tensor):
        parts.append(head.bias.detach()[:, None])
    return torch.cat(parts, 1).double()


def apply_head(head: nn.Module, features: Tensor, weights: Tensor, change: bool = False) -> Tensor:
    """Outputs of the head under M sets of weights, without a loop and without touching the head.

    Args:
        head: gives the geometry only; its own weights are not used.
        features: ``(m, B, D, h, w)``, or ``(m, B, ..., D)`` for a linear head; m is M, or 1 when
            all draws see the same features.
        weights: ``(M, C_out, P)``; cast to the dtype of the features.
        change: whether these are changes of weights, and the outputs are to be theirs: what
            features carry is then left out.

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
    out = _apply(geometry, geometry.read(features), weights.to(features))
    return out if change or not geometry.carried else out + geometry.offset(features)


def _apply(geometry: HeadGeometry, features: Tensor, weights: Tensor) -> Tensor:
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
