"""The figure of the head's posterior against Markov chains."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from torch import Tensor

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report.layout import chart
from bayesdiff.report.style import style
from bayesdiff.studies.head_chain.comparison import ChainTest, sds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the posterior's sd, at which weights have a histogram.
_QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@style()
def posterior_and_chains(test: ChainTest, found: Mapping[str, Any], conditions: str) -> "Figure":
    """Marginals of six weights, all weights against the normal, and what each structure costs.

    Args:
        test: posterior and chains.
        found: their numbers.
        conditions: of model and pass, for the caption.
    """
    posterior, flat = test.posterior, test.flat
    assert posterior.optimum is not None
    scale = sds(posterior)
    order = scale.argsort()
    caption = (
        f"{conditions}. {found['chain.chains']} chains, {found['chain.draws']} draws, effective "
        f"{found['chain.ess_min']:.0f} or more. Histograms: six of {len(scale)} weights, from the "
        "smallest to the largest posterior sd. Orange: the closed form around the optimum of the "
        "regularised loss; dashed: the same around the trained weights, "
        f"{posterior.distance:.2f} times as far from it as a typical draw. Below on the right: "
        "sd of all weights under each structure over the chains'; boxes: middle half of the "
        "weights, whiskers: 5 % to 95 %."
    )
    title = "The head's posterior against Hamiltonian Monte Carlo"
    drawn, panels = chart(1300, 620, title, caption, 2, 4)
    for axes, q in zip(panels.flat, _QUANTILES, strict=False):
        index = int(order[round(q * (len(order) - 1))])
        histogram(axes, flat[:, index], posterior, index, float(scale[index]))
        ends = {0.0: "smallest sd", 1.0: "largest sd"}
        axes.set_title(ends.get(q, f"sd at its {100 * q:.0f} % quantile"))
    panels[0, 0].legend(loc="upper left", fontsize=7)
    normal_plot(panels[1, 2], ((flat - posterior.optimum.flatten()) / scale).numpy())
    costs(panels[1, 3], test)
    return drawn


def histogram(
    axes: "Axes", values: Tensor, posterior: HeadPosterior, index: int, scale: float
) -> None:
    """One weight: the chains' draws and the closed form's densities."""
    assert posterior.optimum is not None
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


def costs(axes: "Axes", test: ChainTest) -> None:
    """Marginal sd of every structure over the chains'."""
    own = test.flat.std(0)
    ratios = {name: (sds(p) / own).numpy() for name, p in test.structures.items()}
    look: dict[str, Any] = {"whis": (5, 95), "showfliers": False, "widths": 0.6}
    labels = [name.replace("empirical_fisher", "empirical\nFisher") for name in ratios]
    axes.axvline(1, color="0.3", linestyle="--", linewidth=0.8)
    axes.boxplot(list(ratios.values()), tick_labels=labels, orientation="horizontal", **look)
    axes.set(xlim=(0, None), xlabel="sd over that of the chains", title="structures, all weights")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
