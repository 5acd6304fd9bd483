"""Which score finds the bad images? Every score on several models, put together in one table.

    python experiments/filtering/run.py [MODEL ...] [KEY=VALUE ...]

Without a model: all of them. Pools are kept in the run folders, so an interrupted study goes on
where it was; models of an earlier call stay in results.json.
"""

import sys
from pathlib import Path
from typing import Any

from bayesdiff import pipeline
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.report import figures, table
from bayesdiff.storage.artefacts import read_json, write_json, write_text
from bayesdiff.studies.filtering.figures import z_by_score
from bayesdiff.studies.filtering.gains import NAMES, SCORES

HERE = Path(__file__).parent
# As ../propagation trains them: the same run folders.
SHORT = ["trainer.max_epochs=4", "laplace.num_images=20000"]
EULER = ["model=flow", "solver=euler", "solver.num_steps=20"]
# Made from what seeds 0 to 2 of the first three models had shown, and fixed before seed 3 of any
# model, and any seed of fashion_diffusion, was looked at.
BEST = "members.joint"
# 4,000 images over four seeds; a larger pool adds to these.
POOL = ["filtering.num_images=1000", "filtering.seeds=[0,1,2,3]"]
ENDS = ("", "_low", "_high")
DPM = ["model=diffusion", "solver=dpmpp_2m", "solver.num_steps=20"]
MODELS = {
    "mnist_flow": [*EULER, "data=mnist", *SHORT],
    "fashion_flow": [*EULER, "data=fashion", *SHORT],
    "mnist_diffusion": [*DPM, "data=mnist", *SHORT],
    "fashion_diffusion": [*DPM, "data=fashion", *SHORT],
}


def filtered(model: str, *more: str) -> dict[str, Any]:
    """The numbers of one model; whatever does not exist is made."""
    cfg = pipeline.compose("experiment=filtering", *POOL, *MODELS[model], *more)
    (folder,) = pipeline.run(cfg).studies
    found = read_json(folder / "results.json")
    assert found is not None
    return slim(found)


def _has_best(found: dict[str, Any]) -> bool:
    """Whether a kept model was scored by what is now the best."""
    return any(row["score"] == BEST for row in found["over_seeds"])


def slim(found: dict[str, Any]) -> dict[str, Any]:
    """What the tables and figures read, and the gain in every metric; the run folder has all."""
    keep = found["conditions"]["main_keep"]
    ends = [f"{name}{end}" for name in ("z", "fid_gain", "precision_gain") for end in ENDS]
    others = [f"{name}_z" for name in SCORES if name != "fid"]

    def of(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
        return [{name: row[name] for name in (*NAMES, *names) if name in row} for row in rows]

    main = [row for row in found["over_seeds"] if row["keep"] == keep]
    rest = [row for row in found["over_seeds"] if row["keep"] != keep]
    per_seed = {
        seed: of([row for row in rows if row["keep"] == keep], "fid", "fid_gain", "z")
        for seed, rows in found["seeds"].items()
    }
    over = of(main, *ends, *others) + of(rest, "z", "fid_gain")
    told = {name: found[name] for name in ("conditions", "best", "profile")}
    return told | {"over_seeds": over, "seeds": per_seed}


def flat(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``MODEL.MODE.SCORE.z``, ``.fid_gain``, ``.interval``; ``.best``, ``.best_z``, its leads."""
    keys: dict[str, Any] = {}
    for name, found in models.items():
        keep = found["conditions"]["main_keep"]
        for row in found["over_seeds"]:
            if row["keep"] != keep:
                continue
            place = f"{name}.{row['mode']}.{row['score']}"
            keys[f"{place}.z"], keys[f"{place}.fid_gain"] = row["z"], row["fid_gain"]
            keys[f"{place}.interval"] = [row["fid_gain_low"], row["fid_gain_high"]]
        main = [
            {
                row["score"]: row
                for row in rows
                if (row["mode"], row["keep"]) == ("per_class", keep)
            }
            for rows in found["seeds"].values()
        ]
        keys[f"{name}.best"], keys[f"{name}.best_z"] = BEST, main[-1][BEST]["z"]
        keys[f"{name}.chosen_by_the_first_seeds"] = found["best"]
        leads = [
            [{"score": k, "lead": row["fid"] - rows[BEST]["fid"]} for k, row in rows.items()]
            for rows in main
        ]
        for row in over_seeds(leads, ["score"], ["lead"]):
            place = f"{name}.best_over.{row['score']}"
            keys[place], keys[f"{place}.interval"] = (
                row["lead"],
                [row["lead_low"], row["lead_high"]],
            )
    return keys


def write(models: dict[str, dict[str, Any]]) -> None:
    """results.json, the table and a figure for every model."""
    write_json(HERE / "results.json", {**flat(models), "models": models})
    for mode in ("per_class", "global"):
        columns = {
            name: {row["score"]: interval(row, "z", ".1f") for row in found["over_seeds"]
                   if (row["mode"], row["keep"]) == (mode, found["conditions"]["main_keep"])}
            for name, found in models.items()
        }  # fmt: skip
        write_text(HERE / f"table-{mode.replace('_', '-')}.md", side_by_side(columns))
    columns = {
        name: {row["score"]: interval(row, "auroc_within", ".2f") for row in found["profile"]}
        for name, found in models.items()
    }
    write_text(HERE / "table-finds.md", side_by_side(columns))
    for name, found in models.items():
        figures.save(z_by_score(found), HERE / f"{name}.png")


def interval(row: dict[str, Any], name: str, form: str) -> str:
    """Mean over seeds with its interval; empty where there is none."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "" if value is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def side_by_side(columns: dict[str, dict[str, str]]) -> str:
    """A table with a line for every score, the best of the first model first."""
    first = next(iter(columns.values()))

    def place(score: str) -> float:
        return -float((first.get(score) or "-inf").split()[0])

    scores = sorted(dict.fromkeys(each for own in columns.values() for each in own), key=place)
    lines = [
        {"score": score} | {name: own.get(score, "") for name, own in columns.items()}
        for score in scores
    ]
    return table.markdown(lines)


def main(arguments: list[str]) -> None:
    """Run the models asked for."""
    overrides = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word] or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        sys.exit(f"unknown model {unknown[0]}; choose from {', '.join(MODELS)}")
    kept = (read_json(HERE / "results.json") or {}).get("models", {})
    models = {name: found for name, found in kept.items() if _has_best(found)}
    for name in names:
        models[name] = filtered(name, *overrides)
        write({name: models[name] for name in MODELS if name in models})


if __name__ == "__main__":
    main(sys.argv[1:])
