"""Figures against their pixels, the board against TensorBoard's own reader."""

import json
import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.report import board, figures
from bayesdiff.report.layout import standard_deviation
from bayesdiff.report.options import SCORES_FILE, ReportOptions
from bayesdiff.report.pictures import Pictures
from bayesdiff.report.style import DPI
from bayesdiff.storage.artefacts import read_arrays
from bayesdiff.sweeps.charts import sweep_figure
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.scores.of_maps_and_images import map_score

pytestmark = pytest.mark.usefixtures("without_pdf", "every_figure_drawn")

CLASSES = ["cat", "dog", "$5 bill and a very long name for a class $"]


class Fake(Samples):
    """Samples that a test may change."""

    __setattr__ = object.__setattr__


def fake(count=24, channels=1, height=8, width=8, steps=10, labelled=True, seed=0):
    """A generated set: random images, smooth positive variances that grow along the solver."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, height, width, generator=rng) * 2 - 1
    variance = torch.rand(count, channels, height, width, generator=rng) ** 2
    times = torch.linspace(0, 1, steps + 1)[1:]
    frames = slice(None, None, 3)
    growth = times[:, None, None, None, None] ** 4
    return Fake(
        images=images,
        variance=variance,
        labels=torch.arange(count) % len(CLASSES) if labelled else None,
        times=times,
        summed=times[:, None] ** 4 * variance.flatten(1).sum(1),
        frames=(growth * images[:6])[frames],
        frame_variance=(growth**2 * variance[:6])[frames],
        frame_times=times[frames],
        nfe=50,
        estimator="ensemble of 5",
        units="model",
        spatial=times[:, None] ** 8 * variance.flatten(1).var(1),
    )


def drawn(figure, folder):
    """Pixels of the saved figure, (H, W, 3) uint8."""
    pixels = imread(figures.save(figure, folder / "deep" / "figure.png"))
    return (pixels[..., :3] * 255).round().astype(np.uint8)


def extremes(samples, classes, **options):
    """The most and the least uncertain images by their summed variance."""
    return figures.extremes(samples, classes, map_score(samples, "sum"), **options)


def words(figure):
    """Everything written on the figure, line breaks of a caption taken out."""
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return " | ".join(" ".join(text.get_text().split()) for text in texts)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (1, 28, 20), (3, 32, 32)])
def test_sample_grid_shows_every_pixel(tmp_path, channels, height, width):
    samples = fake(5, channels, height, width)
    figure = figures.sample_grid(samples.images, None, [], columns=5)
    page = drawn(figure, tmp_path)
    expected = ((samples.images.double() + 1) / 2 * 255).permute(0, 2, 3, 1).numpy()
    for shown, truth in zip(figure.axes[0].images, expected, strict=True):
        left, right, bottom, top = (int(edge) for edge in shown.get_extent())
        cell = page[top:bottom, left:right].astype(float)
        scale = (bottom - top) // height
        assert (right - left) == scale * width
        blocks = cell.reshape(height, scale, width, scale, 3)
        # Nearest, no rounding of edges: all pixels of a block are equal, and equal to the image.
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert np.abs(blocks[:, 0, :, 0] - truth).max() <= 1
        # A grey line around them, which a white pixel at the border does not melt over.
        around = page[top - 1 : bottom + 1, left - 1 : right + 1]
        for edge in (around[0], around[-1], around[:, 0], around[:, -1]):
            assert np.abs(edge.astype(int) - 178).max() <= 1


def test_sample_grid_has_a_titled_row_per_class():
    samples = fake(12)
    labelled = figures.sample_grid(samples.images, samples.labels, CLASSES, 10, "NFE 50")
    titles = [text.get_text() for text in labelled.axes[0].texts]
    assert titles[:2] == ["cat", "dog"] and titles[2].endswith("…")
    rows = [shown.get_extent()[3] for shown in labelled.axes[0].images]
    assert [rows.count(row) for row in sorted(set(rows))] == [4, 4, 4]
    assert "12 of 12" in words(labelled) and "NFE 50" in words(labelled)
    assert "cat" not in words(figures.sample_grid(samples.images, None, CLASSES))
    one_class = figures.sample_grid(samples.images, torch.zeros(12, dtype=torch.int64), CLASSES)
    assert len(one_class.axes[0].images) == 12


def test_a_map_is_the_root_of_the_channel_mean():
    variance = torch.tensor([4.0, 16.0, 1.0])[:, None, None].expand(3, 2, 2)
    np.testing.assert_allclose(standard_deviation(variance), np.full((2, 2), 7**0.5))
    assert (standard_deviation(-variance) == 0).all()


def test_image_and_map_shares_one_scale(tmp_path):
    samples = fake()
    figure = figures.image_and_map(samples, CLASSES, count=4)
    maps = figure.axes[0].images[1::2]
    assert len(maps) == 4 and len({image.get_clim() for image in maps}) == 1
    np.testing.assert_allclose(maps[2].get_array(), standard_deviation(samples.variance[2]))
    assert maps[0].get_clim()[0] == 0
    for condition in ("ensemble of 5", "NFE 50", "N 24", "standard deviation"):
        assert condition in words(figure)
    drawn(figure, tmp_path)


def test_every_class_of_ten_has_its_first_image():
    names = [f"T-shirt/to{i}" for i in range(10)]
    axes = figures.image_and_map(fake(), names).axes[0]
    assert len(axes.images) == 20 and not any("…" in each.get_text() for each in axes.texts)
    assert len({image.get_extent()[3] for image in axes.images}) == 2
    assert len(figures.image_and_map(fake(), names[:3]).axes[0].images) == 16


@pytest.mark.parametrize("size", [1e-12, 4.3e-4, 1.0])
def test_the_colour_bar_is_inside_the_figure(size):
    samples = fake()
    samples.variance = size * samples.variance
    figure = extremes(samples, CLASSES, count=8)
    figure.draw_without_rendering()
    (bar,) = figure.axes[0].child_axes
    assert bar.get_tightbbox().x1 < figure.bbox.width
    assert bar.get_ylabel() == "standard deviation\n(images in [-1, 1])"


def test_the_units_of_a_map_are_said_and_the_picture_stays_the_same(tmp_path, monkeypatch):
    model, unit = fake(), fake()
    unit.units, unit.images, unit.variance = "unit", (unit.images + 1) / 2, unit.variance / 4
    shown = {}
    for samples in (model, unit):
        figure = figures.image_and_map(samples, CLASSES, count=2)
        shown[samples.units] = [image.get_array() for image in figure.axes[0].images]
        interval = {"model": "[-1, 1]", "unit": "[0, 1]"}[samples.units]
        for make in (figures.image_and_map, figures.over_time, extremes):
            assert f"image range {interval}" in words(make(samples, CLASSES))
    for (one, of_one), (other, of_other) in zip(*map(pairs, shown.values()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(of_one, 2 * of_other, rtol=1e-6)
    grids = [
        figures.sample_grid(s.images, None, [], 5, "", s.units).axes[0].images[3].get_array()
        for s in (model, unit)
    ]
    np.testing.assert_allclose(*grids, atol=1e-6)
    # Numbers stay comparable from run to run.
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    unit.summed, unit.spatial = unit.summed / 4, unit.spatial / 16
    curves = {}
    for samples in (model, unit):
        board.write(tmp_path / samples.units, samples, {}, {}, CLASSES)
        events = board_of(tmp_path / samples.units)
        for tag in events.Tags()["scalars"]:
            curves.setdefault(tag, []).append([event.value for event in events.Scalars(tag)])
    assert "over_t/spatial_variance" in curves and "uncertainty/summed_variance" in curves
    for pair in curves.values():
        np.testing.assert_allclose(*pair, rtol=1e-6)


def pairs(drawn_images):
    return list(zip(drawn_images[::2], drawn_images[1::2], strict=True))


def test_over_time_scales_each_column_and_writes_the_scale():
    samples = fake(steps=10)
    figure = figures.over_time(samples, CLASSES, count=2)
    shown = figure.axes[0].images
    assert len(shown) == 4 * 2 * 2
    tops = [image.get_clim()[1] for image in shown if image.get_array().ndim == 2][::2]
    assert tops == sorted(tops) and tops[-1] > 100 * tops[0]
    for top, time in zip(tops, samples.frame_times, strict=True):
        assert f"{top:.2g}" in words(figure) and f"t = {time:.3g}" in words(figure)


def test_summed_over_time_draws_the_mean_of_each_class():
    samples = fake()
    axes = figures.summed_over_time(samples, CLASSES).axes[0]
    truth = samples.summed[:, 1::3].double().mean(1)
    np.testing.assert_allclose(axes.lines[1].get_ydata(), truth)
    assert len(axes.collections) == 3 and axes.get_yscale() == "log"
    samples.summed = 1 + samples.summed / samples.summed.max()
    assert figures.summed_over_time(samples, CLASSES).axes[0].get_yscale() == "linear"


def test_score_histogram_counts_all_and_orders_the_classes():
    scores = torch.arange(1.0, 31.0)
    labels = (torch.arange(30) // 10).flip(0)
    figure = figures.score_histogram(scores, labels, CLASSES, "NFE 50")
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 30
    names = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert names[1:] == ["dog", "cat"] and "NFE 50" in words(figure)
    assert len(figures.score_histogram(scores, None, []).axes) == 1
    assert "1 not finite" in words(figures.score_histogram(scores.log().log(), None, []))


def test_classes_of_few_images_are_points_and_not_boxes_of_quantiles():
    figure = figures.score_histogram(torch.arange(1.0, 31.0), torch.arange(30) // 10, CLASSES)
    rows = figure.axes[1].lines
    assert [list(row.get_xdata()) for row in rows] == np.arange(1.0, 31.0).reshape(3, 10).tolist()
    middle = figure.axes[1].collections[0].get_segments()
    assert [line[0, 0] for line in middle] == [5.5, 15.5, 25.5]
    assert "Points" in words(figure) and "Boxes" not in words(figure)
    assert all(tick == round(tick) for tick in figure.axes[0].get_yticks())
    many = figures.score_histogram(torch.arange(60.0), torch.arange(60) // 20, CLASSES)
    assert len(many.axes[1].lines) == 18 and "Boxes" in words(many)


def test_extremes_pick_the_ends_of_the_ranking():
    samples = fake()
    figure = extremes(samples, CLASSES, count=3)
    ranking = samples.variance.flatten(1).sum(1).argsort()
    expected = [*ranking.flip(0)[:3].tolist(), *ranking[:3].tolist()]
    maps = [image.get_array() for image in figure.axes[0].images if image.get_array().ndim == 2]
    for shown, index in zip(maps, expected, strict=True):
        np.testing.assert_allclose(shown, standard_deviation(samples.variance[index]))
    best = figures.extremes(samples, CLASSES, torch.arange(24.0), 1)
    assert " 23.0 |" in words(best) and " 0.00 |" in words(best)


def test_sweep_figure_scales_and_gaps(tmp_path):
    rows = [
        {"prior": prior, "solver": solver, "fid@5k": 10 + prior / 100 + (solver == "heun")}
        for prior in (1, 10.0, 1000)
        for solver in ("euler", "heun")
    ]
    rows += [
        {"prior": 5, "solver": "euler"},
        {"prior": 5, "solver": "heun", "fid@5k": float("nan")},
    ]
    figure = sweep_figure(rows, ["prior", "solver"], ["fid@5k"])
    number, name = figure.axes
    assert number.get_xscale() == "log" and name.get_xscale() == "linear"
    assert [text.get_text() for text in name.get_xticklabels()] == ["euler", "heun"]
    np.testing.assert_allclose(number.lines[0].get_ydata(), [10.01, 10.1, 20.0])
    assert "6 of 8 cells" in words(figure)
    three = [{**row, "k": True, "fid@5k": "12.5"} for row in rows[:2]]
    drawn(sweep_figure(three, ["prior", "solver", "k"], ["fid@5k"]), tmp_path)
    drawn(sweep_figure(rows[-2:], ["prior"], ["fid@5k"]), tmp_path)


def test_negative_and_broken_variances_are_said_not_hidden(tmp_path):
    samples = fake()
    samples.variance[0] = -1.0
    samples.variance[1, 0, 0, 0] = float("nan")
    samples.summed[-1, 0] = -1.0
    for figure in (
        figures.image_and_map(samples, CLASSES),
        figures.over_time(samples, CLASSES),
        figures.summed_over_time(samples, CLASSES),
        extremes(samples, CLASSES),
    ):
        assert "4.2 % of all variances are negative" in words(figure)
        assert "1 images have variances that are not finite" in words(figure)
        drawn(figure, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 1, "steps": 1},
        {"count": 3, "channels": 3, "height": 24, "width": 16, "labelled": False},
        {"count": 30, "channels": 2, "height": 1, "width": 1},
    ],
)
def test_odd_sets_still_make_a_report(tmp_path, options):
    samples = fake(**options)
    samples.variance.zero_()
    samples.summed.zero_()
    samples.frame_variance.zero_()
    paths = board.write(tmp_path / "tensorboard", samples, {}, {}, [])
    assert len(paths) == 6 and all(path.stat().st_size for path in paths)


def test_more_classes_than_can_be_told_apart():
    samples = fake(60)
    samples.labels = torch.arange(60)
    assert len(figures.summed_over_time(samples, []).axes[0].lines) == 1
    assert len(figures.score_histogram(samples.summed[-1], samples.labels, []).axes) == 1
    assert len(figures.sample_grid(samples.images, samples.labels, []).axes[0].images) == 60


def test_texts_stay_on_the_page_and_apart():
    """Nothing written is cut off, and no two texts of a sheet lie over each other."""
    samples = fake()
    for figure in (figures.over_time(samples, CLASSES), extremes(samples, CLASSES)):
        figure.canvas.draw()
        page = figure.bbox
        texts = [t for t in (*figure.texts, *figure.axes[0].texts) if t.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= page.x1 and b.y1 <= page.y1 for b in boxes)
        for place, box in enumerate(boxes):
            overlaps = [texts[i].get_text() for i in range(place) if box.overlaps(boxes[i])]
            assert not overlaps, (texts[place].get_text(), overlaps)


def test_a_figure_does_not_depend_on_the_users_matplotlib(tmp_path):
    import matplotlib

    samples = fake()
    plain = drawn(figures.image_and_map(samples, CLASSES), tmp_path)
    with matplotlib.rc_context(
        {"savefig.bbox": "tight", "font.size": 20, "image.origin": "lower"}
    ):
        figure = figures.image_and_map(samples, CLASSES)
        assert (drawn(figure, tmp_path) == plain).all()
        assert matplotlib.rcParams["font.size"] == 20
    assert plain.shape[:2] == tuple(int(side * DPI) for side in figure.get_size_inches()[::-1])


METRICS = {"fid@5k/classifier": 12.5, "is@5k/classifier": 7.25, "broken": float("nan")}
HPARAMS = {"model": {"name": "flow", "ema": True}, "steps": 20, "seeds": [1, 2], "skip": None}


def board_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A board and what it was made of: samples, PNG files, folder."""
    samples, folder = fake(), tmp_path_factory.mktemp("run") / "tensorboard"
    options = ReportOptions(pdf=False)
    made = board.write(folder, samples, METRICS, HPARAMS, CLASSES, options=options)
    return samples, made, folder


def test_board_writes_what_tensorboard_reads(written):
    samples, paths, folder = written
    assert [path.parent for path in paths] == [folder.parent / "figures"] * 6
    events = board_of(folder)
    tags = events.Tags()
    kinds = ("summed_variance", "mean_variance", "spatial_variance", "increment")
    over_t = {f"over_t/{kind}" for kind in kinds}
    assert set(tags["scalars"]) == {*METRICS, *over_t, "uncertainty/summed_variance"}
    assert events.Scalars("fid@5k/classifier")[0].value == 12.5
    curve = [event.value for event in events.Scalars("uncertainty/summed_variance")]
    np.testing.assert_allclose(curve, samples.summed.mean(1), rtol=1e-6)
    assert tags["histograms"] == ["uncertainty/score"]
    assert {tag.split("/")[-1] for tag in tags["images"]} == {path.stem for path in paths}
    shown = events.Images("samples/samples")[0]
    assert (shown.height, shown.width) == imread(paths[0]).shape[:2]


def test_curves_over_t_are_comparable_between_solvers(written):
    """A step is a thousandth of t, whatever the number of solver steps."""
    samples, _, folder = written
    events = board_of(folder)
    summed = samples.summed.double().mean(1).numpy()
    truth = {
        "summed_variance": summed,
        "mean_variance": summed / 64,
        "spatial_variance": samples.spatial.double().mean(1).numpy(),
        "increment": np.diff(summed, prepend=0),
    }
    for name, values in truth.items():
        curve = events.Scalars(f"over_t/{name}")
        assert [event.step for event in curve] == list(range(100, 1001, 100))
        np.testing.assert_allclose([event.value for event in curve], values, rtol=1e-5)


def test_hparams_row_carries_the_real_metrics(written):
    folder = written[-1]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    events = board_of(folder)
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    # TensorBoard takes the columns of the first list it finds for all runs; without one it makes
    # a column of every scalar.
    assert metadata.EXPERIMENT_TAG not in content
    assert set(METRICS) <= set(events.Tags()["scalars"])
    row = {key: value.number_value or value.string_value for key, value in start.hparams.items()}
    flow = {"model.name": "flow", "model.ema": "true"}
    assert row == {**flow, "steps": 20, "seeds": "[1, 2]", "skip": "null"}
    assert metadata.SESSION_END_INFO_TAG in content


def test_a_second_report_replaces_the_first_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    training = tmp_path / "tensorboard" / "events.out.tfevents.1.host.2.0"
    training.parent.mkdir()
    training.write_bytes(b"")
    for value in (1.0, 2.0):
        board.write(training.parent, fake(3), {"fid@3": value}, {}, CLASSES)
    assert training.exists() and len(list(training.parent.iterdir())) == 2
    assert [event.value for event in board_of(training.parent).Scalars("fid@3")] == [2.0]


def test_scores_replace_the_summed_variance(tmp_path):
    scores = {"members.joint": torch.linspace(100, 200, 24)}
    shown = ReportOptions(chosen_by="members.joint", pdf=False)
    more = {"scores": scores, "options": shown}
    board.write(tmp_path / "tb", fake(), {}, {}, CLASSES, **more)
    histogram = board_of(tmp_path / "tb").Histograms("uncertainty/score")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (100, 200, 24)
    assert (tmp_path / "figures" / "extremes.png").exists()


def test_a_run_sorts_its_images_by_what_the_report_asks_for(copied, compose):
    asked = ("report.sorted_by=[map.sum,likelihood.bits_per_dim]", "report.likelihood_steps=2")
    more = ("report.chosen_by=map.patch_max", "report.map_scale=own")
    result = pipeline.run(compose(*asked, *more))
    scores = read_arrays(result.folder / SCORES_FILE)
    assert set(scores) == {"map.sum", "map.patch_max", "likelihood.bits_per_dim"}
    captions = json.loads((result.folder / "figures" / "captions.json").read_text())
    assert "map.patch_max" in captions["extremes"]["caption"]
    assert "scale of its own" in captions["image_and_map"]["caption"]
    assert {"sorted", "extremes", "samples"} <= set(captions)
    assert not list((result.folder / "figures").glob("*.pdf"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("report.sorted_by=[map.total]", "unknown score report.sorted_by=map.total; choose from"),
        ("report.chosen_by=nll", "unknown score report.chosen_by=nll"),
        ("+report.colour=red", "unknown option report.colour"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_before_any_work(
    override, said, compose, monkeypatch
):
    monkeypatch.setattr(pipeline, "fit", None)
    with pytest.raises(UserError, match=re.escape(said)):
        pipeline.run(compose(override))
