"""Grids of sigma_noise and prior_precision on several models, put together in one figure.

    python experiments/prior-ablation/run.py [MODEL ...] [--to FOLDER] [KEY=VALUE ...]

Without a model: those on digits. Every grid is kept in its run folder, so an interrupted study
goes on where it was; models of an earlier call stay in results.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from bayesdiff import pipeline
from bayesdiff.report import figures, table
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.prior_ablation import figures as ablation

HERE = Path(__file__).parent
# As ../propagation trains them: the same run folders.
SHORT = ["trainer.max_epochs=4", "laplace.num_images=20000"]
EULER = ["model=flow", "solver=euler", "solver.num_steps=20"]
MODELS = {
    "digits-flow": [*EULER, "data=digits"],
    "digits-diffusion": ["model=diffusion", "data=digits"],
    "fashion-flow": [*EULER, "data=fashion", *SHORT],
    "mnist-flow": [*EULER, "data=mnist", *SHORT],
    "fashion-diffusion": [
        *("model=diffusion", "data=fashion", "solver=dpmpp_2m", "solver.num_steps=20"),
        *SHORT,
    ],
}


def configure(model: str, *more: str) -> DictConfig:
    """The configuration of one model, as train.py would compose it."""
    given = ["experiment=prior_ablation", *MODELS[model], *more]
    return pipeline.compose(*given)


def grid(cfg: DictConfig) -> dict[str, Any]:
    """The numbers of one model's grid; training and curvature are made if they do not exist."""
    (folder,) = pipeline.run(cfg).studies
    found = read_json(folder / "results.json")
    assert found is not None
    return found


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    curve = found["structures"][found["structure"]]["curve"]
    taus, variance = (
        np.array(curve[k], dtype=float) for k in ("prior_precision", "total_variance")
    )
    least = np.interp(np.log(found["own"]["prior_precision"]), np.log(taus), variance)
    fallen = taus[np.argmax(variance < 0.9 * least)]
    low, high = found["eigenvalues"]
    return {
        "model": name,
        "sigma_noise": found["own"]["sigma_noise"],
        "P": found["parameters"],
        "eigenvalues": f"{low:.2g} to {high:.2g}",
        "effective at tau = 1": float(np.interp(0, np.log(taus), curve["effective_parameters"])),
        "evidence's tau": found["best"].get("prior_precision"),
        "variance 10 % down at tau": float(fallen),
        "image rank, largest tau": curve["image_rank"][-1],
        "pixel rank, largest tau": curve["pixel_rank"][-1],
        "grid over cell": found["grid_cost_ratio"],
    }


def main(arguments: list[str]) -> None:
    """Run the models asked for and write results.json, table.md and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("given", nargs="*", metavar="MODEL or KEY=VALUE")
    parser.add_argument("--to", type=Path, default=HERE)
    given = parser.parse_intermixed_args(arguments)
    overrides = [word for word in given.given if "=" in word]
    models = [word for word in given.given if "=" not in word]
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}; choose from {', '.join(MODELS)}")
    settings = (read_json(given.to / "results.json") or {}).get("settings", {})
    for name in models or [name for name in MODELS if name.startswith("digits")]:
        settings[name] = grid(configure(name, *overrides))
        write(given.to, {name: settings[name] for name in MODELS if name in settings})


def write(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """What has been found so far."""
    own = {name: found["structures"][found["structure"]] for name, found in settings.items()}
    results = {
        "grid_cost_ratio": max(found["grid_cost_ratio"] for found in settings.values()),
        "effective_parameters": {name: one["effective_parameters"] for name, one in own.items()},
        "evidence": {name: one["evidence"] for name, one in own.items()},
        "settings": settings,
    }
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table.markdown([row(*item) for item in settings.items()]))
    figures.save(ablation.over_prior(settings), folder / "over-prior.png")


if __name__ == "__main__":
    main(sys.argv[1:])
