"""One sweep of 24 cells by three launchers: the same table, and how much faster two workers are.

    python experiments/sweep-demo/run.py [LAUNCHER ...] [--output DIR] [--set KEY=VALUE ...]

2 models x 2 solvers of each x 3 prior_precision x 2 skip intervals on digits, by basic, joblib
(2 workers) and submitit_local, each from nothing in a folder of its own, with one thread per
process. Models vary fastest, so that two workers begin with two trainings. Stops with an error if
two tables differ; writes `joblib_speedup` and the seconds into results.json beside this file.
Without a name: all three. Give no launcher but basic and joblib to measure the speed alone.
"""

import argparse
import csv
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bayesdiff.storage.artefacts import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
log = logging.getLogger(__name__)

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
# No solver is for both models, so that model and solver are chosen as a pair, see pair/.
CELLS = [
    f"hydra.searchpath=[file://{HERE}]",
    *("data=digits", "trainer=cpu", "trainer.max_epochs=10", "callbacks.progress=null"),
    *("uncertainty=linearised", "uncertainty.draws=8", "metrics.num_images=500"),
    *("laplace.prior_precision=1,10,100", "uncertainty.skip_interval=1,2"),
    "+pair=flow_euler,diffusion_ddim,flow_midpoint,diffusion_dpmpp_2m",
]
# What may differ between launchers.
OWN = ("seconds", "folder")


def swept(launcher: str, output: Path, more: list[str]) -> tuple[list[dict[str, str]], float]:
    """Table and wall time of the sweep by one launcher, from nothing."""
    folder = output / launcher
    shutil.rmtree(folder, ignore_errors=True)
    options = [*CELLS, *more, f"output_dir={folder}", *LAUNCHERS[launcher]]
    command = [sys.executable, "sweep.py", "-m", *options]
    log.info("%s", shlex.join(command[1:]))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    seconds = time.perf_counter() - started
    if code:
        sys.exit(f"error: the sweep by {launcher} ended with status {code}")
    (path,) = folder.glob("sweeps/*/sweep.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    trainings = len(list(folder.glob("digits-*/fit.json")))
    log.info("%s: %d cells, %d trainings, %.0f s", launcher, len(rows), trainings, seconds)
    return [{k: v for k, v in row.items() if k not in OWN} for row in rows], seconds


def differences(tables: dict[str, list[dict[str, str]]]) -> list[str]:
    """Where tables are not those of the first launcher."""
    (first, reference), *others = tables.items()
    return [
        f"cell {number}: {name} is {row.get(name)} by {launcher} and {value} by {first}"
        for launcher, rows in others
        for number, (expected, row) in enumerate(zip(reference, rows, strict=True))
        for name, value in expected.items()
        if row.get(name) != value
    ]


def main() -> None:
    """Sweep, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launchers", nargs="*", metavar="LAUNCHER", help=", ".join(LAUNCHERS))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "sweep-demo")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = given.launchers or list(LAUNCHERS)
    if unknown := set(names) - set(LAUNCHERS):
        sys.exit(f"error: unknown launcher {min(unknown)}; choose from {', '.join(LAUNCHERS)}")
    made = {name: swept(name, given.output.absolute(), given.set) for name in names}
    if found := differences({name: rows for name, (rows, _) in made.items()}):
        sys.exit("error: tables differ: " + "; ".join(found[:5]))
    seconds = {name: round(wall, 1) for name, (_, wall) in made.items()}
    results: dict[str, Any] = (read_json(given.results) or {}) | {
        "sweep_cells": len(made[names[0]][0]),
        "sweep_identical_tables": sorted(made),
        "sweep_seconds": seconds,
    }
    if {"basic", "joblib"} <= seconds.keys():
        results["joblib_speedup"] = round(seconds["basic"] / seconds["joblib"], 2)
    write_json(given.results, results)


if __name__ == "__main__":
    main()
