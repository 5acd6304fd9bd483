"""One number per image, from its members and from what a network says of it.

Oriented as all scores of ``image_scores``: the higher, the more doubtful, the sooner discarded.
Answers are float64 ``(N,)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import UserError, positive
from bayesdiff.uncertainty.scores.of_maps_and_images import FLOOR

ConfidenceScore = Callable[[Tensor, Tensor | None], Tensor]

# sigma^2 of Gaussian features in "Generative uncertainty in diffusion models" (Jazbec et al.
# 2025): spread of features below which members count as the same.
FEATURE_FLOOR = 1e-3


@dataclass(frozen=True)
class MemberScore:
    """A score of an image's members.

    Attributes:
        reads: what it needs of them: ``images (N, M, C, H, W)``, ``features (N, M, F)`` or
            ``logits (N, M, K)``.
        of: the score itself, of that tensor.
    """

    reads: str
    of: Callable[[Tensor], Tensor]


def log_det(images: Tensor, floor: float = FLOOR) -> Tensor:
    """Log-determinant of S + floor I, S the members' covariance of all values, divisor M - 1.

    The only score of the pixels' variance that sees their correlation. S has rank M - 1 at most;
    the floor stands for the directions that M members leave open. Exact, from M x M matrices.

    Args:
        images: ``(N, M, C, H, W)``, M >= 2.
        floor: variance in every direction; by default what rounding to 8 bits gives.
    """
    positive("floor", floor)
    centred = _members(images).flatten(2)
    centred = centred - centred.mean(1, keepdim=True)
    members, size = centred.shape[1:]
    gram = centred @ centred.mT / ((members - 1) * floor)
    # det(I_D + A A^T) = det(I_M + A^T A).
    root = torch.linalg.cholesky(gram + torch.eye(members, dtype=gram.dtype, device=gram.device))
    return 2 * root.diagonal(dim1=1, dim2=2).log().sum(1) + size * math.log(floor)


def pixel_variance(images: Tensor) -> Tensor:
    """Unbiased variance over the members, summed: what an ensemble's map has as its ``sum``.

    Args:
        images: ``(N, M, C, H, W)``, M >= 2.
    """
    return _members(images).flatten(2).var(1).sum(1)


def semantic_entropy(
    features: Tensor, floor: float = FEATURE_FLOOR, correction: int = 0, unit: bool = False
) -> Tensor:
    """Entropy of a Gaussian with independent features, in nats: generative uncertainty.

    sum_f 0.5 ln(v_f + floor) + F/2 (ln 2 pi + 1), v_f the members' variance of feature f. Source:
    Jazbec et al., "Generative uncertainty in diffusion models" (2025), with divisor M.

    Args:
        features: ``(N, M, F)``, M >= 2.
        floor: sigma^2, added to every variance.
        correction: the divisor is M - correction.
        unit: scale every feature vector to length 1 first.
    """
    positive("floor", floor)
    variance = _feature_variance(features, correction, unit)
    size = features.shape[-1]
    return 0.5 * (variance + floor).log().sum(1) + size / 2 * (math.log(2 * math.pi) + 1)


def semantic_variance(features: Tensor, correction: int = 0, unit: bool = False) -> Tensor:
    """Variance of the features over members, summed: the trace beside ``semantic_entropy``.

    Args:
        features: ``(N, M, F)``, M >= 2.
        correction: the divisor is M - correction.
        unit: scale every feature vector to length 1 first.
    """
    return _feature_variance(features, correction, unit).sum(1)


def mutual_information(logits: Tensor) -> Tensor:
    """Entropy of the members' mean class probabilities less their mean entropy, in nats.

    0 where all members agree, however unsure each is. Source: Houlsby et al., "Bayesian active
    learning" (2011), eq. 2.

    Args:
        logits: ``(N, M, K)``, M >= 2.
    """
    probability = _members(logits).softmax(-1)
    apart = predictive_entropy(logits) - _entropy(probability).mean(1)
    return apart.clamp(min=0)  # rounding could go below


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the members' mean class probabilities, in nats: own doubt and dissent.

    Args:
        logits: ``(N, M, K)``, M >= 2.
    """
    return _entropy(_members(logits).softmax(-1).mean(1))


def dissent(logits: Tensor) -> Tensor:
    """Share of the members that vote against the majority's class.

    Args:
        logits: ``(N, M, K)``, M >= 2.
    """
    votes = F.one_hot(_members(logits).argmax(-1), logits.shape[-1])
    return 1 - votes.double().mean(1).amax(1)


MEMBER_SCORES: dict[str, MemberScore] = {
    "pixel_variance": MemberScore("images", pixel_variance),
    "log_det": MemberScore("images", log_det),
    "semantic_entropy": MemberScore("features", semantic_entropy),
    "semantic_variance": MemberScore("features", semantic_variance),
    "predictive_entropy": MemberScore("logits", predictive_entropy),
    "mutual_information": MemberScore("logits", mutual_information),
    "dissent": MemberScore("logits", dissent),
}


def unconfidence(logits: Tensor) -> Tensor:
    """1 - probability of the likeliest class, from ``(N, K)``."""
    return _all_but(logits, logits.argmax(1))


def class_entropy(logits: Tensor) -> Tensor:
    """Entropy of the class probabilities, in nats, from ``(N, K)``."""
    return _entropy(logits.double().softmax(1))


def off_label(logits: Tensor, labels: Tensor | None) -> Tensor:
    """1 - probability of the class that the image was asked to show.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``.

    Raises:
        UserError: without labels.
    """
    if labels is None:
        raise UserError("the score off_label needs labels; leave it out for unconditional models")
    return _all_but(logits, labels)


# Of a classifier's logits for the image ``(N, K)`` and the classes asked for ``(N,)``, or None.
CONFIDENCE_SCORES: dict[str, ConfidenceScore] = {
    "unconfidence": lambda logits, labels: unconfidence(logits),
    "class_entropy": lambda logits, labels: class_entropy(logits),
    "off_label": off_label,
}


def _members(values: Tensor) -> Tensor:
    """The members' values in float64: features that differ little would vanish in fewer digits."""
    if values.shape[1] < 2:
        raise UserError(f"a score of members needs 2 or more of them, got {values.shape[1]}")
    return values.double()


def _feature_variance(features: Tensor, correction: int, unit: bool) -> Tensor:
    values = _members(features)
    return (F.normalize(values, dim=-1) if unit else values).var(1, correction=correction)


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability).sum(-1)


def _all_but(logits: Tensor, classes: Tensor) -> Tensor:
    """1 - probability of one class per image; as a sum, exact where that is nearly 1."""
    log_p = logits.double().log_softmax(1)
    others = log_p.scatter(1, classes.to(logits.device).view(-1, 1), -math.inf)
    return others.exp().sum(1)
