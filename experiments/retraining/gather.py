"""results.json, table and figure of what run.py has measured.

python experiments/retraining/gather.py
"""

from pathlib import Path
from typing import Any

from networks import SETTINGS
from run import BEST, OF_DIGITS

from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.report import figures, table
from bayesdiff.report.style import DPI, style
from bayesdiff.storage.artefacts import read_json, write_json, write_text

HERE = Path(__file__).parent
STATISTICS = ("image_rank", "pixel_rank", "size", "mean_size", "coverage", "nfe", "seconds")
SHOWN = ("image_rank", "pixel_rank", "size", "coverage")
ORDER = (
    *("head", "head_linearised", "last_block", "last_block_sampled", "all", "all_one_prior"),
    *("all_sampled", "all_seen_once", "all_calibrated", "two_trainings", "checkpoints", "swag"),
    *("mc_dropout_head", "mc_dropout_network", "subnetwork", "subnetwork_1_percent", "published"),
    *("variance_head", "variance_head_marginal", "aleatoric_trace"),
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"


def gathered(networks: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the networks under test with their intervals, by setting and method."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for setting in (name for name in SETTINGS if name in networks):
        tables = [
            [{"method": method, **numbers} for method, numbers in own.items()]
            for _, own in sorted(networks[setting].items())
        ]
        rows: dict[str, list[dict[str, Any]]] = {}
        for each in tables:
            for row in each:
                rows.setdefault(row["method"], []).append(row)
        found[setting] = {}
        for method, several in rows.items():
            names = [n for n in (*STATISTICS, "summed_variance") if n in several[0]]
            if len(several) > 1:
                (mean,) = over_seeds([[one] for one in several], ["method"], names)
            else:
                mean = several[0]
            over_images = {
                f"{n}_images_{end}": sum(one[f"{n}_{end}"] for one in several) / len(several)
                for n in ("image_rank", "pixel_rank", "size")
                for end in ("low", "high")
                if f"{n}_{end}" in several[0]
            }
            kept = {k: v for k, v in mean.items() if k.startswith(tuple(names))}
            found[setting][method] = kept | over_images | {"networks": len(several)}
    return found


def best(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """The method that was fixed beforehand, at its worst and on average over the settings."""
    results: dict[str, float] = {}
    for name, method in (("best", BEST), ("best_calibrated", f"{BEST}_calibrated")):
        for statistic in SHOWN:
            values = [own[method][statistic] for own in found.values()]
            results[f"{name}.{statistic}"] = sum(values) / len(values)
            results[f"{name}.{statistic}_min"] = min(values)
            results[f"{name}.{statistic}_max"] = max(values)
    short = [own["retraining"]["image_rank"] - own[BEST]["image_rank"] for own in found.values()]
    return results | {"best.below_reliability_max": max(short)}


def rows_of(own: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """The table of one setting."""
    rows = []
    for method in (*ORDER, "retraining"):
        if method not in own:
            continue
        numbers = own[method]
        line = {"method": method if method != "retraining" else "reliability of the reference"}
        for name in SHOWN:
            if name not in numbers:
                line[name] = ""
                continue
            text = "{:.2f}" if name != "size" else "{:.3g}"
            line[name] = text.format(numbers[name])
            low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
            if low is not None and high is not None and numbers["networks"] > 1:
                line[name] += f" [{text.format(low)}, {text.format(high)}]"
        line["NFE"] = f"{numbers['nfe']:.0f}" if "nfe" in numbers else ""
        rows.append(line)
    return rows


@style()
def draw(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Ranks and size of every method, a marker for each setting, its interval over networks."""
    from matplotlib.figure import Figure

    names = [name for name in ORDER if name not in OF_DIGITS]
    figure = Figure(figsize=(10.5, 5.2), dpi=DPI, layout="constrained")
    for axis, statistic in zip(figure.subplots(1, 3, sharey=True), SHOWN, strict=False):
        for number, (setting, own) in enumerate(found.items()):
            there = [name for name in names if name in own]
            place = [names.index(name) + 0.12 * (number - len(found) / 2) for name in there]
            look = {"color": COLOURS[number], "label": setting.replace("_", " ")}
            values = [own[name][statistic] for name in there]
            axis.plot(values, place, MARKERS[number], markersize=4, **look)
            if statistic != "size":
                axis.axvline(own["retraining"][statistic], color=COLOURS[number], linewidth=0.7)
        axis.set_xlabel(statistic.replace("_", " ") + " against retraining")
        axis.grid(False, axis="y")
        if statistic == "size":
            axis.set_xscale("log")
            axis.axvspan(0.5, 2, color="#dddddd", zorder=0)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    figure.set_label("Every method against retraining; lines are the reference's reliability")
    figures.save(figure, HERE / "retraining.png")


def main() -> None:
    """Write all three."""
    found = gathered(read_json(HERE / "networks.json") or {})
    flat = {
        f"{setting}.{method}.{name}": value
        for setting, own in found.items()
        for method, numbers in own.items()
        for name, value in numbers.items()
    }
    write_json(HERE / "results.json", best(found) | flat)
    for setting, own in found.items():
        write_text(HERE / f"table-{setting}.md", table.markdown(rows_of(own)))
    draw(found)


if __name__ == "__main__":
    main()
