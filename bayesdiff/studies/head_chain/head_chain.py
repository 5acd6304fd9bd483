"""Is the posterior of the head's weights Gaussian? Against chains that know its loss alone.

A pass over a few images fixes features and targets; Hamiltonian Monte Carlo follows the negative
log posterior through the network's own head, and the closed form of the same pass is held against
its draws. For a Gaussian likelihood both are the same, of a diffusion model as of a flow.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.laplace.chain import Chains, sample_chains
from bayesdiff.laplace.curvature import batches, fit_curvature
from bayesdiff.laplace.head import HeadGeometry, apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import check_noise_level
from bayesdiff.models.conditions import values_of
from bayesdiff.report import table
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.fit_key import network_code
from bayesdiff.runs.processes import check_devices
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import Artefact, weights_key
from bayesdiff.studies.head_chain.comparison import ChainTest, measure
from bayesdiff.studies.head_chain.figures import posterior_and_chains
from bayesdiff.studies.study import Place, Report, Study, conditions, without
from bayesdiff.uncertainty import Estimator

_PREDICTED = 20  # images that predictions are compared on
_AT_ONCE = 64  # images of the pass in one network evaluation
_MOST_BYTES = 2 * 2**30  # of all draws; their figures take a few times as much
_MOST_OF_A_STEP = 4 * 2**30
_HELD = 5  # tensors of all chains' images that a step keeps for its derivative
_HEADLINES = (
    "full.sd_error_max", "ks_max", "ks_p_min", "chain.r_hat_max", "distance_from_optimum",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeadChain(Study):
    """The pass and the chains.

    Args:
        num_images: of the pass, 10 or more, one (t, noise) draw each.
        chains: that run side by side, from starts twice as wide as the posterior.
        draws: kept from each.
        warmup: proposals before.
        step: of the leapfrog, in posterior standard deviations; a path is a quarter of a circle.
        seed: of the pass, the starts and the chains.

    Example:
        >>> study = HeadChain(chains=32, draws=100)
        >>> start = torch.zeros(study.chains, 1, 1, dtype=torch.float64)
        >>> root, generator = torch.eye(1, dtype=torch.float64), torch.Generator().manual_seed(0)
        >>> chains = sample_chains(  # of a Gaussian whose standard deviation is 2
        ...     lambda w: w.square().sum((1, 2)) / 8, start, 2 * root,
        ...     draws=study.draws, warmup=study.warmup, step=study.step, generator=generator,
        ... )
        >>> chains.draws.std().round(decimals=1)
        tensor(2., dtype=torch.float64)
    """

    num_images: int = 300
    chains: int = 64
    draws: int = 500
    warmup: int = 20
    step: float = math.pi / 10
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("head_chain.num_images", self.num_images, 10)  # empirical Fisher needs them
        at_least("head_chain.chains", self.chains, 2)
        at_least("head_chain.draws", self.draws, 10)
        at_least("head_chain.warmup", self.warmup, 0)
        positive("head_chain.step", self.step)
        seed_of("head_chain.seed", self.seed)

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what no chain can follow.

        Raises:
            UserError: for several noise levels, several processes, or more than memory holds.
        """
        check_noise_level(run.model, "head_chain", run.cfg.laplace.get("objective", "likelihood"))
        there = len(run.data.data.images)
        if self.num_images > there:
            raise UserError(
                f"head_chain.num_images={self.num_images} is more than the {there} training "
                "images; use fewer"
            )
        if run.cfg.laplace.sigma_noise == "mle_per_time":
            raise UserError(
                "head_chain compares with one noise level, laplace.sigma_noise=mle_per_time has "
                "several; use mle, or a number"
            )
        if check_devices(run.cfg) > 1:
            raise UserError(
                f"head_chain follows its chains in one process, trainer.devices="
                f"{run.cfg.trainer.devices} are several; train first, then give trainer.devices=1"
            )
        self._check_memory(run)

    def _check_memory(self, run: Run) -> None:
        """Refuse draws, or a step of all chains over all images, that would take too much."""
        head: Any = run.model.net.head
        kept = 8 * self.chains * self.draws * len(head.weight) * HeadGeometry.of(head).size
        values = run.data.data.images[0].numel()
        step = 8 * _HELD * self.chains * self.num_images * values
        for name, size, most in (
            ("draws", kept, _MOST_BYTES), ("num_images", step, _MOST_OF_A_STEP),
        ):  # fmt: skip
            if size > most:
                raise UserError(
                    f"head_chain.{name}={getattr(self, name)} of head_chain.chains={self.chains} "
                    f"take {size / 2**30:.1f} GiB here, more than {most / 2**30:.0f}; lower them"
                )

    def made_from(self, at: Setup) -> list[Any]:
        """The network and its data, noise level and prior; no solver and no other pass."""
        cfg = at.run.cfg
        network = [weights_key(at.run.model), cfg.model.prediction, plain(cfg.path)]
        settings = [str(cfg.laplace.sigma_noise), str(cfg.laplace.prior_precision)]
        return [*network, *network_code(cfg), at.run.data.data.fingerprint, *settings]

    def make(self, at: Setup, place: Place) -> Report:
        """The chains, whose draws are kept as ``draws.npz``, and their comparison."""
        test = self._test(at.run, place)
        found = measure(test, at.run.model.net.head)
        own = {name: found[name] for name in ("sigma_noise", "prior_precision")}
        made_of = conditions(
            without(at.settings, "solver.", "uncertainty.") | own | {"structure": "full"}
        )
        passed = f"{self.num_images} images with one (t, noise) draw each, frozen features"
        figure = posterior_and_chains(test, found, f"{made_of} {passed}")
        shown = {name: found[name] for name in _HEADLINES}
        rows: list[table.Row] = [{"figure": k, "value": v} for k, v in found.items()]
        return Report(
            found,
            [("head_chain/posterior_and_chains", figure)],
            {"table.md": table.markdown(rows)},
            scalars=shown,
            headlines=shown,
        )

    @torch.no_grad()
    def _test(self, run: Run, place: Place) -> ChainTest:
        """The pass, and its chains."""
        data, laplace = run.data.data, run.cfg.laplace
        once: dict[str, Any] = {
            "num_images": self.num_images, "batch_size": _AT_ONCE, "seed": self.seed,
            "encode": data.space.encode,
        }  # fmt: skip
        given = values_of(run.model.condition, data)
        curvature = fit_curvature(run.model, data.images, given, source=place.key, **once)
        posterior = HeadPosterior.fit(
            curvature, sigma_noise=laplace.sigma_noise, prior_precision=laplace.prior_precision
        )
        parts = list(batches(run.model, data.images, given, draws=1, **once))
        features = torch.cat([part.features for part in parts]).double().cpu()[None]
        target = torch.cat([part.target for part in parts]).double().cpu()

        def sampled() -> dict[str, Tensor]:
            began = time.process_time()
            chains = self._sampled(run, posterior, features, target)
            seconds = torch.tensor(time.process_time() - began)
            return {"draws": chains.draws, "acceptance": chains.acceptance, "seconds": seconds}

        kept = Artefact(place.folder / "draws.npz", place.key).arrays(sampled)
        made = kept["draws"], kept["acceptance"], float(kept["seconds"])
        return ChainTest(posterior, *made, features[:, :_PREDICTED])

    def _sampled(
        self, run: Run, posterior: HeadPosterior, features: Tensor, target: Tensor
    ) -> Chains:
        """The chains, from starts around the trained weights twice as wide as the posterior."""
        mean = posterior.curvature.mean
        around = torch.Generator().manual_seed(self.seed + 1)
        return sample_chains(
            loss_of(run, posterior, features, target),
            mean + 2 * (posterior.draw(self.chains, around) - mean),
            torch.linalg.cholesky(posterior.covariance),
            draws=self.draws,
            warmup=self.warmup,
            step=self.step,
            generator=torch.Generator().manual_seed(self.seed),
        )


def loss_of(
    run: Run, posterior: HeadPosterior, features: Tensor, target: Tensor
) -> Callable[[Tensor], Tensor]:
    """Negative log posterior of weights, through the network's own head and fold.

    Args:
        run: gives the network.
        posterior: gives noise level and prior.
        features: ``(1, B, D, h, w)`` float64.
        target: ``(B, C, H, W)`` float64.

    Returns:
        The loss ``(K,)`` of weights ``(K, C_out, P)``, up to a constant.
    """
    net, noise, tau = run.model.net, posterior.sigma_noise, posterior.prior_precision

    def loss(weights: Tensor) -> Tensor:
        output = apply_head(net.head, features, weights)
        images = net.fold(output.flatten(0, 1)).unflatten(0, output.shape[:2])
        fit = (images - target).square().sum((1, 2, 3, 4)) / (2 * noise**2)
        return fit + tau / 2 * weights.square().sum((1, 2))

    return loss
