"""Are latents and what lies behind them inferred with the right uncertainty?

Latents come from a mixture of known Gaussians, observations from the trained flow and noise. What
is unknown are the weights of the Gaussians: chains over them are held against a grid, small data
sets with other weights tell whether posteriors are calibrated. The last layer's own posterior has
a part of its own: is a latent where flows with other heads say that it may be?

Source: de Albuquerque and Pearson, "Inflationary Flows" (2024), whose sampler moves all latents of
all observations, in one chain; here they are integrated out, and many chains run at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.machine.ranks import rank
from bayesdiff.paths.coefficient import is_zero
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver
from bayesdiff.solvers.encode import backward
from bayesdiff.solvers.step import coefficients
from bayesdiff.studies.inference import calibration, figures
from bayesdiff.studies.inference.collapsed import ComponentLikelihood, component_likelihood
from bayesdiff.studies.inference.flow_map import FlowMap
from bayesdiff.studies.inference.given import check_mixture, plain_rows
from bayesdiff.studies.inference.hamiltonian import Hamiltonian
from bayesdiff.studies.inference.mixture import LatentMixture
from bayesdiff.studies.inference.shown import Shown
from bayesdiff.studies.inference.simplex import grid_posterior
from bayesdiff.studies.inference.weights import (
    collapsed_chains,
    joint_chains,
    referee,
    speedup,
    summary,
)
from bayesdiff.studies.study import Place, Report, Study, check_unconditional, conditions, without
from bayesdiff.uncertainty import Estimator

_COORDINATES = (2, 3)
# Parts that draw for themselves: none depends on how much another one drew.
_CHAINS, _ALONE, _JOINT, _REPEATS, _LATENTS = range(1, 6)


@dataclass(frozen=True, kw_only=True)
class LatentInference(Study):
    """The mixture, its observations, and what is done with them.

    Args:
        means: of two or three Gaussians in whitened latent coordinates; further ones are 0.
        scales: their standard deviations; in further coordinates 1.
        weights: of the Gaussians, the truth.
        noise: standard deviation of the observations, in units of the model's states.
        observations: how many.
        importance_draws: for each observation and Gaussian, to integrate out its latent.
        chains: over the weights, all at once.
        draws: kept from each.
        warmup: trajectories before.
        leapfrog_steps: at most, of one trajectory.
        target_acceptance: that the step size aims at.
        joint: whether chains over weights and all latents run as well; slow.
        joint_observations: for these, the first so many.
        joint_chains: how many.
        repeats: data sets with weights from the prior, for the calibration of the weights.
        repeat_observations: of each.
        truths: heads from the posterior with a latent each, for the calibration of latents.
        heads: others that find each latent again.
        seed: of everything.

    Example:
        >>> study = LatentInference(
        ...     means=[[-1, 0], [1, 0]], scales=[[0.1, 0.1], [0.1, 0.1]], weights=[0.7, 0.3]
        ... )
        >>> log_likelihood = torch.tensor([[0.0, -99.0]] * 3 + [[-99.0, 0.0]])  # three are of one
        >>> grid_posterior(log_likelihood).mean  # (3 + 1) / (4 + 2) under a uniform prior
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    means: Sequence[Sequence[float]] = ((0.0, 0.0), (-0.05, 0.0), (0.05, 0.0))
    scales: Sequence[Sequence[float]] = ((0.75, 0.75), (0.1, 1.0), (1.0, 0.1))
    weights: Sequence[float] = (0.5, 0.25, 0.25)
    noise: float = 0.1
    observations: int = 2000
    importance_draws: int = 32
    chains: int = 16
    draws: int = 500
    warmup: int = 300
    leapfrog_steps: int = 10
    target_acceptance: float = 0.8
    joint: bool = False
    joint_observations: int = 50
    joint_chains: int = 8
    repeats: int = 50
    repeat_observations: int = 100
    truths: int = 200
    heads: int = 31
    seed: int = 0

    def __post_init__(self) -> None:
        check_mixture(self.means, self.scales, self.weights)
        positive("inference.noise", self.noise)
        for name, least in _LEAST.items():
            at_least(f"inference.{name}", getattr(self, name), least)
        if not isinstance(self.joint, bool):
            raise UserError(f"inference.joint must be true or false, got {self.joint!r}")
        seed_of("inference.seed", self.seed)
        self._sampler  # noqa: B018 - refuses its own options

    @property
    def _sampler(self) -> Hamiltonian:
        return Hamiltonian(self.draws, self.warmup, self.leapfrog_steps, self.target_acceptance)

    def check_data(self, data: ImageData, name: str) -> None:
        """Refuse states whose latents are too many to integrate out.

        Raises:
            UserError: for states of other than two or three coordinates, or fewer than the means.
        """
        shape = tuple(data.space.shape)
        if len(shape) != 1 or shape[0] not in _COORDINATES:
            raise UserError(
                f"{name} integrates latents of 2 or 3 coordinates out, states of {data.name} are "
                f"{shape}; use data=circles, or leave {name} out"
            )
        if len(self.means[0]) > shape[0]:
            raise UserError(
                f"{name}.means={plain_rows(self.means)} have {len(self.means[0])} coordinates, "
                f"and states of {data.name} have {shape[0]}; give fewer"
            )

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what is no map.

        Raises:
            UserError: for a conditional model, or a solver or prediction without a way back.
        """
        check_unconditional(run, "inference is about one map")
        backward(solver, run.model.path, run.model.prediction)
        if solver.denoise and not is_zero(coefficients(run.model.path, [1.0])[0][1]):
            raise UserError(
                "solver.denoise=true ends with a prediction, which has no way back; use "
                "solver.denoise=false"
            )

    def mixture(self, flow: FlowMap, size: int, device: torch.device) -> LatentMixture:
        """The Gaussians in all ``size`` coordinates, and the flow behind them."""
        means, scales = (torch.tensor(plain_rows(v)) for v in (self.means, self.scales))
        missing = (0, size - means.shape[1])
        pad = torch.nn.functional.pad
        return LatentMixture(
            pad(means, missing).to(device),
            pad(scales, missing, value=1.0).to(device),
            flow.decode,
            self.noise,
        )

    def make(self, at: Setup, place: Place) -> Report | None:
        """Chains, referee and calibration; small enough for one process."""
        if rank():
            return None
        flow = FlowMap(at.run.model, at.solver)
        with flow.frozen():
            shown = self._shown(at, flow)
        results = shown.results
        headlines = {
            "weights_covered": float(results["weights"]["all_inside"]),
            "r_hat": results["weights"]["r_hat_max"],
            "speedup": results["speedup"]["speedup"],
            "sbc_p": results["sbc"]["p_corrected"],
            "latents_p": results["latents"]["p_corrected"],
        }
        made_of = conditions(without(at.settings, "uncertainty."))
        return Report(
            results,
            figures.every(shown, made_of),
            {"table.md": table.markdown(_rows(results))},
            scalars=headlines,
            headlines=headlines,
        )

    def _shown(self, at: Setup, flow: FlowMap) -> Shown:
        size, device = at.run.data.space.shape[0], at.run.device
        mixture = self.mixture(flow, size, device)
        generator = torch.Generator(device).manual_seed(self.seed)
        truth = torch.tensor(list(self.weights), dtype=torch.float64)
        component = torch.multinomial(
            truth.float().to(device), self.observations, replacement=True, generator=generator
        )
        z, x = mixture.draw_of(component, generator)
        encoded = flow.encode(x)
        likelihood = component_likelihood(
            mixture, x, encoded, generator, draws=self.importance_draws
        )
        logs = likelihood.log_likelihood.double().cpu()
        chains = collapsed_chains(logs, self._sampler, self.chains, self._chance(_CHAINS))
        grid = grid_posterior(logs)
        weights = summary(chains, truth)
        latents = calibration.latent_shares(
            flow, at.posterior, size, device, self.truths, self.heads, self.seed + _LATENTS
        )
        ranks = calibration.weight_shares(
            mixture, flow, self.repeats, self.repeat_observations, self.importance_draws,
            self.seed + _REPEATS,
        )  # fmt: skip
        results = {
            "weights": weights,
            "referee": referee(grid, weights),
            "joint": self._joint(mixture, x, encoded, logs, truth) if self.joint else None,
            "speedup": speedup(logs, self._sampler, chains, self._chance(_ALONE)),
            "importance": _importance(likelihood),
            "sbc": calibration.of_weights(ranks),
            "latents": calibration.of_latents(latents),
            "conditions": self._conditions(at),
        }
        return Shown(results, chains.weights, grid, z.cpu(), x.cpu(), component.cpu())

    def _joint(
        self, mixture: LatentMixture, x: Tensor, encoded: Tensor, logs: Tensor, truth: Tensor
    ) -> dict[str, Any]:
        """All latents of the first observations as well, against the grid for the same ones."""
        first = slice(0, self.joint_observations)
        generator = torch.Generator(x.device).manual_seed(self.seed + _JOINT)
        chains = joint_chains(
            mixture, x[first], encoded[first], self._sampler, self.joint_chains, generator
        )
        found = summary(chains, truth)
        return found | {"referee": referee(grid_posterior(logs[first]), found)}

    def _chance(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + part)

    def _conditions(self, at: Setup) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*_LEAST, "noise", "joint", "seed")}
        given = {name: plain_rows(getattr(self, name)) for name in ("means", "scales")}
        return own | given | {"solver": at.solver.name, "steps": at.solver.num_steps}


# The least value of every count among the options.
_LEAST = {
    "observations": 2, "importance_draws": 1, "chains": 4, "draws": 20, "warmup": 1,
    "leapfrog_steps": 1, "joint_observations": 1, "joint_chains": 4,
    "repeats": calibration.FEWEST, "repeat_observations": 1, "truths": calibration.FEWEST,
    "heads": 2,
}  # fmt: skip


def _importance(likelihood: ComponentLikelihood) -> dict[str, float]:
    """How well the proposals fit, weighted by where observations may come from."""
    share = likelihood.log_likelihood.double().softmax(1)
    return {
        "efficiency": float((share * likelihood.efficiency.double()).sum(1).mean()),
        "efficiency_smallest": float(likelihood.efficiency.min()),
    }


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every weight."""
    weights, grid = results["weights"], results["referee"]
    names = ("truth", "mean", "sd", "low", "high", "inside", "r_hat", "ess")
    rows = []
    for k in range(len(weights["truth"])):
        row = {"weight": k + 1} | {name: weights[name][k] for name in names}
        row |= {f"grid_{name}": grid[name][k] for name in ("mean", "sd")}
        rows.append(row | {"sbc_p": results["sbc"]["p"][k]})
    return rows
