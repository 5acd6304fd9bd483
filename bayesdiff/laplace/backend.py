"""laplace-torch on image heads, through its own extension point.

Its last-layer route refuses convolutions and miscounts the outputs of per-pixel linear heads, and
its full GGN costs one pass per parameter. ``HeadGGN`` is a curvature backend that gives it the
exact GGN from one Gram matrix:

    model = nn.Sequential(head, nn.Flatten())
    la = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full",
                 backend=HeadGGN)
    la.fit(loader)  # of (features, target.flatten(1)) pairs

``to_laplace`` fills such an object from a posterior, without a pass over the data.
"""

import copy
from typing import Any

import torch
from laplace import DiagLaplace, FullLaplace
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.gram import gram, gram_diagonal
from bayesdiff.laplace.head import HeadGeometry, apply_head, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior


class HeadGGN(CurvatureInterface):
    """Exact GGN ``I_C (x) G`` of a linear or convolutional head under a Gaussian likelihood.

    The model is the head alone or ``nn.Sequential(head, nn.Flatten())``. As in laplace-torch, the
    loss is half the squared error and 1 / sigma_noise^2 is applied by the caller.
    """

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Half the squared error and the GGN ``(C P, C P)`` of one batch of features."""
        head = self._head()
        block = gram(head, x)
        order = _parameter_order(head)
        hessian = torch.block_diag(*[block] * _outputs(head))[order][:, order]
        return self._loss(x, y), hessian.to(self.params[0])

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Half the squared error and the diagonal of the GGN, ``(C P,)``."""
        head = self._head()
        diagonal = gram_diagonal(head, x).repeat(_outputs(head))
        return self._loss(x, y), diagonal[_parameter_order(head)].to(self.params[0])

    @torch.no_grad()
    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        # A convolution to few channels is slow; apply_head is the same sum, faster.
        head = self._head()
        out = apply_head(head, x[None], head_matrix(head)[None])[0]
        return self.factor * self.lossfunc(out.reshape(y.shape), y)

    def _head(self) -> nn.Module:
        """The head in the model laplace-torch was given.

        Raises:
            UserError: if the model is anything else, or not all of its weights are treated.
        """
        inside = list(self.model) if isinstance(self.model, nn.Sequential) else [self.model]
        if self.likelihood != "regression" or self.subnetwork_indices is not None:
            raise UserError("HeadGGN treats likelihood=regression and subset_of_weights=all only")
        if not inside or any(not isinstance(layer, nn.Flatten) for layer in inside[1:]):
            raise UserError("HeadGGN needs a head, or nn.Sequential(head, nn.Flatten())")
        HeadGeometry.of(inside[0])
        return inside[0]


def _outputs(head: nn.Module) -> int:
    return len(head_matrix(head))


def _parameter_order(head: nn.Module) -> Tensor:
    """Where laplace-torch's parameters (all weights, then all biases) lie in C blocks of P."""
    geometry, channels = HeadGeometry.of(head), _outputs(head)
    index = torch.arange(channels * geometry.size).reshape(channels, geometry.size)
    if not geometry.bias:
        return index.flatten()
    return torch.cat([index[:, :-1].flatten(), index[:, -1]])


def to_laplace(posterior: HeadPosterior, head: nn.Module) -> FullLaplace | DiagLaplace:
    """The same posterior as a fitted laplace-torch object in float64.

    Args:
        posterior: gives the numbers; an ``n_eff`` becomes the object's ``n_data``.
        head: gives the layer's shape; it is copied, never changed.

    Raises:
        UserError: if the head is not the one of the posterior, or the likelihood no Gaussian.
    """
    curvature = posterior.curvature
    if not curvature.scaled:
        raise UserError(
            f"to_laplace makes a regression, and the likelihood here is {curvature.likelihood}; "
            "fit laplace-torch's classification on the head itself"
        )
    if HeadGeometry.of(head) != curvature.geometry or _outputs(head) != len(curvature.mean):
        raise UserError(f"the head {head} does not have the weights of this posterior")
    model = nn.Sequential(copy.deepcopy(head).double().cpu(), nn.Flatten())
    order = _parameter_order(head)
    mean = curvature.mean.flatten()[order]
    nn.utils.vector_to_parameters(mean, model.parameters())
    kind = DiagLaplace if posterior.is_diagonal else FullLaplace
    laplace = kind(
        model,
        "regression",
        sigma_noise=posterior.sigma_noise,
        prior_precision=posterior.prior_precision,
        backend=HeadGGN,
    )
    # It keeps sigma^2 times the likelihood's precision.
    if posterior.is_diagonal:
        data = posterior.eigenvalues.expand(curvature.mean.shape).flatten()
    else:
        data = torch.block_diag(*[posterior.likelihood_precision] * len(curvature.mean))[:, order]
    laplace.H = posterior.sigma_noise**2 * data[order]
    weight = posterior.n_eff / curvature.num_images
    laplace.mean = mean
    laplace.loss = torch.tensor(weight * curvature.squared_error / 2, dtype=mean.dtype)
    laplace.n_data = posterior.n_eff  # type: ignore[assignment]  # a weight, not a count, here
    laplace.n_outputs = curvature.num_outputs // curvature.num_images
    return laplace
