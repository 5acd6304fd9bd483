"""laplace-torch on image heads, through its own extension point.

Its last-layer route refuses convolutions and miscounts the outputs of per-pixel linear heads, and
its full GGN costs one pass per parameter. ``HeadGGN`` is a curvature backend that gives it the
exact GGN from one Gram matrix:

    model = nn.Sequential(head, nn.Flatten())
    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full",
                 backend=HeadGGN)
    la.fit(loader)  # of (features, target.flatten(1)) pairs
"""

from typing import Any

import torch
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.gram import gram, gram_diagonal
from bayesdiff.laplace.head import HeadGeometry, apply_head, head_matrix


class HeadGGN(CurvatureInterface):
    """Exact GGN ``I_C (x) G`` of a linear or convolutional head under a Gaussian likelihood.

    The model is the head alone or ``nn.Sequential(head, nn.Flatten())``. As in laplace-torch, the
    loss is half the squared error and 1 / sigma_noise^2 is applied by the caller.
    """

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Half the squared error and the GGN ``(C P, C P)`` of one batch of features."""
        head = self._head()
        block = gram(head, x)
        order = parameter_order(head)
        hessian = torch.block_diag(*[block] * _outputs(head))[order][:, order]
        return self._loss(x, y), hessian.to(self.params[0])

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Half the squared error and the diagonal of the GGN, ``(C P,)``."""
        head = self._head()
        diagonal = gram_diagonal(head, x).repeat(_outputs(head))
        return self._loss(x, y), diagonal[parameter_order(head)].to(self.params[0])

    @torch.no_grad()
    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        # A convolution to few channels is slow; apply_head is the same sum, faster.
        head = self._head()
        out = apply_head(head, x[None], head_matrix(head)[None])[0]
        return self.factor * self.lossfunc(out.reshape(y.shape), y)

    def _head(self) -> nn.Module:
        """The head in the model laplace-torch was given."""
        inside = list(self.model) if isinstance(self.model, nn.Sequential) else [self.model]
        if self.likelihood != "regression" or self.subnetwork_indices is not None:
            raise UserError("HeadGGN treats likelihood=regression and subset_of_weights=all only")
        if not inside or any(not isinstance(layer, nn.Flatten) for layer in inside[1:]):
            raise UserError("HeadGGN needs a head, or nn.Sequential(head, nn.Flatten())")
        HeadGeometry.of(inside[0])
        return inside[0]


def _outputs(head: nn.Module) -> int:
    return len(head_matrix(head))


def parameter_order(head: nn.Module) -> Tensor:
    """Where laplace-torch's parameters (all weights, then all biases) lie in C blocks of P."""
    geometry, channels = HeadGeometry.of(head), _outputs(head)
    index = torch.arange(channels * geometry.size).reshape(channels, geometry.size)
    if not geometry.bias:
        return index.flatten()
    return torch.cat([index[:, :-1].flatten(), index[:, -1]])
