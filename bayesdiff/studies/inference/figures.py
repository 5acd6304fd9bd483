"""Figures of latent inference: posteriors, ranks, and what was observed."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from bayesdiff.report.layout import chart
from bayesdiff.report.style import COLOURS, style
from bayesdiff.studies.inference.calibration import DRAWS, band
from bayesdiff.studies.inference.shown import Shown
from bayesdiff.studies.inference.simplex import RESOLUTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRACES = 4  # chains that are drawn
_POINTS = 1500
_BARS = 36  # of a marginal, about


def every(shown: Shown, conditions: str = "") -> Iterator[tuple[str, "Figure"]]:
    """All figures.

    Args:
        shown: numbers and draws.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    yield "inference/weights", weights(shown, conditions)
    yield "inference/ranks", ranks(shown.results, conditions)
    yield "inference/observations", observations(shown, conditions)


@style()
def weights(shown: Shown, conditions: str = "") -> "Figure":
    """Marginals of the weights above traces of a few chains."""
    found, made = shown.results["weights"], shown.results["conditions"]
    fast, off = shown.results["speedup"], shown.results["referee"]
    count = len(found["truth"])
    caption = (
        f"Posterior of the mixture's weights from {made['observations']} observations with noise "
        f"{made['noise']:g}. Above: all draws, the grid over the same likelihoods (line), the "
        f"truth (dashed) and 95 % intervals (bars). Below: the first {_TRACES} chains after their "
        f"warm-up. {found['chains']} chains of {found['draws']} draws, largest R-hat "
        f"{found['r_hat_max']:.4f}, fewest effective draws {min(found['ess']):.0f}, "
        f"{found['divergences']} divergences; means are off the grid's by "
        f"{off['mean_off']:.3f} sd at most. Effective draws per second: {fast['speedup']:.1f} "
        f"times those of one chain by itself, {fast['threads']} thread"
        f"{'' if fast['threads'] == 1 else 's'}. {conditions}"
    )
    title = "Posterior of the weights"
    figure, panels = chart(310 * count, 470, title, caption, 2, count)
    for k in range(count):
        _marginal(panels[0, k], shown, k)
        panels[0, k].set(xlabel=f"weight {k + 1}", yticks=[])
        for place, chain in enumerate(shown.draws[:_TRACES, :, k]):
            panels[1, k].plot(chain, color=COLOURS[place], linewidth=0.5)
        panels[1, k].axhline(found["truth"][k], color="0.2", linestyle="--", linewidth=1)
        panels[1, k].set(xlabel="draw", ylabel=f"weight {k + 1}")
    panels[0, 0].set_ylabel("density")
    panels[0, 0].legend(loc="upper left", fontsize=8)
    return figure


def _marginal(axes: "Axes", shown: Shown, k: int) -> None:
    found = shown.results["weights"]
    values = shown.draws[..., k].flatten().numpy()
    centre, reach = shown.results["referee"]["mean"][k], 4.5 * shown.results["referee"]["sd"][k]
    # A bar holds whole cells of the grid: as many of them as any other bar.
    cells = max(1, round(2 * reach * RESOLUTION / _BARS))
    ends = (centre - reach) * RESOLUTION // cells, (centre + reach) * RESOLUTION // cells + 1
    bins = [edge * cells / RESOLUTION for edge in range(int(ends[0]), int(ends[1]) + 1)]
    axes.hist(values, bins, density=True, color=COLOURS[0], alpha=0.35, label="chains")
    mass, of_weight = shown.grid.mass.numpy(), shown.grid.weights[:, k].numpy()
    line: dict[str, Any] = {"histtype": "step", "color": COLOURS[1], "linewidth": 1.4}
    axes.hist(of_weight, bins, density=True, weights=mass, label="grid", **line)
    top = axes.get_ylim()[1]
    axes.vlines(found["truth"][k], 0, top, color="0.2", linestyle="--", label="truth")
    axes.plot([found["low"][k], found["high"][k]], [0.03 * top] * 2, color="0.1", linewidth=4)
    axes.set_ylim(0, 1.7 * top)


@style()
def ranks(results: Mapping[str, Any], conditions: str = "") -> "Figure":
    """Histograms of ranks of the truth, with the band of uniform ones."""
    sbc, latents, made = results["sbc"], results["latents"], results["conditions"]
    rows = [(sbc, "weight"), (latents, "latent"), (latents["weighted"], "weighted latent")]
    caption = (
        f"Where truths lie among draws of their posteriors; band: 95 % of the bars if ranks are "
        f"uniform. Above: weights of {made['repeats']} mixtures from the prior among {DRAWS} "
        f"posterior draws, {made['repeat_observations']} observations each. Middle: latents of "
        f"{made['truths']} heads from the posterior among what {made['heads']} other heads find "
        "for the same state; below: the same with heads weighted by their density of the state, "
        "which is exact. p-values: chi-square; smallest, corrected for their number "
        f"(Bonferroni): {', '.join(format(part['p_corrected'], '.3g') for part, _ in rows)}. "
        f"Standard deviation of latents over heads {_listed(latents['spread'])}, round trip of "
        f"the solver {_listed(latents['round_trip'])}; 90 % intervals cover "
        f"{_listed(latents['coverage'])}. {conditions}"
    )
    columns = max(len(part["p"]) for part, _ in rows)
    figure, panels = chart(300 * columns, 640, "Ranks of truths", caption, 3, columns)
    for row, (part, name) in enumerate(rows):
        for k in range(columns):
            panels[row, k].set_visible(k < len(part["p"]))
        for k, p in enumerate(part["p"]):
            _histogram(panels[row, k], part["counts"][k])
            panels[row, k].set_title(f"{name} {k + 1}: p = {p:.3g}")
            panels[row, k].set_ylabel("truths" if k == 0 else "")
            lowest = row == len(rows) - 1 or k >= len(rows[row + 1][0]["p"])
            panels[row, k].set_xlabel("draws below the truth" if lowest else "")
    return figure


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _histogram(axes: "Axes", counts: list[int]) -> None:
    bins, total = len(counts), sum(counts)
    axes.axhspan(*band(total, bins), color="0.88", zorder=0)
    axes.axhline(total / bins, color="0.4", linewidth=0.8)
    left = [place / bins for place in range(bins)]
    axes.bar(left, counts, 1 / bins, align="edge", color=COLOURS[0], edgecolor="white")
    axes.set(xlim=(0, 1), ylim=(0, max(*counts, 2 * total / bins)))
    axes.grid(False)


@style()
def observations(shown: Shown, conditions: str = "") -> "Figure":
    """Latents and their observations, by pairs of coordinates, in the colours of components."""
    size = shown.latents.shape[1]
    pairs = list(combinations(range(size), 2))
    count = min(len(shown.latents), _POINTS)
    made = shown.results["conditions"]
    caption = (
        f"Above: {count} latents of the mixture, in the colours of its Gaussians. Below: their "
        f"observations, states that the flow makes of them with noise {made['noise']:g}; these "
        f"alone are given to the inference. {conditions}"
    )
    wide = 400
    title = "What is observed"
    figure, panels = chart(wide * len(pairs), 2 * wide, title, caption, 2, len(pairs))
    for row, (points, name) in enumerate(((shown.latents, "latent"), (shown.observed, "state"))):
        for column, (i, j) in enumerate(pairs):
            panel = panels[row, column]
            for k in range(shown.draws.shape[2]):
                own = points[:count][shown.component[:count] == k]
                how: dict[str, Any] = {"color": COLOURS[k], "label": f"Gaussian {k + 1}"}
                panel.scatter(own[:, i], own[:, j], s=3, linewidths=0, **how)
            panel.set(xlabel=f"{name} {i + 1}", ylabel=f"{name} {j + 1}", aspect="equal")
    above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    panels[0, 0].legend(markerscale=3, handlelength=1, columnspacing=1, **above)
    return figure
