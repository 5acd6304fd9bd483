"""Tables of rows: a CSV file, Markdown text, and the one place that writes to the console."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesdiff.cli import mute
from bayesdiff.storage.artefacts import write_atomic

Row = Mapping[str, Any]

# What the closing table of a run shows, in this order.
_SHOWN = (
    "sliced_wasserstein@", "real/sliced_wasserstein@", "energy_distance@",
    "fid@", "is@", "kid@", "precision@", "recall@", "cmmd@", "real/fid@",
    "classifier_test_accuracy", "nfe",
    "summed_variance/mean", "sampler_noise/mean", "aleatoric/mean", "calibration/factor",
    "likelihood/bits_per_dim", "validation/", "laplace/effective_parameters",
    "laplace/block_effective_parameters", "laplace/sigma_noise",
)  # fmt: skip
_ENDS = ("_low", "_high")


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every key of ``rows`` in the order of first sight."""
    return list(dict.fromkeys(key for row in rows for key in row))


def cell(value: Any) -> str:
    """Text of one value for a reader: four significant digits, nothing for a missing value."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table, ready for a study's README."""
    names = list(columns) if columns is not None else columns_of(rows)
    body = [[cell(row.get(name)).replace("|", "\\|") for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(metrics: Mapping[str, float], more: Iterable[str] = ()) -> list[Row]:
    """The metrics that a reader looks for first; an interval stands behind its figure.

    Args:
        metrics: of a run.
        more: names of further ones to show, such as the headlines of studies.
    """
    rows: list[Row] = []
    first = [name for start in _SHOWN for name in metrics if name.startswith(start)]
    for name in dict.fromkeys([*first, *(name for name in more if name in metrics)]):
        value: float | str = metrics[name]
        whole = metrics.get(name.replace("effective_", ""))
        if "effective_" in name and whole is not None:
            value = f"{cell(value)} of {whole:.0f}"
        if all(name + end in metrics for end in _ENDS):
            low, high = (cell(metrics[name + end]) for end in _ENDS)
            value = f"{cell(value)} ({low} to {high})"
        if not name.endswith(_ENDS):
            rows.append({"metric": name, "value": value})
    return rows


def write_csv(path: str | Path, rows: Sequence[Row]) -> Path:
    """Write ``rows`` with full precision; a reader never sees half a file.

    Args:
        path: the file; its folder is made.
        rows: dictionaries that may lack keys, for example a failed cell without metrics.

    Returns:
        The path.
    """
    path = Path(path)
    write_atomic(path, lambda file: _fill(file, rows))
    return path


def _fill(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(title: str, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """Print ``rows`` as a table on standard output.

    Args:
        title: line above the table.
        rows: dictionaries; numbers are rounded to four significant digits.
        columns: keys to show and their order; all keys when left out.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Output(Console):
        """Standard output, whose reader may leave before the end, as in ``| head``."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            mute()

    names = list(columns) if columns is not None else columns_of(rows)
    numeric = {
        name: all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        for name in names
    }
    table = Table(title=Text(title), title_justify="left")
    for name in names:
        table.add_column(Text(name), justify="right" if numeric[name] else "left")
    for row in rows:
        # Text, not str: a value such as "[1, 2]" is not markup.
        table.add_row(*(Text(cell(row.get(name))) for name in names))
    console = Output()
    if not console.is_terminal:
        # A log file has no width to fold at.
        console = Output(width=1000)
    console.print(table)
