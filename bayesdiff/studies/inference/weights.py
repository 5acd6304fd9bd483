"""The posterior of a mixture's weights: chains, numbers, and what running many at once gains."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.studies.inference.diagnostics import bulk_ess, r_hat
from bayesdiff.studies.inference.hamiltonian import Hamiltonian
from bayesdiff.studies.inference.mixture import JointPosterior, LatentMixture
from bayesdiff.studies.inference.simplex import (
    GridPosterior,
    free_of,
    log_posterior,
    log_weights,
)

_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class WeightChains:
    """Draws of the weights.

    Attributes:
        weights: ``(C, N, K)`` float64, on the CPU.
        seconds: of the chains, their warm-up included.
        divergences: trajectories that diverged, of all chains.
        acceptance: mean probability.
    """

    weights: Tensor
    seconds: float
    divergences: int
    acceptance: float

    @property
    def rate(self) -> float:
        """Effective draws of the weight that has the fewest, per second."""
        return float(bulk_ess(self.weights).min()) / self.seconds


def prior_weights(count: int, components: int, generator: torch.Generator) -> Tensor:
    """Uniform on the simplex, ``(count, K)`` float64 on the CPU."""
    noise = torch.empty(count, components, dtype=torch.float64)
    exponential = noise.exponential_(generator=generator)
    return exponential / exponential.sum(1, keepdim=True)


def collapsed_chains(
    log_likelihood: Tensor, sampler: Hamiltonian, chains: int, generator: torch.Generator
) -> WeightChains:
    """Chains over the weights alone, all at once, from starts that the prior draws.

    Args:
        log_likelihood: of each observation under each component, ``(N, K)`` float64.
        sampler: its options.
        chains: how many.
        generator: on the CPU.
    """
    start = free_of(prior_weights(chains, log_likelihood.shape[1], generator))
    began = time.perf_counter()
    made = sampler.sample(lambda free: log_posterior(log_likelihood, free), start, generator)
    seconds = time.perf_counter() - began
    weights = log_weights(made.draws).exp()
    return WeightChains(
        weights, seconds, int(made.divergences.sum()), float(made.acceptance.mean())
    )


def joint_chains(
    mixture: LatentMixture,
    x: Tensor,
    encoded: Tensor,
    sampler: Hamiltonian,
    chains: int,
    generator: torch.Generator,
) -> WeightChains:
    """Chains over the weights and all latents, of which the weights are kept.

    Args:
        mixture: of the latents.
        x: observations ``(N, D)``.
        encoded: what the map's inverse makes of them.
        sampler: its options.
        chains: how many.
        generator: on the device of ``x``.
    """
    joint = JointPosterior(mixture, x, encoded)
    start = joint.start(chains, generator)
    began = time.perf_counter()
    made = sampler.sample(joint, start, generator, keep=lambda state: joint.unpack(state)[0])
    seconds = time.perf_counter() - began
    weights = log_weights(made.draws.double().cpu()).exp()
    return WeightChains(
        weights, seconds, int(made.divergences.sum()), float(made.acceptance.mean())
    )


def summary(chains: WeightChains, truth: Tensor) -> dict[str, Any]:
    """Numbers of every weight, as lists; whether the intervals hold the truth, and all of it.

    Args:
        chains: of the weights.
        truth: ``(K,)``.
    """
    flat = chains.weights.flatten(0, 1)
    low, high = (flat.quantile(end, 0) for end in _ENDS)
    inside = (low <= truth) & (truth <= high)
    mixed = r_hat(chains.weights)
    return {
        "truth": truth.tolist(),
        "mean": flat.mean(0).tolist(),
        "sd": flat.std(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "inside": inside.tolist(),
        "all_inside": bool(inside.all()),
        "r_hat": mixed.tolist(),
        "r_hat_max": float(mixed.max()),
        "ess": bulk_ess(chains.weights).tolist(),
        "divergences": chains.divergences,
        "acceptance": chains.acceptance,
        "seconds": chains.seconds,
        "chains": chains.weights.shape[0],
        "draws": chains.weights.shape[1],
    }


def referee(grid: GridPosterior, of_chains: dict[str, Any]) -> dict[str, Any]:
    """The grid's numbers, and how far the chains' are from them.

    Returns:
        Lists ``mean``, ``sd``, ``low`` and ``high``; ``mean_off``, the largest distance of the
        means in the grid's standard deviations, and ``sd_off``, of the standard deviations'
        ratios from 1.
    """
    low, high = (_quantile(grid, end) for end in _ENDS)
    mean, sd = (torch.tensor(of_chains[name], dtype=torch.float64) for name in ("mean", "sd"))
    return {
        "mean": grid.mean.tolist(),
        "sd": grid.deviation.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "mean_off": float(((mean - grid.mean).abs() / grid.deviation).max()),
        "sd_off": float((sd / grid.deviation - 1).abs().max()),
    }


def speedup(
    log_likelihood: Tensor, sampler: Hamiltonian, chains: WeightChains, generator: torch.Generator
) -> dict[str, Any]:
    """Effective draws per second of all chains at once over those of one chain by itself.

    Both with the same options, warm-up included, in this process.
    """
    alone = collapsed_chains(log_likelihood, sampler, 1, generator)
    return {
        "speedup": chains.rate / alone.rate,
        "ess_per_second": chains.rate,
        "ess_per_second_alone": alone.rate,
        "seconds": chains.seconds,
        "seconds_alone": alone.seconds,
        "chains": len(chains.weights),
        "threads": torch.get_num_threads(),
        "observations": len(log_likelihood),
        "warmup": sampler.warmup,
        "draws": sampler.draws,
    }


def _quantile(grid: GridPosterior, share: float) -> Tensor:
    """Of every weight, ``(K,)``."""
    values, order = grid.weights.sort(0)
    below = grid.mass[order].cumsum(0)
    place = (below < share).sum(0).clamp(max=len(values) - 1)
    return values.gather(0, place[None])[0]
