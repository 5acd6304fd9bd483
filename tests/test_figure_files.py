"""The style, the files a figure becomes, and sheets of sorted images."""

import json
import re
import zlib

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from test_report import CLASSES, extremes, fake, words

from bayesdiff.checks import UserError
from bayesdiff.report import figures
from bayesdiff.report.charts import label_ends, log_ticks, three_digits
from bayesdiff.report.options import ReportOptions
from bayesdiff.report.series import plain_number
from bayesdiff.report.sorted_sheet import Block, sorted_images
from bayesdiff.report.style import COLOURS, look, save, style

SETTINGS = {
    "data": "digits", "model": "flow", "prediction": "velocity", "solver.name": "heun",
    "solver.num_steps": 20, "seed": 3, "structure": "full", "sigma_noise": 0.12345,
    "prior_precision": 1e4, "n_eff": 60000, "solver.options.final": "zero",
}  # fmt: skip


def test_a_figure_is_a_png_with_and_a_pdf_without_its_caption(tmp_path):
    figure = figures.image_and_map(fake(), CLASSES, count=3, settings=SETTINGS)
    path = save(figure, tmp_path / "maps.png")
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert captions["maps"]["title"] == "Samples and their uncertainty maps"
    caption = captions["maps"]["caption"]
    for word in ("digits", "flow (velocity)", "heun (final zero), 20 steps", "seed 3",
                 "posterior full", "N_eff 60,000", "sigma_noise 0.1235", "prior_precision 1e+04",
                 "ensemble of 5", "NFE 50", "N 24"):  # fmt: skip
        assert word in caption, word
    assert path.read_bytes()[:4] == b"\x89PNG"
    pdf = (tmp_path / "maps.pdf").read_bytes()
    # Letters are letters, and each of the six images has its own 8 x 8 pixels.
    assert b"/FontFile2" in pdf and pdf.count(b"/Subtype /Image") >= 6
    sizes = re.findall(rb"/Width (\d+)", pdf)
    assert set(sizes[:6]) == {b"8"} or sizes.count(b"8") >= 6
    streams = b"".join(_streams(pdf))
    assert b"BT" in streams and len(streams) > 0
    before = pdf
    save(figure, path)
    assert (tmp_path / "maps.pdf").read_bytes() == before  # the same figure, the same bytes
    save(figures.sample_grid(fake(3).images, None, []), tmp_path / "grid.png", pdf=False)
    assert json.loads((tmp_path / "captions.json").read_text()).keys() == {"maps", "grid"}
    save(figure, path, pdf=False)
    assert not (tmp_path / "maps.pdf").exists()


def _streams(pdf):
    for part in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            yield zlib.decompress(part)
        except zlib.error:
            continue


def test_no_title_is_burned_in_and_every_caption_has_the_conditions():
    samples = fake()
    for make in (figures.image_and_map, extremes, figures.over_time):
        figure = make(samples, CLASSES, settings=SETTINGS)
        assert figure.get_label() and figure.get_label() not in words(figure)
        assert "sigma_noise 0.1235" in words(figure) and "digits" in words(figure)
    curve = figures.summed_over_time(samples, CLASSES, SETTINGS)
    assert "prior_precision 1e+04" in words(curve)


def test_curves_are_told_apart_without_colour():
    looks = [look(place) for place in range(16)]
    assert len({(one["marker"], str(one["linestyle"])) for one in looks}) == 16
    # Luminance of neighbours differs, so that a grey print keeps them apart as well.
    with style():
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLOURS)
    assert len({tuple(to_rgb(colour)) for colour in COLOURS}) == len(COLOURS)


def test_extremes_share_one_scale_unless_asked_otherwise():
    samples = fake()
    samples.variance *= torch.linspace(0.01, 1, 24)[:, None, None, None]

    def limits(**options):
        drawn = extremes(samples, CLASSES, count=3, **options).axes[0].images
        return [image.get_clim() for image in drawn if image.get_array().ndim == 2]

    shared = limits()
    assert len(shared) == 6 and len(set(shared)) == 1
    own = limits(own_scale=True)
    assert len(set(own)) == 6 and min(own)[1] < 0.3 * max(own)[1]
    text = words(extremes(samples, CLASSES, count=3, name="members.joint"))
    assert "highest members.joint of 24 images" in text and "lowest members.joint" in text


def test_many_classes_have_three_in_colour_and_all_of_them_a_name():
    samples = fake(60)
    samples.labels = torch.arange(60) % 12
    samples.summed = samples.times[:, None] * (1.0 + samples.labels)[None]
    axes = figures.summed_over_time(samples, []).axes[0]
    marked = [line for line in axes.lines if line.get_marker() != "None"]
    assert len(axes.lines) == 12 and len(marked) == 3 and len(axes.collections) == 3
    assert {line.get_label() for line in marked} == {"0", "5", "11"}
    assert len({str(line.get_linestyle()) + line.get_marker() for line in marked}) == 3
    names = [text for text in axes.texts if text.get_text()]
    assert sorted(int(text.get_text()) for text in names) == list(range(12))
    heights = sorted(text.xyann[1] for text in names)
    assert min(np.diff(heights)) >= 0.05 - 1e-9 and heights[-1] <= 1 + 1e-9


def test_names_stay_where_there_is_room():
    axes = Figure().subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(axes, [(1, 0.2, "a", "k"), (1, 0.8, "b", "k"), (1, float("nan"), "c", "k")])
    assert [text.xyann[1] for text in axes.texts] == pytest.approx([0, 0.2, 0.8], abs=1e-9)


def test_numbers_are_short_and_keep_their_digits():
    assert [plain_number(x) for x in (0.02, 500.0, 1e12, 2e-9)] == ["0.02", "500", "1e12", "2e-9"]
    assert [three_digits(x) for x in (0.023, 5.0, 123.4)] == ["0.0230", "5.00", "123"]


@pytest.mark.parametrize("ends", [(0.021, 0.048), (0.9, 1.1), (0.02, 0.5), (1e-9, 1e9)])
def test_a_logarithmic_axis_has_a_few_numbers_wherever_it_lies(ends):
    figure = Figure()
    axes = figure.subplots()
    axes.set(xscale="log", xlim=ends)
    log_ticks(axes.xaxis, np.array(ends))
    figure.canvas.draw()
    inside = [t for t in axes.xaxis.get_majorticklocs() if ends[0] <= t <= ends[1]]
    assert 2 <= len(inside) <= 8


def test_sorted_sheets_show_all_images_in_order():
    images = torch.linspace(-1, 1, 12)[:, None, None, None].expand(12, 1, 4, 4)
    scores = torch.arange(12.0)
    scores[3] = torch.nan
    figure = sorted_images([Block("up", images, scores), Block("down", images, -scores)], "here")
    levels = [float(np.mean(image.get_array())) for image in figure.axes[0].images]
    assert len(levels) == 24 and "here" in words(figure)
    up, down = levels[:12], levels[12:]
    assert up[:11] == sorted(up[:11], reverse=True) and down[:11] == sorted(down[:11])
    assert up[11] == down[11] == pytest.approx(float((images[3, 0, 0, 0] + 1) / 2))  # NaN is last
    assert "up" in words(figure) and "11.0" in words(figure) and "-0.00" in words(figure)
    few = Block("many", images[:1].expand(900, 1, 4, 4), torch.arange(900.0)).order(10)
    assert few[0] == 899 and few[-1] == 0 and len(few) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"map_scale": "each"}, "unknown report.map_scale 'each'; choose shared or own"),
        ({"sorted_by": "map.sum"}, "report.sorted_by must be a list"),
        ({"sorted_by": ["map.sum", "map.sum"]}, "names one twice"),
        ({"pdf": "yes"}, "report.pdf must be true or false"),
        ({"members": 1}, "report.members must be a whole number >= 2"),
        ({"chosen_by": None}, "report.chosen_by must name a score"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        ReportOptions(**options)
