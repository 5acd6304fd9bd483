"""What rank and size does a budget buy? The default estimator against 128 trajectories.

    python experiments/budget/run.py [DATA_MODEL ...] [derivative=NAME]

Networks are those of ../retraining, seed 0. Settings of earlier calls stay in results.json.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "retraining"))

import torch
from networks import SETTINGS, STORE, prepared
from torch import Tensor

from bayesdiff.metrics.agreement import agreement
from bayesdiff.report import table
from bayesdiff.runs.setup import starts
from bayesdiff.storage.artefacts import (
    key_of,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
    write_text,
)
from bayesdiff.studies.script import Asked
from bayesdiff.uncertainty import Ensemble, Estimator, Linearised, Refined

HERE = Path(__file__).parent
IMAGES, BATCH, STEPS = 128, 32, 20
REFERENCE = Ensemble(members=128, noise_members=0, seed=99)
BUDGETS = (1.4, 4.0)


def estimators(derivative: str) -> dict[str, Estimator]:
    """Under test, by name."""
    found: dict[str, Estimator] = {
        f"refined_{budget}": Refined(budget=budget, derivative=derivative) for budget in BUDGETS
    }
    return found | {
        "ensemble_16": Ensemble(members=16, noise_members=0, seed=1),
        "linearised_32": Linearised(draws=32, derivative="difference"),
    }


def of_setting(setting: str, derivative: str) -> dict[str, dict[str, Any]]:
    """Ranks, size and time of every estimator."""
    run, solver, laplace = prepared(setting, 0, f"solver.num_steps={STEPS}")
    posterior = laplace.fit(run.model, run.data.data)
    start_of = starts(run, solver)

    def maps(estimator: Estimator) -> tuple[Tensor, float, float]:
        begun, parts = time.process_time(), []
        for part in torch.arange(IMAGES).split(BATCH):
            parts.append(estimator(start_of(part.tolist()), posterior))
        spent = time.process_time() - begun
        return torch.cat([each.variance for each in parts]), parts[0].nfe, spent / IMAGES

    path, key = STORE / "budget" / f"{setting}.npz", key_of(run.key, repr(REFERENCE), STEPS)
    stored = read_arrays(path, key)
    if stored is None:
        variance, _, seconds = maps(REFERENCE)
        stored = {"variance": variance, "seconds": torch.tensor([seconds], dtype=torch.float64)}
        write_arrays(path, key, stored)
    found = {}
    for name, estimator in estimators(derivative).items():
        begun = time.process_time()
        ready = estimator.fit(start_of, posterior)
        once = time.process_time() - begun
        variance, nfe, seconds = maps(ready)
        found[name] = agreement(variance, stored["variance"], seed=0) | {
            "nfe": nfe,
            "budget": nfe / STEPS - 1,
            "seconds": seconds,
            "seconds_once": once,
            "share_of_reference": seconds / float(stored["seconds"]),
        }
        print(setting, name, {k: round(v, 3) for k, v in found[name].items()}, flush=True)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, and add to the results."""
    asked = Asked.of(words, SETTINGS, "derivative")
    (derivative,) = asked.options["derivative"] or ["auto"]
    for setting in asked.names or SETTINGS:
        measured = of_setting(setting, derivative)
        results = read_json(HERE / "results.json") or {}
        for name, numbers in measured.items():
            label = name if derivative == "auto" else f"{name}_{derivative}"
            results |= {f"{setting}.{label}.{key}": value for key, value in numbers.items()}
        write_json(HERE / "results.json", results)
    rows = []
    for key in results:
        setting, _, rest = key.partition(".")
        if rest.endswith(".image_rank") and not rest.startswith(SAME):
            rows.append(row(results, setting, rest.removesuffix(".image_rank")))
    write_text(HERE / "table.md", table.markdown(rows))


def row(results: dict[str, float], setting: str, name: str) -> dict[str, str]:
    """One line of the table."""
    own = {key: results[f"{setting}.{name}.{key}"] for key in (*SHOWN, *INTERVALS)}
    line = {"setting": setting, "estimator": name}
    for key in ("image_rank", "pixel_rank"):
        low, high = own[f"{key}_low"], own[f"{key}_high"]
        line[key.replace("_", " ")] = f"{own[key]:.3f} [{low:.3f}, {high:.3f}]"
    line |= {"size": f"{own['spread_ratio']:.2f}", "budget": f"{own['budget']:.1f}"}
    line["s per image"] = f"{own['seconds']:.3f}"
    line["s once"] = f"{own['seconds_once']:.0f}"
    return line | {"time over reference": f"{own['share_of_reference']:.3f}"}


# The same whatever refined's derivative is.
SAME = ("ensemble_16_", "linearised_32_")
SHOWN = (
    *("image_rank", "pixel_rank", "spread_ratio", "budget", "seconds", "seconds_once"),
    "share_of_reference",
)
INTERVALS = [f"{key}_{end}" for key in ("image_rank", "pixel_rank") for end in ("low", "high")]


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
