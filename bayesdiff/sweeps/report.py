"""The report over a sweep: table, figures, one page for a browser, and the same on the board."""

import logging
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesdiff.report import table
from bayesdiff.report.layout import estimator_of
from bayesdiff.report.options import SCORES_FILE
from bayesdiff.report.style import clear
from bayesdiff.storage.artefacts import read_arrays, read_json, write_text
from bayesdiff.storage.atomic import file_name
from bayesdiff.uncertainty.stored import stored_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from bayesdiff.report.sorted_sheet import Block
    from bayesdiff.sweeps.maps import CellMaps
    from bayesdiff.sweeps.over_time import CellCurve

log = logging.getLogger(__name__)

Row = dict[str, Any]

# The few metrics that fit on a screen; a name that ends in @ is the beginning of one.
_SHOWN = (
    "sliced_wasserstein@", "fid@", "is@", "nfe",
    "summed_variance/mean", "laplace/effective_parameters",
    "validation/image_rank", "validation/pixel_rank", "validation/log_ratio",
)  # fmt: skip
# What made a cell's maps where it is not what was asked for.
MAPS_BY = "maps by"
# More keys than this have no picture of their own.
_MOST_KEYS = 8
_MOST_ROWS = 200  # of the table in TensorBoard


def write(folder: Path, rows: list[Row], command: str = "", *, pdf: bool = True) -> None:
    """Everything that is said of a sweep.

    The table on the screen and as ``sweep.csv``; where seeds and more were swept their
    means likewise, as ``over_seeds.csv`` and ``over_seeds.md``; where cells are done
    ``sweep.png``, pictures in ``figures`` and events in ``report``; ``report.html`` always.

    Args:
        folder: of the sweep.
        rows: one for every cell, failed ones too.
        command: that started it.
        pdf: whether each figure is there as PDF as well.
    """
    from bayesdiff.report import board
    from bayesdiff.sweeps import page

    keys = swept_keys(rows)
    flat = [flatten(row, keys) for row in rows]
    table.write_csv(folder / "sweep.csv", flat)
    metrics = [name for name in shown_metrics(rows) if any(name in row for row in flat)]
    others = [MAPS_BY] if any(MAPS_BY in row for row in flat) else []
    columns = [*keys, *others, *metrics, "status"]
    table.show(f"sweep: {folder / 'sweep.csv'}", flat, columns)
    _write_means(folder, flat, keys, metrics)
    pictures = draw(folder, rows, flat, keys, metrics, pdf)
    conditions = conditions_of(rows)
    text = page.page(folder, flat, keys, metrics, conditions, pictures, command, others)
    write_text(folder / "report.html", text)
    listed = "\n\n".join(f"{name}: {value}" for name, value in conditions.items())
    shown = table.markdown(flat[:_MOST_ROWS], columns)
    said = f"`{command}`\n\n{listed}\n\n{shown}"
    board.write_sweep(folder / "report", flat, metrics, said, pictures)
    log.info("report: %s", folder / "report.html")


def _write_means(
    folder: Path, flat: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]
) -> None:
    """Means over seeds: all on disk, those that fit on the screen."""
    from bayesdiff.sweeps.seeds import averaged, over_seeds, said

    every = averaged(flat, keys)
    if not (means := over_seeds(flat, keys, every)):
        return
    table.write_csv(folder / "over_seeds.csv", means)
    texts = [row | {name: said(row, name) for name in every} for row in means]
    first = [*(key for key in keys if key in means[0]), "seeds"]
    write_text(folder / "over_seeds.md", table.markdown(texts, [*first, *every]))
    shown = [name for name in metrics if name in every]
    table.show(f"over seeds: {folder / 'over_seeds.csv'}", texts, [*first, *shown])


def command_of(task: Sequence[str], hydra: Sequence[str] = ()) -> str:
    """The command line behind a sweep's overrides."""
    own = [override for override in hydra if not override.startswith("hydra.mode=")]
    return shlex.join(["python", "sweep.py", "-m", *own, *task])


def draw(
    folder: Path, rows: Sequence[Row], flat: Sequence[Row], keys: Sequence[str],
    metrics: Sequence[str], pdf: bool = True,
) -> dict[str, Path]:  # fmt: skip
    """Save every figure of the sweep; names for a reader, and files."""
    from bayesdiff.report import figures
    from bayesdiff.report.series import axis_keys
    from bayesdiff.sweeps.charts import sweep_figure

    clear(folder)
    clear(folder / "figures")
    done = [row for row in flat if row["status"] == "done"]
    varied = [key for key in axis_keys(keys) if len({str(row[key]) for row in done}) > 1]
    made_from = ", ".join(f"{name} {text}" for name, text in conditions_of(rows).items())
    made: list[tuple[str, Path, Figure]] = []
    if varied and metrics:
        whole = sweep_figure(flat, keys, metrics, None, made_from)
        figures.save(whole, folder / "sweep.png", pdf=pdf)
    for place, key in enumerate(varied[:_MOST_KEYS] if metrics else []):
        figure = sweep_figure(flat, keys, metrics, key, made_from)
        made.append((f"Metrics over {key}", Path(f"{place}_{file_name(key)[:60]}.png"), figure))
    made += _of_samples(rows, keys, made_from)
    return {
        heading: figures.save(figure, folder / "figures" / name, pdf=pdf)
        for heading, name, figure in made
    }


def _cell_name(row: Row, keys: Sequence[str]) -> str:
    """The swept values of a cell."""
    from bayesdiff.report.series import short_names, text_of

    values = flatten(row, keys)
    said = zip(short_names(keys), (text_of(values[key]) for key in keys), strict=True)
    return ", ".join(f"{key} {value}" for key, value in said)


def _of_samples(
    rows: Sequence[Row], keys: Sequence[str], conditions: str
) -> "list[tuple[str, Path, Figure]]":
    """Figures of the cells' own images and maps: headings, names of files, figures."""
    from bayesdiff.report import sorted_sheet
    from bayesdiff.sweeps import maps as sweep_maps
    from bayesdiff.sweeps import over_time as sweep_over_time

    done = [row for row in rows if row["status"] == "done" and row.get("samples")]
    curves, maps, blocks = _read(done, keys)
    made: list[tuple[str, Path, Figure]] = []
    if curves:
        said = _said_of(done[: sweep_over_time.MOST_CELLS])
        figure = sweep_over_time.over_time_figure(curves, len(done) - len(curves), said)
        made.append(("Uncertainty over time", Path("over_time.png"), figure))
    if maps:
        said = _said_of(done[: sweep_maps.MOST_CELLS])
        figure = sweep_maps.map_tiles(maps, len(done) - len(maps), said)
        made.append(("Maps on the same noise", Path("maps.png"), figure))
    more = len(done) - sorted_sheet.MOST_BLOCKS
    conditions += f"; {more} more cells are not shown" if more > 0 else ""
    for score, each in blocks.items():
        name = Path(f"sorted_{file_name(score)[:60]}.png")
        sheet = sorted_sheet.sorted_images(each, conditions, score)
        made.append((f"Images sorted by {score}", name, sheet))
    return made


def _read(
    done: Sequence[Row], keys: Sequence[str]
) -> "tuple[list[CellCurve], list[CellMaps], dict[str, list[Block]]]":
    """What the figures show of the first cells that can be read, each file opened once."""
    from bayesdiff.report import sorted_sheet
    from bayesdiff.sweeps import maps as sweep_maps
    from bayesdiff.sweeps import over_time as sweep_over_time

    curves: list[CellCurve] = []
    maps: list[CellMaps] = []
    blocks: dict[str, list[Block]] = {}
    most = (sweep_over_time.MOST_CELLS, sweep_maps.MOST_CELLS, sorted_sheet.MOST_BLOCKS)
    for place, row in enumerate(done[: max(most)]):
        samples = stored_samples(row["samples"])
        if samples is None:
            continue
        name = _cell_name(row, keys)
        if place < most[0]:
            curves.append(sweep_over_time.CellCurve.of(samples, name))
        if place < most[1] and samples.images.dim() == 4:  # points have no pictures
            lines = textwrap.wrap(name, 34, max_lines=4, placeholder=" …")
            maps.append(sweep_maps.CellMaps.of(samples, "\n".join(lines)))
        for score, values in (_sorted_by(row) if place < most[2] else {}).items():
            if len(values) == len(samples.images):
                block = sorted_sheet.Block(name, samples.images, values)
                blocks.setdefault(score, []).append(block)
    return curves, maps, blocks


def _sorted_by(row: Row) -> "dict[str, Tensor]":
    """The scores by which the cell's own report sorts its images."""
    folder = Path(row["folder"])
    asked = (read_json(folder / "metrics.json") or {}).get("report") or {}
    known = read_arrays(folder / SCORES_FILE) or {}
    return {name: known[name] for name in asked.get("sorted_by") or () if name in known}


def _said_of(rows: Sequence[Row]) -> str:
    """The conditions that a figure of few cells has room for."""
    known = conditions_of(rows)
    kept = [f"{name} {known[name]}" for name in ("data", "estimator", "NFE") if name in known]
    return ", ".join(kept)


def conditions_of(rows: Sequence[Row]) -> dict[str, str]:
    """What the numbers of the cells stand for, over all cells that are done."""
    done = [row for row in rows if row["status"] == "done"]
    settings = [row.get("settings", {}) for row in done]
    metrics = [row.get("metrics", {}) for row in done]
    scored = [name.removeprefix("fid@") for m in metrics for name in m if name.startswith("fid@")]
    sizes, features = ([name.partition("/")[side] for name in scored] for side in (0, 2))
    known = {
        "data": [s.get("data") for s in settings],
        "model": [s.get("model") for s in settings],
        "seed": [s.get("seed") for s in settings],
        "solver": [s.get("solver.name") for s in settings],
        "NFE": [m.get("nfe") for m in metrics],
        "estimator": [estimator_of(s) for s in settings],
        "images with maps": [s.get("uncertainty.num_images") for s in settings],
        "images scored": sizes,
        "feature extractor": features,
    }
    found = {name: _said(values) for name, values in known.items()}
    return {name: text for name, text in found.items() if text}


def _said(values: Iterable[Any]) -> str:
    """The distinct ones, a dozen at most."""
    texts = list(dict.fromkeys(table.cell(value) for value in values if value is not None))
    more = f" and {len(texts) - 12} more" if len(texts) > 12 else ""
    return ", ".join(texts[:12]) + more


def swept_keys(rows: Sequence[Row]) -> list[str]:
    """Override keys with more than one value over the cells, in the order they were given."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for override in row["overrides"]:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1] or list(values)


def flatten(row: Mapping[str, Any], keys: Sequence[str]) -> Row:
    """One table row: the swept values first, then status, metrics and folder."""
    given = dict(override.partition("=")[::2] for override in row["overrides"])
    flat: Row = {key: _number(given.get(key, "")) for key in keys}
    if row.get("settings", {}).get("uncertainty.instead_of"):
        flat[MAPS_BY] = estimator_of(row["settings"])
    flat |= {"status": row["status"], **row.get("metrics", {}), "seconds": row["seconds"]}
    return flat | {"folder": row.get("folder", ""), "error": row.get("error", "")}


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """The few metrics that fit on a screen, and studies' headlines; the CSV has all metrics."""
    names = [name for row in rows for name in row.get("metrics", {})]
    headlines = [name for row in rows for name in row.get("headlines", [])]
    first = [n for w in _SHOWN for n in names if n == w or w[-1] == "@" and n.startswith(w)]
    return list(dict.fromkeys([*first, *headlines]))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
