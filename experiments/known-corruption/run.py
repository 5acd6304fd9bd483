"""Which score finds the images that a known corruption of the training data has spoilt? On digits.

    python experiments/known-corruption/run.py [SEED ...] [KEY=VALUE ...]

A seed is that of training, of the corruption and of the noise, and stands for other classes.
Trainings and pools are kept below output_dir: an interrupted study goes on where it was.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import torch
from head import seen_by_the_head
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import to_uint8
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.metrics.classifier import load_or_train
from bayesdiff.metrics.features import classifier_extractor, extract
from bayesdiff.metrics.seeds import mean_interval
from bayesdiff.metrics.selection import auroc
from bayesdiff.report import figures, table
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import finite, read_json, write_json, write_text
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.scoring import ScoreOptions, score_table, seen_of
from bayesdiff.uncertainty import Ensemble, Estimator, Linearised, Published, Refined, Samples
from bayesdiff.uncertainty.scores.of_maps_and_images import MAP_SCORES

Values = dict[str, Any]
HERE = Path(__file__).parent
COMMON = (
    *("model=flow", "data=digits", "solver=euler", "solver.num_steps=20"),
    *("metrics.num_images=0", "callbacks.samples=null"),
)
# The strength in configs/corruption; and stronger ones, fixed before either was run: two images,
# and one visit in an epoch, the least there is.
MILD = ("mislabelled", "truncated", "undertrained")
SEVERE: dict[str, Values] = {
    "truncated_severe": {"keep": 2},
    "undertrained_severe": {"visits": 0.01},
}
CASES = (*MILD, *SEVERE)
# An aim is met where two of three corruptions are found.
AIMS = {"": MILD, "severe_": ("mislabelled", *SEVERE)}
# Classes of every seed, so that an interval over seeds is one over classes too.
CONFUSED = [("3", "8"), ("1", "7"), ("4", "9")]
SCARCE = ["5", "2", "7"]
IMAGES = 500  # of a pool, every label alike
SHOWN = 30
MAPS: dict[str, Estimator] = {
    "refined": Refined(train_images=300),
    "linearised": Linearised(draws=8, derivative="difference"),
    "ensemble": Ensemble(members=8, noise_members=0),
    "published": Published(skip_interval=5),
}
SCORES = ScoreOptions(members=8, aleatoric_draws=5)
# A judge of its own seed, far from those of the classifiers that score.
JUDGE = 1000
AIM = 0.9
FEWEST = 10  # wrong images of a seed: of fewer, an AUROC says nothing


def affected(case: str, seed: int) -> list[str]:
    """Names of the classes that a corruption spoils under a seed."""
    return list(CONFUSED[seed % 3]) if case == "mislabelled" else [SCARCE[seed % 3]]


def corruption_of(case: str) -> str:
    """The corruption behind a case of any strength."""
    return case.removesuffix("_severe")


def overrides(case: str, seed: int) -> list[str]:
    """The command line of a case: ``clean``, or a corruption with its classes."""
    given = [*COMMON, f"seed={seed}", f"metrics.seed={seed}"]
    if case == "clean":
        return given
    names = affected(case, seed)
    options = {"classes": names, "seed": seed, **SEVERE.get(case, {})}
    if case == "mislabelled":
        options["into"] = names[::-1]
    lines = [f"data.source.corruption.{key}={value}" for key, value in options.items()]
    return [*given, f"corruption={corruption_of(case)}", *lines]


def trained(case: str, seed: int, *more: str) -> Setup:
    """A run with its network, which is trained if it does not exist, and its posterior."""
    cfg = pipeline.compose(*overrides(case, seed), *more)
    run, solver, estimator, laplace = pipeline.prepare(cfg)
    weights = fit(run, laplace)
    run.model.to(run.device).eval()
    posterior = laplace.fit(run.model, run.data.data)
    return Setup(run, solver, estimator, posterior, weights)


def judged(clean: ImageData, cache: Path, seed: int, images: Tensor) -> tuple[Tensor, float]:
    """Classes that a classifier of the uncorrupted data sees, and its accuracy on test images."""
    classifier = load_or_train(cache, clean, JUDGE + seed)
    read = extract(classifier_extractor(classifier), to_uint8(images), 256)
    assert read.logits is not None
    return read.logits.argmax(1), classifier.test_accuracy


class Case:
    """One trained network with its pool, every score of it and what the judge says.

    Attributes:
        samples: images of the first estimator, in the model's range.
        scores: of every score, (N,).
        wrong: whether the judge sees another class than was asked for, bool (N,).
        accuracy: of the judge.
        data: that the network was trained on.
        relative: mean summed variance under each label over that of all, by estimator.
    """

    def __init__(self, case: str, seed: int, clean: ImageData, images: int, *more: str) -> None:
        at = trained(case, seed, *more)
        run = self.run = at.run
        self.posterior = at.posterior
        pool = self.pool = ImagePool(at, images, seed)
        maps = {name: pool.maps(estimator) for name, estimator in MAPS.items()}
        self.samples: Samples = maps["refined"].in_model_range()
        seen, _ = seen_of(pool, SCORES, self.samples.images)
        labels = self.samples.labels
        assert labels is not None
        self.labels: Tensor = labels
        self.data = run.data.data
        self.scores = score_table(run, maps, seen, seed)
        self.scores["label.scarcity"] = scarcity(self.data, labels)
        cache = Path(run.cfg.output_dir) / "cache"
        found, self.accuracy = judged(clean, cache, seed, self.samples.images)
        self.wrong = found != labels
        self.relative = {name: by_label(made) for name, made in maps.items()}


def all_counted(case: Case, clean: ImageData, under: Tensor, names: list[str]) -> Values:
    """The network of corrupted data with the posterior that all clean images would give it.

    What it still sees of the affected class, the network has in it; the rest is the count's doing.
    """
    laplace = LastLayerLaplace(sigma_noise=case.posterior.sigma_noise)
    posterior = laplace.fit(case.run.model, clean)
    made = ImagePool(
        replace(case.pool.at, posterior=posterior), case.pool.count, case.pool.seed
    ).maps(MAPS["ensemble"])
    made = made.in_model_range()
    kinds = {kind: MAP_SCORES[kind](made.variance, made.images) for kind in ("sum", "mean_log")}
    return areas(kinds, under) | _of({"relative_variance": by_label(made)}, clean, names)


def scarcity(data: ImageData, labels: Tensor) -> Tensor:
    """The simplest baseline: how few training images carry the label asked for, (N,)."""
    assert data.labels is not None
    return -data.labels.bincount(minlength=data.num_classes)[labels].double()


def by_label(made: Samples) -> list[float]:
    """Mean summed variance under each label over the mean of all."""
    assert made.labels is not None
    total = made.variance.double().clamp(min=0).flatten(1).sum(1)
    each = torch.stack([total[made.labels == k].mean() for k in made.labels.unique()])
    return (each / total.mean()).tolist()


def marked(labels: Tensor, classes: tuple[str, ...], names: list[str]) -> Tensor:
    """Whether an image was asked to show one of these classes, bool (N,)."""
    return torch.isin(labels, torch.tensor([classes.index(name) for name in names]))


def areas(scores: dict[str, Tensor], found: Tensor) -> dict[str, float]:
    """AUROC of every score for the marked images; NaN where none or all are."""
    return {name: float(auroc(score.cpu(), found)) for name, score in scores.items()}


def of_seed(seed: int, images: int, folder: Path, *more: str) -> Values:
    """AUROC of every score, for every corruption and both truths, under one seed."""
    clean_run = pipeline.prepare(pipeline.compose(*overrides("clean", seed), *more))[0]
    data = clean_run.data.data
    control = Case("clean", seed, data, images, *more)
    found: Values = {}
    shown = {"clean": (control, affected("truncated", seed))}
    for name in CASES:
        case, names = Case(name, seed, data, images, *more), affected(name, seed)
        under = marked(case.labels, data.classes, names)
        found[name] = {
            "classes": names,
            "training_images": _counts(case.data, names),
            "images": images,
            "affected": int(under.sum()),
            "wrong": int(case.wrong.sum()),
            "wrong_of_affected": float(case.wrong[under].double().mean()),
            "wrong_of_others": float(case.wrong[~under].double().mean()),
            "judge_test_accuracy": case.accuracy,
            "auroc": areas(case.scores, under),
            "wrong_auroc": areas(case.scores, case.wrong),
            "clean_auroc": areas(control.scores, marked(control.labels, data.classes, names)),
            "relative_variance": _of(case.relative, data, names),
            "clean_relative_variance": _of(control.relative, data, names),
        }
        if name == "truncated":
            found[name]["all_counted"] = all_counted(case, data, under, names)
        shown[name] = (case, names)
    found["clean"] = {"wrong_of_all": float(control.wrong.double().mean())}
    found["head"] = seen_by_the_head(control.run, control.posterior, shown["truncated"][0].data,
                                     data.classes.index(SCARCE[seed % 3]))  # fmt: skip
    figures.save(pictures.first_images(shown, SHOWN), folder / f"first-images-seed{seed}.png")
    return found


def _counts(data: ImageData, names: list[str]) -> dict[str, int]:
    assert data.labels is not None
    counts = data.labels.bincount(minlength=data.num_classes)
    return {name: int(counts[data.classes.index(name)]) for name in names}


def _of(relative: dict[str, list[float]], data: ImageData, names: list[str]) -> dict[str, float]:
    """Relative variance under the classes named, by estimator."""
    places = [data.classes.index(name) for name in names]
    return {name: sum(each[k] for k in places) / len(places) for name, each in relative.items()}


def can_be_chosen(score: str) -> bool:
    """Neither luck, nor the label alone, nor what compares with real images."""
    return score.split(".")[0] not in ("random", "label", "real")


def best_of(tables: list[dict[str, float]]) -> str:
    """The score with the highest mean over the seeds given."""
    names = [name for name in tables[0] if can_be_chosen(name)]
    return max(names, key=lambda name: mean([one[name] for one in tables]))


def mean(values: list[float]) -> float:
    """Mean; NaN counts as chance, 0.5: nothing was there to be found."""
    return mean_interval(_or_chance(values))[0]


def _or_chance(values: list[float]) -> list[float]:
    return [0.5 if value != value else value for value in values]


def summary(seeds: dict[str, Values]) -> Values:
    """Flat keys over all seeds, and the choice that the last seed did not see."""
    flat: Values = {}
    ordered = [seeds[name] for name in sorted(seeds, key=int)]
    for truth in ("auroc", "wrong_auroc", "clean_auroc"):
        prefix = truth.removesuffix("auroc")
        reached = set()
        for case in CASES:
            tables = [one[case][truth] for one in ordered]
            for score in tables[0]:
                values = [one[score] for one in tables]
                middle, *ends = mean_interval(_or_chance(values))
                flat[f"{case}.{score}.{truth}"] = middle
                flat[f"{case}.{score}.{prefix}interval"] = ends
            if truth == "clean_auroc" or len(tables) < 2 or not _enough(ordered, case, truth):
                continue
            best = best_of(tables[:-1])
            flat[f"{case}.{prefix}best"] = best
            flat[f"{case}.{prefix}best_auroc"] = tables[-1][best]  # of the seed not seen
            flat[f"{case}.{prefix}best_mean"] = mean([one[best] for one in tables])
            if tables[-1][best] >= AIM:
                reached.add(case)
        if truth == "clean_auroc":
            continue
        for aim, cases in AIMS.items():
            flat[f"{aim}{prefix}targets_met"] = len(reached & set(cases)) >= 2
            flat[f"{aim}{prefix}corruptions_found"] = len(reached & set(cases))
    return flat


def _enough(seeds: list[Values], case: str, truth: str) -> bool:
    """Whether there was something to be found under every seed."""
    return truth != "wrong_auroc" or all(one[case]["wrong"] >= FEWEST for one in seeds)


def write(seeds: dict[str, Values], folder: Path) -> None:
    """results.json, the table and the figure."""
    flat = summary(seeds)
    write_json(folder / "results.json", finite({**flat, "seeds": seeds}))
    scores = list(next(iter(seeds.values()))["mislabelled"]["auroc"])
    found = {case: _enough(list(seeds.values()), case, "wrong_auroc") for case in CASES}
    rows = [_row(score, flat, found) for score in scores]
    rows.sort(key=lambda row: -sum(flat[f"{case}.{row['score']}.auroc"] for case in CASES))
    write_text(folder / "table.md", table.markdown(rows))
    figures.save(pictures.by_score(flat, scores, found, len(seeds)), folder / "auroc.png")


def _row(score: str, flat: Values, found: dict[str, bool]) -> dict[str, str]:
    line = {"score": score}
    for case in CASES:
        titles = {"auroc": "label", "wrong_auroc": "wrong", "clean_auroc": "control"}
        for truth, title in titles.items():
            if truth == "wrong_auroc" and not found[case]:
                continue
            line[f"{case}, {title}"] = f"{flat[f'{case}.{score}.{truth}']:.2f}"
    return line


def main(arguments: list[str], folder: Path = HERE, images: int = IMAGES) -> None:
    """Train what is missing, score, and write."""
    more = [word for word in arguments if "=" in word]
    seeds = [int(word) for word in arguments if "=" not in word] or [0, 1, 2]
    kept = (read_json(folder / "results.json") or {}).get("seeds", {})
    stored = {seed: found for seed, found in kept.items() if set(CASES) <= found.keys()}
    for seed in seeds:
        stored[str(seed)] = of_seed(seed, images, folder, *more)
        write(stored, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
