"""Figures of finished runs on the trained U-Net, written into results.json.

    python experiments/pretrained/trained.py refined=CELL ensemble32=CELL

CELL is the folder of a cell, the one that holds its ``metrics.json``.
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main():
    """Read every cell's validation; the first one is what ``trained.*`` means."""
    path = HERE / "results.json"
    kept = json.loads(path.read_text())
    results = {name: value for name, value in kept.items() if not name.startswith("trained.")}
    for place, word in enumerate(sys.argv[1:]):
        name, folder = word.split("=", 1)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        metrics = metrics.get("metrics", metrics)
        found = {
            "image_rank": metrics["validation/image_rank"],
            "pixel_rank": metrics["validation/pixel_rank"],
            "size": math.exp(metrics["validation/log_ratio"]),
            "nfe": metrics["nfe"],
        }
        found |= {key: metrics[key] for key in metrics if "fid@" in key}
        for prefix in [f"trained.{name}", *(["trained"] if place == 0 else [])]:
            results |= {f"{prefix}.{key}": value for key, value in found.items()}
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
