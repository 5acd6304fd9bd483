"""Figures of a grid of sigma_noise and prior_precision."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdiff.report.evidence import mark_eigenvalues
from bayesdiff.report.layout import GAP, chart, put, sheet, standard_deviation
from bayesdiff.report.series import plain_number
from bayesdiff.report.style import COLOURS, MAP_COLOURS, look, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PANELS = (
    ("total_variance", "log10 summed variance"),
    ("effective_parameters", "effective parameters"),
    ("image_rank", "rank of images"),
    ("pixel_rank", "rank of pixels"),
    ("evidence", "log10 of evidence lost"),
)


@style()
def map_tiles(
    maps: np.ndarray,
    sigma_noise: Sequence[float],
    prior_precision: Sequence[float],
    *,
    shared: bool,
    conditions: str,
) -> "Figure":
    """One image's map under every setting: rows are sigma_noise, columns prior_precision.

    Args:
        maps: standard deviations ``(S, T, H, W)``; NaN for a setting without a map.
        sigma_noise: S values.
        prior_precision: T values.
        shared: one logarithmic colour scale for all instead of one scale for each.
        conditions: how they were made.
    """
    from matplotlib.colors import LogNorm

    side = max(1, round(64 / max(maps.shape[2:])))
    size = side * maps.shape[3], side * maps.shape[2]
    positive = maps[np.isfinite(maps) & (maps > 0)]
    low, high = np.quantile(positive, (0.001, 0.999)) if positive.size else (0.1, 1.0)
    scale = "one logarithmic colour scale" if shared else "each map with its own colour scale"
    caption = f"Standard deviations of one image, {scale}; empty: no such posterior. {conditions}"
    left, top, width = 92, 62, len(prior_precision) * (size[0] + GAP)
    tall = len(sigma_noise) * (size[1] + GAP)
    title = "Maps over sigma_noise (rows) and prior_precision (columns)"
    figure, axes = sheet(left + width + (110 if shared else 10), top + tall + 6, title, caption)
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(left + width / 2, 18, "prior_precision", **middle)
    axes.text(18, top + tall / 2, "sigma_noise", rotation=90, **middle)
    drawn = None
    for row, sigma in enumerate(sigma_noise):
        y = top + row * (size[1] + GAP)
        axes.text(left - 8, y + size[1] / 2, f"{sigma:.3g}", ha="right", va="center", size=9)
        for column, tau in enumerate(prior_precision):
            x, tile = left + column * (size[0] + GAP), maps[row, column]
            if row == 0:
                axes.text(x + size[0] / 2, top - 8, plain_number(tau), ha="center", size=9)
            if not np.isfinite(tile).all():
                continue
            own = {"vmin": 0, "vmax": tile.max() or 1.0}
            how: dict[str, Any] = {"norm": LogNorm(low, max(high, 1.001 * low))} if shared else own
            drawn = put(axes, np.maximum(tile, low) if shared else tile, x, y, size,
                        cmap=MAP_COLOURS, **how)  # fmt: skip
    if shared and drawn is not None:
        place = (left + width + 10, top, 14, min(tall - GAP, 300))
        bar = axes.inset_axes(place, transform=axes.transData)
        figure.colorbar(drawn, cax=bar).set_label("standard deviation")
    return figure


@style()
def grid_panels(results: Mapping[str, Any], structure: str, conditions: str = "") -> "Figure":
    """Every number of one structure over the grid."""
    found, shape = results["structures"][structure], (2, 3)
    sigma, tau = results["sigma_noise"], results["prior_precision"]
    caption = (
        f"Structure {structure}; Spearman ranks against the maps of structure "
        f"{results['structure']} at the run's own {_own(results)}; empty: no such posterior. "
        f"Last panel: a curve over prior_precision for each sigma_noise. {conditions}"
    )
    figure, panels = chart(1080, 620, "The grid of settings", caption, *shape)
    for axes, (name, title) in zip(panels.flat, _PANELS, strict=False):
        values = np.array(found[name], dtype=float)
        if name == "evidence":
            values = np.log10(1 + np.nanmax(values, initial=-np.inf) - values)
        elif name == "total_variance":
            values = np.log10(values, where=values > 0, out=np.full_like(values, np.nan))
        axes.grid(False)
        drawn = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_title(title)
        axes.set_xticks(range(0, len(tau), 4), [plain_number(value) for value in tau[::4]])
        axes.set_yticks(range(len(sigma)), [f"{value:.3g}" for value in sigma])
        axes.set(xlabel="prior_precision", ylabel="sigma_noise")
        figure.colorbar(drawn, ax=axes)
    _collapse(panels.flat[-1], found["total_variance"], sigma, tau)
    return figure


def _collapse(axes: "Axes", total: Any, sigma: Sequence[float], tau: Sequence[float]) -> None:
    """Variance over sigma_noise^2: one curve if all that matters is tau sigma^2."""
    import matplotlib

    scale = np.square(np.array(sigma, dtype=float))[:, None]
    values = np.array(total, dtype=float) / scale
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(sigma)))
    for row, (x, y) in enumerate(zip(scale * np.array(tau, dtype=float), values, strict=True)):
        how = look(row) | {"color": ramp[row], "linestyle": "-", "linewidth": 0.6, "markersize": 4}
        axes.plot(x, y, label=f"{sigma[row]:.3g}", **how)
    axes.set(xscale="log", yscale="log", xlabel="prior_precision × sigma_noise²")
    axes.set_title("summed variance / sigma_noise²")
    small: dict[str, Any] = {"fontsize": 7, "title_fontsize": 8, "ncols": 2, "handlelength": 1}
    axes.legend(title="sigma_noise", loc="lower left", columnspacing=0.8, **small)


def _own(results: Mapping[str, Any]) -> str:
    own = results["own"]
    return (
        f"sigma_noise {own['sigma_noise']:.4g}, prior_precision {own['prior_precision']:.4g}, "
        f"N_eff {own['n_eff']:g}"
    )


@style()
def over_prior(studies: Mapping[str, Mapping[str, Any]], conditions: str = "") -> "Figure":
    """When prior_precision matters: parameters, variance and ranks over it, a column per study.

    Args:
        studies: results of each model by name; the curve of its own structure is drawn.
        conditions: of the run, for the caption.
    """
    rows = (
        ("effective\nparameters over P", ("effective_parameters",)),
        ("summed variance", ("total_variance",)),
        ("rank with\nown maps", ("image_rank", "pixel_rank")),
    )
    caption = (
        "At each run's own sigma_noise. Dashed: smallest and largest eigenvalue of the "
        "likelihood's precision; square: the run's own prior_precision; triangle: the evidence's. "
        f"{conditions}"
    )
    size = (70 + (270 if len(studies) > 1 else 570) * len(studies), 700)
    title = "When does prior_precision matter?"
    figure, panels = chart(*size, title, caption, 3, len(studies), sharex="col", sharey="row")
    for column, (name, results) in enumerate(studies.items()):
        curve = results["structures"][results["structure"]]["curve"]
        taus = np.array(curve["prior_precision"], dtype=float)
        for axes, (label, keys) in zip(panels[:, column], rows, strict=True):
            for place, key in enumerate(keys):
                values = np.array(curve[key], dtype=float)
                if key == "effective_parameters":
                    values = values / results["parameters"]
                how = look(place) | {"markevery": max(1, len(taus) // 8)}
                axes.plot(taus, values, label=key.replace("_rank", "s"), **how)
            axes.set(xscale="log", ylabel=label if column == 0 else "")
            mark_eigenvalues(axes, results["eigenvalues"], (taus.min(), taus.max()))
        _mark_priors(panels[0, column], results, taus)
        panels[0, column].set_title(name)
        panels[1, column].set_yscale("log")
        panels[2, column].set(xlabel="prior_precision")
    panels[2, 0].legend(loc="best")
    return figure


def _mark_priors(axes: "Axes", results: Mapping[str, Any], taus: np.ndarray) -> None:
    """The run's own prior_precision and the evidence's choice, along the foot of the axes."""
    foot: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "linestyle": "none",
        "clip_on": False,
    }
    axes.plot(results["own"]["prior_precision"], 0.04, "s", color=COLOURS[2], markersize=7, **foot)
    best = results["best"].get("prior_precision")
    if best is not None:
        axes.plot(best, 0.04, "^", color=COLOURS[3], markersize=7, **foot)
    axes.set_xlim(taus.min(), taus.max())


def every(
    results: Mapping[str, Any], arrays: Mapping[str, Tensor], conditions: str = ""
) -> Iterator[tuple[str, "Figure"]]:
    """All figures of a grid, made when they are asked for.

    Args:
        results: numbers of the grid.
        arrays: maps ``(S, T, N, C, H, W)`` of every structure.
        conditions: of the run, for the captions.

    Yields:
        Tag and figure.
    """
    yield (
        "ablation/over_prior",
        over_prior({f"structure {results['structure']}": results}, conditions),
    )
    axes = results["sigma_noise"], results["prior_precision"]
    for name in results["structures"]:
        yield f"ablation/grid_{name}", grid_panels(results, name, conditions)
        variance = arrays[name][:, :, 0]
        maps = np.where(variance.isnan().any(2).numpy(), np.nan, standard_deviation(variance))
        for shared in (False, True):
            kind = "shared" if shared else "own"
            what = f"Structure {name}, sample 0 of {results['num_images']}. {conditions}"
            figure = map_tiles(maps, *axes, shared=shared, conditions=what)
            yield f"ablation/maps_{name}_{kind}_scale", figure
