"""Writes results.json from what the runs left: python collect.py OUTPUTS MORE_OUTPUTS ..."""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
VALUES = 28 * 28
# Beside this file: what other studies wrote; their numbers are repeated, their curves are not.
BESIDE = ("beliefs", "two_digit", "fast_solver", "recursion")


def learning_curve(run: Path, batch: int) -> list[dict[str, float]]:
    """Transmitted nats per image of 1,024 test images after every epoch, continuous time."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    if "val/loss" not in events.Tags()["scalars"]:  # a training that ended within its first epoch
        return []
    return [
        {"images_seen": (point.step + 1) * batch, "transmitted": point.value * VALUES}
        for point in events.Scalars("val/loss")
    ]


def code_length(folder: Path) -> dict[str, object]:
    """One training's code lengths, with what it is told apart by."""
    run = folder.parent
    cfg = OmegaConf.load(run / ".hydra" / "config.yaml")
    found = json.loads((folder / "results.json").read_text())
    stages = map(json.loads, (run / "stages.jsonl").read_text().splitlines())
    training = next(stage for stage in stages if stage["stage"] == "training")
    options = {
        "beta_1": cfg.path.beta_1, "residual": cfg.model.wrapper.residual,
        "max_steps": cfg.trainer.max_steps, "epochs": cfg.trainer.max_epochs,
    }  # fmt: skip
    keep = {name: found[name] for name in ("images", "draws", "rows", "levels")}
    cost = {name: training[name] for name in ("amount", "seconds", "threads", "device")}
    curve = learning_curve(run, cfg.data.batch_size)
    return {**options, **keep, "learning_curve": curve, "training": cost}


def main(outputs: list[str]) -> None:
    """All trainings of the output folders, the longest first."""
    folders = [f for out in outputs for f in sorted(Path(out).glob("*/code_length-*"))]
    runs = sorted(map(code_length, folders), key=lambda run: -len(run["learning_curve"]))
    longest = next(row for row in runs[0]["rows"] if row["n"] == "inf")
    results = {"nats_per_image": longest["nats"], "runs": runs}
    for name in BESIDE:
        if (HERE / f"{name}.json").is_file():
            given = json.loads((HERE / f"{name}.json").read_text())
            results |= {k: v for k, v in given.items() if isinstance(v, (int, float))}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
