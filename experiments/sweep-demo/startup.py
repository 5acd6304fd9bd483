"""How long a command takes that has nothing to do, beside importing torch, lightning and hydra.

    python experiments/sweep-demo/startup.py [--rounds 5]

Writes `startup_ratio` (`train.py --help`), `cached_run_ratio` (a run whose artefacts are all
there) and the seconds behind them into results.json beside this file. The commands take turns, and
the shortest time of each counts: another program on the machine makes single times longer.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bayesdiff.storage.artefacts import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
log = logging.getLogger(__name__)

# Digits, at a size that trains in seconds: what is measured are the runs after it.
SMALL = [
    *("net=tiny", "trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=1"),
    *("trainer.limit_train_batches=2", "solver.num_steps=3", "laplace.num_images=64"),
    *("metrics.num_images=12", "uncertainty.num_images=4", "uncertainty.train_images=24"),
    *("uncertainty.epochs=1", "callbacks.samples=null"),
]


def seconds(*command: str) -> float:
    """Wall time of one Python command, on one thread."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, float]:
    """The ratios, and the seconds they come from."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["train.py", "experiment=demo", *SMALL, f"output_dir={folder}"]
        commands = {
            "imports": ["-c", "import torch, lightning, hydra"],
            "help": ["train.py", "--help"],
            "cached_run": run,
        }
        first = seconds(*run)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds):
            for name, command in commands.items():
                times[name].append(seconds(*command))
            log.info("round %d: %s", number + 1, {k: round(v[-1], 2) for k, v in times.items()})
    best = {name: min(values) for name, values in times.items()}
    return {
        "startup_ratio": best["help"] / best["imports"],
        "cached_run_ratio": best["cached_run"] / best["imports"],
        "startup.rounds": rounds,
        "startup.first_run_seconds": first,
        **{f"startup.{name}_seconds": value for name, value in best.items()},
    }


def main() -> None:
    """Measure, and put the figures beside those of the other parts of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    found = {name: round(value, 4) for name, value in measure(given.rounds).items()}
    write_json(given.results, (read_json(given.results) or {}) | found)
    log.info("%s", found)


if __name__ == "__main__":
    main()
