"""Measure every ratio of experiments/benchmark/README.md and write results.json beside it.

python experiments/benchmark/run.py [--repeats 5]
"""

import argparse
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import last_layer  # noqa: E402
import torch  # noqa: E402
import whole  # noqa: E402

HERE = Path(__file__).parent


def main() -> None:
    """Measure, print the ratios, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, medians count")
    repeats = parser.parse_args().repeats
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = whole.curvature_pass(repeats)
    rows += [whole.training(repeats), whole.sweep(repeats)]
    last = last_layer.measure(repeats)
    ratios: dict[str, float] = {}
    for row in rows:  # These are costs: the worst is the largest.
        ratios[row["name"]] = max(ratios.get(row["name"], 0.0), row["ratio"])
    ratios |= last["ratios"]
    results: dict[str, Any] = {
        **{name: round(value, 3) for name, value in ratios.items()},
        "conditions": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "repeats": repeats,
        },
        "table": rows + last["table"],
    }
    path = HERE / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(f"{name:32s} {value:8.2f}" for name, value in ratios.items()))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
