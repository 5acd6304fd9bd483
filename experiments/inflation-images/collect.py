"""Writes results.json from what the runs left: python collect.py OUTPUTS MORE_OUTPUTS ..."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HERE = Path(__file__).parent
KEPT = (
    "round_trip_mse", "round_trip_grey_mse", "psnr", "latent_kurtosis", "latent_variance",
    "latent_sd", "weights_share",
)  # fmt: skip


def name_of(cfg: Any) -> str:
    """``flow``, ``prp``, or ``prr`` with dimensions kept and gap."""
    if "schedule" not in cfg.path:
        return "flow"
    if cfg.path.schedule == "prp":
        return "prp"
    return f"prr_{cfg.path.dims_to_keep}_gap_{cfg.path.inflation_gap}"


def of_run(folder: Path) -> dict[str, Any]:
    """Numbers of one run folder, by names that begin with its own."""
    name = name_of(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    numbers: dict[str, Any] = {}
    for file in sorted(folder.glob("heun-*/metrics.json")):
        found = json.loads(file.read_text())["metrics"]
        numbers |= {f"{name}.{k}": v for k, v in found.items() if "fid@" in k or "kid@" in k}
    for file in sorted(folder.glob("inversion-*/results.json")):
        found = json.loads(file.read_text())
        numbers |= {f"{name}.{key}": found[key] for key in KEPT if key in found}
        numbers[f"{name}.round_trip_nfe"] = found["conditions"]["nfe"]
    stages = map(json.loads, (folder / "stages.jsonl").read_text().splitlines())
    training = next((stage for stage in stages if stage["stage"] == "training"), {})
    return numbers | {
        f"{name}.training.{k}": training[k] for k in ("amount", "seconds") if training
    }


def main(outputs: list[str]) -> None:
    """All runs of the output folders, and what ``few.py`` beside this file has left."""
    results: dict[str, Any] = {}
    for out in outputs:
        for file in sorted(Path(out).glob("*/fit.json")):
            results |= of_run(file.parent)
    few = HERE / "few_numbers.json"
    if few.is_file():
        results |= json.loads(few.read_text())
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
