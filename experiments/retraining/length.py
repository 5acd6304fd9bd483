"""Is the size that a posterior lacks a matter of how long the network was trained?

    python experiments/retraining/length.py [DATA_MODEL] [epochs=K ...]

The networks of seeds 0 to 7 trained for fewer and for more epochs. Of seed 0 the maps of all
layers and of the head, against the seven others.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import Bench, images_of
from networks import REFERENCE, SETTINGS
from run import linearised, reliability, wide

from bayesdiff.metrics.agreement import image_rank, pixel_rank, spread_ratio
from bayesdiff.report import table
from bayesdiff.runs.training import images_seen
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
SETTING = "digits_flow"
EPOCHS = ("20", "40", "120", "360")
USUAL = "120"  # of the other scripts, whose networks are taken


def of_length(setting: str, epochs: str) -> dict[str, float]:
    """Ranks and sizes of the maps of one network against others that were trained as long."""
    bench = Bench(setting if epochs == USUAL else f"{setting}_{epochs}", 0)
    images = images_of(bench, REFERENCE)
    others = [images[k] for k in REFERENCE if k]
    reference = torch.stack(others).var(0)
    every = wide(bench, "all", "all", linearised())
    head = bench.maps("head_linearised", linearised())
    return {
        "images_seen": float(images_seen(bench.run)),
        "image_rank": image_rank(every.variance, reference),
        "reliability": reliability(others)["image_rank"],
        "pixel_rank": pixel_rank(every.variance, reference),
        "size": spread_ratio(every.variance, reference),
        "size_of_head": spread_ratio(head.variance, reference),
        "summed_variance_of_retraining": float(reference.flatten(1).sum(1).mean()),
    }


def main(words: Sequence[str]) -> None:
    """Compare, and add to the results."""
    asked = Asked.of(words, SETTINGS, "epochs")
    setting = asked.names[0] if asked.names else SETTING
    for epochs in asked.options["epochs"] or EPOCHS:
        results = read_json(HERE / "length.json") or {}
        found = results.setdefault(setting, {})
        found[epochs] = of_length(setting, epochs)
        write_json(HERE / "length.json", results)
        rows = [{"epochs": name, **found[name]} for name in sorted(found, key=int)]
        write_text(HERE / f"length-{setting}.md", table.markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
