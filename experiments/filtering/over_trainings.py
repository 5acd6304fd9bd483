"""What filtering gains beside what training again changes: the same study on three trainings.

    python experiments/filtering/over_trainings.py [DATA_MODEL ...]

Networks are those of ../retraining, seeds 0 to 2; settings of earlier calls stay in
over-trainings.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "retraining"))

from networks import SETTINGS, UNDER_TEST, configuration

from bayesdiff import pipeline
from bayesdiff.metrics.seeds import mean_interval, over_seeds
from bayesdiff.report import table
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
IMAGES = 500
STUDY = [
    *("experiment=filtering", f"filtering.num_images={IMAGES}", "filtering.seeds=[0]"),
    *("filtering.keep=[0.8]", "filtering.draws=20", "uncertainty.members=16"),
    "+filtering.maps.checkpoints._target_=bayesdiff.uncertainty.Checkpoints",
    "+filtering.maps.swag._target_=bayesdiff.uncertainty.Swag",
    "+filtering.maps.mc_dropout._target_=bayesdiff.uncertainty.MCDropout",
    "+filtering.maps.subnetwork._target_=bayesdiff.uncertainty.Subnetwork",
    "+filtering.maps.subnetwork.share=0.01",
]


def rows_of(setting: str, seed: int) -> list[dict[str, Any]]:
    """Every score's gain on one training."""
    (folder,) = pipeline.run(configuration(setting, seed, *STUDY)).studies
    found = read_json(folder / "results.json")
    assert found is not None
    return list(found["over_seeds"])


def summed_up(tables: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Gains over trainings with their intervals, beside the trainings' own spread."""
    mode = max({row["mode"] for row in tables[0]}, key=lambda m: "class" in m)
    own = [[row for row in each if row["mode"] == mode] for each in tables]
    chance = [
        next(row["fid"] + row["fid_gain"] for row in each if row["score"] == "random")
        for each in own
    ]
    mean, low, high = mean_interval(chance)
    rows = over_seeds(own, ["score"], ["fid_gain", "z", "fid"])
    spread = (sum((value - mean) ** 2 for value in chance) / (len(chance) - 1)) ** 0.5
    return {
        "mode": mode,
        "fid_by_chance": {"mean": mean, "low": low, "high": high, "sd": spread, "each": chance},
        "scores": sorted(rows, key=lambda row: -row["fid_gain"]),
    }


def main(words: Sequence[str]) -> None:
    """Filter, and add to the results."""
    for setting in Asked.of(words, SETTINGS).names or ["digits_flow", "fashion_flow"]:
        results = read_json(HERE / "over-trainings.json") or {}
        results[setting] = summed_up([rows_of(setting, seed) for seed in UNDER_TEST])
        write_json(HERE / "over-trainings.json", results)
        names = ["score", *(f"fid_gain{end}" for end in ("", "_low", "_high")), "z"]
        write_text(
            HERE / f"table-over-trainings-{setting}.md",
            table.markdown(results[setting]["scores"], names),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
