"""The report over a sweep: figures against their numbers, the page against a parser, the board."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from test_report import fake

from bayesdiff.report.options import SCORES_FILE
from bayesdiff.report.series import depends, series, short_names
from bayesdiff.storage.artefacts import write_arrays, write_json
from bayesdiff.sweeps import report as sweep
from bayesdiff.sweeps.charts import sweep_figure
from bayesdiff.sweeps.maps import CellMaps, by_images, map_tiles, scale_of
from bayesdiff.sweeps.over_time import CellCurve, over_time_figure
from bayesdiff.uncertainty.stored import stored_samples, to_arrays

pytestmark = pytest.mark.usefixtures("without_pdf", "every_figure_drawn")

FID, VARIANCE = "fid@500/classifier", "summed_variance/mean"


def cell(folder, number, overrides, images=None, size=1.0, **changes):
    """A row as a finished cell leaves it, with the maps behind it."""
    there = folder / "run" / f"cell {number}"
    seed = int(dict(o.split("=") for o in overrides).get("seed", 0))
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 1, 8, 8, generator=rng) * 2 - 1 if images is None else images
    samples = fake(6)
    samples.images, samples.variance = images, size * torch.rand(images.shape, generator=rng)
    write_arrays(folder / "run" / f"samples {number}.npz", "key", to_arrays(samples))
    (there / "figures").mkdir(parents=True)
    (there / "figures" / "image_and_map.png").write_bytes(b"")
    settings = {"data": "digits", "seed": seed, "uncertainty.name": "ensemble"}
    settings |= {"uncertainty.num_images": 6}
    row = {"number": number, "overrides": overrides, "status": "done", "seconds": 2.0}
    row |= {"folder": str(there), "settings": settings}
    row |= {"samples": str(folder / "run" / f"samples {number}.npz")}
    return row | {"metrics": {FID: 10.0 + number, VARIANCE: size, "nfe": 40}} | changes


def failed(number, overrides, error="the value is <bad> & wrong"):
    row = {"number": number, "overrides": overrides, "status": "failed", "seconds": 0.1}
    return row | {"error": error}


class Page(HTMLParser):
    """What a browser finds in the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.sources, self.text, self.opened = [], [], "", []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.opened.append(tag)
        self.links += [given["href"]] if "href" in given else []
        self.sources += [given["src"]] if "src" in given else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweeps" / "abc"


def written(folder, rows, command="python sweep.py -m prior=1,10"):
    sweep.write(folder, rows, command)
    return Page(folder / "report.html")


def test_the_page_has_table_pictures_conditions_and_nothing_from_outside(folder):
    rows = [cell(folder, i, [f"prior={10**i}", "k=1"], size=10.0**-i) for i in range(3)]
    rows.append(failed(3, ["prior=-1", "k=1"]))
    page = written(folder, rows, "python sweep.py -m 'prior=1,10,100,-1' k=1")
    source = (folder / "report.html").read_text()
    assert "python sweep.py -m 'prior=1,10,100,-1' k=1" in page.text
    for known in ("digits", "ensemble", "500", "classifier", "40", "4, 1 failed", "6.1 s"):
        assert known in page.text, known
    assert "cell 3: the value is <bad> & wrong" in page.text
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://|//cdn|<link|@import|url\(", source)
    table = next(row for row in page.rows if row[0] == "cell")
    assert table[:4] == ["cell", "prior", FID, "nfe"]
    (first,) = [row for row in page.rows if row[0] == "0"]
    assert first[:4] == ["0", "1", "10", "40"]
    for link in page.links:  # relative, and there
        assert not link.startswith("/") and (folder / unquote(link)).is_file(), link
    assert len(page.links) == 4  # three cells and the CSV
    assert (folder / "sweep.png").is_file()


def test_the_page_is_whole_without_a_script(folder):
    """All that is shown is markup; the only script sorts."""
    written(folder, [cell(folder, i, [f"prior={i}"]) for i in range(1, 3)])
    source = (folder / "report.html").read_text()
    bare = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert source.count("<script>") == 1 and bare.count("<td") == source.count("<td") > 0
    assert "fetch" not in source and "innerHTML" not in source


def test_a_sweep_without_a_single_result_still_has_a_page(folder):
    page = written(folder, [failed(i, [f"prior={-i}"], f"got {-i}") for i in range(3)])
    assert "cell 2: got -2" in page.text and not page.sources
    assert "No cell is done" in page.text
    assert not (folder / "sweep.png").exists()
    assert len(list(csv.DictReader((folder / "sweep.csv").open()))) == 3


def test_one_cell_has_a_page_with_its_maps_and_no_curves(folder):
    page = written(folder, [cell(folder, 0, ["prior=1"])])
    assert len(page.sources) == 2 and "Sweep of one cell" in page.text


def test_cells_without_metrics_or_maps_are_left_out_of_the_pictures(folder):
    rows = [cell(folder, i, [f"prior={i + 1}"]) for i in range(3)]
    rows[1]["metrics"] = {}
    Path(rows[2]["samples"]).write_bytes(b"broken")
    page = written(folder, rows)
    assert len(page.sources) == 3
    (bare,) = [row for row in page.rows if row[0] == "1"]
    assert bare[2] == ""


def test_two_hundred_cells_make_a_page_of_reasonable_size(folder):
    rows = [cell(folder, i, [f"prior={i + 1}", f"name=v{i}"]) for i in range(200)]
    page = written(folder, rows)
    assert len([row for row in page.rows if row and row[0].isdigit()]) == 200
    assert (folder / "report.html").stat().st_size < 3e6


def test_special_characters_are_text(folder):
    odd = "<script>alert(1)</script>"
    page = written(folder, [cell(folder, i, [f"note={odd}{i}$"]) for i in range(2)], odd)
    assert page.opened.count("script") == 1 and f"{odd}1$" in page.text


def test_each_error_is_told_once_with_its_cells(folder):
    rows = [failed(i, [f"a={i}"], "same") for i in range(3)] + [failed(3, ["a=9"], "other")]
    text = written(folder, rows).text
    assert "cells 0, 1, 2: same" in text and "cell 3: other" in text


def test_intervals_over_seeds_are_students(folder):
    rows = [
        cell(folder, 3 * p + s, [f"prior={10**p}", f"seed={s}"])
        for p in range(3)
        for s in range(3)
    ]
    page = written(folder, rows)
    values = [10.0, 11.0, 12.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert f"11 [{low:.4g}, {high:.4g}]" in page.text
    flat = [sweep.flatten(row, ["prior", "seed"]) for row in rows]
    axes = sweep_figure(flat, ["prior", "seed"], [FID], "prior").axes[0]
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [11, 14, 17])
    (bars,) = axes.collections
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [low, high])
    source = (folder / "report.html").read_text()
    assert 'alt="Metrics over prior"' in source and "Metrics over seed" not in source


def test_means_over_seeds_are_on_the_screen_and_in_files(folder, capsys):
    """Of every metric, also those that the screen has no room for; of failed cells none."""
    rows = [
        cell(folder, 3 * p + s, [f"prior={10**p}", f"seed={s}"])
        for p in range(2)
        for s in range(3)
    ]
    for row in rows:
        row["metrics"] |= {
            "recall@500/classifier": 0.1 * row["number"],
            "own_low": 1.0,
            "own": 2.0,
        }
    rows[5] = failed(5, ["prior=10", "seed=2"])
    written(folder, rows)
    first, second = csv.DictReader((folder / "over_seeds.csv").open())
    values = [0.0, 0.1, 0.2]
    ends = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    name = "recall@500/classifier"
    found = [float(first[name + end]) for end in ("", "_low", "_high")]
    np.testing.assert_allclose(found, [0.1, *ends])
    assert (first["seeds"], second["seeds"], float(second["prior"])) == ("3", "2", 10)
    assert float(second[FID]) == 13.5 and float(first["own_low"]) == 2  # of the seeds, no metric
    low, high = stats.t.interval(0.95, 2, 11, stats.sem([10.0, 11.0, 12.0]))
    text = f"11 [{low:.4g}, {high:.4g}]"
    assert text in capsys.readouterr().out and text in (folder / "over_seeds.md").read_text()


def test_without_seeds_or_anything_else_there_are_no_means_over_seeds(folder):
    for keys in ("prior", "seed"):
        there = folder / keys
        page = written(there, [cell(there, i, [f"{keys}={i}"]) for i in range(2)])
        assert not (there / "over_seeds.csv").exists() and "Over seeds" not in page.text


def test_one_seed_has_no_interval_and_cells_apart_in_other_keys_are_no_seeds():
    rows = [{"prior": p, "seed": 0, "k": k, FID: 1.0 + k} for p in (1, 2) for k in range(12)]
    axes = sweep_figure(rows, ["prior", "k"], [FID], "prior").axes[0]
    assert not axes.collections
    assert series(rows, ["prior", "k"], "prior")[0] == []  # 12 lines could not be told apart
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [6.5, 6.5])


def test_every_combination_of_the_other_keys_has_a_line():
    rows = [
        {"p": p, "a.name": a, "b.name": b, FID: p * (1 + 2 * (a == "x"))}
        for p in (1, 2, 3) for a in "xy" for b in "uv"
    ]  # fmt: skip
    names, groups = series(rows, ["p", "a.name", "b.name"], "p")
    assert names == ["a.name", "b.name"] and list(groups) == [
        ("x", "u"), ("x", "v"), ("y", "u"), ("y", "v"),
    ]  # fmt: skip
    axes = sweep_figure(rows, ["p", "a.name", "b.name"], [FID], "p").axes[0]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["x, u", "x, v", "y, u", "y, v"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [3, 6, 9])
    assert short_names(["a.name", "b.name", "c.k"]) == ["a.name", "b.name", "k"]


@pytest.mark.parametrize(
    "values",
    [
        ["ensemble", "total_variance", "a_very_long_name_for_an_estimator", "deep_ensemble"],
        [f"outputs/digits-flow-{i:08d}/checkpoints/last.ckpt" for i in range(30)],
        [0.001, 0.01, 0.1, 1, 10, 100, 1000],
        [1, 1.001, 50],
        [1, 1e6],
        [10.0**k for k in range(-9, 10)],
        list(range(30)),
    ],
)
def test_labels_of_the_x_axis_do_not_overlap(values):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = [{"key": v, FID: float(i), "nfe": 3.0} for i, v in enumerate(values)]
    figure = sweep_figure(rows, ["key"], [FID, "nfe", VARIANCE])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes[:2]:
        labels = [x for x in axes.get_xticklabels() if x.get_text() and x.get_visible()]
        angle = math.radians(labels[0].get_rotation())
        boxes = []
        for label in labels:
            x = label.get_transform().transform(label.get_position())[0]
            plain = label.get_fontsize() * figure.dpi / 72
            boxes.append((x, label.get_window_extent(canvas.get_renderer()).width, plain))
        for (x, width, height), (other, wide, _) in zip(boxes, boxes[1:], strict=False):
            # Turned labels are lines side by side: their distance across counts.
            room = (other - x) * (math.sin(angle) or 1)
            assert room >= (height if angle else (width + wide) / 2) - 1


def maps_of(name, top, images=None, size=8):
    images = torch.zeros(2, 1, size, size) if images is None else images
    return CellMaps(name, images, np.full((2, size, size), top))


def test_maps_share_one_scale_and_images_are_shown_once():
    other = torch.ones(2, 1, 8, 8)
    cells = [maps_of("a", 1.0), maps_of("b", 2.0, other), maps_of("c", 2.5), maps_of("d", 0.0)]
    assert [[c.name for c in group] for group in by_images(cells)] == [["a", "c", "d"], ["b"]]
    low, high, log = scale_of(cells)
    assert (low, high, log) == (0.0, 2.5, False)
    figure = map_tiles(cells, 7, "digits")
    drawn = figure.axes[0].images
    maps = [image for image in drawn if image.get_array().ndim == 2]
    assert len(drawn) == 2 * 2 + 4 * 2 and len(maps) == 8
    assert {image.get_clim() for image in maps} == {(0.0, 2.5)}
    texts = " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))
    assert "7 more cells" in " ".join(texts.split())


def test_maps_of_different_orders_share_a_logarithmic_scale():
    cells = [maps_of("a", 1.0), maps_of("b", 1e-3), maps_of("none", 0.0)]
    low, high, log = scale_of(cells)
    assert log and high == 1.0 and 0 < low <= 1e-3
    assert scale_of([maps_of("none", 0.0)]) == (0.0, 1.0, False)
    maps = [i for i in map_tiles(cells, 0, "").axes[0].images if i.get_array().ndim == 2]
    assert {image.get_clim() for image in maps} == {(low, high)}
    map_tiles([maps_of("large", 1.0, size=32), maps_of("small", 1.0)], 0, "")


def test_samples_are_read_in_model_units(tmp_path):
    samples = fake(9, channels=3)
    for name, given in (("a", samples), ("b", samples.in_unit_range())):
        write_arrays(tmp_path / f"{name}.npz", "k", to_arrays(given))
    read = [stored_samples(tmp_path / f"{name}.npz") for name in "ab"]
    one, two = (CellMaps.of(each, "name") for each in read)
    assert one.shares_images(two) and len(one.images) == 8
    truth = samples.variance[:8].double().mean(1).sqrt().numpy()
    np.testing.assert_allclose(one.maps, truth, rtol=1e-6)
    np.testing.assert_allclose(two.maps, one.maps, rtol=1e-5)
    curves = [CellCurve.of(each, "name").summed for each in read]
    np.testing.assert_allclose(*curves, rtol=1e-6)
    assert (read[1].estimator, read[1].nfe, read[1].units) == ("ensemble of 5", 50, "model")
    assert stored_samples(tmp_path / "c") is None
    write_arrays(tmp_path / "part.npz", "k", {"images": samples.images})
    assert stored_samples(tmp_path / "part.npz") is None


def test_solvers_with_other_steps_share_one_plot_over_t(folder):
    """A flow of 20 steps and a diffusion of 25 lie over the same t, in the same units."""
    rows = [cell(folder, i, [f"model={name}"]) for i, name in enumerate(("flow", "diffusion"))]
    truth = {}
    for row, steps, unit in zip(rows, (20, 25), (False, True), strict=True):
        samples = fake(6, steps=steps)
        truth[steps] = samples.summed.double().mean(1).numpy()
        given = samples.in_unit_range() if unit else samples
        write_arrays(Path(row["samples"]), "key", to_arrays(given))
    read = [(stored_samples(row["samples"]), row["overrides"][0]) for row in rows]
    curves = [CellCurve.of(*each) for each in read]
    lines = over_time_figure(curves, 3, "digits").axes[0].lines
    assert [line.get_label() for line in lines] == ["model=flow", "model=diffusion"]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 2
    for line, (steps, values) in zip(lines, truth.items(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, steps + 1) / steps, rtol=1e-6)
        np.testing.assert_allclose(line.get_ydata(), values, rtol=1e-6)
    page = written(folder, rows)
    assert "Uncertainty over time" in (folder / "report.html").read_text() and page.sources
    assert (folder / "figures" / "over_time.png").is_file()
    assert "sweep/Uncertainty over time" in events_of(folder / "report").Tags()["images"]


def test_headlines_of_studies_are_columns(folder, capsys):
    name = "filtering/ensemble.sum/cmmd_gain@0.8"
    rows = [cell(folder, i, [f"laplace={kind}"]) for i, kind in enumerate(("full", "diag"))]
    for place, row in enumerate(rows):
        row["metrics"][name], row["headlines"] = 0.5 + place, [name]
    page = written(folder, rows)
    table = next(row for row in page.rows if row[0] == "cell")
    assert name in table and f"{name}" in capsys.readouterr().out
    assert [row[name] for row in csv.DictReader((folder / "sweep.csv").open())] == ["0.5", "1.5"]


def test_the_cap_on_tiles_is_said(folder, monkeypatch):
    monkeypatch.setattr("bayesdiff.sweeps.maps.MOST_CELLS", 4)
    seen = []
    monkeypatch.setattr(
        "bayesdiff.sweeps.maps.map_tiles",
        lambda cells, more, conditions: seen.append((len(cells), more, conditions)) or
        map_tiles(cells, more, conditions),
    )  # fmt: skip
    written(folder, [cell(folder, i, [f"prior={i + 1}"]) for i in range(6)])
    assert seen == [(4, 2, "data digits, estimator ensemble, NFE 40")]


def events_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_the_board_has_curves_pictures_a_layout_and_no_second_row(folder):
    rows = [cell(folder, i, [f"prior={i + 1}"]) for i in range(3)] + [failed(3, ["prior=-1"])]
    written(folder, rows)
    written(folder, rows)  # replaces, does not add
    assert len(list((folder / "report").iterdir())) == 1
    events = events_of(folder / "report")
    tags = events.Tags()
    assert [(e.step, e.value) for e in events.Scalars(f"sweep/{FID}")] == [
        (0, 10.0), (1, 11.0), (2, 12.0),
    ]  # fmt: skip
    assert set(tags["images"]) == {
        "sweep/Metrics over prior", "sweep/Uncertainty over time", "sweep/Maps on the same noise",
    }  # fmt: skip
    (layout,) = [tag for tag in tags["tensors"] if "custom_scalars" in tag]
    text = layout_pb2.Layout.FromString(events.Tensors(layout)[0].tensor_proto.string_val[0])
    assert [category.title for category in text.category] == ["scores", "uncertainty", "Laplace"]
    wanted = [chart.multiline.tag[0] for category in text.category for chart in category.chart]
    known = [*rows[0]["metrics"], f"sweep/{FID}", "laplace/effective_parameters"]
    for name in known:
        assert sum(bool(re.search(pattern, name)) for pattern in wanted) == 1, name
    with pytest.raises(KeyError):  # the rows of HPARAMS are the cells' own
        events.PluginTagToContent("hparams")


def test_the_command_is_the_users_own():
    hydra = ["hydra.mode=MULTIRUN", "hydra/launcher=joblib"]
    command = sweep.command_of(["seed=0,1", "a=[1, 2]"], hydra)
    assert command == "python sweep.py -m hydra/launcher=joblib seed=0,1 'a=[1, 2]'"


def test_panels_that_cannot_differ_are_left_out_and_said():
    rows = [
        {"prior": p, "steps": n, FID: 44.0 + n, VARIANCE: p + n, "nfe": 2.0 * n}
        for p in (1, 2) for n in (10, 20)
    ]  # fmt: skip
    keys = ["prior", "steps"]
    found = [depends(rows, keys, "prior", metric) for metric in (FID, VARIANCE, "nfe")]
    assert found == [False, True, False]
    assert all(depends(rows, keys, "steps", metric) for metric in (FID, VARIANCE, "nfe"))
    figure = sweep_figure(rows, keys, [FID, VARIANCE, "nfe"], "prior")
    assert [axes.get_title() for axes in figure.axes] == [VARIANCE]
    assert figure.axes[0].get_xlabel() == "prior"
    said = " ".join(figure.texts[0].get_text().split())
    assert f"Not drawn, since they do not depend on prior: {FID}, nfe" in said


def test_an_axis_is_not_zoomed_into_noise():
    rows = [{"p": p, FID: 44.236 + 0.001 * p} for p in (1, 2, 3)]
    low, high = sweep_figure(rows, ["p"], [FID]).axes[0].get_ylim()
    assert high - low >= 0.1 * 44 and low < 44.236 < high


def test_a_cell_is_drawn_with_its_own_interval():
    name = "validation/image_rank"
    rows = [{"p": p, name: 0.1 * p, f"{name}_low": -0.5, f"{name}_high": 0.6} for p in (1, 2, 3)]
    axes = sweep_figure(rows, ["p"], [name]).axes[0]
    (bars,) = axes.collections
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[-0.5, 0.6]] * 3)
    assert axes.get_ylim()[0] < -0.5 and axes.get_ylim()[1] > 0.6


def test_one_outlier_does_not_darken_all_other_maps():
    cells = [maps_of(str(top), top) for top in (1.0, 1.2, 1.4, 1.6)]
    assert scale_of([*cells, maps_of("outlier", 1e3)]) == scale_of(cells) == (0.0, 1.6, False)
    figure = map_tiles([*cells, maps_of("outlier", 1e3)], 0, "here")
    assert "1 cells are mostly off the scale" in " ".join(figure.texts[0].get_text().split())


def sorts(row, scores, asked):
    """Scores of a cell, and by which of them its report sorts its images."""
    write_arrays(Path(row["folder"]) / SCORES_FILE, "key", scores)
    record = {"report": {"chosen_by": [*scores][-1], "sorted_by": asked}}
    write_json(Path(row["folder"]) / "metrics.json", record)


def test_a_sweep_has_a_sheet_of_sorted_images_for_each_score_that_was_asked_for(folder):
    rows = [cell(folder, i, [f"skip={i + 1}"]) for i in range(2)]
    scores = {"map.sum": torch.arange(6.0), "members.joint": torch.full((6,), torch.nan)}
    for row in rows:
        sorts(row, {**scores, "map.mean": torch.arange(6.0)}, ["map.sum", "members.joint"])
    page = written(folder, rows)
    assert "Images sorted by map.sum" in page.text and "by map.mean" not in page.text
    for name in ("sorted_map.sum", "sorted_members.joint", "maps", "0_skip"):
        assert (folder / "figures" / f"{name}.png").is_file()
    captions = json.loads((folder / "figures" / "captions.json").read_text())
    assert "skip" in captions["0_skip"]["title"]
    assert "12 images have no score (NaN)" in captions["sorted_members.joint"]["caption"]
    assert "no score" not in captions["sorted_map.sum"]["caption"]


def test_an_infinite_score_is_first_in_a_sweep_as_it_is_in_its_cell(folder):
    """Rarity is infinite outside all balls: no other image is as rare."""
    rows = [cell(folder, 0, ["a=1"])]
    scores = torch.tensor([1.0, torch.inf, 3.0, torch.nan, -torch.inf, 2.0])
    sorts(rows[0], {"real.rarity": scores}, ["real.rarity"])
    (block,) = sweep._read(rows, ["a"])[2]["real.rarity"]
    assert block.order().tolist() == [1, 2, 5, 0, 4, 3]
    torch.testing.assert_close(block.scores, scores, equal_nan=True)


def test_every_file_of_samples_is_read_once(folder, monkeypatch):
    rows = [cell(folder, i, [f"a={i}"]) for i in range(3)]
    for row in rows:
        sorts(row, {"map.sum": torch.arange(6.0)}, ["map.sum"])
    seen = []
    monkeypatch.setattr(sweep, "stored_samples", lambda p: seen.append(p) or stored_samples(p))
    sweep.draw(folder, rows, [sweep.flatten(row, ["a"]) for row in rows], ["a"], [FID])
    assert seen == [row["samples"] for row in rows]


def test_files_of_an_earlier_report_go(folder):
    rows = [cell(folder, i, [f"a={i}"]) for i in range(2)]
    sorts(rows[0], {"map.sum": torch.arange(6.0)}, ["map.sum"])
    written(folder, rows)
    assert (folder / "sweep.png").is_file()
    mine = folder / "figures" / "mine.txt"
    mine.write_text("kept")
    sorts(rows[0], {"map.sum": torch.arange(6.0)}, [])
    written(folder, rows[:1])
    left = sorted(path.name for path in (folder / "figures").iterdir())
    assert left == ["captions.json", "maps.pdf", "maps.png", "mine.txt", "over_time.pdf",
                    "over_time.png"]  # fmt: skip
    assert not (folder / "sweep.png").exists() and not (folder / "captions.json").exists()


def test_the_page_says_what_made_the_maps_of_each_cell(folder):
    rows = [cell(folder, i, [f"a={i}"]) for i in range(2)]
    rows[1]["settings"]["uncertainty.instead_of"] = "refined, for few maps"
    page = written(folder, rows)
    table = next(row for row in page.rows if row[0] == "cell")
    assert table[:3] == ["cell", "a", "maps by"]
    said = [row[2] for row in page.rows if row[0] in "01"]
    assert said == ["", "ensemble, in place of refined, for few maps"]
