"""Tables against the csv module and the console."""

import csv

import pytest

from bayesdiff.report import table

ROWS = [{"prior": 1, "fid@5k": 12.345678901234567}, {"prior": 10, "note": "[bold]a|b[/bold], c"}]


def test_csv_keeps_every_key_and_digit(tmp_path):
    path = table.write_csv(tmp_path / "new" / "table.csv", ROWS)
    with path.open(newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert float(back[0]["fid@5k"]) == ROWS[0]["fid@5k"] and back[1]["fid@5k"] == ""
    assert back[1]["note"] == ROWS[1]["note"]
    assert table.write_csv(path, []).read_text() == "\n"


def test_csv_is_whole_or_absent(tmp_path):
    path = table.write_csv(tmp_path / "table.csv", ROWS)

    class Unwritable:
        def __str__(self):
            raise RuntimeError("stop")

    before = path.read_text()
    with pytest.raises(RuntimeError, match="stop"):
        table.write_csv(path, [*ROWS, {"prior": Unwritable()}])
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_show_rounds_and_takes_no_markup(capsys):
    table.show("Cells [red]", ROWS, ["prior", "fid@5k", "note"])
    shown = capsys.readouterr().out
    for text in ("Cells [red]", "12.35", "[bold]a|b[/bold], c"):
        assert text in shown


def test_markdown_table():
    assert table.markdown(ROWS, ["prior", "note"]).splitlines() == [
        "| prior | note |",
        "| --- | --- |",
        "| 1 |  |",
        "| 10 | [bold]a\\|b[/bold], c |",
    ]
