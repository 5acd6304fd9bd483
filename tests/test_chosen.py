"""Chosen samples, their files, and their statistics over time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import curved, model_of, start_of
from PIL import Image

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_uint8
from bayesdiff.report import export
from bayesdiff.report.pictures import Pictures
from bayesdiff.runs import stages
from bayesdiff.solvers import Euler
from bayesdiff.uncertainty import Ensemble
from bayesdiff.uncertainty.chosen import _class, sample_numbers


def run_of(count=10, classes=tuple("abcdefghij")):
    data = SimpleNamespace(classes=classes)
    return SimpleNamespace(
        model=SimpleNamespace(num_classes=count), data=SimpleNamespace(data=data)
    )


def test_classes_are_the_samples_of_lowest_number_that_have_them():
    found = sample_numbers(Ensemble(labels=[5, "d"], num_images=5), run_of())
    assert found == [5, 3, 15, 13, 25]
    assert [number % 10 for number in found] == [5, 3, 5, 3, 5]
    assert sample_numbers(Ensemble(numbers=[905, 0]), run_of()) == [905, 0]
    assert Ensemble(numbers=[905, 0]).map_count == 2 and Ensemble(num_images=7).map_count == 7
    assert sample_numbers(Ensemble(), run_of()) is None


BAD = [
    ({"labels": []}, ["uncertainty.labels", "list"]),
    ({"labels": 3}, ["uncertainty.labels", "list", "3"]),
    ({"labels": [3, 3]}, ["twice"]),
    ({"labels": [3, "d"]}, ["uncertainty.labels=[3, 'd']", "twice"]),
    ({"labels": [10]}, ["uncertainty.labels 10", "0 to 9"]),
    ({"labels": [-1]}, ["uncertainty.labels -1"]),
    ({"labels": ["z"]}, ["'z'", "a, b"]),
    ({"labels": [True]}, ["True"]),
    ({"numbers": [0, 0]}, ["uncertainty.numbers", "twice"]),
    ({"numbers": [-1]}, ["uncertainty.numbers", "-1"]),
    ({"numbers": [2**32]}, ["uncertainty.numbers", str(2**32)]),
    ({"numbers": [1.5]}, ["uncertainty.numbers", "1.5"]),
    ({"numbers": [1], "labels": [1]}, ["uncertainty.numbers=[1]", "uncertainty.labels=[1]"]),
    ({"numbers": [1], "validate": True}, ["validate_images=16", "1 maps"]),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_no_sample_has_is_refused_in_one_line(options, words):
    with pytest.raises(UserError) as caught:
        sample_numbers(Ensemble(**options), run_of())
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


BAD_RUNS = [
    (
        ("model.num_classes=null", "uncertainty.labels=[3]"),
        ["uncertainty.labels=[3]", "no classes"],
    ),
    (("uncertainty.export=jpg",), ["uncertainty.export 'jpg'", "png"]),
    (("metrics.export=true",), ["metrics.export True", "png"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_RUNS)
def test_a_run_that_cannot_have_them_is_refused_before_any_work(overrides, words, compose):
    with pytest.raises(UserError) as caught:
        pipeline.prepare(compose(*overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def arrays_of(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_same_number_is_the_same_image_with_the_same_map(
    copied: Trained, compose: Compose, monkeypatch
):
    """Numbers 0 to 3 are there; 3 and 1 are asked for, alone, by number and by class."""
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    whole = arrays_of(copied.samples)
    assert whole["numbers"].tolist() == [0, 1, 2, 3]
    by_number = pipeline.run(compose("uncertainty.numbers=[3,1]", "uncertainty.batch_size=1"))
    by_class = pipeline.run(compose("uncertainty.labels=[3,1]", "uncertainty.num_images=2"))
    for result in (by_number, by_class):
        assert result.samples != copied.samples
        few = arrays_of(result.samples)
        assert few["numbers"].tolist() == [3, 1] == few["labels"].tolist()
        for name in ("images", "variance"):
            np.testing.assert_allclose(few[name], whole[name][[3, 1]], rtol=2e-4, atol=1e-6)
    # Images behind scores, and scores, are those of the whole run.
    assert len(list(copied.folder.glob("images-*.npz"))) == 1
    assert len(list(copied.folder.glob("scores-*.json"))) == 1
    # The reference that maps are compared with follows the same samples.
    seen = []
    real = stages.validate

    def watched(maps, starts, *rest):
        seen.append(starts([0, 1]).noise.indices)
        return real(maps, starts, *rest)

    monkeypatch.setattr(stages, "validate", watched)
    more = ["uncertainty.validate_images=3", "uncertainty.validate_members=2"]
    pipeline.run(compose("uncertainty.numbers=[3,1,12]", "uncertainty.validate=true", *more))
    assert seen == [[3, 1]]


def test_images_and_maps_are_files_of_their_own(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    asked = compose("uncertainty.export=png", "metrics.export=png")
    result = pipeline.run(asked)
    assert result.samples == copied.samples and result.folder == copied.cell
    folder, stored = copied.cell / "png", arrays_of(copied.samples)
    sums = stored["variance"].sum((1, 2, 3))
    names = {f"{i:05d}-{i}-{sums[i]:.4g}.png" for i in range(4)}
    assert {path.name for path in folder.iterdir()} == {
        *names,
        *(f"{i:05d}-map.png" for i in range(4)),
        "scale.json",
    }
    for i, name in enumerate(sorted(names)):
        with Image.open(folder / name) as image:
            wanted = to_uint8(torch.from_numpy(stored["images"][i, 0])).numpy()
            assert image.mode == "L" and (np.asarray(image) == wanted).all()
    scale = json.loads((folder / "scale.json").read_text())
    sd = np.sqrt(stored["variance"][:, 0].clip(0))
    assert scale["highest"] == pytest.approx(float(sd.max()), rel=1e-6)
    from matplotlib import colormaps

    for i in range(4):
        with Image.open(folder / f"{i:05d}-map.png") as image:
            wanted = colormaps[scale["colours"]](sd[i] / scale["highest"], bytes=True)[..., :3]
            assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 3
    (images,) = copied.folder.glob("images-*.npz")
    files = sorted(images.with_suffix("").iterdir())
    assert [path.name for path in files][:2] == ["00000-0.png", "00001-1.png"] and len(files) == 12
    with Image.open(files[11]) as image:
        assert (np.asarray(image) == arrays_of(images)["images"][11, 0]).all()
    before = {path: path.stat().st_mtime_ns for path in [*folder.iterdir(), *files]}
    pipeline.run(asked)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_folder_of_files_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    real, count = export._write, iter(range(9))

    def fails(path, pixels):
        if next(count) == 2:
            raise KeyboardInterrupt
        real(path, pixels)

    labels = torch.tensor([0, 1, 0])
    monkeypatch.setattr(export, "_write", fails)
    with pytest.raises(KeyboardInterrupt):
        export.export_images(tmp_path / "png", images, ["T-shirt/top", "a b:c"], labels)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    export.export_images(tmp_path / "png", images, ["T-shirt/top", "a b:c"], labels)
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["00000-T-shirt-top.png", "00001-a-b-c.png", "00002-T-shirt-top.png"]
    assert [export.class_file_name(name) for name in ("..", "é/ü", "x" * 99)] == [
        "class",
        "é-ü",
        "x" * 40,
    ]


def test_statistics_over_time_are_those_of_the_maps_at_every_step():
    """Every step asked for as a time, so that its map is kept too."""
    net, posterior, _ = curved()
    times = [0.25, 0.5, 0.75]
    start = start_of(model_of(net), Euler(4), count=3, shape=(1, 3, 3))
    samples = Ensemble(members=5, times=times)(start, posterior)
    maps = [*samples.state_variance, samples.variance]
    found = samples.over_time
    before = torch.zeros(3, dtype=torch.float64)
    for step, variance in enumerate(maps):
        for i in range(3):
            values = variance[i].flatten().tolist()
            average = sum(values) / 9
            assert float(found["summed"][step, i]) == pytest.approx(sum(values))
            assert float(found["mean"][step, i]) == pytest.approx(average)
            spread = sum((value - average) ** 2 for value in values) / 9
            assert float(found["spatial"][step, i]) == pytest.approx(spread)
            grown = sum(values) - float(before[i])
            assert float(found["increment"][step, i]) == pytest.approx(grown)
        before = variance.flatten(1).sum(1)
    # In the units of [0, 1] a variance is a quarter, and the variance of variances its square.
    unit = samples.in_unit_range().over_time
    for name, factor in {"mean": 4, "increment": 4, "spatial": 16}.items():
        torch.testing.assert_close(factor * unit[name], found[name])
    joined = type(samples).join([samples, samples])
    assert joined.over_time["spatial"].shape == (4, 6)


def test_a_number_that_is_also_the_name_of_another_class_is_not_guessed():
    names = ("1", "10", "2")
    with pytest.raises(UserError, match="1 is the number of class '10', and the name of class"):
        _class(1, names, 3)
    assert [_class(label, names, 3) for label in ("1", "10", 0)] == [0, 1, 0]
    assert [_class(label, ("0", "1"), 2) for label in (1, "1")] == [1, 1]
    # 5 is the number of none of two classes.
    assert [_class(label, ("5", "7"), 2) for label in (5, 7, "7", 1)] == [0, 1, 1, 1]
