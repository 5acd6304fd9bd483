"""A sweep that is killed again and again ends with the table and images of one that is not.

    python experiments/sweep-demo/kills.py [--kills 20] [--seed 0]

Three digits models are swept once without a fault, which gives the moments at which every file
appears. Then the same command runs in other folders and gets SIGKILL at random moments, spread
evenly over the stages, and is started again after each until it ends; a sweep that ends before
all kills are spent is followed by another one from nothing. Writes into results.json beside this
file: `kills_survived`, those after which all came out bit for bit the same; `repeated_stages`,
stages that were finished when a kill came and were made once more all the same.
"""

import argparse
import csv
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bayesdiff.storage.artefacts import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
log = logging.getLogger(__name__)

SWEEP = ["sweep.py", "-m", "seed=0,1,2", "trainer=cpu", "net=tiny", "callbacks.progress=null"]
FULL = [
    *("trainer.max_epochs=6", "metrics.num_images=500", "solver.num_steps=20"),
    *("uncertainty.num_images=40", "uncertainty.train_images=200", "uncertainty.epochs=4"),
]
SMOKE = [
    *("trainer.max_epochs=2", "metrics.num_images=20", "solver.num_steps=3"),
    *("laplace.num_images=64", "uncertainty.num_images=4", "uncertainty.train_images=24"),
    *("uncertainty.epochs=1", "trainer.limit_train_batches=3", "callbacks.samples=null"),
]
# The stage that ends with a file of this name.
STAGES = {
    "curvature-*.safetensors": "curvature",
    "fit.json": "training",
    "images-*.npz": "images",
    "refiner-*.safetensors": "refiner",
    "samples-*.npz": "maps",
    "classifier-*.safetensors": "classifier",
    "reference-*.npz": "reference",
    "scores-*.json": "scores",
    "metrics.json": "report",
    "sweep.csv": "table",
}


class Sweep:
    """One folder in which the sweep runs."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self.command = [sys.executable, *SWEEP, *overrides, f"output_dir={folder}"]

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it, or start it again, in a process group of its own and on one thread."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as file:
            return subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(
        self, process: "subprocess.Popen[bytes]", after: str | None, offset: float, first: float
    ) -> None:
        """Wait for a file and some seconds more, as long as the process runs."""
        if after is None or (self.folder / after).is_file():
            offset += first  # what is there already is looked over before work goes on
        else:
            until(process, (self.folder / after).is_file)
        until(process, limit(offset))

    def finished(self) -> dict[str, tuple[str, int]]:
        """Files that end a stage: their stages and when they were written."""
        found = {}
        for pattern, stage in STAGES.items():
            for path in self.folder.rglob(pattern):
                if path.parent.name != ".locks":
                    name = path.relative_to(self.folder).as_posix()
                    found[name] = stage, path.stat().st_mtime_ns
        return found

    def contents(self) -> dict[str, object]:
        """The table, the numbers, the arrays and the pictures."""
        found: dict[str, object] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            # The sweep's folder is named by its command, which names this folder.
            name = re.sub("^sweeps/[^/]+", "sweeps", name)
            if ".locks" in name or not path.is_file():
                continue
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    found |= {f"{name}/{key}": file[key].tobytes() for key in file.files}
            elif path.name == "sweep.csv":
                rows = csv.DictReader(path.read_text().splitlines())
                timed = ("seconds", "folder")
                found[name] = [{k: v for k, v in r.items() if k not in timed} for r in rows]
            elif path.name == "metrics.json":
                found[name] = read_json(path)
            elif path.suffix == ".png" and path.name != "training.png":
                found[name] = path.read_bytes()
        return found


def timeline(sweep: Sweep) -> tuple[list[tuple[float, str, str]], float]:
    """Run without a fault: (seconds since the start, file, stage) in order, and the first work.

    The first work is when training begins, and is about what a start costs.
    """
    began = time.time()
    process = sweep.start()
    first = until(process, lambda: bool(list(sweep.folder.glob("*/.hydra/config.yaml"))))
    if process.wait() != 0 or not first:
        sys.exit(f"error: the sweep without a fault failed; see {sweep.folder}/log.txt")
    files = sweep.finished().items()
    events = sorted((mtime / 1e9 - began, name, stage) for name, (stage, mtime) in files)
    return events, first


def until(process: "subprocess.Popen[bytes]", what: Callable[[], bool]) -> float:
    """Seconds until something is there, 0 if the process ends first."""
    began = time.perf_counter()
    while process.poll() is None:
        if what():
            return time.perf_counter() - began
        time.sleep(0.005)
    return 0.0


def moments(
    events: list[tuple[float, str, str]], first: float, count: int, chance: random.Random
) -> list[tuple[str, str | None, float]]:
    """As many random moments: (stage, the file before it, seconds after that), in their order."""
    spans: dict[str, list[tuple[float, float, str | None]]] = {}
    before: str | None = None
    last = first
    for end, name, stage in events:
        spans.setdefault(stage, []).append((last, end, before))
        before, last = name, end
    chosen = []
    for number in range(count):
        stage = list(spans)[number % len(spans)]
        begin, end, after = chance.choice(spans[stage])
        offset = chance.random() * (end - begin)
        chosen.append((begin + offset, stage, after, offset))
    return [(stage, after, offset) for _, stage, after, offset in sorted(chosen)]


def interrupted(
    sweep: Sweep, plan: list[tuple[str, str | None, float]], first: float
) -> tuple[int, Counter[str]]:
    """Run with kills, taken from the plan, until the sweep ends.

    Returns:
        How many kills met it, and how often a stage was made although it was finished.
    """
    kills, repeated = 0, Counter[str]()
    known: dict[str, tuple[str, int]] = {}
    while True:
        process = sweep.start()
        stage, after, offset = plan[0] if plan else ("", None, 0.0)
        if plan:
            sweep.wait(process, after, offset, first)
        if plan and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            plan.pop(0)
            kills += 1
        status = process.wait()
        now = sweep.finished()
        for name in known.keys() & now.keys():
            if known[name] != now[name] and known[name][0] != "table":
                repeated[known[name][0]] += 1
                log.info("made again: %s", name)
        known = now
        if status != -signal.SIGKILL:
            if status:
                sys.exit(f"error: the sweep failed; see {sweep.folder}/log.txt")
            return kills, repeated
        log.info("kill %d in %s, %d files finished", kills, stage, len(now))


def limit(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds are over."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def study(folder: Path, kills: int, seed: int, overrides: list[str]) -> dict[str, object]:
    """Run all sweeps and compare them."""
    whole = Sweep(folder / "whole", overrides)
    events, first = timeline(whole)
    log.info("without a fault: %.0f s, %d files, first work after %.1f s",
             events[-1][0], len(events), first)  # fmt: skip
    expected = whole.contents()
    plan = moments(events, first, kills, random.Random(seed))
    stages = Counter(stage for stage, _, _ in plan)
    survived, repeated, number = 0, Counter[str](), 0
    while plan:
        sweep = Sweep(folder / f"killed-{number}", overrides)
        met, again = interrupted(sweep, plan, first)
        found = sweep.contents()
        odd = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
        if odd:
            log.error("sweep %d differs in %s", number, sorted(odd))
        survived += 0 if odd else met
        repeated += again
        number += 1
        if not met:
            sys.exit("error: a sweep ended before a kill could meet it; the machine is too uneven")
    return {
        "kills_survived": survived,
        "repeated_stages": sum(repeated.values()),
        "kills": {
            "asked": kills,
            "seed": seed,
            "sweeps": number,
            "by_stage": dict(stages),
            "repeated": dict(repeated),
            "compared": len(expected),
            "seconds_without_a_fault": round(events[-1][0], 1),
        },
    }


def main() -> None:
    """Run the study, and put the figures beside those of the other parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a sweep of seconds")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    found = study(folder, given.kills, given.seed, SMOKE if given.smoke else FULL)
    write_json(given.results, (read_json(given.results) or {}) | found)
    log.info("%s", found)
    if found["kills_survived"] == given.kills:
        shutil.rmtree(folder)
    else:
        sys.exit(f"error: not all the same; the sweeps are kept in {folder}")


if __name__ == "__main__":
    main()
