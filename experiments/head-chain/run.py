"""The head's posterior against long Hamiltonian Monte Carlo chains that know the loss alone.

    python experiments/head-chain/run.py [KEY=VALUE ...]

``experiment=head_chain`` on one model, and how far its head is from the optimum of more draws.
Training and chains are made if they do not exist, and kept in the run folder.
"""

import shutil
import sys
from pathlib import Path

from omegaconf import DictConfig

from bayesdiff import pipeline
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import read_json, write_json

HERE = Path(__file__).parent
MODEL = ["model=flow", "data=digits", "seed=1"]
DRAWS = (1, 4, 16)  # of (t, noise) per image, for the distance over all images


def configuration(*more: str) -> DictConfig:
    """Of the run with the study; few maps, which it does not read."""
    few = ["uncertainty.num_images=8", "uncertainty.members=2"]
    return pipeline.compose("experiment=head_chain", *MODEL, *few, *more)


def load(cfg: DictConfig) -> tuple[Run, HeadPosterior]:
    """The trained model and the posterior that its own run uses."""
    run, _, _, laplace = pipeline.prepare(cfg)
    fit(run, laplace)
    run.model.to(run.device).eval()
    return run, laplace.fit(run.model, run.data.data)


def distances(run: Run, posterior: HeadPosterior) -> dict[str, float | None]:
    """Distance of the run's own posterior, and with more (t, noise) draws per image."""
    data = run.data.data
    found = {"run.distance_from_optimum": posterior.distance}
    for draws in DRAWS:
        curvature = fit_curvature(
            run.model, data.images, data.labels, source="distance", draws=draws, seed=1
        )
        whole = HeadPosterior.fit(curvature, prior_precision=1.0)
        found[f"run.distance_from_optimum_{draws}_draws"] = whole.distance
    return found


def main(overrides: list[str]) -> None:
    """Write results.json and the figure."""
    cfg = configuration(*overrides)
    (folder,) = pipeline.run(cfg).studies
    found = read_json(folder / "results.json") or {}
    # Of the run folder, not of the numbers.
    found = {name: value for name, value in found.items() if name not in ("key", "headlines")}
    found |= distances(*load(cfg))
    write_json(HERE / "results.json", found)
    shutil.copy(folder / "figures" / "posterior_and_chains.png", HERE / "head-chain.png")
    for name, value in found.items():
        print(f"{name:42s} {table.cell(value)}")


if __name__ == "__main__":
    main(sys.argv[1:])
