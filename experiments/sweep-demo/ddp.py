"""Do 2 and 4 processes give what one gives? Curvature, images, maps and FID of one network.

    python experiments/sweep-demo/ddp.py [OUTPUT_DIR] [KEY=VALUE ...]

Trains once, then repeats everything behind the training with each number of processes (gloo, on
CPU cores). Adds ``ddp_*`` to results.json.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bayesdiff.laplace.record import Curvature
from bayesdiff.storage.artefacts import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMON = (
    *("model=flow", "data=digits", "trainer.accelerator=cpu", "metrics.num_images=1000"),
    *("trainer.max_epochs=20", "uncertainty=ensemble", "uncertainty.num_images=64"),
)
PROCESSES = (1, 2, 4)


def run(folder: Path, count: int, *more: str) -> Path:
    """The command with so many processes; returns its run folder."""
    at = folder / f"processes-{count}"
    given = [*COMMON, f"output_dir={folder}", f"run_dir={at}", *more]
    if count > 1:
        weights = folder / "processes-1" / "checkpoints" / "last.ckpt"
        given += ["trainer=ddp", f"trainer.devices={count}", "fit=false", f"ckpt_path={weights}"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *given], check=True)
    return at


def largest(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def compared(one: Path, other: Path) -> dict[str, Any]:
    """What differs between two run folders."""
    first, second = (Curvature.load(next(at.glob("curvature-*"))) for at in (one, other))
    (images, again), (samples, maps), (cell, there) = (
        tuple(next(at.glob(name)) for at in (one, other))
        for name in ("images-*.npz", "samples-*.npz", "*/metrics.json")
    )
    with np.load(images) as a, np.load(again) as b:
        same_images = bool(np.array_equal(a["images"], b["images"]))
    with np.load(samples) as a, np.load(maps) as b:
        of_maps = largest(a["variance"], b["variance"])
    found = [read_json(path) for path in (cell, there)]
    assert found[0] is not None and found[1] is not None
    (fid,) = (name for name in found[0]["metrics"] if name.startswith("fid@"))
    return {
        "curvature_error": largest(first.gram.numpy(), second.gram.numpy()),
        "same_images": same_images,
        "variance_error": of_maps,
        "fid": found[1]["metrics"][fid],
        "fid_difference": abs(found[0]["metrics"][fid] - found[1]["metrics"][fid]),
    }


def main(arguments: list[str]) -> None:
    """Run and compare."""
    more = [word for word in arguments if "=" in word]
    folder = Path(next((word for word in arguments if "=" not in word), "outputs/ddp-demo"))
    one, *others = (run(folder, count, *more) for count in PROCESSES)
    found = {count: compared(one, at) for count, at in zip(PROCESSES[1:], others, strict=True)}
    path = HERE / "results.json"
    results = read_json(path) or {}
    results["ddp_curvature_error"] = max(each["curvature_error"] for each in found.values())
    results["ddp_fid_difference"] = max(each["fid_difference"] for each in found.values())
    results["ddp_same_images"] = all(each["same_images"] for each in found.values())
    results["ddp"] = {str(count): each for count, each in found.items()}
    write_json(path, results)


if __name__ == "__main__":
    main(sys.argv[1:])
