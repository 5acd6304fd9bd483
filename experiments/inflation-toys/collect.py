"""Writes results.json from what the runs left: python collect.py OUTPUTS MORE_OUTPUTS ..."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HERE = Path(__file__).parent
# Of each study's results.json: the numbers that are kept, under their names here.
KEPT = {
    "inversion": (
        "round_trip_mse", "round_trip_mse_low", "round_trip_mse_high", "round_trip_worst",
        "latent_kurtosis", "latent_variance", "latent_sd", "weights_share",
    ),
    "coverage": ("coverage_error", "held_out_error", "changed_sides"),
}  # fmt: skip
INFERENCE = ("weights_covered", "speedup", "r_hat", "sbc_p", "latents_p")


def latest(folder: Path, study: str) -> dict[str, Any]:
    """Results of the study that was made last in a run folder; empty without any."""
    found = sorted(folder.glob(f"{study}-*/results.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else {}


def of_run(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and numbers of one run folder."""
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    name = f"{cfg.data.name}_{cfg.path.schedule}"
    numbers: dict[str, Any] = {}
    for study, kept in KEPT.items():
        found = latest(folder, study)
        numbers |= {f"{name}.{key}": found[key] for key in kept if key in found}
    metrics = sorted(folder.glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    for file in metrics[-1:]:
        for key, value in json.loads(file.read_text())["metrics"].items():
            if "sliced_wasserstein" in key:
                numbers[f"{name}.{key}"] = value
    headlines = latest(folder, "inference").get("headlines", {})
    found = {key.removeprefix("inference/"): value for key, value in headlines.items()}
    where = "hmc" if name == "circles_prp" else f"hmc.{name}"
    numbers |= {f"{where}.{key}": found[key] for key in INFERENCE if key in found}
    stages = map(json.loads, (folder / "stages.jsonl").read_text().splitlines())
    training = next((stage for stage in stages if stage["stage"] == "training"), {})
    numbers |= {
        f"{name}.training.{k}": training[k] for k in ("amount", "seconds") if k in training
    }
    return name, numbers


def main(outputs: list[str]) -> None:
    """All runs of the output folders."""
    runs = [
        of_run(file.parent) for out in outputs for file in sorted(Path(out).glob("*/fit.json"))
    ]
    results = {key: value for _, numbers in sorted(runs) for key, value in numbers.items()}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
