"""Every estimator against a reference ensemble: accuracy over cost, and total variance over steps.

    python experiments/propagation/run.py [MODEL/SOLVER ...] [--steps] [--timing]

Every measurement is kept under outputs/propagation, so an interrupted study goes on where it was.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference import IMAGES, configure, load, members, starts
from torch import Tensor

from bayesdiff.metrics.agreement import agreement, image_rank, pixel_rank
from bayesdiff.report import table
from bayesdiff.report.style import DPI, LINES, save, style
from bayesdiff.solvers import integrate
from bayesdiff.storage.artefacts import key_of, read_json, write_json, write_text
from bayesdiff.uncertainty import (
    Ensemble,
    Estimator,
    Linearised,
    Published,
    Refined,
    TotalVariance,
)

HERE = Path(__file__).parent
STORE = HERE.parents[1] / "outputs" / "propagation"
SETTINGS = [
    "fashion-flow/euler20",
    "fashion-flow/euler50",
    "fashion-flow/heun10",
    "fashion-diffusion/ddim50",
    "fashion-diffusion/dpmpp20",
    "mnist-flow/euler20",
    "mnist-flow/euler50",
    "mnist-flow/heun10",
]
BUDGET, PRODUCTS = 1.4, 4  # of the default


def sparse(seed: int, evaluations: int) -> Estimator:
    """The live part of the default, alone: the best at its cost without training."""
    return Linearised(
        draws=int(BUDGET * evaluations / PRODUCTS),
        skip_interval=evaluations // PRODUCTS,
        derivative="bfloat16",
        seed=seed,
    )


ESTIMATORS: dict[str, Callable[[int, int], Estimator]] = {
    "default": lambda seed, _: Refined(seed=seed),
    "linearised": sparse,
    "published": lambda seed, _: Published(seed=seed),
    "total-variance": lambda seed, _: TotalVariance(seed=seed),
}
# The default with more to spend, each with the products that suit it; on one setting.
BUDGETS = {"3": (3.0, 6)}
SPENT = ("default", "budget-3")
BUDGETS_ON = "fashion-flow/euler20"
SIZES = (2, 3, 5, 8, 16)
TURNS = 3  # of a timing, best over best
VERSION = 2  # of what is measured and kept
SEED = 1  # of the estimators' draws; the reference has its own
BATCH = 64
STEPS = (10, 20, 50, 100, 200)
STEPS_IMAGES, STEPS_MEMBERS = 4, 16


class Setting:
    """One model and solver with its reference."""

    def __init__(self, name: str, *more: str) -> None:
        self.name = name
        self.run, self.solver, self.posterior = load(configure(*name.split("/"), *more))
        self.starts = starts(self.run, self.solver)

    def maps(self, estimator: Estimator, count: int = IMAGES) -> tuple[Tensor, float, int]:
        """Variance of the first images, seconds, and network evaluations per image."""
        ready = estimator.fit(self.starts, self.posterior, self.run.folder)
        began = time.perf_counter()
        parts = [
            ready(self.starts(part.tolist()), self.posterior)
            for part in torch.arange(count).split(BATCH)
        ]
        seconds = time.perf_counter() - began
        return torch.cat([part.variance for part in parts]), seconds, parts[0].nfe

    @torch.inference_mode()
    def plain(self) -> tuple[float, int]:
        """Seconds of sampling the same images without maps, and evaluations per image."""
        start = self.starts(range(IMAGES))
        field = start.field()
        began = time.perf_counter()
        integrate(field, start.steps(), start.initial(), start.draw)
        return time.perf_counter() - began, field.evaluations


def kept(name: str, make: Callable[[], dict[str, Any]], *key: Any) -> dict[str, Any]:
    """A measurement, made once."""
    path = STORE / f"{name.replace('/', '-')}.json"
    stored = read_json(path) or {}
    if stored.get("key") != key_of(*key):
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        stored = {"key": key_of(*key), **make()}
        write_json(path, stored)
    return {name: value for name, value in stored.items() if name != "key"}


def accuracy(setting: Setting) -> dict[str, Any]:
    """All estimators against the reference of one setting."""
    everything = members(setting.run, setting.solver, setting.posterior)
    reference = everything.var(0)
    halves = everything[::2].var(0), everything[1::2].var(0)
    seconds, nfe = min(setting.plain() for _ in range(3))
    found: dict[str, Any] = {
        "reference": {
            "members": len(everything),
            "images": IMAGES,
            "reliability_image": corrected(image_rank(*halves)),
            "reliability_pixel": corrected(pixel_rank(*halves)),
            "summed_variance": float(reference.flatten(1).sum(1).mean()),
            "plain_nfe": nfe,
        }
    }
    estimators = {name: make(SEED, nfe) for name, make in ESTIMATORS.items()}
    if setting.name == BUDGETS_ON:
        estimators |= {
            f"budget-{name}": Refined(seed=SEED, budget=budget, products=products)
            for name, (budget, products) in BUDGETS.items()
        }
    for name, estimator in estimators.items():

        def measure(estimator: Estimator = estimator) -> dict[str, float]:
            variance, took, evaluations = setting.maps(estimator)
            spent = {"nfe": evaluations / nfe, "cost": took / seconds}
            return compare(variance, reference) | spent

        found[name] = kept(f"one/{setting.name}/{name}", measure, repr(estimator), VERSION)
    found |= {f"ensemble{size}": small_ensemble(everything, size) for size in SIZES}
    return found


def small_ensemble(everything: Tensor, size: int, groups: int = 8) -> dict[str, float]:
    """Disjoint groups of the reference's members, each against all members outside it."""
    each = []
    for number in range(groups):
        inside = torch.zeros(len(everything), dtype=torch.bool)
        inside[number * size : (number + 1) * size] = True
        each.append(compare(everything[inside].var(0), everything[~inside].var(0)))
    mean = {key: sum(one[key] for one in each) / groups for key in each[0]}
    return {**mean, "nfe": size + 1.0, "groups": groups}


def corrected(half: float) -> float:
    """Spearman-Brown: reliability of the whole from the correlation of its halves."""
    return 2 * half / (1 + half)


def compare(variance: Tensor, reference: Tensor) -> dict[str, float]:
    """Ranks and size of one set of maps, with intervals over images."""
    found = agreement(variance.clamp(min=0), reference, seed=0)
    total = float(variance.double().sum() / reference.double().sum())
    return {**found, "variance_ratio": found.pop("spread_ratio"), "total_ratio": total}


def timing(setting: Setting) -> dict[str, Any]:
    """Wall time over plain sampling, measured in turns, nothing else running."""
    nfe = setting.plain()[1]
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "turns": TURNS}
    timed = {name: ESTIMATORS[name](SEED, nfe) for name in ("default", "linearised")}
    if setting.name == BUDGETS_ON:  # the costly ones cost about the same evaluations everywhere
        timed = {name: make(SEED, nfe) for name, make in ESTIMATORS.items()}
        timed |= {f"ensemble{n}": Ensemble(members=n, noise_members=0, seed=SEED) for n in (2, 5)}
    for name, estimator in timed.items():
        turns = [(setting.plain()[0], setting.maps(estimator)[1]) for _ in range(TURNS)]
        plain, seconds = (min(each) for each in zip(*turns, strict=True))
        found[name] = seconds / plain
        found.setdefault("plain_seconds", plain)
    return found


def over_steps(model: str) -> dict[str, Any]:
    """Total variance of every estimator for 10 to 200 steps."""
    solver = {"flow": "euler20", "diffusion": "ddim50"}[model.split("-")[1]]
    found: dict[str, Any] = {"steps": STEPS}
    for steps in STEPS:
        setting = Setting(f"{model}/{solver}", f"solver.num_steps={steps}")
        estimators = {name: make(SEED, steps) for name, make in ESTIMATORS.items()}
        estimators["linearised"] = Linearised(draws=8, derivative="difference", seed=SEED)
        estimators["ensemble"] = Ensemble(members=STEPS_MEMBERS, seed=SEED)
        # Seven directions whatever the steps, and few training images: only the size matters here.
        estimators["default"] = Refined(seed=SEED, train_images=100, budget=28 / steps)
        for name, estimator in estimators.items():
            variance, _, _ = setting.maps(estimator, STEPS_IMAGES)
            total = float(variance.flatten(1).sum(1).mean())
            found.setdefault(name, []).append(total)
            print(model, steps, name, total, flush=True)
    return found


def gather() -> None:
    """results.json and the figures from all that has been measured."""
    found: dict[str, Any] = {"settings": {}, "timing": {}, "steps": {}}
    for kind, names in (
        ("accuracy", SETTINGS),
        ("timing", SETTINGS),
        ("steps", ("fashion-flow", "fashion-diffusion")),
    ):
        for name in names:
            stored = read_json(STORE / f"{kind}-{name.replace('/', '-')}.json")
            if stored:
                stored.pop("key", None)
                found["settings" if kind == "accuracy" else kind][name] = stored
    for name in ("default", "linearised", "published", "ensemble5"):
        each = [setting[name] for setting in found["settings"].values() if name in setting]
        found[f"{name}.image_rank"] = min(one["image_rank"] for one in each)
        found[f"{name}.pixel_rank"] = min(one["pixel_rank"] for one in each)
        ratios = [one["variance_ratio"] for one in each]
        # An estimate without a positive sum on any image has no ratio.
        far = [r if r == r else 0.0 for r in ratios]
        found[f"{name}.variance_ratio"] = max(far, key=lambda r: abs(r - 1))
        costs = [timed[name] for timed in found["timing"].values() if name in timed]
        found[f"{name}.cost"] = max(costs, default=None)
    found["note"] = "flat keys: the worst over all settings"
    write_json(HERE / "results.json", found)
    write_text(HERE / "table.md", table.markdown(rows(found["settings"])))
    draw_cost(found)
    draw_steps(found["steps"])


def rows(settings: dict[str, Any]) -> list[dict[str, str]]:
    """Lines of the table."""
    lines = []
    for name, setting in settings.items():
        for estimator, one in setting.items():
            line = {"setting": name, "estimator": estimator}
            if estimator == "reference":
                line |= {
                    "image rank [95 %]": f"{one['reliability_image']:.3f} (its own reliability)",
                    "pixel rank": f"{one['reliability_pixel']:.3f}",
                    "evaluations over plain": str(one["members"]),
                }
            else:
                ends = "" if "groups" in one else " [{image_rank_low:.2f}, {image_rank_high:.2f}]"
                line |= {
                    "image rank [95 %]": ("{image_rank:.3f}" + ends).format(**one),
                    "pixel rank": f"{one['pixel_rank']:.3f}",
                    "variance ratio": f"{one['variance_ratio']:.3f}",
                    "by the sum": f"{one['total_ratio']:.2f}",
                    "evaluations over plain": f"{one['nfe']:.2f}",
                }
            lines.append(line)
    return lines


STYLE = {
    "default": ("#0072B2", "o"),
    "linearised": ("#009E73", "s"),
    "published": ("#D55E00", "X"),
    "total-variance": ("#CC79A7", "D"),
    "ensemble": ("#555555", "."),
}


@style()
def draw_cost(found: dict[str, Any]) -> None:
    """Accuracy over network evaluations, the ensembles as the curve to beat."""
    from matplotlib.figure import Figure

    settings = found["settings"]
    wide, bands = 4, -(-len(settings) // 4)
    figure = Figure(figsize=(3.1 * wide, 5.6 * bands), dpi=DPI, layout="constrained")
    axes = figure.subplots(2 * bands, wide, sharey="row", squeeze=False)
    for number, (name, setting) in enumerate(settings.items()):
        band, column = divmod(number, wide)
        for row, metric in enumerate(("image_rank", "pixel_rank")):
            axis = axes[2 * band + row, column]
            curve = [
                (setting[f"ensemble{n}"]["nfe"], setting[f"ensemble{n}"][metric]) for n in SIZES
            ]
            axis.plot(*zip(*curve, strict=True), ".-", color="#555555", label="ensembles")
            spent = [setting[name] for name in SPENT if name in setting]
            axis.plot(
                [one["nfe"] for one in spent],
                [one[metric] for one in spent],
                "o--",
                color=STYLE["default"][0],
                markerfacecolor="none",
            )
            for estimator in reversed([name for name in ESTIMATORS if name in setting]):
                color, marker = STYLE[estimator]
                cost = setting[estimator]["nfe"]
                value = setting[estimator][metric]
                low, high = (setting[estimator][f"{metric}_{end}"] for end in ("low", "high"))
                axis.plot([cost, cost], [low, high], color=color, linewidth=1)
                axis.plot(cost, value, marker, color=color, label=estimator)
            axis.set_xscale("log")
            axis.set_xticks([2, 3, 4, 6, 9, 17], ["2", "3", "4", "6", "9", "17"])
            axis.minorticks_off()
            axis.set_ylabel(metric.replace("_", " ") if not column else "")
        axes[2 * band, column].set_title(name, fontsize=9)
        axes[2 * band + 1, column].set_xlabel("network evaluations\nover plain sampling")
    axes[0, 0].legend(fontsize=7)
    figure.set_label("Accuracy over cost")
    save(figure, HERE / "accuracy-over-cost.png")


@style()
def draw_steps(steps: dict[str, Any]) -> None:
    """Total variance over the number of steps."""
    from matplotlib.figure import Figure

    if not steps:
        return
    figure = Figure(figsize=(4.2 * len(steps), 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(steps), squeeze=False)[0]
    for axis, (model, values) in zip(axes, steps.items(), strict=True):
        for (name, (color, marker)), line in zip(STYLE.items(), [*LINES, "-"], strict=True):
            pairs = [(n, v) for n, v in zip(values["steps"], values[name], strict=True) if v > 0]
            if pairs:
                axis.plot(
                    *zip(*pairs, strict=True),
                    color=color,
                    marker=marker,
                    linestyle=line,
                    label=name,
                )
        axis.set(xscale="log", yscale="log", title=model, xlabel="steps")
    axes[0].set_ylabel("summed variance per image")
    axes[0].legend(fontsize=7)
    figure.set_label("Summed variance over the number of steps")
    save(figure, HERE / "variance-over-steps.png")


def main(arguments: list[str]) -> None:
    """Measure what is asked for, then gather all that has been measured."""
    flags = {a for a in arguments if a.startswith("--")}
    for name in [a for a in arguments if a not in flags] or (
        [] if flags == {"--steps"} else SETTINGS
    ):
        # Put together anew from what is kept of every estimator.
        write_json(STORE / f"accuracy-{name.replace('/', '-')}.json", accuracy(Setting(name)))
        if "--timing" in flags:
            kept(f"timing/{name}", lambda name=name: timing(Setting(name)), name, VERSION)
    if "--steps" in flags:
        for model in ("fashion-flow", "fashion-diffusion"):
            kept(f"steps/{model}", lambda model=model: over_steps(model), model, VERSION)
    gather()


if __name__ == "__main__":
    main(sys.argv[1:])
