"""Reference ensembles: the last images of many members, kept so that any subset can be compared.

python experiments/propagation/reference.py fashion-flow euler20
"""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.progress import track
from bayesdiff.runs.build import Run
from bayesdiff.runs.training import fit
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import key_of, read_arrays, write_arrays
from bayesdiff.uncertainty import Starts, starts_of
from bayesdiff.uncertainty.members.ensemble import MemberField

ROOT = Path(__file__).parents[2]
MEMBERS, IMAGES, SEED = 128, 64, 10_000

MODELS = {
    "fashion-flow": ["model=flow", "data=fashion"],
    "fashion-diffusion": ["model=diffusion", "data=fashion"],
    "mnist-flow": ["model=flow", "data=mnist"],
}
SOLVERS = {
    "euler20": ["solver=euler", "solver.num_steps=20"],
    "euler50": ["solver=euler", "solver.num_steps=50"],
    "heun10": ["solver=heun", "solver.num_steps=10"],
    "ddim50": ["solver=ddim", "solver.num_steps=50"],
    "dpmpp20": ["solver=dpmpp_2m", "solver.num_steps=20"],
}
TRAINING = ["trainer.max_epochs=4", "laplace.num_images=20000"]


def configure(model: str, solver: str, *more: str) -> DictConfig:
    """The configuration of one setting, as train.py would compose it."""
    return pipeline.compose(*MODELS[model], *SOLVERS[solver], *TRAINING, *more)


def load(cfg: DictConfig) -> tuple[Run, Solver, HeadPosterior]:
    """The trained model with its posterior; both are made if they do not exist."""
    run, solver, _, laplace = pipeline.prepare(cfg)
    fit(run, laplace)
    run.model.to(run.device).eval()
    return run, solver, laplace.fit(run.model, run.data.data)


def starts(run: Run, solver: Solver) -> Starts:
    """Starts of the run's own samples."""
    shape = run.data.data.images.shape[1:]
    return starts_of(run.model, solver, run.cfg.seed, shape, run.device)


@torch.inference_mode()
def members(run: Run, solver: Solver, posterior: HeadPosterior, count: int = MEMBERS) -> Tensor:
    """Last images ``(count, IMAGES, C, H, W)`` of members that keep one weight draw each."""
    weights = posterior.draw(count, torch.Generator().manual_seed(SEED)).to(run.device)
    start_of = starts(run, solver)
    steps = start_of([0]).steps()
    numbers = [step.numbers() for step in steps]
    key = key_of(run.key, numbers, run.cfg.seed, pipeline.settings_of(posterior), count, IMAGES)
    path = ROOT / "outputs" / "propagation" / f"reference-{key}.npz"
    stored = read_arrays(path, key)
    if stored is not None:
        return stored["members"]
    parts = []
    for indices in track(list(torch.arange(IMAGES).split(4)), "reference"):
        start = start_of(indices.tolist())
        field, x_0 = start.field(), start.initial()
        parts.append(
            integrate(MemberField(field, weights), start.steps(), x_0[None], start.draw).cpu()
        )
    result = torch.cat(parts, 1)
    write_arrays(path, key, {"members": result})
    return result


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run, solver, posterior = load(configure(sys.argv[1], name))
        spread = members(run, solver, posterior).var(0)
        print(sys.argv[1], name, float(spread.flatten(1).sum(1).mean()))
