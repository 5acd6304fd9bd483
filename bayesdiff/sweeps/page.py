"""One page for a browser: everything inside it, readable without a server or JavaScript."""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bayesdiff.machine.progress import duration
from bayesdiff.report import table
from bayesdiff.report.series import SEED, finite, text_of
from bayesdiff.sweeps.seeds import over_seeds, said

Row = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2.5rem auto;
  max-width: 1280px; padding: 0 1.5rem; }
h1 { font-size: 1.45rem; font-weight: 600; margin: 0 0 .8rem; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; } .quiet { color: #666; } a { color: #1a5fb4; }
pre { background: #f6f6f6; padding: .7rem .9rem; border-radius: 4px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: .8rem 0; }
dt { color: #666; } dd { margin: 0; }
.wide { overflow: auto; max-height: 80vh; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid #eee; }
th { font-weight: 600; position: sticky; top: 0; background: #fff; border-bottom: 1px solid #999;
  vertical-align: bottom; white-space: normal; }
td.number, th.number { text-align: right; }
td small { color: #666; display: block; }
tr.failed td { color: #a51d2d; }
img { max-width: 100%; height: auto; display: block; margin: .3rem 0 2rem; }
"""
# A bonus where there is JavaScript: click on a heading to sort by it.
_SORT = """
document.querySelectorAll("table.sortable th").forEach((head) => {
  head.style.cursor = "pointer";
  head.title = "sort";
  head.onclick = () => {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
    const value = (row) => row.cells[at].dataset.value ?? row.cells[at].textContent;
    const rows = [...body.rows].sort((one, two) => {
      const a = value(one), b = value(two);
      if (a === "" || b === "") return (a === "") - (b === "");
      const less = a - b;
      return (down === "1" ? 1 : -1) * (isNaN(less) ? a.localeCompare(b) : less);
    });
    body.append(...rows);
  };
});
"""


def page(
    folder: Path,
    rows: Sequence[Row],
    keys: Sequence[str],
    metrics: Sequence[str],
    conditions: Mapping[str, str],
    pictures: Mapping[str, Path],
    command: str,
    others: Sequence[str] = (),
) -> str:
    """The page's HTML.

    Args:
        folder: where it will lie; links to the cells' pictures are relative to it.
        rows: flat, one for every cell.
        keys: swept ones.
        metrics: the columns of figures.
        conditions: names and values that all numbers depend on.
        pictures: files by heading; they are put into the page.
        command: that started the sweep.
        others: further columns, before the figures.
    """
    title = "Sweep over " + ", ".join(keys) if len(rows) > 1 else "Sweep of one cell"
    failed = [row for row in rows if row["status"] != "done"]
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<pre>{escape(command)}</pre>"] if command else []
    parts += [_conditions(rows, failed, conditions), _failures(rows, failed)]
    parts += [_over_seeds(rows, keys, metrics)]
    parts += ["<h2>Cells</h2>", _cells(folder, rows, [*keys, *others], metrics)]
    parts += [
        '<p class="quiet">All metrics: <a href="sweep.csv">sweep.csv</a>. A number leads to its '
        "cell's pictures.</p>"
    ]
    parts += ["<h2>Figures</h2>", *(_picture(*each) for each in pictures.items())]
    if not pictures:
        parts.append(f"<p>{_why_no_pictures(rows, failed)}</p>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n<script>{_SORT}</script>\n</body></html>\n"
    )


def _conditions(rows: Sequence[Row], failed: Sequence[Row], known: Mapping[str, str]) -> str:
    seconds = sum(float(row.get("seconds") or 0) for row in rows)
    facts = dict(known)
    facts["cells"] = f"{len(rows)}" + (f", {len(failed)} failed" if failed else "")
    facts["time"] = f"{duration(seconds)} for all cells, one after the other"
    facts["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{lines}</dl>"


def _failures(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    """Errors with the cells that have them, each error once."""
    cells: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if any(row is one for one in failed):
            cells.setdefault(str(row.get("error") or "no reason given"), []).append(place)
    lines = [
        f"<li>cell{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}: "
        f"{escape(error)}</li>"
        for error, places in cells.items()
    ]
    return f"<h2>Failed cells</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _over_seeds(rows: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """Means over seeds with Student's t intervals, a row for each setting."""
    means = over_seeds(rows, keys, metrics)
    if not means:
        return ""
    names = [*(key for key in keys if key != SEED), "seeds"]
    body = []
    for row in means:
        cells = [*(_cell(row[name]) for name in names), *(_interval(row, m) for m in metrics)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(_head(name, rows) for name in [*names, *metrics])
    note = (
        '<p class="quiet">Means over seeds with 95 % intervals of Student\'s t. All metrics: '
        '<a href="over_seeds.csv">over_seeds.csv</a>.</p>'
    )
    return f"<h2>Over seeds</h2>{note}{_table(heads, body)}"


def _interval(row: Row, metric: str) -> str:
    mean, _, ends = said(row, metric).partition(" ")
    text = mean + (f" <small>{ends}</small>" if ends else "")
    return f'<td class="number" data-value="{row.get(metric, "")!r}">{text}</td>'


def _cells(folder: Path, rows: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]) -> str:
    names = [*keys, *metrics, "seconds", "status"]
    body = []
    for place, row in enumerate(rows):
        link = _link(folder, str(row.get("folder") or ""), str(place))
        line = [f'<td class="number" data-value="{place}">{link}</td>']
        line += [_cell(row.get(name)) for name in names]
        mark = "" if row["status"] == "done" else ' class="failed"'
        body.append(f"<tr{mark}>{''.join(line)}</tr>")
    heads = '<th class="number">cell</th>' + "".join(_head(name, rows) for name in names)
    return _table(heads, body)


def _table(heads: str, body: Sequence[str]) -> str:
    rows = "\n".join(body)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _head(name: str, rows: Sequence[Row]) -> str:
    numeric = all(finite(row.get(name)) or row.get(name) in (None, "") for row in rows)
    kind = ' class="number"' if numeric and name != "status" else ""
    text = re.sub(r"([/._@])", r"\1<wbr>", escape(name))  # a long name breaks where parts meet
    return f"<th{kind}>{text}</th>"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return '<td data-value=""></td>'
    if finite(value):
        value = float(value)
        text = text_of(value) if value == int(value) else table.cell(value)
        return f'<td class="number" data-value="{value!r}">{text}</td>'
    return f"<td>{escape(str(value))}</td>"


def _link(folder: Path, cell: str, text: str) -> str:
    """To the cell's maps, else to its folder; none for a failed cell."""
    if not cell:
        return text
    target = Path(cell).resolve()
    picture = target / "figures" / "image_and_map.png"
    target = picture if picture.is_file() else target
    relative = Path(os.path.relpath(target, folder.resolve())).as_posix()
    return f'<a href="{quote(relative)}">{text}</a>'


def _picture(name: str, path: Path) -> str:
    pixels = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<h3>{escape(name)}</h3>\n<img alt="{escape(name)}" src="data:image/png;base64,{pixels}">'
    )


def _why_no_pictures(rows: Sequence[Row], failed: Sequence[Row]) -> str:
    if len(failed) == len(rows):
        return "No cell is done, so there is nothing to draw."
    return "Nothing varies over the cells that are done, and none has maps."
