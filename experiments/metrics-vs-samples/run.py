"""How many images does a comparison need? FID and CMMD over the number of images.

    python experiments/metrics-vs-samples/run.py [KEY=VALUE ...]

Training and images are those of ../first-light and ../propagation: the same run folders, and what
exists is not made again. Options such as metrics.num_images=200 go to every run.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.metrics.features import extract
from bayesdiff.metrics.subsets import pool
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style
from bayesdiff.runs.address import images_at
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import judge
from bayesdiff.runs.stages import make_images
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import finite, write_json, write_text
from bayesdiff.studies.sample_sizes import fid_of_infinity, sample_size_curve

HERE = Path(__file__).parent
COMMON = [
    *("data=fashion", "trainer.max_epochs=4", "laplace.num_images=20000"),
    *("metrics.num_images=10000", "uncertainty=ensemble"),
]
MODELS = {
    "fashion_flow": ["model=flow", "solver=euler", "solver.num_steps=20"],
    "fashion_diffusion": ["model=diffusion", "solver=ddim", "solver.num_steps=25"],
}
SIZES = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
SUBSETS, SEED = 100, 0
ENCODER = "classifier"
# Two independent sets of equal size differ by more than this many of their sd once in 20 times.
APART = 1.96 * 2**0.5
NAMES = {
    "fashion_flow": "flow, Euler 20",
    "fashion_diffusion": "diffusion, DDIM 25",
    "real": "real test images",
}


def images_of(model: str, *more: str) -> tuple[Run, Tensor]:
    """A trained model's own images; whatever does not exist is made."""
    cfg = pipeline.compose(*MODELS[model], *COMMON, *more)
    run, solver, _, laplace = pipeline.prepare(cfg)
    weights = fit(run, laplace)
    run.model.to(run.device).eval()
    count = cfg.metrics.num_images
    return run, make_images(run, solver, count, images_at(run, solver, weights))


def curve_of(run: Run, images: Tensor) -> dict[str, Any]:
    """FID and CMMD of the images over their number, and the FID of infinitely many."""
    extractor, reference = judge(run)
    read = extract(extractor, images, run.cfg.metrics.batch_size)
    made = pool(read.features, reference)
    sizes = [size for size in SIZES if size <= len(made)]
    rows = sample_size_curve(made, reference, sizes, encoder=ENCODER, seed=SEED, subsets=SUBSETS)
    infinity = fid_of_infinity(made, seed=SEED)
    for row in rows:
        row["fid_excess"] = row["fid"] - infinity["fid_infinity"]
        for name in ("fid", "cmmd"):
            # Of a fresh set, not of a part of this pool.
            shared = (1 - row["images"] / len(made)) ** 0.5
            row[f"{name}_fresh_sd"] = row[f"{name}_sd"] / shared if shared else float("nan")
            row[f"{name}_apart"] = APART * row[f"{name}_fresh_sd"]
    return {**infinity, "images": len(made), "reference": reference.size, "curve": rows}


def told_apart(one: dict[str, Any], other: dict[str, Any], name: str) -> int | None:
    """The least number of images each for which the two sets differ beyond chance (95 %)."""
    for a, b in zip(one["curve"], other["curve"], strict=True):
        sd = (a[f"{name}_fresh_sd"] ** 2 + b[f"{name}_fresh_sd"] ** 2) ** 0.5
        # In at least 4 of 5 comparisons: 1.96 to be beyond chance, 0.84 more to be so mostly.
        if abs(a[name] - b[name]) > (1.96 + 0.84) * sd:
            return int(a["images"])
    return None


def rows_of(sets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each number of images."""
    lines = []
    for number in range(len(next(iter(sets.values()))["curve"])):
        line: dict[str, Any] = {}
        for name, found in sets.items():
            row = found["curve"][number]
            line["images"] = row["images"]
            for metric in ("fid", "cmmd"):
                text = f"{row[metric]:.3g}"
                if row["images"] < found["images"]:
                    text += f" [{row[f'{metric}_low']:.3g}, {row[f'{metric}_high']:.3g}]"
                line[f"{metric.upper()}, {NAMES[name]}"] = text
        lines.append(line)
    return lines


@style()
def draw(sets: dict[str, dict[str, Any]]) -> Any:
    """FID and CMMD over the number of images, with the interval of a fresh set."""
    count = max(found["images"] for found in sets.values())
    caption = (
        f"Mean over {SUBSETS} random parts of {count:,} images; band: where a fresh set of so "
        "many lies with 95 %. Dashed: FID extrapolated to infinitely many images. Features: the "
        "project's classifier, penultimate layer; reference: 60,000 training images."
    )
    figure, axes = chart(
        900, 400, "FID falls with the number of images, CMMD stays", caption, 1, 2
    )
    for axis, metric in zip(axes[0], ("fid", "cmmd"), strict=True):
        for place, (name, found) in enumerate(sets.items()):
            how = look(place) | {"linestyle": "-"}  # dashed has another meaning
            color = how["color"]
            rows = found["curve"]
            inner = [row for row in rows if row["images"] < found["images"]]
            at = [row["images"] for row in rows]
            axis.plot(at, [row[metric] for row in rows], label=NAMES[name], **how)
            low, high = ([row[f"{metric}_{end}"] for row in inner] for end in ("low", "high"))
            axis.fill_between(at[: len(inner)], low, high, color=color, alpha=0.2, linewidth=0)
            if metric == "fid":
                axis.axhline(found["fid_infinity"], color=color, linestyle="--", linewidth=0.9)
        axis.set(xscale="log", xlabel="images", ylabel=f"{metric.upper()} ({ENCODER})")
    axes[0, 0].set_yscale("log")
    axes[0, 1].axhline(0, color="0.5", linewidth=0.8)
    axes[0, 0].legend()
    return figure


def write(sets: dict[str, dict[str, Any]]) -> None:
    """results.json, the table and the figure."""
    flat: dict[str, Any] = {}
    for name, found in sets.items():
        for key in ("fid_infinity", "fid_infinity_low", "fid_infinity_high", "fid_slope"):
            flat[f"{name}.{key}"] = found[key]
        for row in found["curve"]:
            for metric in ("fid", "cmmd"):
                flat[f"{name}.{metric}@{row['images']}"] = row[metric]
                flat[f"{name}.{metric}_apart@{row['images']}"] = row[f"{metric}_apart"]
    flow, diffusion = sets["fashion_flow"], sets["fashion_diffusion"]
    for metric in ("fid", "cmmd"):
        flat[f"flow_from_diffusion.{metric}.images"] = told_apart(flow, diffusion, metric)
        flat[f"flow_from_real.{metric}.images"] = told_apart(flow, sets["real"], metric)
    conditions = {"encoder": ENCODER, "subsets": SUBSETS, "seed": SEED}
    write_json(HERE / "results.json", finite({**flat, "conditions": conditions, "sets": sets}))
    write_text(HERE / "table.md", table.markdown(rows_of(sets)))
    figures.save(draw(sets), HERE / "metrics-vs-samples.png")


def main(overrides: list[str]) -> None:
    """Both models and the real images."""
    sets = {}
    for name in MODELS:
        run, images = images_of(name, *overrides)
        sets[name] = curve_of(run, images)
    test = run.data.data.test_images
    mixed = torch.randperm(len(test), generator=torch.Generator().manual_seed(SEED))
    sets["real"] = curve_of(run, test[mixed[: len(images)]])
    write(sets)


if __name__ == "__main__":
    main(sys.argv[1:])
