"""The networks of this study: nine trainings of each, and one more with dropout.

    python experiments/retraining/networks.py [DATA_MODEL ...] [seed=K ...]

Kept under outputs/retraining; what is there is not trained again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from bayesdiff import pipeline
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.runs.build import Run
from bayesdiff.runs.training import fit
from bayesdiff.solvers import Solver
from bayesdiff.studies.script import Asked

ROOT = Path(__file__).parents[2]
STORE = ROOT / "outputs" / "retraining"
DATA = {
    "digits": ["net.channels=[16,32]", "callbacks.snapshots.every=4"],
    "mnist": [
        *("net.channels=[16,32]", "net.blocks=1", "data.batch_size=64", "data.ema_decay=0.99"),
        *("trainer.limit_train_batches=94", "trainer.limit_val_batches=4"),
        *("callbacks.snapshots.keep=5", "laplace.num_images=10000", "laplace.n_eff=60000"),
    ],
}
DATA["fashion"] = DATA["mnist"]
MODELS = {"flow": ["solver=euler"], "diffusion": ["solver=ddim"]}
COMMON = [
    *("solver.num_steps=10", "metrics.num_images=0", "uncertainty=ensemble"),
    *("callbacks=snapshots", "trainer.precision=32-true", "callbacks.progress=null"),
    "callbacks.samples=null",
]
SETTINGS = [f"{data}_{model}" for data in DATA for model in MODELS]
UNDER_TEST = (0, 1, 2)
REFERENCE = range(8)  # the network under test is left out of these
EXTRA = (8,)  # for the calibration of sizes; never part of a reference
WITH_DROPOUT = (0,)  # seeds that are trained with dropout as well, for a rival
DROPOUT = 0.1


def prepared(
    setting: str, seed: int, *more: str, dropout: bool = False
) -> tuple[Run, Solver, LastLayerLaplace]:
    """A run with its network, which is trained if it does not exist."""
    cfg = configuration(setting, seed, *more, dropout=dropout)
    run, solver, _, laplace = pipeline.prepare(cfg)
    fit(run, laplace)
    run.model.to(run.device).eval()
    return run, solver, laplace


def configuration(setting: str, seed: int, *more: str, dropout: bool = False) -> DictConfig:
    """Of one network of a setting such as ``mnist_flow``, or ``digits_flow_40`` for 40 epochs."""
    data, model, *epochs = setting.split("_")
    place = STORE / setting / (f"dropout-{seed}" if dropout else f"seed-{seed}")
    own = [f"seed={seed}", f"run_dir={place}", f"data={data}", f"model={model}"]
    own += [*MODELS[model], *DATA[data], *COMMON]
    own += [f"trainer.max_epochs={number}" for number in epochs]
    if dropout:
        own.append(f"net.dropout={DROPOUT}")
    return pipeline.compose(*own, *more)


def main(words: Sequence[str]) -> None:
    """Train what is missing, the networks under test first."""
    asked = Asked.of(words, SETTINGS, "seed")
    seeds = [int(seed) for seed in asked.options["seed"]]
    for seed in seeds or [*REFERENCE, *EXTRA]:
        for setting in asked.names or SETTINGS:
            prepared(setting, seed)
            if seed in WITH_DROPOUT:
                prepared(setting, seed, dropout=True)


if __name__ == "__main__":
    main(sys.argv[1:])
