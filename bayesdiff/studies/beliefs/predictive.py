"""What the output of a network of classes is unsure about: the data, and the weights of its head.

Entropies are in nats per value: total = aleatoric + epistemic is the entropy of the averaged
probabilities, split into the average entropy and the mutual information of value and weights.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import ClassLikelihood

NODES = 20  # of the Gauss-Hermite rule over one logit


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of every value, with weights drawn from the posterior and averaged.

    Attributes:
        log_p: log-probabilities ``(B, C, K, ...)``.
        aleatoric: mean entropy under fixed weights, ``(B, C, ...)``.
        epistemic: mutual information of value and weights, ``(B, C, ...)``, >= 0.
    """

    log_p: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    @property
    def total(self) -> Tensor:
        """Entropy of the averaged probabilities."""
        return self.aleatoric + self.epistemic

    @classmethod
    def averaged(cls, log_p: Tensor, weights: Tensor) -> "Prediction":
        """Average over nodes or draws.

        Args:
            log_p: ``(S, B, C, K, ...)``.
            weights: ``(S,)``, adding up to 1.
        """
        log_w = weights.log().view(-1, *[1] * (log_p.ndim - 1))
        mean = (log_p + log_w).logsumexp(0)
        each = log_p.exp() * log_w.exp()
        # A mean of divergences, none below 0: a difference of entropies would lose small ones.
        epistemic = (each * (log_p - mean)).sum((0, 3))
        return cls(mean, -(each * log_p).sum((0, 3)), epistemic.clamp(min=0))


@dataclass(frozen=True)
class HeadPredictive:
    """Averages over the posterior of the head.

    One logit per value is normal under it, and averaged by quadrature; K of them, whose weights
    depend on each other, by draws that all images share.

    Attributes:
        net: with its trained weights.
        likelihood: of the model.
        posterior: of the head.
        draws: of weights, for K > 2 logits.
        seed: of these.
    """

    net: Any
    likelihood: ClassLikelihood
    posterior: HeadPosterior
    draws: int = 32
    seed: int = 0

    def __call__(self, features: Tensor) -> Prediction:
        """Prediction from the input of the head, ``(B, D, h, w)``, in float64."""
        logits, weights = self._quadrature(features) if self._single else self._drawn(features)
        log_p = self.likelihood.log_probabilities(logits.flatten(0, 1))
        return Prediction.averaged(log_p.unflatten(0, logits.shape[:2]), weights)

    @property
    def _single(self) -> bool:
        return self.likelihood.channels(1) == 1

    def _quadrature(self, features: Tensor) -> tuple[Tensor, Tensor]:
        output = self.net.head(features)
        variance = self.posterior.predictive_variance(features).expand_as(output)
        nodes, weights = (torch.from_numpy(v).to(output.device) for v in hermite(NODES))
        mean, spread = (self.net.fold(v).double() for v in (output, variance.clamp(min=0).sqrt()))
        return mean + spread * nodes.view(-1, *[1] * mean.ndim), weights

    def _drawn(self, features: Tensor) -> tuple[Tensor, Tensor]:
        outputs = apply_head(self.net.head, features[None], self._weights.to(features.device))
        folded = self.net.fold(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
        share = torch.full((self.draws,), 1 / self.draws, dtype=torch.float64)
        return folded.double(), share.to(features.device)

    @cached_property
    def _weights(self) -> Tensor:
        return self.posterior.draw(self.draws, torch.Generator().manual_seed(self.seed))


def hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights with E f(xi) = sum w f(node) for standard normal xi."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / math.fsum(weights)


def largest_entropy(likelihood: ClassLikelihood) -> float:
    """Ln K."""
    even = torch.zeros(1, likelihood.channels(1), 1, 1)
    return math.log(likelihood.log_probabilities(even).shape[2])


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of classes in nats, ``(B, C, K, ...) -> (B, C, ...)``."""
    return -(log_p.exp() * log_p).sum(2)
