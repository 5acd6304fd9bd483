"""Simulated truths among draws of their posteriors: weights of a mixture, latents under heads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.studies.inference.collapsed import component_likelihood
from bayesdiff.studies.inference.flow_map import FlowMap
from bayesdiff.studies.inference.mixture import LatentMixture, jacobian_of, log_normal
from bayesdiff.studies.inference.ranks import ranks_of, uniformity
from bayesdiff.studies.inference.simplex import grid_posterior
from bayesdiff.studies.inference.weights import prior_weights

FEWEST = 10  # truths that a test of uniformity takes
DRAWS = 99  # from each posterior of the weights: 100 ranks
_BINS = (10, 5, 4, 2)  # divide 100
_AT_ONCE = 512  # members
_TAIL = 0.05  # on either side of a central interval


def weight_shares(
    mixture: LatentMixture,
    flow: FlowMap,
    repeats: int,
    observations: int,
    importance_draws: int,
    seed: int,
) -> Tensor:
    """Where true weights lie among posterior draws, ``(R, K)`` ranks from 0 to ``DRAWS``.

    Weights are from their prior, data sets from the weights; posteriors by the grid over the
    collapsed likelihoods, all of them from one call.

    Args:
        mixture: of the latents.
        flow: gives the map's inverse.
        repeats: R.
        observations: of each data set.
        importance_draws: for each observation and component.
        seed: of everything.
    """
    device = mixture.means.device
    generator = torch.Generator(device).manual_seed(seed)
    own = torch.Generator().manual_seed(seed)
    truths = prior_weights(repeats, len(mixture.means), own)
    component = torch.multinomial(truths, observations, replacement=True, generator=own)
    _, x = mixture.draw_of(component.flatten().to(device), generator)
    found = component_likelihood(mixture, x, flow.encode(x), generator, draws=importance_draws)
    sets = found.log_likelihood.double().cpu().view(repeats, observations, -1)
    samples = [grid_posterior(each).draw(DRAWS, own) for each in sets]
    return ranks_of(torch.stack(samples), truths)


@dataclass(frozen=True)
class LatentShares:
    """Where true latents lie among those that other heads find for the same state.

    Attributes:
        shares: uniform on (0, 1) if heads from the posterior alone do, ``(T, D)``.
        weighted: the same with each head weighted by its density of the state, uniform whenever
            the flows are inverted exactly, ``(T, D)``.
        spread: standard deviation of the latents over heads, ``(T, D)``.
        error: of the latent that the true head itself finds, ``(T, D)``.
    """

    shares: Tensor
    weighted: Tensor
    spread: Tensor
    error: Tensor


@torch.no_grad()
def latent_shares(
    flow: FlowMap,
    posterior: HeadPosterior,
    size: int,
    device: torch.device,
    truths: int,
    heads: int,
    seed: int,
) -> LatentShares:
    """Draw a head and a latent, decode, and find the latent again under other heads.

    Every truth has heads of its own: shares are independent. Given a state x and the set of all
    heads, the true one is head k with probability p(x | k) over their sum, for heads are from one
    posterior; the share of the true latent is uniform with those weights, and nearly so without
    where a state says little about the head.

    Args:
        flow: with a model that is frozen.
        posterior: of the head.
        size: D, of a latent.
        device: of the flow.
        truths: T, true heads with one latent each.
        heads: other heads for each.
        seed: of everything.
    """
    own = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, ...]] = []
    for count in _chunks(truths, max(1, _AT_ONCE // (heads + 1))):
        drawn = posterior.draw(count * (heads + 1), own).to(device, torch.float32)
        z = torch.randn(count, size, generator=own).to(device)
        x = flow.decode_under(drawn[:: heads + 1], z).repeat_interleave(heads + 1, 0)
        found, log_density = _encoded(flow, drawn, x)
        found = found.view(count, heads + 1, size).double().cpu()
        chance = log_density.view(count, heads + 1).double().cpu().softmax(1)[..., None]
        truth, even = z.double().cpu(), torch.full_like(chance, 1 / (heads + 1))
        among = torch.rand(count, size, generator=own, dtype=torch.float64)
        below = (found[:, 1:] < truth[:, None]).double()
        shares = [(below * w[:, 1:]).sum(1) + among * w[:, 0] for w in (even, chance)]
        parts.append((*shares, found[:, 1:].std(1), found[:, 0] - truth))
    return LatentShares(*(torch.cat(each) for each in zip(*parts, strict=True)))


def of_weights(ranks: Tensor) -> dict[str, Any]:
    """p-values of the ranks' uniformity, and counts for a histogram.

    Returns:
        ``p`` of every weight; ``p_smallest``; ``p_corrected``, the smallest times their number, 1
        at most (Bonferroni): what the smallest would have to be below for a level.
    """
    return _tested((ranks + 0.5) / (DRAWS + 1))


def of_latents(found: LatentShares) -> dict[str, Any]:
    """As ``of_weights`` of every coordinate, and how well central intervals cover.

    Returns:
        Also ``weighted``, the same of heads weighted by their density of the state; ``coverage``
        of the central 90 % interval with its binomial ``coverage_error``; ``spread``, the root
        mean square of the latents' standard deviation over heads, and ``round_trip``, that of the
        solver's own error: ranks say nothing where it is not far below.
    """
    inside = ((found.shares >= _TAIL) & (found.shares <= 1 - _TAIL)).double().mean(0)
    count = len(found.shares)
    return {
        **_tested(found.shares),
        "weighted": _tested(found.weighted),
        "coverage": inside.tolist(),
        "coverage_error": (inside * (1 - inside) / count).sqrt().tolist(),
        "spread": found.spread.square().mean(0).sqrt().tolist(),
        "round_trip": found.error.square().mean(0).sqrt().tolist(),
    }


def band(count: int, bins: int) -> tuple[float, float]:
    """Where 95 % of the bins' counts lie if shares are uniform."""
    low, high = binom.ppf((0.025, 0.975), count, 1 / bins)
    return float(low), float(high)


def _tested(shares: Tensor) -> dict[str, Any]:
    """Test of shares ``(N, P)`` in (0, 1)."""
    count = len(shares)
    bins = next(b for b in _BINS if count >= 5 * b)
    place = (shares * bins).long().clamp(max=bins - 1)
    p = uniformity(place, bins - 1, bins)
    counts = torch.nn.functional.one_hot(place, bins).sum(0)
    return {
        "p": p.tolist(),
        "p_smallest": float(p.min()),
        "p_corrected": min(1.0, len(p) * float(p.min())),
        "counts": counts.tolist(),
        "truths": count,
    }


def _encoded(flow: FlowMap, heads: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents ``(M, D)`` under heads, and each head's log density of the state, ``(M,)``."""
    z, slope = jacobian_of(lambda state: flow.encode_under(heads, state), x)
    return z, log_normal(z) + torch.linalg.slogdet(slope).logabsdet


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
