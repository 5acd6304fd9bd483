"""Variance-preserving paths with a schedule of its own for every pixel."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.checks import UserError, positive
from bayesdiff.paths.probability_path import PathCoefficients, ProbabilityPath

# Share of a quarter turn between data and noise. At a whole one nothing of the data would be left,
# and ln(alpha / sigma) would have no value there.
_TURN = 0.995


class VPPerPixel(ProbabilityPath):
    """alpha_i = cos theta_i(t), sigma_i = sin theta_i(t), with theta_i = atan(c_i tan(theta(t))).

    theta turns evenly from (almost) pi / 2 at noise to 0 at data, as the cosine schedule does. The
    speed c_i of a pixel lowers its ln(alpha / sigma) by ln c_i at all times: slow pixels become
    data first. With gamma = tan^2 theta and xi_i = 1 / c_i^2 that is theta_i = atan sqrt(gamma /
    xi_i), the form of an inflationary flow in whitened coordinates.

    Args:
        slow: speed of the pixel in the centre of a sample.
        fast: speed at its corners; geometric between.
        speeds: of every pixel, broadcast against a sample, in place of these two.

    Raises:
        UserError: for a speed that is not above 0.

    Example:
        >>> path = VPPerPixel(slow=0.5, fast=2.0).for_shape((1, 3, 3))
        >>> at = path.coefficients(torch.tensor(0.5))
        >>> at.alpha[0]  # the pixel in the centre is nearest to data
        tensor([[0.4500, 0.6032, 0.4500],
                [0.6032, 0.8958, 0.6032],
                [0.4500, 0.6032, 0.4500]], dtype=torch.float64)
    """

    family = "diffusion"
    variance_preserving = True

    def __init__(self, slow: float = 0.5, fast: float = 2.0, speeds: Tensor | None = None) -> None:
        self.slow, self.fast = positive("path.slow", slow), positive("path.fast", fast)
        if speeds is not None and not bool((speeds > 0).all()):
            raise UserError("path.speeds must all be above 0; a pixel at rest would stay noise")
        self.speeds = None if speeds is None else speeds.double()

    def for_shape(self, shape: Sequence[int]) -> "VPPerPixel":
        """With the speeds of samples of this shape, the same for all channels.

        Raises:
            UserError: for a shape other than ``(C, H, W)``.
        """
        if self.speeds is not None:
            return self
        if len(shape) != 3:
            raise UserError(
                f"path=vp_per_pixel is for images (C, H, W), states here are {tuple(shape)}; use "
                "path=vp_cosine"
            )
        axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape[1:]]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        distance = place.square().mean(0).sqrt()
        speeds = self.slow * (self.fast / self.slow) ** distance[None]
        return VPPerPixel(self.slow, self.fast, speeds)

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t``: ``(*t.shape, 1, H, W)`` in float64.

        Raises:
            UserError: before ``for_shape``.
        """
        if self.speeds is None:
            raise UserError("path=vp_per_pixel has no speeds yet; call for_shape((C, H, W)) first")
        speeds = self.speeds.to(t.device)
        rate = _TURN * math.pi / 2
        angle = (rate * (1 - t.double())).view(*t.shape, *[1] * speeds.ndim)
        alpha, sigma = angle.cos(), speeds * angle.sin()
        square = alpha.square() + sigma.square()
        alpha, sigma = alpha / square.sqrt(), sigma / square.sqrt()
        turning = -rate * speeds / square  # d theta_i / dt
        return PathCoefficients(alpha, sigma, d_alpha=-sigma * turning, d_sigma=alpha * turning)
