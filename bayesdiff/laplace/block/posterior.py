"""The Gaussian posterior of the last block's weights, a Kronecker product in every layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.block.record import BlockFactors, LayerFactors
from bayesdiff.laplace.posterior import HeadPosterior


@dataclass(frozen=True)
class LayerPosterior:
    """Covariance of one layer's weights ``(C, P)``, in the eigenvectors of its factors.

    Attributes:
        eigenvalues: ``(C, P)`` of the likelihood's precision.
        output: eigenvectors ``(C, C)`` of the outer factor.
        input: eigenvectors ``(P, P)`` of the inner one.
        variances: ``(C, P)``, 1 / (eigenvalues + prior_precision).
    """

    eigenvalues: Tensor
    output: Tensor
    input: Tensor
    variances: Tensor

    @classmethod
    def of(
        cls, factors: LayerFactors, structure: str, weight: float, prior: float
    ) -> "LayerPosterior":
        """Posterior for ``weight`` times the factors' product, plus ``prior`` on every weight."""
        inner = factors.input
        if structure == "kron" and factors.bias:
            inner = torch.block_diag(inner[:-1, :-1], inner[-1:, -1:])
        (a, vectors), (b, others) = (torch.linalg.eigh(each) for each in (inner, factors.output))
        # Second moments; a negative value is rounding.
        values = weight * b.clamp(min=0)[:, None] * a.clamp(min=0)
        return cls(values, others, vectors, 1 / (values + prior))

    def deviations(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws around zero, ``(n, C, P)``, on the generator's device, by the symmetric root."""
        device = generator.device
        size = (n, *self.variances.shape)
        noise = torch.randn(size, generator=generator, device=device, dtype=torch.float64)
        output, inner = self.output.to(device), self.input.to(device)
        noise = (output.T @ noise @ inner) * self.variances.sqrt().to(device)
        return output @ noise @ inner.T

    @property
    def covariance(self) -> Tensor:
        """``(C P, C P)``, weights in the order of ``flatten``; for small layers."""
        basis = torch.kron(self.output, self.input)
        return (basis * self.variances.flatten()) @ basis.T


@dataclass(frozen=True)
class BlockPosterior:
    """Gaussian over the weights of the last block; layers are independent, the head as well.

    The precision of a layer is ``n_eff / num_images * output (x) input / sigma_noise^2 + tau I``:
    likelihood and prior are those of the head's posterior. Structure ``full`` keeps what ties a
    layer's weights and bias, ``kron`` leaves it out.

    The network is not linear in these weights, and its normalisations ignore some of their
    directions: the data leave those to the prior, which is felt here sooner than by the head. A
    draw far along them is no longer what the GGN describes; ``effective_parameters`` near
    ``num_parameters`` says that there are few.

    Attributes:
        factors: the data's part.
        structure: ``full`` or ``kron``.
        sigma_noise: sd of the likelihood, in units of the network's output.
        prior_precision: tau, of every weight.
        n_eff: images the likelihood counts for.
    """

    factors: BlockFactors
    structure: str
    sigma_noise: float
    prior_precision: float
    n_eff: float

    @classmethod
    def beside(cls, head: HeadPosterior, factors: BlockFactors) -> "BlockPosterior":
        """With the numbers of the head's posterior, whatever they were fitted to.

        Raises:
            UserError: if the two come from other weights or data, or the structure does not fit.
        """
        factors.require_source(head.curvature.source)
        if head.structure not in ("full", "kron"):
            raise UserError(
                f"the posterior of the last block cannot be {head.structure}; use full or kron"
            )
        return cls(factors, head.structure, head.sigma_noise, head.prior_precision, head.n_eff)

    @cached_property
    def layers(self) -> Mapping[str, LayerPosterior]:
        """Every layer's posterior, by its name in the network."""
        weight = self.n_eff / self.factors.num_images / self.sigma_noise**2
        return {
            name: LayerPosterior.of(layer, self.structure, weight, self.prior_precision)
            for name, layer in self.factors.layers.items()
        }

    def deviations(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws minus the trained weights, ``(n, C, P)`` float64 for every layer."""
        return {name: layer.deviations(n, generator) for name, layer in self.layers.items()}

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all layers."""
        return sum(layer.variances.numel() for layer in self.layers.values())

    @property
    def effective_parameters(self) -> float:
        """Weights that the data determine, ``sum a / (a + tau)`` over the eigenvalues."""
        shares = (layer.eigenvalues * layer.variances for layer in self.layers.values())
        return float(sum(share.sum() for share in shares))

    @property
    def settings(self) -> list[Any]:
        """All that the posterior depends on, for a key; the factors by their content."""
        numbers = self.sigma_noise, self.prior_precision, self.n_eff
        digits = (float(f"{number:.9g}") for number in numbers)
        return ["last_block", self.factors.source, self.factors.key, self.structure, *digits]
