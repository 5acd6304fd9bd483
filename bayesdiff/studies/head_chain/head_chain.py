"""Is the posterior of the head's weights Gaussian? Against chains that know its loss alone.

A pass over a few images fixes features and targets; Hamiltonian Monte Carlo follows the negative
log posterior through the network's own head, and the closed form of the same pass is held against
its draws. For a Gaussian likelihood both are the same, of a diffusion model as of a flow.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.laplace.chain import Chains, sample_chains
from bayesdiff.laplace.curvature import batches, fit_curvature
from bayesdiff.laplace.head import HeadGeometry, apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report import board, table
from bayesdiff.runs.build import Run
from bayesdiff.runs.processes import check_devices
from bayesdiff.storage.artefacts import key_of, read_arrays, weights_key, write_arrays, write_text
from bayesdiff.studies.head_chain.comparison import ChainTest, measure
from bayesdiff.studies.head_chain.figures import posterior_and_chains
from bayesdiff.studies.study import Study, configured, pdf

log = logging.getLogger(__name__)

_PREDICTED = 20  # images that predictions are compared on
_MOST_BYTES = 2 * 2**30  # of all draws; their figures take a few times as much


@dataclass(frozen=True, kw_only=True)
class HeadChain:
    """The pass and the chains.

    Args:
        num_images: of the pass, 10 or more, one (t, noise) draw each.
        chains: that run side by side, from starts twice as wide as the posterior.
        draws: kept from each.
        warmup: proposals before.
        step: of the leapfrog, in posterior standard deviations; a path is a quarter of a circle.
        seed: of the pass, the starts and the chains.
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


def check_head_chain(run: Run) -> None:
    """Refuse before any work what no chain can follow; nothing where it is not asked for.

    Raises:
        UserError: for several noise levels, several processes, or more than memory holds.
    """
    wanted: HeadChain | None = configured(run, "head_chain")
    if wanted is None:
        return
    there = len(run.data.data.images)
    if wanted.num_images > there:
        raise UserError(
            f"head_chain.num_images={wanted.num_images} is more than the {there} training images; "
            "use fewer"
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
    head: Any = run.model.net.head
    outputs = head.weight.shape[0]
    size = 8 * wanted.chains * wanted.draws * outputs * HeadGeometry.of(head).size
    if size > _MOST_BYTES:
        raise UserError(
            f"head_chain.draws={wanted.draws} of head_chain.chains={wanted.chains} take "
            f"{size / 2**30:.1f} GiB for this head; lower them"
        )


def chain_head(run: Run) -> Path | None:
    """Numbers, a figure and all draws, in a folder of their own; results.json last.

    Args:
        run: with its trained model.

    Returns:
        The folder, None where it is not asked for.
    """
    wanted: HeadChain | None = configured(run, "head_chain")
    if wanted is None:
        return None
    laplace = run.cfg.laplace
    settings = [str(laplace.sigma_noise), str(laplace.prior_precision)]
    parts = [weights_key(run.model), run.data.data.fingerprint, settings]
    study = Study.of(run, "head_chain", "hmc", *parts)
    if study.is_made:
        return study.folder
    test = make(run, wanted, study)
    found = measure(test, run.model.net.head)
    _report(run, study, wanted, test, found)
    study.close(found, {name: found[name] for name in _HEADLINES})
    log.info("head_chain: %d draws in %s", found["chain.draws"], study.folder)
    return study.folder


@torch.no_grad()
def make(run: Run, wanted: HeadChain, study: Study) -> ChainTest:
    """The pass, and its chains, which are kept as ``draws.npz``."""
    data = run.data.data
    once: dict[str, Any] = {
        "num_images": wanted.num_images,
        "batch_size": wanted.num_images,
        "seed": wanted.seed,
    }
    source = "-".join([weights_key(run.model), data.fingerprint, key_of(once)])
    curvature = fit_curvature(run.model, data.images, data.labels, source=source, **once)
    posterior = HeadPosterior.fit(
        curvature,
        sigma_noise=run.cfg.laplace.sigma_noise,
        prior_precision=run.cfg.laplace.prior_precision,
    )
    parts = list(batches(run.model, data.images, data.labels, **once))
    features = torch.cat([part.features for part in parts]).double().cpu()[None]
    target = torch.cat([part.target for part in parts]).double().cpu()
    path = study.folder / "draws.npz"
    kept = read_arrays(path, study.key)
    if kept is None:
        began = time.process_time()
        chains = _sampled(run, wanted, posterior, features, target)
        seconds = torch.tensor(time.process_time() - began)
        kept = {"draws": chains.draws, "acceptance": chains.acceptance, "seconds": seconds}
        write_arrays(path, study.key, kept)
    made = kept["draws"], kept["acceptance"], float(kept["seconds"])
    return ChainTest(posterior, *made, features[:, :_PREDICTED])


def _sampled(
    run: Run, wanted: HeadChain, posterior: HeadPosterior, features: Tensor, target: Tensor
) -> Chains:
    """The chains, from starts around the trained weights twice as wide as the posterior."""
    mean = posterior.curvature.mean
    around = torch.Generator().manual_seed(wanted.seed + 1)
    return sample_chains(
        loss_of(run, posterior, features, target),
        mean + 2 * (posterior.draw(wanted.chains, around) - mean),
        torch.linalg.cholesky(posterior.covariance),
        draws=wanted.draws,
        warmup=wanted.warmup,
        step=wanted.step,
        generator=torch.Generator().manual_seed(wanted.seed),
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


_HEADLINES = (
    "full.sd_error_max", "ks_max", "ks_p_min", "chain.r_hat_max", "distance_from_optimum",
)  # fmt: skip


def _report(
    run: Run, study: Study, wanted: HeadChain, test: ChainTest, found: dict[str, Any]
) -> None:
    """Table, figure and loggers."""
    folder = study.folder
    rows = [{"figure": name, "value": value} for name, value in found.items()]
    write_text(folder / "table.md", table.markdown(rows))
    conditions = (
        f"{run.data.data.name} {run.model.path.family}, seed {run.cfg.seed}, {wanted.num_images} "
        f"images with one (t, noise) draw each, frozen features, prior_precision "
        f"{found['prior_precision']:.3g}, sigma_noise {found['sigma_noise']:.3g}"
    )
    scalars = {f"head_chain/{name}": found[name] for name in _HEADLINES}
    figure = posterior_and_chains(test, found, conditions)
    made = [("head_chain/posterior_and_chains", figure)]
    board.write_study(folder / "tensorboard", scalars, {}, made, study.loggers, pdf=pdf(run))
