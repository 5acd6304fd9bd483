"""Which cheap posterior predicts what retraining would change? Structures and rivals, on digits.

    python experiments/structures/run.py [SEED ...]

Each seed is a network under test; the trainings in OTHERS are the deep ensemble it is compared
with. Maps are kept under outputs/structures: an interrupted study goes on where it was.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.progress import track
from bayesdiff.metrics.agreement import agreement, image_rank, pixel_rank
from bayesdiff.models import GenerativeModel
from bayesdiff.report import figures, table
from bayesdiff.report.style import DPI, style
from bayesdiff.runs.build import Run
from bayesdiff.runs.training import fit
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import (
    key_of,
    read_arrays,
    read_json,
    weights_key,
    write_arrays,
    write_json,
    write_text,
)
from bayesdiff.uncertainty import (
    Checkpoints,
    DeepEnsemble,
    Ensemble,
    Estimator,
    MCDropout,
    Starts,
    Swag,
    starts_of,
)
from bayesdiff.uncertainty.members.block_ensemble import BlockEnsemble

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STORE = ROOT / "outputs" / "structures"
COMMON = [
    *("model=flow", "data=digits", "solver=euler", "solver.num_steps=20"),
    *("laplace.time_bins=10", "metrics.num_images=0", "uncertainty=ensemble"),
]
OTHERS = range(1, 9)  # seeds of the other networks of the deep ensemble
IMAGES, BATCH = 256, 64
MEMBERS = 32  # of every posterior under test
REFERENCE = Ensemble(members=128, seed=10_000)
RANK = 16  # of subspace

POSTERIORS: dict[str, dict[str, Any]] = {
    "full": {},
    "full_per_time": {"sigma_noise": "mle_per_time"},
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "empirical_fisher": {"structure": "empirical_fisher"},
    "empirical_fisher_published": {"structure": "empirical_fisher_published"},
    "prior_only": {"structure": "prior_only"},
    "hessian_free": {"structure": "hessian_free"},
    "subspace": {"structure": "subspace", "rank": RANK},
}
# Wider than the head; here the prior matters.
BLOCKS: dict[str, dict[str, float]] = {
    "last_block": {},
    "last_block_tau_100": {"prior_precision": 100.0},
    "last_block_tau_1e4": {"prior_precision": 1e4},
}
RIVALS: dict[str, Estimator] = {
    "mc_dropout": MCDropout(members=MEMBERS, seed=1),
    "mc_dropout_fresh": MCDropout(members=MEMBERS, seed=1, mask="fresh"),
    "checkpoints": Checkpoints(),
    "swag": Swag(members=MEMBERS, seed=1),
}
SHOWN = [*POSTERIORS, *BLOCKS, *RIVALS]


class Bench:
    """One network under test, with its posterior."""

    def __init__(self, seed: int) -> None:
        more = ["callbacks=snapshots", "callbacks.snapshots.every=4", "laplace.subset=last_block"]
        self.seed = seed
        place = f"run_dir={STORE}/seed-{seed}"
        self.run, self.solver, laplace = trained(f"seed={seed}", place, *more)
        self.posterior = laplace.fit(self.run.model, self.run.data.data)
        assert laplace.block is not None
        self.block = laplace.block

    def maps(self, name: str, estimator: Estimator, posterior: HeadPosterior) -> Tensor:
        """Variance ``(IMAGES, C, H, W)`` under an estimator that is still to be fitted."""
        made_from = key_of(repr(estimator), pipeline.settings_of(posterior))
        return self._kept(
            name,
            made_from,
            posterior,
            lambda: estimator.fit(self.starts, posterior, self.run.folder),
        )

    def of_block(self, name: str, **settings: float) -> Tensor:
        """Variance ``(IMAGES, C, H, W)`` under the posterior of head and last block."""
        head = replace(self.posterior, **settings)
        block = replace(self.block, priors=dict.fromkeys(self.block.priors, head.prior_precision))
        ensemble = BlockEnsemble(members=MEMBERS, seed=1, block=block)
        return self._kept(
            name, key_of(block.settings), head, lambda: ensemble.fit(self.starts, head)
        )

    def deep(self, networks: tuple[GenerativeModel, ...], name: str = "deep_ensemble") -> Tensor:
        """Variance ``(IMAGES, C, H, W)`` over networks that were trained apart."""
        made_from = key_of([weights_key(network) for network in networks])
        ready = DeepEnsemble(networks=networks)
        return self._kept(name, made_from, self.posterior, lambda: ready)

    def _kept(
        self, name: str, made_from: str, posterior: HeadPosterior, fit: Callable[[], Estimator]
    ) -> Tensor:
        """Made once."""
        key = key_of(self.run.key, made_from, IMAGES)
        path = STORE / f"seed-{self.seed}" / f"{name}.npz"
        stored = read_arrays(path, key)
        if stored is None:
            ready = fit()
            parts = [
                ready(self.starts(part.tolist()), posterior).variance
                for part in track(list(torch.arange(IMAGES).split(BATCH)), name)
            ]
            stored = {"variance": torch.cat(parts)}
            write_arrays(path, key, stored)
        return stored["variance"]

    @property
    def starts(self) -> Starts:
        """Starts of the run's own samples."""
        run = self.run
        shape = run.data.data.images.shape[1:]
        return starts_of(run.model, self.solver, run.cfg.seed, shape, run.device)


def trained(*more: str) -> tuple[Run, Solver, LastLayerLaplace]:
    """A run with its network, which is trained if it does not exist."""
    cfg = pipeline.compose(*COMMON, *more)
    run, solver, _, laplace = pipeline.prepare(cfg)
    fit(run, laplace)
    run.model.to(run.device).eval()
    return run, solver, laplace


def compared(bench: Bench, networks: tuple[GenerativeModel, ...]) -> dict[str, Any]:
    """Every posterior and rival against both references."""
    full = bench.maps("reference", REFERENCE, bench.posterior)
    deep = bench.deep((bench.run.model, *networks))
    half = len(networks) // 2
    halves = [
        bench.deep(part, f"deep_ensemble-{which}")
        for which, part in zip("ab", (networks[:half], networks[half:]), strict=True)
    ]
    found: dict[str, Any] = {
        "deep_ensemble": {
            "networks": len(networks) + 1,
            "reliability_image": corrected(image_rank(*halves)),
            "reliability_pixel": corrected(pixel_rank(*halves)),
            "summed_variance": float(deep.flatten(1).sum(1).mean()),
            **against(deep, full, ""),
        }
    }
    for name, make in under_test(bench).items():
        variance = make()
        found[name] = against(variance, full, "") | against(variance, deep, "deep_")
    return found


def under_test(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """What makes the maps of every posterior and rival."""
    ensemble, posterior = Ensemble(members=MEMBERS, seed=1), bench.posterior
    made: dict[str, Callable[[], Tensor]] = {}
    for name, settings in POSTERIORS.items():
        one = HeadPosterior.fit(posterior.curvature, **settings)
        made[name] = lambda name=name, one=one: bench.maps(name, ensemble, one)
    for name, block in BLOCKS.items():
        made[name] = lambda name=name, block=block: bench.of_block(name, **block)
    for name, rival in RIVALS.items():
        made[name] = lambda name=name, rival=rival: bench.maps(name, rival, posterior)
    return made


def against(variance: Tensor, reference: Tensor, prefix: str) -> dict[str, float]:
    """Ranks and size, each with its interval over images."""
    found = agreement(variance, reference, seed=0)
    return {prefix + name: value for name, value in found.items()}


def corrected(half: float) -> float:
    """Spearman-Brown: reliability of the whole from the correlation of its halves."""
    return 2 * half / (1 + half)


def gather(seeds: dict[str, dict[str, Any]]) -> None:
    """results.json, the table and the figure; flat keys are those of the first seed."""
    first = next(iter(seeds.values()))
    flat = {
        f"{name}.{statistic}": value
        for name, numbers in first.items()
        for statistic, value in numbers.items()
    }
    write_json(HERE / "results.json", {**flat, "seeds": seeds})
    rows = [row(name, numbers) for name, numbers in first.items()]
    write_text(HERE / "table.md", table.markdown(rows))
    draw(seeds)


def row(name: str, numbers: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    line = {"posterior": name}
    for prefix, reference in (("", "full"), ("deep_", "deep ensemble")):
        for statistic in ("image_rank", "pixel_rank", "spread_ratio"):
            found = prefix + statistic
            ends = (numbers.get(found, float("nan")),)
            ends += tuple(numbers.get(f"{found}_{end}", float("nan")) for end in ("low", "high"))
            text = "{:.2f} [{:.2f}, {:.2f}]" if statistic != "spread_ratio" else "{:.3g}"
            title = f"{statistic.replace('_', ' ')}, {reference}".replace("spread ratio", "size")
            line[title] = text.format(*ends) if found in numbers else ""
    return line


@style()
def draw(seeds: dict[str, dict[str, Any]]) -> None:
    """Ranks against both references, a dot with its interval for every network under test."""
    from matplotlib.figure import Figure

    names = [name for name in set.intersection(*map(set, seeds.values())) if name in SHOWN]
    names.sort(key=SHOWN.index)
    figure = Figure(figsize=(8.2, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    references = (("", "the full posterior, 128 members"), ("deep_", "a deep ensemble"))
    for axis, (prefix, title) in zip(axes, references, strict=True):
        for metric, color in (("image_rank", "#0072B2"), ("pixel_rank", "#D55E00")):
            for number, one in enumerate(seeds.values()):
                place = [y + 0.12 * number + 0.3 * (color == "#D55E00") for y in range(len(names))]
                ends = [[one[n][f"{prefix}{metric}{end}"] for n in names] for end in ENDS]
                axis.hlines(place, ends[1], ends[2], color=color, linewidth=1.5)
                label = metric.replace("_", " ") if not number else None
                mark = "o" if metric == "image_rank" else "s"
                axis.plot(ends[0], place, mark, color=color, markersize=4, label=label)
        axis.set_title(f"against {title}", fontsize=10)
        axis.set_xlabel("rank correlation, 95 % over images")
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.grid(False, axis="y")
    axes[0].set_yticks([y + 0.2 for y in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower left")
    figure.set_label("Ranks of maps against two references")
    figures.save(figure, HERE / "structures.png")


ENDS = ("", "_low", "_high")


def main(seeds: list[int]) -> None:
    """Train what is missing, compare, and write."""
    networks = {seed: trained(f"seed={seed}")[0].model for seed in OTHERS}
    stored = (read_json(HERE / "results.json") or {}).get("seeds", {})
    for seed in seeds:
        others = tuple(model for other, model in networks.items() if other != seed)
        stored[str(seed)] = compared(Bench(seed), others)
        gather(stored)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [0])
