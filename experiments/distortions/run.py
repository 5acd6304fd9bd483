"""FID and CMMD of real test images that are distorted more and more.

    python experiments/distortions/run.py [DATA ...] [lpips=FILE] [KEY=VALUE ...]

Every measurement is kept under outputs/distortions, so an interrupted study goes on where it was;
data sets of an earlier call with the same overrides stay in results.json.
LPIPS to the image before needs AlexNet's ImageNet weights, the file that torchvision keeps as
alexnet-owt-7be5be79.pth: in torch's download cache, or given; nothing is downloaded.
"""

import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from distort import STRENGTHS, distorted
from torch import Tensor, nn

from bayesdiff import pipeline
from bayesdiff.cli import one_line_errors
from bayesdiff.data.images import ImageData
from bayesdiff.metrics.agreement import spearman
from bayesdiff.metrics.cmmd import cmmd_of_subsets
from bayesdiff.metrics.features import extract, weights_hash
from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.metrics.subsets import pool
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart, picture, put, sheet
from bayesdiff.report.style import look, style
from bayesdiff.runs.build import build
from bayesdiff.runs.scores import judge
from bayesdiff.storage.artefacts import (
    finite,
    key_of,
    read_json,
    weights_key,
    write_json,
    write_text,
)
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STORE = ROOT / "outputs" / "distortions"
_CIFAR = "${oc.env:BAYESDIFF_DATA,data}/cifar10"
DATA = {
    "fashion": ["data=fashion"],
    "digits": ["data=digits"],
    "cifar10": [
        *("data=zip", "data.name=cifar10", f"data.root={_CIFAR}-train10k-32x32.zip"),
        f"data.source.test_root={_CIFAR}-test2k-32x32.zip",
    ],
}
DEFAULT = ["fashion", "digits"]
MAIN = "fashion"  # of the keys without a data set
SEEDS, MOST = 5, 1000  # disjoint parts of the test images, and images of each at most
LEVELS = (1, 2, 3, 4, 5)
METRICS = ("fid", "cmmd", "lpips")
VERSION = 1  # of what is measured and kept
NETWORKS = {"alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}
NETWORK, LPIPS_SIZE, LPIPS_IMAGES = "alex", 64, 200  # per seed


class Bench:
    """Test images in disjoint parts, and what judges them."""

    def __init__(self, name: str, lpips: nn.Module | None, *more: str) -> None:
        cfg = pipeline.compose(*DATA[name], "metrics=classifier", *more)
        run = build(cfg)
        self.name, self.lpips, self.cfg = name, lpips, cfg
        # All that an LPIPS depends on beside the images.
        self.perceives: list[Any] | None = None
        if lpips is not None:
            self.perceives = [NETWORK, LPIPS_SIZE, LPIPS_IMAGES, weights_key(lpips)]
        self.data: ImageData = run.data.data
        self.extractor, self.reference = judge(run)
        self.real = torch.from_numpy(self.reference.subset)
        count = min(MOST, len(self.data.test_images) // SEEDS)
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randperm(len(self.data.test_images), generator=generator)
        self.parts = mixed[: SEEDS * count].view(SEEDS, count)

    def images(self, kind: str, level: int, seed: int) -> Tensor:
        """One part, distorted by noise of its own."""
        images, labels = self.data.test_images, self.data.test_labels
        assert labels is not None  # metrics=classifier refuses others
        part = self.parts[seed]
        return distorted(images[part], labels[part], kind, level, seed)

    def measure(self, kind: str, level: int) -> dict[str, list[float]]:
        """Every metric of every seed."""
        images = [self.images(kind, level, seed) for seed in range(SEEDS)]
        features = extract(self.extractor, torch.cat(images)).features
        parts = torch.arange(len(features)).view(SEEDS, -1)
        values = {
            "fid": pool(features, self.reference).figures(parts)["fid"].tolist(),
            "cmmd": cmmd_of_subsets(features, self.real, parts).tolist(),
        }
        if self.lpips is not None and kind != "mode_drop":  # has no image before
            before = [self.images(kind, 0, seed) for seed in range(SEEDS)]
            pairs = zip(before, images, strict=True)
            values["lpips"] = [perceptual(self.lpips, *pair) for pair in pairs]
        return values

    def kept(self, kind: str, level: int) -> dict[str, list[float]]:
        """Measured once."""
        key = key_of(
            *(self.data.fingerprint, weights_hash(self.extractor), VERSION, SEEDS, MOST),
            *(STRENGTHS.get(kind), level, self.perceives),
        )
        path = STORE / f"{self.name}-{kind}-{level}.json"
        stored = read_json(path) or {}
        if stored.get("key") != key:
            print(f"{self.name} {kind} {level}", flush=True)
            stored = {"key": key, "values": self.measure(kind, level)}
            write_json(path, stored)
        values: dict[str, list[float]] = stored["values"]
        return values

    def all(self) -> dict[str, dict[str, list[float]]]:
        """``KIND.LEVEL`` to the metrics of every seed; level 0 is ``none.0``."""
        measured = {"none.0": self.kept("none", 0)}
        for kind in STRENGTHS:
            measured |= {f"{kind}.{level}": self.kept(kind, level) for level in LEVELS}
        return measured

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on."""
        metrics = self.cfg.metrics
        return {
            "data": self.data.name,
            "images": self.parts.shape[1],
            "seeds": SEEDS,
            "reference_images": self.reference.size,
            "cmmd_reference_images": len(self.real),
            "features": metrics.features,
            "classifier_seed": metrics.seed,
            "classifier_test_accuracy": self.extractor.classifier.test_accuracy,
            "lpips": self.lpips is not None,
            "strengths": STRENGTHS,
        }


def perceptual_network(path: Path | None) -> nn.Module | None:
    """LPIPS by torchmetrics; None, with a line that says so, where its backbone is not there."""
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
    from torchvision import models

    name = getattr(models, NETWORKS[NETWORK]).DEFAULT.url.rsplit("/", 1)[-1]
    hub = Path(torch.hub.get_dir())
    path = path or hub / "checkpoints" / name
    if not path.is_file():
        print(f"LPIPS is left out: no weights at {path}; give lpips=/path/to/{name}", flush=True)
        return None
    weights = torch.load(path, map_location="cpu", weights_only=True)
    with TemporaryDirectory() as folder:
        # torchvision unpickles whatever lies in its cache; hand it what we wrote ourselves.
        (Path(folder) / "checkpoints").mkdir()
        torch.save(weights, Path(folder) / "checkpoints" / name)
        torch.hub.set_dir(folder)
        try:
            return LearnedPerceptualImagePatchSimilarity(NETWORK, normalize=True)
        finally:
            torch.hub.set_dir(hub)


@torch.no_grad()
def perceptual(network: nn.Module, before: Tensor, after: Tensor) -> float:
    """Mean LPIPS of the first images, enlarged to what its backbone takes."""
    pair = []
    for images in (before, after):
        images = images[:LPIPS_IMAGES].expand(-1, 3, -1, -1) / 255
        pair.append(F.interpolate(images, size=LPIPS_SIZE, mode="bilinear", antialias=True))
    network.reset()
    return float(network(*pair))


def summary(measured: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Means over seeds with intervals, how metrics follow the level, and where they disagree."""
    flat: dict[str, Any] = {}
    for setting, values in measured.items():
        for metric, each in values.items():
            flat |= named(f"distortion.{setting}.{metric}", each)
    for kind in STRENGTHS:
        for metric in METRICS:
            rows = along(measured, kind, metric)
            if rows is not None:
                flat |= {f"{kind}.{metric}.{name}": v for name, v in follows(rows).items()}
    return flat | disagreement(measured)


def named(name: str, values: Iterable[float], most: float = float("inf")) -> dict[str, float]:
    """Mean over seeds and its interval, cut at what the number can reach."""
    mean, low, high = mean_interval(list(values))
    return {name: mean, f"{name}_low": low, f"{name}_high": min(high, most)}


def along(measured: dict[str, Any], kind: str, metric: str) -> Tensor | None:
    """A metric over levels 0, 1, ... ``(SEEDS, L)``; None where it was not measured."""
    settings = ["none.0", *(f"{kind}.{level}" for level in LEVELS)]
    if any(metric not in measured[setting] for setting in settings):
        return None
    return torch.tensor([measured[setting][metric] for setting in settings], dtype=torch.float64).T


def follows(rows: Tensor) -> dict[str, Any]:
    """How a metric ``(SEEDS, L)`` follows the level.

    ``monotone`` is the Spearman correlation with the level, with its interval over seeds;
    ``steps_up`` the share of steps, over seeds, at which it rises; ``seen_from`` the first level
    from which on it differs from the undistorted images beyond chance.
    """
    ranks = spearman(rows, torch.arange(rows.shape[1]).expand_as(rows)).tolist()
    differs = [beyond_chance(column - rows[:, 0]) for column in rows.T[1:]]
    signs = enumerate(LEVELS)
    seen = [level for place, level in signs if all(sign > 0 for sign in differs[place:])]
    return {
        **named("monotone", ranks, most=1.0),
        "steps_up": float((rows.diff(dim=1) > 0).double().mean()),
        "seen_from": min(seen, default=None),
    }


def beyond_chance(differences: Tensor) -> int:
    """Sign of paired differences over seeds, 0 where their interval holds 0."""
    _, low, high = mean_interval(differences.tolist())
    return int(low > 0) - int(high < 0)


def disagreement(measured: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Pairs of distorted sets that FID and CMMD put in opposite orders, both beyond chance."""
    names = [name for name in measured if name != "none.0"]
    values = {
        name: {m: torch.tensor(measured[name][m], dtype=torch.float64) for m in ("fid", "cmmd")}
        for name in names
    }
    against, both = [], 0
    for one, other in combinations(names, 2):
        signs = [beyond_chance(values[one][m] - values[other][m]) for m in ("fid", "cmmd")]
        both += bool(signs[0] and signs[1])
        if signs[0] * signs[1] < 0:
            worse = (one, other) if signs[0] > 0 else (other, one)
            against.append({"fid_worse": worse[0], "cmmd_worse": worse[1]})
    seeds = [[values[name][m] for name in names] for m in ("fid", "cmmd")]
    ranks = spearman(*(torch.stack(each, 1) for each in seeds)).tolist()
    return {
        **named("fid_and_cmmd.rank", ranks, most=1.0),
        "fid_and_cmmd.pairs": len(names) * (len(names) - 1) // 2,
        "fid_and_cmmd.pairs_apart_in_both": both,
        "fid_and_cmmd.pairs_opposite": len(against),
        "fid_and_cmmd.opposite": against,
    }


def rows_of(flat: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each kind and metric."""
    lines = []
    for kind, strengths in STRENGTHS.items():
        for metric in METRICS:
            if f"{kind}.{metric}.monotone" not in flat:
                continue
            line = {"distortion": kind, "levels": ", ".join(f"{s:g}" for s in strengths)}
            line |= {"metric": metric.upper(), "0": interval(flat, f"distortion.none.0.{metric}")}
            for level in LEVELS:
                line[str(level)] = interval(flat, f"distortion.{kind}.{level}.{metric}")
            line["Spearman with the level"] = interval(flat, f"{kind}.{metric}.monotone")
            seen = flat[f"{kind}.{metric}.seen_from"]
            lines.append(line | {"seen from level": "never" if seen is None else str(seen)})
    return lines


def interval(flat: dict[str, Any], name: str) -> str:
    """Mean and interval."""
    mean, low, high = (flat[name + end] for end in ("", "_low", "_high"))
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


@style()
def draw(flat: dict[str, Any], conditions: dict[str, Any]) -> Any:
    """Both metrics over the level, and one over the other."""
    caption = (
        f"Real test images of {conditions['data']}, distorted: {SEEDS} disjoint parts of "
        f"{conditions['images']:,} images; mean and 95 % interval over them. Level 0: none. "
        "Features: the project's classifier, penultimate layer. On the right levels 1 to 5."
    )
    title = "FID and CMMD under progressive distortion"
    figure, axes = chart(1100, 400, title, caption, 1, 3)
    for place, kind in enumerate(STRENGTHS):
        how = look(place)
        names = ["distortion.none.0", *(f"distortion.{kind}.{level}" for level in LEVELS)]
        lines = {m: [flat[f"{name}.{m}"] for name in names] for m in ("fid", "cmmd")}
        for axis, metric in zip(axes[0], lines, strict=False):
            ends = [[flat[f"{n}.{metric}_{end}"] for n in names] for end in ("low", "high")]
            axis.fill_between(range(len(names)), *ends, color=how["color"], alpha=0.2, linewidth=0)
            axis.plot(lines[metric], **how)
        axes[0, 2].plot(lines["fid"][1:], lines["cmmd"][1:], label=kind.replace("_", " "), **how)
    for axis, metric in zip(axes[0], ("fid", "cmmd"), strict=False):
        axis.set(xlabel="level", ylabel=metric.upper())
        axis.set_yscale("symlog", linthresh=0.1 if metric == "cmmd" else 1)
    axes[0, 2].set(xlabel="FID", ylabel="CMMD")
    axes[0, 2].set_xscale("symlog", linthresh=1)
    axes[0, 2].set_yscale("symlog", linthresh=0.1)
    axes[0, 2].legend(loc="lower right")
    return figure


@style()
def show(bench: Bench) -> Any:
    """One image of three classes at every level of every kind that changes pixels."""
    size, kinds = 56, [kind for kind in STRENGTHS if kind != "mode_drop"]
    left, caption = 150, f"The first three images of one part of {bench.name}; levels 0 to 5."
    height = len(kinds) * (size + 6)
    figure, axes = sheet(
        left + (1 + len(LEVELS)) * (3 * size + 12), height, "The distortions", caption
    )
    for row, kind in enumerate(kinds):
        y = row * (size + 6)
        axes.text(left - 8, y + size / 2, kind.replace("_", " "), ha="right", va="center")
        for level in (0, *LEVELS):
            for number, image in enumerate(bench.images(kind, level, 0)[:3]):
                x = left + level * (3 * size + 12) + number * size
                put(axes, picture(image / 127.5 - 1), x, y, (size, size))
    return figure


def write(sets: dict[str, dict[str, Any]], overrides: list[str]) -> None:
    """results.json, tables and figures of all data sets so far."""
    flats = {name: summary(one["seeds"]) for name, one in sets.items()}
    flat = dict(flats[MAIN] if MAIN in flats else next(iter(flats.values())))
    for name, own in flats.items():
        flat |= {f"{name}.{key}": value for key, value in own.items()}
        figures.save(draw(own, sets[name]["conditions"]), HERE / f"{name}.png")
    write_json(HERE / "results.json", finite({**flat, "overrides": overrides, "sets": sets}))
    parts = [f"## {name}\n\n{table.markdown(rows_of(own))}" for name, own in flats.items()]
    write_text(HERE / "table.md", "\n".join(parts))


def main(arguments: list[str]) -> None:
    """Measure the data sets asked for; those of an earlier call stay."""
    asked = Asked.of(arguments, DATA, "lpips")
    sets = asked.kept(HERE / "results.json", "sets")
    (weights,) = asked.options["lpips"][-1:] or [None]
    lpips = perceptual_network(None if weights is None else Path(weights))
    for name in asked.names or DEFAULT:
        bench = Bench(name, lpips, *asked.overrides)
        measured = bench.all()
        sets[name] = {"conditions": bench.conditions, "seeds": measured}
        write({name: sets[name] for name in DATA if name in sets}, asked.recorded)
        figures.save(show(bench), HERE / f"{name}-distorted.png")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
