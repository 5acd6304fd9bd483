"""How far the head's Gaussian is from draws of Markov chains that know its loss alone."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from bayesdiff.laplace.chain import effective_draws, scale_reduction
from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior

STRUCTURES = ("full", "kron", "diag", "empirical_fisher")
_EVERY = 16  # steps of the chains that predictions are compared on, of all chains


@dataclass(frozen=True)
class ChainTest:
    """One pass over a few images, and chains on the very same features and targets.

    Attributes:
        posterior: of that pass, structure full.
        draws: ``(S, K, C_out, P)`` float64.
        acceptance: ``(K,)``.
        seconds: of one core that the chains took.
        features: ``(1, B, D, h, w)`` of some images, to compare predictions on.
    """

    posterior: HeadPosterior
    draws: Tensor
    acceptance: Tensor
    seconds: float
    features: Tensor

    @property
    def flat(self) -> Tensor:
        """All draws of all weights, ``(S K, C_out P)``."""
        return self.draws.flatten(2).flatten(0, 1)

    @cached_property
    def structures(self) -> dict[str, HeadPosterior]:
        """The posteriors to compare, all of the same pass, noise level and prior."""
        given = self.posterior
        return {
            name: HeadPosterior.fit(
                given.curvature,
                structure=name,
                sigma_noise=given.sigma_noise,
                prior_precision=given.prior_precision,
            )
            for name in STRUCTURES
        }


def sds(posterior: HeadPosterior) -> Tensor:
    """Marginal standard deviations ``(C_out P,)``."""
    variances = posterior.covariance.diagonal(dim1=-2, dim2=-1)
    return variances.sqrt().expand(posterior.curvature.mean.shape).flatten()


def measure(test: ChainTest, head: nn.Module) -> dict[str, Any]:
    """Every number, by flat names.

    Args:
        test: posterior and chains.
        head: of the network.

    Returns:
        ``chain.*``, how many chains and draws there are, what they took and how well they mix;
        ``weights``, ``sigma_noise``, ``prior_precision`` and ``distance_from_optimum`` of the
        pass; what ``marginals`` and ``joint`` return. For each structure ``sd_ratio`` of the
        weights and ``predictive_sd_ratio`` of the head's outputs on ``test.features``, its sd
        over that of the chains (of every 16th step of all chains for outputs), as median and ends
        of the middle 90 %. ``full.sd_error_rms`` and ``full.sd_error_max``, over the weights, of
        sd / sd of the chains - 1, and ``full.sd_error_of_the_chain``, the rms that chance gives.
    """
    draws, flat = test.draws.flatten(2), test.flat
    ess = effective_draws(draws)
    spread = effective_draws((draws - flat.mean(0)).square())
    found: dict[str, Any] = {
        "chain.chains": draws.shape[1],
        "chain.draws": len(flat),
        "chain.seconds": round(test.seconds, 1),
        "chain.acceptance": float(test.acceptance.mean()),
        "chain.ess_min": float(ess.min()),
        "chain.ess_median": float(ess.median()),
        "chain.ess_of_squares_median": float(spread.median()),
        "chain.r_hat_max": float(scale_reduction(draws).max()),
        "weights": flat.shape[1],
        "sigma_noise": test.posterior.sigma_noise,
        "prior_precision": test.posterior.prior_precision,
        "distance_from_optimum": test.posterior.distance,
    }
    found |= marginals(test.posterior, flat, ess) | joint(test.posterior, draws, ess)
    own = flat.std(0)
    predicted = apply_head(head, test.features, test.draws[::_EVERY].flatten(0, 1)).var(0)
    for name, posterior in test.structures.items():
        predictive = (posterior.predictive_variance(test.features[0]) / predicted).sqrt()
        found |= spread_of(f"{name}.sd_ratio", sds(posterior) / own)
        found |= spread_of(f"{name}.predictive_sd_ratio", predictive.flatten())
    error = sds(test.posterior) / own - 1
    found["full.sd_error_rms"] = float(error.square().mean().sqrt())
    found["full.sd_error_max"] = float(error.abs().max())
    found["full.sd_error_of_the_chain"] = float((0.5 / spread).mean().sqrt())
    return found


def spread_of(name: str, ratios: Tensor) -> dict[str, float]:
    """Median and the ends of the middle 90 %, of numbers ``(N,)`` however many."""
    found = np.quantile(ratios.cpu().numpy(), (0.5, 0.05, 0.95)).tolist()
    ends = ("median", "5_percent", "95_percent")
    return {f"{name}_{end}": value for end, value in zip(ends, found, strict=True)}


def marginals(posterior: HeadPosterior, flat: Tensor, ess: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov of every weight, around the optimum and around the trained weights.

    Args:
        posterior: structure full.
        flat: draws ``(N, C_out P)``.
        ess: how many independent ones each weight's are worth, ``(C_out P,)``.
    """
    assert posterior.optimum is not None  # full has one
    scale = sds(posterior)
    mean, best = posterior.curvature.mean.flatten(), posterior.optimum.flatten()
    count = ess.clamp(max=len(flat)).sqrt().numpy()
    apart, wrong = (
        np.array([stats.kstest(z, "norm").statistic for z in ((flat - centre) / scale).T.numpy()])
        for centre in (best, mean)
    )
    p = stats.kstwobign.sf(count * apart)
    gap = ((mean - best) / scale).abs()
    return {
        "ks_max": float(apart.max()),
        "ks_p_min": float(p.min()),
        "ks_p_share_below_0.05": float((p < 0.05).mean()),
        "ks_max_at_trained_mean": float(wrong.max()),
        "ks_median_at_trained_mean": float(np.median(wrong)),
        "mean_error_rms_in_standard_errors": float(
            ((flat.mean(0) - best) / scale * ess.sqrt()).square().mean().sqrt()
        ),
        "trained_mean_off_in_sd_median": float(gap.median()),
        "trained_mean_off_in_sd_max": float(gap.max()),
    }


def joint(posterior: HeadPosterior, draws: Tensor, ess: Tensor) -> dict[str, float]:
    """All weights together; what is expected is the error of as many independent draws.

    Args:
        posterior: structure full.
        draws: ``(S, K, C_out P)``.
        ess: how many independent ones each weight's are worth, ``(C_out P,)``.
    """
    assert posterior.optimum is not None
    truth = torch.block_diag(*[posterior.covariance] * len(posterior.curvature.mean))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(truth),
        (draws.flatten(0, 1) - posterior.optimum.flatten()).T,
        upper=False,
    ).T
    squares = white.square().sum(1)
    count = effective_draws(squares.unflatten(0, draws.shape[:2]))
    test = stats.kstest(squares.numpy(), "chi2", args=(white.shape[1],)).statistic
    found = {
        "mahalanobis.mean_over_weights": float(squares.mean()) / white.shape[1],
        "mahalanobis.sd_over_chi2": float(squares.std()) / math.sqrt(2 * white.shape[1]),
        "mahalanobis.ks_p": float(stats.kstwobign.sf(test * math.sqrt(float(count)))),
    }
    n = float(ess.median())
    for name, matrix, sample in (
        ("covariance", truth, draws.flatten(0, 1)),
        ("whitened_covariance", torch.eye(len(truth)).double(), white),
    ):
        size = matrix.norm()
        found[f"full.{name}_error"] = float((sample.T.cov() - matrix).norm() / size)
        scatter = 1 + float(matrix.trace() / size) ** 2
        found[f"full.{name}_error_expected"] = math.sqrt(scatter / n)
    return found
