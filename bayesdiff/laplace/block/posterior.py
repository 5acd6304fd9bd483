"""The Gaussian posterior of layers beside the head, a Kronecker product in every one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.block.record import BlockFactors, LayerFactors
from bayesdiff.laplace.evidence import best_prior
from bayesdiff.laplace.posterior import HeadPosterior

# What a prior that maximises the evidence is fitted for: every layer, or all of them as one.
PRIORS = ("layer", "subset")
# Of the head: those whose like exists for a layer, with and without what ties weights and bias.
STRUCTURES = ("full", "kron")


class LayersPosterior(Protocol):
    """What is known of the weights of layers beside the head, however their GGN is kept."""

    @property
    def factors(self) -> Any:
        """The data's part, with ``require_source``."""

    @property
    def described(self) -> str:
        """For the record of a map."""

    @property
    def settings(self) -> list[Any]:
        """All that it depends on, for a key."""

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all layers."""

    @property
    def effective_parameters(self) -> float:
        """Weights that the data determine."""

    @property
    def prior_range(self) -> tuple[float, float]:
        """The smallest and the largest prior precision of a layer."""

    def log_evidence(self) -> float:
        """What the layers add to the log marginal likelihood of the head's posterior."""

    def deviations(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws minus the trained weights, ``(n, C, P)`` float64 for every layer."""


def described(layers: int, size: str, priors: tuple[float, float]) -> str:
    """Layers, what is known of them and their priors, in words."""
    low, high = (f"{prior:.3g}" for prior in priors)
    tau = low if low == high else f"{low} to {high}"
    some = "1 layer" if layers == 1 else f"{layers} layers"
    return f"{some} beside the head ({size}, prior_precision {tau})"


def _best(name: str, mean: Tensor, values: Tensor) -> float:
    """The prior of one layer by its evidence."""
    try:
        return best_prior(mean, values)
    except UserError as error:
        raise UserError(
            f"the evidence of {name} has no maximum: its weights or its inputs are all zero; "
            "leave it out of laplace.subset, or use laplace.prior_per=subset"
        ) from error


def statistics_of(posterior: LayersPosterior) -> dict[str, float]:
    """How much the data say of the layers, as flat scalars for a logger."""
    low, high = posterior.prior_range
    return {
        "laplace/block_prior_precision_min": low,
        "laplace/block_prior_precision_max": high,
        "laplace/block_log_evidence": posterior.log_evidence(),
        "laplace/block_effective_parameters": posterior.effective_parameters,
        "laplace/block_parameters": posterior.num_parameters,
    }


@dataclass(frozen=True)
class LayerPosterior:
    """Covariance of one layer's weights ``(C, P)``, in the eigenvectors of its factors.

    Attributes:
        eigenvalues: ``(C, P)`` of the likelihood's precision.
        output: eigenvectors ``(C, C)`` of the outer factor.
        input: eigenvectors ``(P, P)`` of the inner one.
        prior_precision: tau, of every weight.
    """

    eigenvalues: Tensor
    output: Tensor
    input: Tensor
    prior_precision: float = 1.0

    @classmethod
    def of(
        cls, factors: LayerFactors, structure: str, weight: float, prior: float = 1.0
    ) -> "LayerPosterior":
        """Posterior for ``weight`` times the factors' product, plus ``prior`` on every weight."""
        inner = factors.input
        if structure == "kron" and factors.bias:
            inner = torch.block_diag(inner[:-1, :-1], inner[-1:, -1:])
        (a, vectors), (b, others) = (torch.linalg.eigh(each) for each in (inner, factors.output))
        # Second moments; a negative value is rounding.
        values = weight * b.clamp(min=0)[:, None] * a.clamp(min=0)
        return cls(values, others, vectors, prior)

    @property
    def variances(self) -> Tensor:
        """``(C, P)``, 1 / (eigenvalues + prior_precision)."""
        return 1 / (self.eigenvalues + self.prior_precision)

    def deviations(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws around zero, ``(n, C, P)``, on the generator's device, by the symmetric root."""
        device = generator.device
        size = (n, *self.eigenvalues.shape)
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
    """Gaussian over the weights of layers beside the head; all are independent, the head as well.

    The precision of a layer is ``n_eff / num_images * output (x) input / sigma_noise^2 + tau I``,
    with the likelihood of the head's posterior and a tau that is given, or fitted to the evidence
    of these layers themselves. Structure ``full`` keeps what ties a layer's weights and bias,
    ``kron`` leaves it out.

    The network is not linear in these weights, and its normalisations ignore some of their
    directions: the data leave those to the prior, which is felt here sooner than by the head. A
    draw far along them is no longer what the GGN describes; sensitivities to the weights
    (``uncertainty=linearised``) do not go there.

    Attributes:
        factors: the data's part.
        structure: ``full`` or ``kron``.
        sigma_noise: sd of the likelihood, in units of the network's output.
        priors: tau of every layer, by its name.
        n_eff: images the likelihood counts for.
    """

    factors: BlockFactors
    structure: str
    sigma_noise: float
    priors: Mapping[str, float]
    n_eff: float

    @classmethod
    def beside(
        cls,
        head: HeadPosterior,
        factors: BlockFactors,
        prior_precision: float | str | None = None,
        prior_per: str = "layer",
    ) -> "BlockPosterior":
        """With the likelihood of the head's posterior.

        Args:
            head: posterior of the head.
            factors: of the layers.
            prior_precision: a number, or ``evidence`` for what maximises the marginal likelihood
                of these layers; None for the number of the head.
            prior_per: ``layer`` for a prior of every layer's own, ``subset`` for one of all.

        Raises:
            UserError: if the two come from other weights or data, or the structure does not fit.
        """
        factors.require_source(head.curvature.source)
        if head.structure not in STRUCTURES:
            raise UserError(
                f"the posterior of layers beside the head cannot be {head.structure}; use full or "
                "kron"
            )
        number = prior_precision is not None and prior_precision != "evidence"
        tau = float(prior_precision or 0) if number else head.prior_precision
        same = dict.fromkeys(factors.layers, tau)
        made = cls(factors, head.structure, head.sigma_noise, same, head.n_eff)
        return made.with_evidence(prior_per) if prior_precision == "evidence" else made

    def with_evidence(self, prior_per: str) -> "BlockPosterior":
        """The posterior under the priors that maximise ``log_evidence``.

        Args:
            prior_per: ``layer`` or ``subset``.
        """
        means = {name: layer.mean for name, layer in self.factors.layers.items()}
        values = {name: layer.eigenvalues for name, layer in self.layers.items()}
        if prior_per == "layer":
            priors = {name: _best(name, means[name], values[name]) for name in means}
        else:
            one = [torch.cat([each[name].flatten() for name in means])[None]
                   for each in (means, values)]  # fmt: skip
            priors = dict.fromkeys(means, best_prior(*one))
        return replace(self, priors=priors)

    @cached_property
    def layers(self) -> Mapping[str, LayerPosterior]:
        """Every layer's posterior, by its name in the network."""
        weight = self.n_eff / self.factors.num_images / self.sigma_noise**2
        return {
            name: LayerPosterior.of(layer, self.structure, weight, self.priors[name])
            for name, layer in self.factors.layers.items()
        }

    def deviations(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws minus the trained weights, ``(n, C, P)`` float64 for every layer."""
        return {name: layer.deviations(n, generator) for name, layer in self.layers.items()}

    def log_evidence(self) -> float:
        """What these layers add to the log marginal likelihood of the head's posterior.

        ``-1/2 sum (log(1 + a / tau) + tau w^2)`` over eigenvalues a and weights w of all layers,
        Laplace's approximation with factors in the place of the GGN (Immer et al. 2021, eq. 6).
        """
        total = 0.0
        for name, layer in self.layers.items():
            tau, mean = layer.prior_precision, self.factors.layers[name].mean
            total += float(torch.log1p(layer.eigenvalues / tau).sum() + tau * mean.square().sum())
        return -0.5 * total

    @property
    def described(self) -> str:
        """How many layers and weights, for the record of a map."""
        return described(len(self.layers), f"{self.num_parameters} weights", self.prior_range)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all layers."""
        return sum(layer.eigenvalues.numel() for layer in self.layers.values())

    @property
    def effective_parameters(self) -> float:
        """Weights that the data determine, ``sum a / (a + tau)`` over the eigenvalues."""
        shares = (layer.eigenvalues * layer.variances for layer in self.layers.values())
        return float(sum(share.sum() for share in shares))

    @property
    def prior_range(self) -> tuple[float, float]:
        """The smallest and the largest tau of a layer."""
        return min(self.priors.values()), max(self.priors.values())

    @property
    def settings(self) -> list[Any]:
        """All that the posterior depends on, for a key; the factors by their content."""
        numbers = self.sigma_noise, self.n_eff, *self.priors.values()
        digits = (float(f"{number:.9g}") for number in numbers)
        return ["layers", self.factors.source, self.factors.key, self.structure, *digits]
