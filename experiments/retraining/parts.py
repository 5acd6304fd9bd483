"""Which layers does retraining move? The map of every part of the network alone.

    python experiments/retraining/parts.py [DATA_MODEL ...]

For networks of seed 0: size and ranks against retraining of the posterior of head and one part.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import Bench, images_of
from networks import REFERENCE, SETTINGS
from run import linearised, wide

from bayesdiff.metrics.agreement import image_rank, pixel_rank, spread_ratio
from bayesdiff.report import table
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
PARTS = {
    "time": ["time"],
    "stem_and_down": ["stem", "down"],
    "middle": ["middle", "attention"],
    "up_to_full_size": ["up.0", "up.1", "up.2"],
    "up_at_full_size": ["up.3", "up.4"],
    "all": "all",
}


def main(words: Sequence[str]) -> None:
    """Compare, and add to the results."""
    for setting in Asked.of(words, SETTINGS).names or ["digits_flow"]:
        bench = Bench(setting, 0)
        images = images_of(bench, REFERENCE)
        reference = torch.stack([images[k] for k in REFERENCE if k]).var(0)
        results = read_json(HERE / "parts.json") or {}
        found = {"head": bench.maps("head_linearised", linearised())}
        for name, part in PARTS.items():
            kept = "all" if name == "all" else f"part_{name}"
            found[name] = wide(bench, kept, part, linearised())
        results[setting] = {
            name: {
                "image_rank": image_rank(maps.variance, reference),
                "pixel_rank": pixel_rank(maps.variance, reference),
                "size": spread_ratio(maps.variance, reference),
                "share_of_all": float(maps.variance.sum() / found["all"].variance.sum()),
            }
            for name, maps in found.items()
        }
        write_json(HERE / "parts.json", results)
        rows = [{"part": name, **numbers} for name, numbers in results[setting].items()]
        write_text(HERE / f"parts-{setting}.md", table.markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
