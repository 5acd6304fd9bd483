"""Does drawing an image anew from the middle of its trajectory mend it, or vary it?

    python experiments/rectify/run.py [MODEL ...] [SETTING ...] [seed=N ...] [KEY=VALUE ...]

Without a model: the digits; without a setting: all; without a seed: the model's own. Draws are
kept in the run folders, so an interrupted study goes on where it was; models and settings of an
earlier call with the same overrides stay in results.json.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from bayesdiff import pipeline
from bayesdiff.cli import one_line_errors
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.report import figures, table
from bayesdiff.report.layout import chart
from bayesdiff.report.style import COLOURS, style
from bayesdiff.storage.artefacts import finite, read_json, write_json, write_text
from bayesdiff.studies.repair.figures import line
from bayesdiff.studies.script import Asked

HERE = Path(__file__).parent
# As ../filtering trains them: the same run folders.
SHORT = ["trainer.max_epochs=4", "laplace.num_images=20000"]
EULER = ["model=flow", "solver=euler", "solver.num_steps=20"]
DPM = ["model=diffusion", "solver=dpmpp_2m", "solver.num_steps=20"]
MODELS = {
    "digits_flow": [*EULER, "data=digits"],
    # Trained for an eighth of the time, so that there is something to mend.
    "digits_flow_short": [*EULER, "data=digits", "trainer.max_epochs=15"],
    "mnist_flow": [*EULER, "data=mnist", *SHORT],
    "fashion_flow": [*EULER, "data=fashion", *SHORT],
    "mnist_diffusion": [*DPM, "data=mnist", *SHORT],
    "fashion_diffusion": [*DPM, "data=fashion", *SHORT],
}
DEFAULT = ["digits_flow", "digits_flow_short"]
SEEDS = {"digits_flow": (0, 1, 2), "digits_flow_short": (0, 1, 2)}  # of training and noise
IMAGES = {"digits": 1497, "mnist": 20000, "fashion": 20000}  # that the posterior has seen
TEMPERATURE = 100
# What "better than the original" is read from.
REJECTION = "digits_flow_short"
VALUES = (
    "quality", "gain", "better", "over_isotropic", "over_chance", "right", "success", "harm",
    "precision", "precision_gain", "feature_distance", "pixel_distance", "feature_shift",
    "pixel_shift", "power", "power_gain", "power_distance", "changed", "fid", "wrong",
)  # fmt: skip
NAMES = ("time", "way", "score", "among", "nfe")
OF_DRAWS = (
    "time", "way", "gain", "better", "over_isotropic", "success", "harm", "precision_gain",
    "feature_distance", "power", "fid",
)  # fmt: skip
OF_PICKS = (
    "time", "way", "gain", "over_chance", "over_isotropic", "success", "harm", "precision_gain",
)  # fmt: skip
# Of a choice among fresh samples, by every score.
OF_SCORES = ("score", "better", "gain", "over_chance", "success", "harm", "precision_gain")


@dataclass(frozen=True)
class Setting:
    """What is drawn anew, and how its choices are shown.

    Attributes:
        overrides: of the configuration; ``{hot}`` is n_eff at TEMPERATURE.
        columns: of the table of choices.
        among: what they choose from: ``all`` are the alternatives and the image.
        by_score: whether every score chooses, not the main one alone; a choice among samples.
    """

    overrides: tuple[str, ...]
    columns: tuple[str, ...]
    among: str = "all"
    by_score: bool = False

    @property
    def chosen_by(self) -> str:
        """Of the table of choices, what chooses from what."""
        if self.by_score:
            return "each score, of alternatives alone"
        return "the score, of alternatives and image"


SETTINGS = {
    "whole": Setting(("experiment=diversity",), OF_PICKS),
    "map": Setting(("experiment=rectify",), OF_PICKS),
    "whole_hot": Setting(("experiment=diversity", "laplace.n_eff={hot}"), OF_PICKS),
    # Plain rejection sampling: of some other samples of the class the one with the least map.
    "rejection": Setting(
        (
            *("experiment=diversity", "repair.ways=[fresh]", "repair.score=map.sum"),
            "repair.draws=4",
        ),
        OF_SCORES,
        among="draws",
        by_score=True,
    ),
}


def repaired(model: str, setting: str, seed: int, *more: str) -> tuple[dict[str, Any], Path]:
    """The numbers of one run and its folder; whatever does not exist is made."""
    hot = IMAGES[model.split("_")[0]] / TEMPERATURE
    chosen = [word.format(hot=hot) for word in SETTINGS[setting].overrides]
    cfg = pipeline.compose(*chosen, *MODELS[model], f"seed={seed}", f"repair.seed={seed}", *more)
    (folder,) = pipeline.run(cfg).studies
    found = read_json(folder / "results.json")
    assert found is not None
    main = found["conditions"]["score"]
    if not SETTINGS[setting].by_score:
        found["picks"] = [row for row in found["picks"] if row["score"] == main]
    found["conditions"] |= {
        "data": cfg.data.name, "epochs": cfg.trainer.max_epochs, "n_eff": cfg.laplace.n_eff,
        "solver": instantiate(cfg.solver).name, "steps": cfg.solver.num_steps,
    }  # fmt: skip
    return found, folder


def together(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows over seeds; those of one seed keep their interval over images."""
    if len(tables) == 1:
        return tables[0]
    names = [name for name in NAMES if name in tables[0][0]]
    return finite(over_seeds(tables, names, VALUES))


def collected(model: str, setting: str, seeds: Sequence[int], *more: str) -> dict[str, Any]:
    """One setting of one model over seeds; figures of the first seed beside this file."""
    runs = []
    for seed in seeds:
        found, folder = repaired(model, setting, seed, *more)
        if not runs:
            place = HERE / "figures" / f"{model}_{setting}"
            shutil.copytree(folder / "figures", place, dirs_exist_ok=True)
        runs.append(found)
    return {
        "conditions": runs[0]["conditions"] | {"seeds": list(seeds)},
        "original": together([[run["original"]] for run in runs])[0],
        "draws": together([run["draws"] for run in runs]),
        "picks": together([run["picks"] for run in runs]),
    }


def flat(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``MODEL.SETTING.TIME.WAY.NAME``, and ``.best_NAME`` for the best of draws and image."""
    keys: dict[str, Any] = {}
    for model, settings in models.items():
        for setting, found in settings.items():
            best = [row for row in found["picks"] if row["among"] == "all"]
            if SETTINGS[setting].by_score:
                best, keys = [], keys | rejection(model, found)
            for prefix, rows in (("", found["draws"]), ("best_", best)):
                for row in rows:
                    place = f"{model}.{setting}.{row['time']:g}.{row['way']}.{prefix}"
                    for name in ("gain", "over_isotropic", "success", "harm", "feature_distance"):
                        if name in row:
                            keys[place + name] = row[name]
    return keys


def rejection(model: str, found: dict[str, Any]) -> dict[str, Any]:
    """``MODEL.rejection.SCORE.AMONG.NAME``, of the model in REJECTION without its name as well.

    ``chance`` among the scores is any of the alternatives.
    """
    rows = [{"score": "chance", "among": "draws", **found["draws"][0]}, *found["picks"]]
    keys: dict[str, Any] = {}
    for row in rows:
        place = f"{model}.rejection.{row['score']}.{row['among']}"
        for name in ("better", "gain", "over_chance", "success", "harm"):
            keys |= {f"{place}.{name}{end}": row.get(name + end) for end in ("", "_low", "_high")}
    if model == REJECTION:
        main = f"{model}.rejection.map.sum.draws.better"
        names = {"": main, ".by_chance": f"{model}.rejection.chance.draws.better"}
        keys |= {
            f"rejection.map_better_than_original{name}{end}": keys[place + end]
            for name, place in names.items()
            for end in ("", "_low", "_high")
        }
    return keys


@style()
def draw(model: str, found: dict[str, Any]) -> Any:
    """How often the choice by every score beats the image, with intervals."""
    rows = [{"score": "any alternative", **found["draws"][0]}]
    chosen = [row for row in found["picks"] if row["among"] == "draws"]
    rows += sorted(chosen, key=lambda row: row["better"])
    conditions, colours = found["conditions"], {"any": "0.5", "map": COLOURS[0]}
    draws = conditions["draws"]
    caption = (
        f"{model}, {conditions['num_images']} images of each of {len(conditions['seeds'])} "
        f"trainings, each with {draws} fresh samples of its class; the best of these by "
        "every score against the image. 95 % intervals over trainings. Dashed: chance. Dotted: "
        "the most that any choice can reach on average."
    )
    title = "Is the sample that a score prefers better than the original?"
    figure, axes = chart(760, 24 * len(rows) + 60, title, caption)
    axis = axes[0, 0]
    for place, row in enumerate(rows):
        colour = colours.get(row["score"][:3], COLOURS[1])
        axis.hlines(place, row["better_low"], row["better_high"], color=colour)
        axis.plot(row["better"], place, "o", color=colour)
    axis.axvline(0.5, color="0.4", linestyle="--", linewidth=1)
    axis.axvline(draws / (draws + 1), color="0.4", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["score"] for row in rows])
    axis.set_xlabel("share of images that the choice beats, ties half")
    axis.grid(False, axis="y")
    return figure


def write(models: dict[str, dict[str, Any]], overrides: list[str]) -> None:
    """results.json, the tables, and the figure of rejection."""
    results = {**flat(models), "overrides": overrides, "models": models}
    write_json(HERE / "results.json", finite(results))
    parts = []
    for model, settings in models.items():
        for setting, found in settings.items():
            original = {k: v for k, v in found["original"].items() if k in VALUES}
            shown = SETTINGS[setting]
            if shown.by_score:
                figures.save(draw(model, found), HERE / "figures" / f"{model}_rejection.png")
            best = [row for row in found["picks"] if row["among"] == shown.among]
            parts += [
                f"## {model}, {setting}\n\nThe images themselves:\n\n{table.markdown([original])}",
                "The alternatives, which is best-of-n by chance:\n\n"
                + lines(found["draws"], OF_DRAWS),
                f"The best by {shown.chosen_by}:\n\n" + lines(best, shown.columns),
            ]
    write_text(HERE / "table.md", "\n".join(parts))


def lines(rows: list[dict[str, Any]], names: Sequence[str]) -> str:
    """A table of those columns that a row has."""
    there = [name for name in names if any(name in row for row in rows)]
    return table.markdown([line(row, there) for row in rows])


def main(arguments: list[str]) -> None:
    """Run the models and settings asked for."""
    asked = Asked.of(arguments, (*MODELS, *SETTINGS), "seed")
    models = asked.kept(HERE / "results.json", "models")
    seeds = [int(seed) for seed in asked.options["seed"]]
    for name in [name for name in asked.names if name in MODELS] or DEFAULT:
        for setting in [name for name in asked.names if name in SETTINGS] or list(SETTINGS):
            own = seeds or SEEDS.get(name, (0,))
            made = collected(name, setting, own, *asked.overrides)
            models.setdefault(name, {})[setting] = made
            write({name: models[name] for name in MODELS if name in models}, asked.recorded)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
