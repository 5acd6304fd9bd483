"""What the pages on pictures and on TensorBoard name is what a run leaves."""

import re

import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import CLASSES, fake

from bayesdiff.metrics.validation import Validation
from bayesdiff.report import board
from bayesdiff.report.options import ReportOptions

START = ROOT / "docs" / "start"
PICTURES = (START / "pictures.md").read_text()
TENSORBOARD = (START / "tensorboard.md").read_text()
# Of grids while a model trains, which the smallest run draws none of; see test_sample_grid.py.
GRIDS = "samples", "training.png"


def first_cells(text, header):
    """Codes in the first column of the tables whose first heading this is."""
    tables = re.findall(rf"^\| {header} \|.*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return {code for cell in cells for code in re.findall(r"`([^`]+)`", cell)}


def without_size(tags):
    return {re.sub(r"@\w+/", "@N/", tag) for tag in tags}


def test_every_tag_of_the_page_is_in_a_run(trained):
    training, cell = (
        EventAccumulator(str(folder / "tensorboard")).Reload()
        for folder in (trained.folder, trained.cell)
    )
    tags = cell.Tags()
    named = without_size(first_cells(TENSORBOARD, "tag"))
    known = without_size(
        [*training.Tags()["scalars"], *tags["scalars"], *tags["images"], *tags["histograms"]]
    )
    assert len(named) > 30 and named - known == {GRIDS[0]}
    # No curve, figure or histogram of a run is without a word.
    curves = {tag for tag in tags["scalars"] if len(cell.Scalars(tag)) > 1}
    described = {*tags["images"], *tags["histograms"], *curves, *training.Tags()["scalars"]}
    assert described <= named
    assert any(tag.startswith("_hparams_/") for tag in cell.summary_metadata)


def figures_named(text):
    return set(re.findall(r"`(\w+\.png)`", text))


def test_every_figure_of_the_page_is_one_that_a_run_leaves(trained, tmp_path):
    left = {path.name for path in (trained.cell / "figures").glob("*.png")}
    default, asked_for = PICTURES.split("\n## Only when asked for\n")
    assert figures_named(default) == left | {GRIDS[1]}
    samples = fake()
    samples.aleatoric, samples.aleatoric_time = samples.variance, torch.tensor(0.5)
    same = samples.variance.flatten(1).sum(1)
    validation = Validation(same, same, *(torch.ones(len(same)) for _ in range(4)))
    shown = ReportOptions(sorted_by=["map.sum"], pdf=False)
    made = board.write(
        tmp_path / "tensorboard", samples, {}, {}, CLASSES, options=shown, validation=validation
    )
    assert figures_named(asked_for) == {path.name for path in made} - left


def test_every_picture_of_the_pages_is_shown_and_small():
    for page, text in (("pictures", PICTURES), ("tensorboard", TENSORBOARD)):
        files = {path.name: path.stat().st_size for path in (START / page).iterdir()}
        assert set(re.findall(rf"\]\({page}/([\w.]+)\)", text)) == set(files)
        assert max(files.values()) < 150_000
