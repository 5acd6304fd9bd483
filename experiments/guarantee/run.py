"""Does the threshold hold? Risk asked against risk found, on new noise and on other trainings.

    python experiments/guarantee/run.py [SETTING ...] [seed=K ...] [members=M] [KEY=VALUE ...]

The networks are those of ../retraining, trained where they are missing; their run folders keep the
pools (networks=FOLDER for copies elsewhere). members=0 leaves out the score that reads members.
Without a setting: all of them. Settings of an earlier call stay in results.json.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "retraining"))

from networks import prepared

from bayesdiff.metrics.features import build_extractor, extract
from bayesdiff.metrics.selection import auroc
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart
from bayesdiff.report.style import look, style
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup, sampled_from, starts
from bayesdiff.runs.stages import made_rows
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import (
    Artefact,
    finite,
    key_of,
    weights_key,
    write_json,
    write_text,
)
from bayesdiff.studies.filtering.guarantee import guaranteed, interval, risk
from bayesdiff.studies.filtering.guaranteed import GuaranteeOptions
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.script import Asked
from bayesdiff.uncertainty import Ensemble
from bayesdiff.uncertainty.scores.of_members import class_entropy, predictive_entropy

HERE = Path(__file__).parent
SETTINGS = ("digits_flow", "mnist_flow", "fashion_flow", "digits_diffusion")
SEEDS = (0, 1, 2)  # trainings of each setting
NOISE = (0, 1, 2)  # seeds of the pools
COUNT = 500  # images of a pool
CALIBRATION = 500  # images of a split; all others are held out
SPLITS = 50
LEVEL = 0.1
MEMBERS = 5
# What is bad, as filtering.judge says it. Digits are of the wrong class too seldom to be filtered.
BAD: dict[str, str | float] = {"digits": 0.999, "mnist": "class", "fashion": "class"}
ASKED = (0.8, 0.9, 0.95)
MAIN, OF_MEMBERS, RANDOM = "classifier.class_entropy", "members.predictive_entropy", "random"

# Scores of all images of one training by name, and which of them are bad.
Images = tuple[dict[str, torch.Tensor], torch.Tensor]


def images_of(setting: str, seed: int, members: int, words: Sequence[str]) -> Images:
    """Scores and marks of one training's pools, all noise seeds together."""
    run, solver, laplace = prepared(setting, seed, *words)
    cfg, data = run.cfg.metrics, run.data.data
    cache = Path(run.cfg.output_dir) / "cache"
    judge, scorer = (
        build_extractor("classifier", data, cache_dir=cache, seed=cfg.seed + k, device=run.device)
        for k in (0, 1)
    )
    asked = GuaranteeOptions(guarantee=ASKED[0], judge=BAD[setting.split("_")[0]])
    parts: list[Images] = []
    for noise in NOISE:
        labels = starts(run, solver, noise)(range(COUNT)).labels
        made = pool_of(run, solver, noise)
        random = torch.Generator().manual_seed(noise)
        logits = extract(scorer, made, cfg.batch_size).logits
        scores = {MAIN: class_entropy(logits)}
        if members:
            posterior = laplace.fit(run.model, data)
            at = Setup(run, solver, Ensemble(), posterior, weights_key(run.model))
            others = ImagePool(at, COUNT, noise).members(members)
            read = extract(scorer, others.flatten(0, 1), cfg.batch_size).logits
            scores[OF_MEMBERS] = predictive_entropy(read.unflatten(0, others.shape[:2]))
        scores[RANDOM] = torch.rand(COUNT, generator=random, dtype=torch.float64)
        assert labels is not None
        logits = extract(judge, made, cfg.batch_size).logits
        parts.append((scores, asked.bad_by_judge(logits, labels.cpu())))
    names = parts[0][0]
    return {k: torch.cat([s[k] for s, _ in parts]) for k in names}, torch.cat(
        [b for _, b in parts]
    )


@torch.inference_mode()
def pool_of(run: Run, solver: Solver, noise: int) -> torch.Tensor:
    """The network's own samples of one noise seed, uint8, kept in its run folder."""
    start_of = starts(run, solver, noise)

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        start = start_of(numbers)
        images = integrate(start.field(), start.steps(), start.initial(), start.draw)
        return {"images": run.data.space.decode(images).cpu()}

    key = key_of(*sampled_from(run, weights_key(run.model)), "images", noise, COUNT)
    file = run.folder / "pools" / f"images-seed{noise}-{key[:8]}.npz"
    rows = made_rows(Artefact(file, key), range(COUNT), 100, batch, f"images, seed {noise}")
    return rows["images"]


def plain_threshold(scores: torch.Tensor, bad: torch.Tensor, allowed: float) -> float | None:
    """The loosest score up to which no more than the allowed share is bad, without a margin."""
    values, order = scores.sort()
    low = bad[order].cumsum(0) / torch.arange(1, len(bad) + 1) <= allowed
    return float(values[low][-1]) if low.any() else None


def splits(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Places of the images that calibrate, and of those that are held out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(SPLITS):
        order = torch.randperm(count, generator=generator)
        yield order[:CALIBRATION], order[CALIBRATION:]


def split_rows(setting: str, trainings: dict[int, Images], score: str) -> list[dict[str, Any]]:
    """One row for each training, share asked and split."""
    rows = []
    for (seed, (scores, bad)), good in itertools.product(trainings.items(), ASKED):
        allowed, values = round(1 - good, 12), scores[score]
        for number, (here, rest) in enumerate(splits(len(bad))):
            own = guaranteed(values[here], bad[here], allowed, LEVEL)
            plain = plain_threshold(values[here], bad[here], allowed)
            every, held = risk(values, bad, own), risk(values[rest], bad[rest], own)
            row = {"setting": setting, "score": score, "seed": seed, "asked": good}
            row |= {"split": number, "holds": own is not None, "kept": held.share_kept}
            # The pools are the population that the calibration images are drawn from.
            row |= {"risk": held.risk, "violated": every.risk > allowed}
            row |= {"violated_held_out": held.risk > allowed}
            row["plain_violated"] = risk(values, bad, plain).risk > allowed
            row["plain_kept"] = risk(values, bad, plain).share_kept
            row["others"] = [
                other_row(there, *trainings[there], score, own, allowed)
                for there in trainings
                if there != seed
            ]
            rows.append(row)
    return rows


def other_row(
    seed: int,
    scores: dict[str, torch.Tensor],
    bad: torch.Tensor,
    score: str,
    threshold: float | None,
    allowed: float,
) -> dict[str, Any]:
    """The same threshold on all images of another training."""
    found = risk(scores[score], bad, threshold)
    return {
        "seed": seed,
        "risk": found.risk,
        "kept": found.share_kept,
        "violated": found.risk > allowed,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares and means over splits; risks over the splits that keep anything."""
    others = [other for row in rows for other in row["others"]]

    def share(name: str, of: Sequence[dict[str, Any]]) -> float | None:
        return sum(row[name] for row in of) / len(of) if of else None

    def mean(name: str, of: Sequence[dict[str, Any]]) -> float | None:
        values = [row[name] for row in of if np.isfinite(row[name])]
        return float(np.mean(values)) if values else None

    hits = sum(row["violated"] for row in rows)
    names = ("violated", "violated_held_out", "plain_violated", "holds")
    found = {name: share(name, rows) for name in names}
    return {
        "splits": len(rows),
        "violations": found["violated"],
        "violations_interval": list(interval(hits, len(rows))),
        "violations_held_out": found["violated_held_out"],
        "plain_violations": found["plain_violated"],
        "holds": found["holds"],
        "kept": mean("kept", rows),
        "plain_kept": mean("plain_kept", rows),
        "risk": mean("risk", rows),
        "other_violations": share("violated", others),
        "other_risk": mean("risk", others),
        "other_kept": mean("kept", others),
    }


def scores_of(trainings: dict[int, Images]) -> list[str]:
    """Names of the scores that all trainings have."""
    return list(next(iter(trainings.values()))[0])


def facts_of(trainings: dict[int, Images]) -> dict[str, Any]:
    """What the trainings are like, before anything is discarded."""
    return {
        "risk_of_all": {seed: float(bad.double().mean()) for seed, (_, bad) in trainings.items()},
        "auroc": {
            name: float(np.mean([auroc(s[name], bad) for s, bad in trainings.values()]))
            for name in scores_of(trainings)
        },
    }


def measured(setting: str, trainings: dict[int, Images]) -> dict[str, Any]:
    """All numbers of one setting."""
    found: dict[str, Any] = facts_of(trainings) | {"rows": []}
    for score in scores_of(trainings):
        rows = split_rows(setting, trainings, score)
        for good in ASKED:
            own = [row for row in rows if row["asked"] == good]
            found["rows"].append({"score": score, "asked": good} | summary(own))
            if score == MAIN:
                worst = {s: summary([r for r in own if r["seed"] == s]) for s in trainings}
                found.setdefault("trainings", []).extend(
                    {"asked": good, "seed": s, **one} for s, one in worst.items()
                )
    return found


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Keys that others look up: of the main score, over all shares asked for."""
    keys: dict[str, Any] = {}
    places = {MAIN: "guarantee", OF_MEMBERS: "guarantee.members", RANDOM: "guarantee.random"}
    for score, place in places.items():
        rows = [
            (name, row)
            for name, one in settings.items()
            for row in one["rows"]
            if row["score"] == score
        ]
        count = sum(row["splits"] for _, row in rows)
        if not count:
            continue
        hits = round(sum(row["violations"] * row["splits"] for _, row in rows))
        keys[f"{place}.violations"] = hits / count
        keys[f"{place}.violations.interval"] = list(interval(hits, count))
        for figure in ("violations_held_out", "plain_violations"):
            keys[f"{place}.{figure}"] = float(np.mean([row[figure] for _, row in rows]))
        for name, row in rows:
            at = f"{place}.{name}.{row['asked']:g}"
            for figure in ("violations", "kept", "risk"):
                keys[f"{at}.{figure}"] = row[figure]
            keys[f"{at}.violations.interval"] = row["violations_interval"]
            if score == MAIN:
                other = f"other_trainings.{name}.{row['asked']:g}"
                keys[f"{other}.risk"] = row["other_risk"]
                keys[f"{other}.violations"] = row["other_violations"]
                keys[f"{other}.kept"] = row["other_kept"]
    return keys


def write(settings: dict[str, Any], overrides: list[str]) -> None:
    """results.json, the table and the figure."""
    conditions = {
        "level": LEVEL, "splits": SPLITS, "calibration": CALIBRATION, "images": COUNT * len(NOISE),
        "noise_seeds": list(NOISE), "score": MAIN, "bad": BAD,
    }  # fmt: skip
    results = {"overrides": overrides, "conditions": conditions, "settings": settings}
    write_json(HERE / "results.json", finite(flat(settings) | results))
    lines = [{"setting": name} | row for name, one in settings.items() for row in one["rows"]]
    columns = ["setting", "score", "asked", "holds", "kept", "risk", "violations"]
    columns += ["violations_held_out", "plain_violations", "plain_kept"]
    columns += ["other_risk", "other_violations"]
    write_text(HERE / "table.md", table.markdown(lines, columns))
    figures.save(asked_and_found(settings), HERE / "asked-and-found.png")


@style()
def asked_and_found(settings: dict[str, Any]) -> Any:
    """Risk asked against risk found: on new noise, and by other trainings."""
    caption = (
        f"Mean over {SPLITS} splits of each training, of the splits whose threshold holds: share "
        f"of bad images among the kept, by {MAIN}; calibrated on {CALIBRATION} images at level "
        f"{LEVEL:g}. Dotted: risk found as asked. Below it the threshold is on the safe side."
    )
    figure, axes = chart(900, 360, "Risk asked and risk found", caption, 1, 2, sharey=True)
    panels = (("risk", "new noise"), ("other_risk", "new noise, another training"))
    for panel, (column, title) in zip(axes[0], panels, strict=True):
        for place, (name, one) in enumerate(settings.items()):
            rows = [row for row in one["rows"] if row["score"] == MAIN]
            x = [1 - row["asked"] for row in rows]
            y = [np.nan if row[column] is None else row[column] for row in rows]
            panel.plot(x, y, label=name.replace("_", " "), **look(place))
        most = 1 - min(ASKED)
        panel.plot([0, most], [0, most], color="0.5", linestyle=":")
        panel.set(title=title, xlabel="risk asked", xlim=(0, None), ylim=(0, None))
    axes[0, 0].set_ylabel("risk found")
    axes[0, 1].legend()
    return figure


def main(words: Sequence[str]) -> None:
    """Measure the settings asked for."""
    asked = Asked.of(words, SETTINGS, "seed", "networks", "members")
    settings = asked.kept(HERE / "results.json", "settings")
    members = int([MEMBERS, *asked.options["members"]][-1])
    seeds = [int(seed) for seed in asked.options["seed"]] or list(SEEDS)
    for setting in asked.names or SETTINGS:
        trainings = {}
        for seed in seeds:
            own = [f"run_dir={at}/{setting}/seed-{seed}" for at in asked.options["networks"]]
            trainings[seed] = images_of(setting, seed, members, [*own, *asked.overrides])
        settings[setting] = measured(setting, trainings)
        write({name: settings[name] for name in SETTINGS if name in settings}, asked.recorded)


if __name__ == "__main__":
    main(sys.argv[1:])
