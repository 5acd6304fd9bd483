"""The head's posterior against long Hamiltonian Monte Carlo chains that know the loss alone.

    python experiments/head-chain/run.py [KEY=VALUE ...]

Training and chains are made if they do not exist, and kept in the run folder.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from scipy import stats
from torch import Tensor, nn

from bayesdiff import pipeline
from bayesdiff.artefacts import key_of, read_arrays, weights_key, write_arrays, write_json
from bayesdiff.build import Run
from bayesdiff.laplace.chain import effective_draws, sample_chains, scale_reduction
from bayesdiff.laplace.curvature import batches, fit_curvature
from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report.layout import chart, save, style
from bayesdiff.training import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = ["model=flow", "data=digits", "seed=1"]
PASS = {"num_images": 300, "batch_size": 300, "seed": 0}
CHAINS = {"draws": 500, "warmup": 20, "step": math.pi / 10}
COUNT = 64
PREDICTED, EVERY = 20, 16  # images and draws that predictions are compared on
STRUCTURES = ("full", "kron", "diag", "empirical_fisher")
DRAWS = (1, 4, 16)  # of (t, noise) per image, for the distance over all images
QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def load(*more: str) -> tuple[Run, HeadPosterior]:
    """The trained model and the posterior that its own run would use."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg: DictConfig = compose("train", [*MODEL, *more])
    run, _, _, laplace = pipeline.prepare(cfg)
    fit(run, laplace)
    run.model.to(run.device).eval()
    return run, laplace.fit(run.model, run.data.data)


@dataclass(frozen=True)
class Study:
    """One pass over a few images, and the chains on the very same features and targets.

    Attributes:
        posterior: of that pass, structure full.
        draws: ``(S, K, C_out, P)``.
        acceptance: ``(K,)``.
        seconds: of one core that the chains took.
        features: ``(1, B, D, h, w)`` of some images, to compare predictions on.
    """

    posterior: HeadPosterior
    draws: Tensor
    acceptance: Tensor
    seconds: float
    features: Tensor

    @classmethod
    def make(cls, run: Run) -> "Study":
        """Run the chains, or read them where they have been run."""
        data = run.data.data
        source = "-".join([weights_key(run.model), data.fingerprint, key_of(PASS)])
        curvature = fit_curvature(run.model, data.images, data.labels, source=source, **PASS)
        posterior = HeadPosterior.fit(curvature, prior_precision=1.0)
        features, target = seen(run)
        key = key_of(pipeline.settings_of(posterior), CHAINS, COUNT)
        path = run.folder / f"head-chain-{key[:8]}.npz"
        kept = read_arrays(path, key)
        if kept is None:
            began = time.process_time()
            chains = sample_chains(
                loss_of(run, posterior, features, target),
                start_of(posterior),
                torch.linalg.cholesky(posterior.covariance),
                generator=torch.Generator().manual_seed(0),
                **CHAINS,
            )
            seconds = torch.tensor(time.process_time() - began)
            kept = {"draws": chains.draws, "acceptance": chains.acceptance, "seconds": seconds}
            write_arrays(path, key, kept)
        made = kept["draws"], kept["acceptance"], float(kept["seconds"])
        return cls(posterior, *made, features[:, :PREDICTED])


def start_of(posterior: HeadPosterior) -> Tensor:
    """Starts ``(K, C_out, P)`` around the trained weights, twice as wide as the posterior."""
    mean = posterior.curvature.mean
    return mean + 2 * (posterior.draw(COUNT, torch.Generator().manual_seed(1)) - mean)


@torch.no_grad()
def seen(run: Run) -> tuple[Tensor, Tensor]:
    """Features ``(1, B, D, h, w)`` and targets ``(B, C, H, W)`` of the pass, float64."""
    data = run.data.data
    parts = list(batches(run.model, data.images, data.labels, **PASS))
    features = torch.cat([part.features for part in parts]).double().cpu()
    return features[None], torch.cat([part.target for part in parts]).double().cpu()


def loss_of(
    run: Run, posterior: HeadPosterior, features: Tensor, target: Tensor
) -> Callable[[Tensor], Tensor]:
    """Negative log posterior of weights, through the network's own head and fold."""
    net, noise, tau = run.model.net, posterior.sigma_noise, posterior.prior_precision

    def loss(weights: Tensor) -> Tensor:
        output = apply_head(net.head, features, weights)
        images = net.fold(output.flatten(0, 1)).unflatten(0, output.shape[:2])
        fit = (images - target).square().sum((1, 2, 3, 4)) / (2 * noise**2)
        return fit + tau / 2 * weights.square().sum((1, 2))

    return loss


def structures(study: Study) -> dict[str, HeadPosterior]:
    """The posteriors to compare, all of the same pass, noise level and prior."""
    given = study.posterior
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


def measure(study: Study, head: nn.Module) -> dict[str, Any]:
    """Every number, by flat names."""
    draws = study.draws.flatten(2)
    flat = draws.flatten(0, 1)
    ess = effective_draws(draws)
    spread = effective_draws((draws - flat.mean(0)).square())
    found: dict[str, Any] = {
        "chain.chains": draws.shape[1],
        "chain.draws": len(flat),
        "chain.seconds": round(study.seconds, 1),
        "chain.acceptance": float(study.acceptance.mean()),
        "chain.ess_min": float(ess.min()),
        "chain.ess_median": float(ess.median()),
        "chain.ess_of_squares_median": float(spread.median()),
        "chain.r_hat_max": float(scale_reduction(draws).max()),
        "weights": flat.shape[1],
        "sigma_noise": study.posterior.sigma_noise,
        "distance_from_optimum": study.posterior.distance,
    }
    found |= marginals(study.posterior, flat, ess) | joint(study.posterior, draws, ess)
    own = flat.std(0)
    predicted = apply_head(head, study.features, study.draws.flatten(0, 1)[::EVERY]).var(0)
    for name, posterior in structures(study).items():
        predictive = (posterior.predictive_variance(study.features[0]) / predicted).sqrt()
        found |= spread_of(f"{name}.sd_ratio", sds(posterior) / own)
        found |= spread_of(f"{name}.predictive_sd_ratio", predictive.flatten())
    error = sds(study.posterior) / own - 1
    found["full.sd_error_rms"] = float(error.square().mean().sqrt())
    found["full.sd_error_max"] = float(error.abs().max())
    found["full.sd_error_of_the_chain"] = float((0.5 / spread).mean().sqrt())
    return found


def spread_of(name: str, ratios: Tensor) -> dict[str, float]:
    """Median and the ends of the middle 90 %."""
    found = ratios.quantile(torch.tensor([0.5, 0.05, 0.95], dtype=ratios.dtype)).tolist()
    ends = ("median", "5_percent", "95_percent")
    return {f"{name}_{end}": value for end, value in zip(ends, found, strict=True)}


def marginals(posterior: HeadPosterior, flat: Tensor, ess: Tensor) -> dict[str, float]:
    """Kolmogorov-Smirnov of every weight, around the optimum and around the trained weights."""
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
    """All weights together; what is expected is the error of as many independent draws."""
    truth = torch.block_diag(*[posterior.covariance] * len(posterior.curvature.mean))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(truth),
        (draws.flatten(0, 1) - posterior.optimum.flatten()).T,
        upper=False,
    ).T
    found = {}
    squares = white.square().sum(1)
    count = effective_draws(squares.unflatten(0, draws.shape[:2]))
    test = stats.kstest(squares.numpy(), "chi2", args=(white.shape[1],)).statistic
    found["mahalanobis.mean_over_weights"] = float(squares.mean()) / white.shape[1]
    found["mahalanobis.sd_over_chi2"] = float(squares.std()) / math.sqrt(2 * white.shape[1])
    found["mahalanobis.ks_p"] = float(stats.kstwobign.sf(test * math.sqrt(float(count))))
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


def distances(run: Run, posterior: HeadPosterior) -> dict[str, float]:
    """Distance of the run's own posterior, and with more (t, noise) draws per image."""
    data, found = run.data.data, {"run.distance_from_optimum": posterior.distance}
    for draws in DRAWS:
        curvature = fit_curvature(
            run.model, data.images, data.labels, source="distance", draws=draws, seed=1
        )
        whole = HeadPosterior.fit(curvature, prior_precision=1.0)
        found[f"run.distance_from_optimum_{draws}_draws"] = whole.distance
    return found


@style()
def figure(study: Study, found: dict[str, Any], path: Path) -> None:
    """Marginals of six weights, all weights against the normal, and what each structure costs."""
    posterior = study.posterior
    flat, scale = study.draws.flatten(2).flatten(0, 1), sds(posterior)
    order = scale.argsort()
    chosen = [int(order[round(q * (len(order) - 1))]) for q in QUANTILES]
    caption = (
        f"Digits flow, seed 1, {PASS['num_images']} images with one (t, noise) draw each, frozen "
        f"features. {found['chain.chains']} chains, {found['chain.draws']} draws, effective "
        f"{found['chain.ess_min']:.0f} or more. Histograms: six of {len(scale)} weights, from the "
        "smallest to the largest posterior sd. Orange: the closed form around the optimum of the "
        "regularised loss; dashed: the same around the trained weights, "
        f"{posterior.distance:.2f} times as far from it as a typical draw. Below on the right: "
        "sd of all weights under each structure over the chains'; boxes: middle half of the "
        "weights, whiskers: 5 % to 95 %."
    )
    title = "The head's posterior against Hamiltonian Monte Carlo"
    drawn, panels = chart(1300, 620, title, caption, 2, 4)
    for axes, index, q in zip(panels.flat, chosen, QUANTILES, strict=False):
        histogram(axes, flat[:, index], posterior, index, float(scale[index]))
        axes.set_title(f"sd at its {100 * q:.0f} % quantile" if 0 < q < 1 else
                       f"{'largest' if q else 'smallest'} sd")  # fmt: skip
    panels[0, 0].legend(loc="upper left", fontsize=7)
    normal_plot(panels[1, 2], ((flat - posterior.optimum.flatten()) / scale).numpy())
    costs(panels[1, 3], study)
    save(drawn, path)


def histogram(
    axes: "Axes", values: Tensor, posterior: HeadPosterior, index: int, scale: float
) -> None:
    """One weight: the chains' draws and the closed form's densities."""
    best, mean = (float(w.flatten()[index]) for w in (posterior.optimum, posterior.curvature.mean))
    axes.hist(values.numpy(), 60, density=True, color="0.75", label="chains")
    ends = min(best, mean) - 4 * scale, max(best, mean) + 4 * scale
    x = np.linspace(*ends, 300)
    axes.plot(x, stats.norm.pdf(x, best, scale), color="C1", label="optimum")
    look: dict[str, Any] = {"color": "C0", "linestyle": "--", "linewidth": 1}
    axes.plot(x, stats.norm.pdf(x, mean, scale), label="trained", **look)
    axes.set(xlim=ends, yticks=[], xlabel="weight", ylim=(0, 0.55 / scale))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(False)


def normal_plot(axes: "Axes", z: np.ndarray) -> None:
    """Quantiles of all standardised weights over those of the normal: median and extremes."""
    shares = stats.norm.cdf(np.linspace(-3, 3, 61))
    x, found = stats.norm.ppf(shares), np.quantile(z, shares, axis=0)
    axes.fill_between(x, found.min(1), found.max(1), color="C0", alpha=0.25, linewidth=0)
    axes.plot(x, np.median(found, 1), color="C0")
    axes.plot(x, x, color="0.3", linestyle="--", linewidth=0.8)
    axes.set(xlabel="normal quantile", ylabel="of the chains", title="all weights, standardised")


def costs(axes: "Axes", study: Study) -> None:
    """Marginal sd of every structure over the chains'."""
    own = study.draws.flatten(2).flatten(0, 1).std(0)
    ratios = {name: (sds(p) / own).numpy() for name, p in structures(study).items()}
    look: dict[str, Any] = {"whis": (5, 95), "showfliers": False, "widths": 0.6}
    labels = [name.replace("empirical_fisher", "empirical\nFisher") for name in ratios]
    axes.axvline(1, color="0.3", linestyle="--", linewidth=0.8)
    axes.boxplot(list(ratios.values()), tick_labels=labels, orientation="horizontal", **look)
    axes.set(xlim=(0, 1.15), xlabel="sd over that of the chains", title="structures, all weights")
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def main() -> None:
    """Write results.json and the figure."""
    run, posterior = load(*sys.argv[1:])
    study = Study.make(run)
    found = measure(study, run.model.net.head) | distances(run, posterior)
    write_json(HERE / "results.json", found)
    figure(study, found, HERE / "head-chain.png")
    for name, value in found.items():
        print(f"{name:42s} {value:.4g}")


if __name__ == "__main__":
    main()
