"""Does a map find bad images at another time of the trajectory? From the pools of the study.

    python experiments/filtering/over_time.py [MODEL ...] [KEY=VALUE ...]

The summed variance at every step of the solver is a score like any other: what it gains, and what
it follows. Reads what run.py has made.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run import HERE, MODELS, POOL

from bayesdiff import pipeline
from bayesdiff.data.spaces import to_uint8
from bayesdiff.metrics.features import extract
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.subsets import pool
from bayesdiff.report import figures
from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style
from bayesdiff.runs.scores import judge
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import finite, read_json, write_json
from bayesdiff.studies.filtering.gains import gains
from bayesdiff.studies.filtering.profile import profile
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.uncertainty.scores.of_maps_and_images import IMAGE_SCORES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    "z": "z within classes",
    "auroc_within": "finds wrong images: AUROC within class",
    "rank_total_variation": "rank with total variation",
}


def of_model(model: str, *more: str) -> list[dict[str, Any]]:
    """One row for each time, over the seeds of the pools."""
    cfg = pipeline.compose("experiment=filtering", *POOL, *MODELS[model], *more)
    run, solver, own, laplace = pipeline.prepare(cfg)
    wanted = run.studies["filtering"]
    weights = fit(run, laplace)
    run.model.to(run.device).eval()
    posterior = laplace.fit(run.model, run.data.data)
    setup = Setup(run, solver, own, posterior, weights)
    extractor, reference = judge(run)
    tables = []
    for seed in wanted.seeds:
        made = ImagePool(setup, wanted.num_images, seed)
        samples = made.maps(own).in_model_range()
        labels = samples.labels
        assert labels is not None  # filtering asks for classes
        scores = {
            f"{t:.3f}": v for t, v in zip(samples.times.tolist(), samples.summed, strict=True)
        }
        read = extract(extractor, to_uint8(samples.images), cfg.metrics.batch_size)
        judged = pool(read.features, reference, groups=labels)
        chance = {"seed": wanted.seed, "subsets": wanted.subsets}
        gained = gains(scores, judged, [wanted.main_keep], **chance)
        follows = profile(
            scores, read.logits, labels, IMAGE_SCORES["total_variation"](samples.images)
        )
        z = {row["score"]: row["z"] for row in gained if row["mode"] == "per_class"}
        tables.append([row | {"z": z[row["score"]]} for row in follows])
    rows = over_seeds(tables, ["score"], list(SHOWN))
    return [{"time": float(row.pop("score")), **row} for row in rows]


@style()
def over_time(found: dict[str, list[dict[str, Any]]]) -> "Figure":
    """What the summed variance gains and follows, over the time at which it is read."""
    caption = (
        "Summed variance of the run's own maps at each solver step, t = 1 being the image. "
        "Mean over seeds with its 95 % interval."
    )
    figure, axes = chart(1150, 360, "Maps at other times", caption, 1, len(SHOWN))
    for panel, (name, title) in zip(axes[0], SHOWN.items(), strict=True):
        for place, (model, rows) in enumerate(found.items()):
            times, means = [row["time"] for row in rows], [row[name] for row in rows]
            low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
            panel.plot(times, means, label=model, **look(place))
            panel.fill_between(times, low, high, color=f"C{place}", alpha=0.15, linewidth=0)
        panel.set(title=title, xlabel="time t")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right upper")
    return figure


def main(arguments: list[str], folder: Path = HERE) -> None:
    """Read the models asked for."""
    more = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word] or list(MODELS)
    path = folder / "over-time.json"
    found = read_json(path) or {}
    found |= {name: finite(of_model(name, *more)) for name in names}
    found = {name: found[name] for name in MODELS if name in found}
    write_json(path, found)
    figures.save(over_time(found), folder / "over-time.png")


if __name__ == "__main__":
    main(sys.argv[1:])
