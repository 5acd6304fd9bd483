"""Figures of finished runs on the trained U-Net, written into results.json.

    python experiments/pretrained/trained.py linearised32=CELL ensemble64=CELL filtering=STUDY

CELL is the folder of a cell, the one that holds its ``metrics.json``; STUDY that of a study, with
its ``results.json``. The first cell is what ``trained.*`` means.
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENDS = ("", "_low", "_high")


def of_cell(folder: Path) -> dict[str, object]:
    """Ranks and size with their intervals over images, and what they cost."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics = metrics.get("metrics", metrics)
    found: dict[str, object] = {"nfe": metrics["nfe"]}
    for name in ("image_rank", "pixel_rank", "log_ratio"):
        value, low, high = (metrics[f"validation/{name}{end}"] for end in ENDS)
        if name == "log_ratio":
            name, value, low, high = "size", *map(math.exp, (value, low, high))
        found |= {name: value, f"{name}.interval": [low, high]}
    return found | {key: metrics[key] for key in metrics if "fid@" in key}


def of_study(folder: Path) -> dict[str, object]:
    """Within classes at the main share: z and gain in FID of every score.

    Intervals are those over images where there is one seed, over seeds otherwise.
    """
    results = json.loads((folder / "results.json").read_text())
    told = results["conditions"]
    found: dict[str, object] = {
        name: told[name] for name in ("num_images", "seeds", "main_keep", "members", "nfe")
    }
    seeds = results["seeds"]
    for row in results["over_seeds"] if len(seeds) > 1 else next(iter(seeds.values())):
        if (row["mode"], row["keep"]) != ("per_class", told["main_keep"]):
            continue
        for name in ("z", "fid_gain", "fid"):
            found[f"{row['score']}.{name}"] = row[name]
            if f"{name}_low" in row:
                found[f"{row['score']}.{name}.interval"] = [
                    row[f"{name}_low"],
                    row[f"{name}_high"],
                ]
    for row in results["profile"]:
        found[f"{row['score']}.auroc_within"] = row["auroc_within"]
    return found


def main():
    """Read every folder; a name is written as ``trained.NAME.*``."""
    path = HERE / "results.json"
    kept = json.loads(path.read_text())
    given = tuple(f"trained.{word.partition('=')[0]}." for word in sys.argv[1:])
    results = {name: value for name, value in kept.items() if not name.startswith(given)}
    cells = 0
    for word in sys.argv[1:]:
        name, folder = word.split("=", 1)
        study = (Path(folder) / "results.json").is_file()
        found = of_study(Path(folder)) if study else of_cell(Path(folder))
        for prefix in [f"trained.{name}", *(["trained"] if not study and not cells else [])]:
            results |= {f"{prefix}.{key}": value for key, value in found.items()}
        cells += not study
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
