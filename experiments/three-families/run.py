"""What the sweep of this folder does not report: rounded samples, and processor seconds in turns.

    python experiments/three-families/run.py SWEEP_FOLDER [SWEEP_FOLDER ...]

A SWEEP_FOLDER holds ``cells``. Reads the trained runs behind them, trains nothing, and writes
results.json, table.md and samples.png beside this file.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.cli import one_line_errors
from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart
from bayesdiff.runs.address import images_at
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import scores_of
from bayesdiff.runs.setup import starts
from bayesdiff.runs.training import fit
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import read_arrays, read_json, write_json, write_text

HERE = Path(__file__).parent
TURNS, BATCH = 7, 50
MEASURES = ("fid", "precision", "recall")
TITLES = {
    "flow": "Flow matching",
    "diffusion": "Diffusion",
    "bfn": "Bayesian flow network",
    "flow_bernoulli": "Flow matching, log-odds",
    "diffusion_bernoulli": "Diffusion, log-odds",
}


def cells(folder: Path) -> list[dict[str, Any]]:
    """Rows of the sweep, in its order."""
    rows = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    done = [row for row in rows if row and row["status"] == "done"]
    return sorted(done, key=lambda row: row["number"])


def opened(row: dict[str, Any]) -> tuple[Run, Solver, str]:
    """The run behind a cell with its trained weights, its sampler, and the key of the weights."""
    cfg = OmegaConf.load(Path(row["folder"]) / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    run, solver, _, laplace = pipeline.prepare(cfg)
    weights = fit(run, laplace)
    run.model.to(run.device).eval()
    return run, solver, weights


def rounded(images: Tensor) -> Tensor:
    """Black or white, whichever is nearer."""
    return torch.where(images > 127, 255, 0).to(torch.uint8)


def figures_of(values: dict[str, float]) -> dict[str, float]:
    """Those of the table, by short names."""
    found = {name.partition("@")[0]: value for name, value in values.items()}
    return {name: found[name] for name in MEASURES}


def sampling(run: Run, solver: Solver) -> None:
    """Makes BATCH samples."""
    start = starts(run, solver)(list(range(BATCH)))
    integrate(start.field(), start.steps(), start.initial(), start.draw)


def stepping(run: Run) -> Callable[[], None]:
    """One optimiser step on a batch of the run's size, as the training takes it."""
    model, images = run.model, run.data.data.images[: run.cfg.data.batch_size]
    x_1 = run.data.space.encode(images)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def step() -> None:
        loss = model._loss(x_1, None, step=0, share=slice(None))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.load_state_dict(state)

    return step


def seconds(work: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Processor seconds of every piece of work, in turns: median and least."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(TURNS + 1):
        for name, do in work.items():
            started = time.process_time()
            do()
            if turn:  # the first one warms up
                taken[name].append(time.process_time() - started)
    return {n: {"median": statistics.median(t), "least": min(t)} for n, t in taken.items()}


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each family and treatment of its samples."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["samples"]), []).append(row)
    found = []
    for (family, samples), same in groups.items():
        line: dict[str, Any] = {"family": family, "samples": samples, "seeds": len(same)}
        for name in (*MEASURES, "grey", "nats"):
            if values := [row[name] for row in same if name in row]:
                ends = zip(("", "_low", "_high"), mean_interval(values), strict=True)
                line |= {name + end: value for end, value in ends}
        found.append(line)
    return found


def shown(lines: list[dict[str, Any]]) -> str:
    """The table for a reader."""

    def said(line: dict[str, Any], name: str) -> str:
        if name not in line:
            return ""
        low, mean, high = (f"{line[name + end]:.3g}" for end in ("_low", "", "_high"))
        return mean if low == high else f"{mean} [{low}, {high}]"

    rows = [
        {key: line[key] for key in ("family", "samples")}
        | {name: said(line, name) for name in (*MEASURES, "grey", "nats")}
        for line in lines
    ]
    return table.markdown(rows)


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the same seed and black and white both: BFN minus the others, log-odds minus without."""
    sharp = {(row["family"], row["seed"]): row for row in rows if not row["grey"]}
    families = list(dict.fromkeys(family for family, _ in sharp))
    compared = [("bfn", family) for family in families if family != "bfn"]
    compared += [(f"{f}_bernoulli", f) for f in families if f"{f}_bernoulli" in families]
    found = []
    for one, other in compared:
        seeds = [seed for family, seed in sharp if family == one and (other, seed) in sharp]
        pairs = [(sharp[one, seed], sharp[other, seed]) for seed in seeds]
        line: dict[str, Any] = {"family": f"{one} - {other}", "samples": "rounded"}
        for name in MEASURES:
            ends = mean_interval([left[name] - right[name] for left, right in pairs])
            line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        found.append(line | {"seeds": len(pairs)})
    return found


def picture(samples: dict[str, Tensor]) -> Any:
    """The first samples of every family, none picked."""
    caption = (
        "Samples 0 to 31 of seed 0, none picked, as the sampler leaves them; log-odds: the "
        "network says how likely a pixel is white."
    )
    columns = min(2, len(samples))
    rows = -(-len(samples) // columns)
    figure, axes = chart(
        450 * columns, 255 * rows, "Samples of three families", caption, rows, columns
    )
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, (name, images) in zip(axes.flat, samples.items(), strict=False):
        tiles = torch.nn.functional.pad(images[:32, 0], (1, 1, 1, 1), value=110)
        tiles = tiles.reshape(4, 8, *tiles.shape[-2:]).permute(0, 2, 1, 3)
        panel.imshow(tiles.flatten(2).flatten(0, 1), cmap="gray", interpolation="nearest")
        panel.set_title(TITLES.get(name, name))
    return figure


def rows_of(cell: dict[str, Any], run: Run, images: Tensor) -> list[dict[str, Any]]:
    """The scores of a cell's samples, and of its rounded ones where any is grey."""
    own = {n: v for n, v in cell["metrics"].items() if not n.startswith("real/")}
    row = {"family": cell["settings"]["family"], "seed": run.cfg.seed, "samples": "as they are"}
    row["grey"] = float(((images > 0) & (images < 255)).float().mean())
    row |= figures_of(own)
    if "code_length/nats_per_image" in own:
        row["nats"] = own["code_length/nats_per_image"]
    if not row["grey"]:
        return [row]
    values = figures_of(scores_of(run)(run, rounded(images)))
    return [row, {**row, "samples": "rounded", "grey": 0.0, **values}]


def processor_seconds(runs: dict[str, tuple[Run, Solver]]) -> dict[str, dict[str, float]]:
    """Of a step, of the whole training as so many steps, and of one sample, for every family."""
    work: dict[str, Callable[[], Any]] = {}
    for family, (run, solver) in runs.items():
        work[f"{family}.step"] = stepping(run)
        work[f"{family}.sample"] = partial(sampling, run, solver)
    taken = seconds(work)
    for family, (run, _) in runs.items():
        step, some = taken[f"{family}.step"], taken[f"{family}.sample"]
        taken[f"{family}.training"] = {k: v * run.length[0] for k, v in step.items()}
        taken[f"{family}.sample"] = {k: v / BATCH for k, v in some.items()}
    return taken


def main(folders: list[Path]) -> None:
    """All of it."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, tuple[Run, Solver]] = {}
    first: dict[str, Tensor] = {}
    real: dict[str, float] = {}
    for cell in (cell for folder in folders for cell in cells(folder)):
        run, solver, weights = opened(cell)
        images = (read_arrays(images_at(run, solver, weights).path) or {})["images"]
        rows += rows_of(cell, run, images)
        runs.setdefault(cell["settings"]["family"], (run, solver))
        first.setdefault(cell["settings"]["family"], images)
        names = [name for name in cell["metrics"] if name.startswith("real/")]
        real = figures_of({name.removeprefix("real/"): cell["metrics"][name] for name in names})
    lines = [*over_seeds(rows), *differences(rows)]
    taken = processor_seconds(runs)
    results = {"rows": rows, "over_seeds": lines, "real": real, "processor_seconds": taken}
    write_json(HERE / "results.json", results)
    write_text(HERE / "table.md", shown(lines))
    figures.save(picture(first), HERE / "samples.png", pdf=False)


if __name__ == "__main__":
    with one_line_errors():
        if len(sys.argv) < 2:
            sys.exit("usage: run.py SWEEP_FOLDER [SWEEP_FOLDER ...]")
        main([Path(word) for word in sys.argv[1:]])
