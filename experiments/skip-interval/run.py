"""Does a skip interval leave the order of the images as it is?

    python experiments/skip-interval/run.py [MODEL ...] [seed=N ...] [KEY=VALUE ...]

Trainings and maps are kept in the run folders, so an interrupted study goes on where it was;
models and seeds of an earlier call with the same overrides stay in results.json.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.cli import one_line_errors
from bayesdiff.metrics.agreement import ranks, spearman
from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.metrics.selection import top_recall
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import finite, write_json, write_text
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.script import Asked
from bayesdiff.uncertainty import Ensemble, Estimator, Linearised, Published

HERE = Path(__file__).parent
STEPS, IMAGES, TENTH = 20, 200, 0.1
COMMON = [
    *("data=digits", "trainer.max_epochs=40", f"solver.num_steps={STEPS}"),
    *("uncertainty=ensemble", "metrics.num_images=0"),
]
MODELS = {
    "flow": ["model=flow", "solver=euler"],
    "ddim": ["model=diffusion", "solver=ddim"],
    "dpmpp": ["model=diffusion", "solver=dpmpp_2m"],
}
SEEDS = (0, 1, 2)  # of training, noise and the estimators' draws
OTHER = 100  # is added to the seed of the draws to see what chance does
SKIPS = (1, 2, 3, 4, 5, 8)
ESTIMATORS: dict[str, Callable[[int, int], Estimator]] = {
    "ensemble": lambda skip, seed: Ensemble(
        members=16, noise_members=0, skip_interval=skip, seed=seed
    ),
    "linearised": lambda skip, seed: Linearised(
        draws=16, derivative="difference", noise_draws=0, skip_interval=skip, seed=seed
    ),
    "published": lambda skip, seed: Published(mc_samples=10, skip_interval=skip, seed=seed),
}
MAIN = "flow.linearised"  # of the keys without a model
MEASURES = ("rank", "top_tenth_overlap", "bottom_tenth_overlap", "crossed", "size")
TABLE = ("rank", "top_tenth_overlap", "bottom_tenth_overlap", "crossed")


def configuration(model: str, seed: int, *more: str) -> DictConfig:
    """Of one training, as train.py would compose it."""
    return pipeline.compose(*MODELS[model], *COMMON, f"seed={seed}", *more)


def summed_maps(cfg: DictConfig) -> dict[str, dict[str, Tensor]]:
    """Summed variance ``(IMAGES,)`` of every estimator at every skip interval, and by other draws.

    Whatever does not exist is made.
    """
    seed = cfg.seed
    run, solver, own, laplace = pipeline.prepare(cfg)
    weights = fit(run, laplace)
    run.model.to(run.device).eval()
    posterior = laplace.fit(run.model, run.data.data)
    pool = ImagePool(Setup(run, solver, own, posterior, weights), IMAGES, seed)

    def summed(estimator: Estimator) -> Tensor:
        return pool.maps(estimator).variance.double().flatten(1).sum(1)

    return {
        name: {str(skip): summed(make(skip, seed)) for skip in SKIPS}
        | {"other": summed(make(1, seed + OTHER))}
        for name, make in ESTIMATORS.items()
    }


def compare(sums: Tensor, unskipped: Tensor) -> dict[str, float]:
    """How one ranking of the images agrees with the unskipped one.

    ``crossed`` is the number of images in the top tenth of one and the bottom tenth of the other;
    ``size`` the ratio of the means, which no ranking sees.
    """
    ends = [extremes(each) for each in (sums, unskipped)]
    return {
        "rank": float(spearman(sums, unskipped)),
        "top_tenth_overlap": float(top_recall(sums, ends[1][0], TENTH)),
        "bottom_tenth_overlap": float(top_recall(-sums, ends[1][1], TENTH)),
        "crossed": int((ends[0][0] & ends[1][1] | ends[0][1] & ends[1][0]).sum()),
        "size": float(sums.mean() / unskipped.mean()),
    }


def extremes(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image is in the top, and in the bottom tenth, bool ``(N,)`` each."""
    place, size = ranks(sums), round(TENTH * len(sums))
    return place >= len(sums) - size, place < size


def of_seed(maps: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """``ESTIMATOR.skip.K.MEASURE``; the same with ``other_draws`` for unskipped ones by others.

    ``ESTIMATOR.skip.1.MEASURE_other_draws`` is what chance alone does to the ranking.
    """
    measured = {}
    for name, sums in maps.items():
        for suffix, unskipped in (("", sums["1"]), ("_other_draws", sums["other"])):
            for skip in SKIPS:
                for measure, value in compare(sums[str(skip)], unskipped).items():
                    measured[f"{name}.skip.{skip}.{measure}{suffix}"] = value
    return measured


def over_seeds(seeds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means with their intervals, cut at what shares and ranks can be; of ``crossed`` the most."""
    together = {}
    for name in next(iter(seeds.values())):
        values = [measured[name] for measured in seeds.values()]
        mean, low, high = mean_interval(values)
        if "rank" in name or "overlap" in name:
            low, high = max(low, 0.0 if "overlap" in name else -1.0), min(high, 1.0)
        together |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        if "crossed" in name:
            together[f"{name}_most"] = max(values)
    return together


def cell(flat: dict[str, float], name: str) -> str:
    """Mean and interval, cut to three digits."""
    mean, low, high = (flat[name + end] for end in ("", "_low", "_high"))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def rows_of(model: str, flat: dict[str, float]) -> list[dict[str, Any]]:
    """One line for each estimator and skip interval, and one for what chance does."""
    lines = []
    for name in ESTIMATORS:
        for skip, suffix in ((1, "_other_draws"), *((k, "") for k in SKIPS if k > 1)):
            place = f"{name}.skip.{skip}"
            line: dict[str, Any] = {"model": model, "estimator": name}
            line["skip"] = "1, other draws" if suffix else str(skip)
            for measure in TABLE[:3]:
                line[measure.replace("_", " ")] = cell(flat, f"{place}.{measure}{suffix}")
            line["crossed, most of a seed"] = int(flat[f"{place}.crossed{suffix}_most"])
            line["rank, other draws"] = cell(flat, f"{place}.rank_other_draws")
            line["size"] = f"{flat[f'{place}.size{suffix}']:.3g}"
            lines.append(line)
    return lines


@style()
def draw(flats: dict[str, dict[str, float]], seeds: int, conditions: dict[str, Any]) -> Any:
    """Rank and overlaps over the skip interval; dashed: unskipped maps by other draws."""
    caption = (
        f"{conditions['data'].capitalize()}, {conditions['steps']} steps, {conditions['images']} "
        f"images ranked by the sum of their map, {seeds} trainings; mean and 95 % interval over "
        "them. Solid: against the unskipped ranking of the same draws. "
        "Dashed: two unskipped rankings of different draws, so what chance alone does. Dotted: an "
        "overlap by chance."
    )
    title = "What a skip interval does to the ranking of the images"
    measures = ("rank", "top_tenth_overlap", "bottom_tenth_overlap")
    figure, axes = chart(1080, 280 * len(flats), title, caption, len(flats), 3, sharey="col")
    for row, (model, flat) in enumerate(flats.items()):
        for axis, measure in zip(axes[row], measures, strict=True):
            for place, name in enumerate(ESTIMATORS):
                how = look(place) | {"linestyle": "-"}  # dashed has another meaning
                colour = how["color"]
                at = [f"{name}.skip.{skip}.{measure}" for skip in SKIPS]
                ends = [[flat[f"{where}_{end}"] for where in at] for end in ("low", "high")]
                axis.fill_between(SKIPS, *ends, color=colour, alpha=0.15, linewidth=0)
                axis.plot(SKIPS, [flat[where] for where in at], label=name, **how)
                chance = flat[f"{name}.skip.1.{measure}_other_draws"]
                axis.axhline(chance, color=colour, linestyle="--", linewidth=1)
            axis.set(xticks=SKIPS, ylim=(min(-0.1, axis.get_ylim()[0]), 1.04))
            axis.set_title(f"{model}: {measure.replace('_', ' ')}")
            if measure != "rank":
                axis.axhline(TENTH, color="0.4", linestyle=":", linewidth=1)
            if row == len(flats) - 1:
                axis.set_xlabel("skip interval")
    axes[0, 0].legend(loc=(0.42, 0.43))
    return figure


def write(
    models: dict[str, dict[str, dict[str, float]]],
    conditions: dict[str, Any],
    overrides: list[str],
) -> None:
    """results.json, the table and the figure, of the numbers of every seed of every model."""
    flats = {model: over_seeds(seeds) for model, seeds in models.items()}
    flat = {f"{model}.{key}": value for model, own in flats.items() for key, value in own.items()}
    main = {k.removeprefix(f"{MAIN}."): v for k, v in flat.items() if k.startswith(f"{MAIN}.")}
    conditions = conditions | {
        "keys_without_a_model": MAIN,
        "seeds": {model: list(seeds) for model, seeds in models.items()},
        "estimators": {name: repr(make(1, 0)) for name, make in ESTIMATORS.items()},
    }
    results = {**main, **flat, "overrides": overrides, "conditions": conditions, "models": models}
    write_json(HERE / "results.json", finite(results))
    rows = [row for model, own in flats.items() for row in rows_of(model, own)]
    write_text(HERE / "table.md", table.markdown(rows))
    seeds = min(len(each) for each in models.values())
    figures.save(draw(flats, seeds, conditions), HERE / "skip-interval.png")


def main(arguments: list[str]) -> None:
    """Measure the models asked for."""
    asked = Asked.of(arguments, MODELS, "seed")
    models = asked.kept(HERE / "results.json", "models")
    for seed in map(int, asked.options["seed"] or SEEDS):
        for name in asked.names or MODELS:
            cfg = configuration(name, seed, *asked.overrides)
            models.setdefault(name, {})[str(seed)] = of_seed(summed_maps(cfg))
            conditions = {
                "data": cfg.data.name,
                "epochs": cfg.trainer.max_epochs,
                "images": IMAGES,
                "steps": cfg.solver.num_steps,
            }
            made = {name: models[name] for name in MODELS if name in models}
            write(made, conditions, asked.recorded)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
