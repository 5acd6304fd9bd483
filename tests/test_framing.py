"""Centre crop and resize against cuts by hand and Pillow's own filter; CelebA's layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from bayesdiff.checks import UserError
from bayesdiff.data import sources
from bayesdiff.data.framing import Framing

CONFIGS = Path(__file__).parents[1] / "configs"
RANDOM = np.random.RandomState(0)


def save(path: Path, *shape: int, kind: str = "png") -> np.ndarray:
    values = RANDOM.randint(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, kind)
    return values


def both(data) -> list[np.ndarray]:
    return [x.permute(1, 2, 0).numpy() for x in torch.cat([data.images, data.test_images])]


def test_crop_is_the_middle_and_resize_is_lanczos(tmp_path):
    images = [save(tmp_path / "a.png", 9, 14, 3), save(tmp_path / "b.png", 12, 10, 3)]
    cuts = [images[0][:, 2:11], images[1][1:11]]  # 9x9 and 10x10, an odd pixel right or below
    shrunk = [np.array(Image.fromarray(c.copy()).resize((4, 4), Image.LANCZOS)) for c in cuts]
    data = sources.folder("f", tmp_path, crop="square", resize=4)
    for truth, got in zip(sorted(shrunk, key=np.sum), sorted(both(data), key=np.sum), strict=True):
        assert np.array_equal(truth, got)
    cut = sources.folder("f", tmp_path, crop=OmegaConf.create([6, 6]))
    truths = [images[0][1:7, 4:10], images[1][3:9, 2:8]]
    for truth, got in zip(sorted(truths, key=np.sum), sorted(both(cut), key=np.sum), strict=True):
        assert np.array_equal(truth, got)


def test_a_part_that_is_no_square(tmp_path):
    images = [save(tmp_path / "a.png", 9, 14, 3), save(tmp_path / "b.png", 12, 10, 3)]
    cuts = [images[0][1:7, 3:11], images[1][3:9, 1:9]]  # 6 rows, 8 columns
    data = sources.folder("f", tmp_path, crop=OmegaConf.create([6, 8]))
    assert data.image_size == (6, 8)
    for truth, got in zip(sorted(cuts, key=np.sum), sorted(both(data), key=np.sum), strict=True):
        assert np.array_equal(truth, got)
    small = sources.folder("f", tmp_path, crop=[6, 8], resize=[3, 4])
    shrunk = [np.array(Image.fromarray(c.copy()).resize((4, 3), Image.LANCZOS)) for c in cuts]
    for truth, got in zip(
        sorted(shrunk, key=np.sum), sorted(both(small), key=np.sum), strict=True
    ):
        assert np.array_equal(truth, got)


def lanczos(values: np.ndarray, size: int) -> np.ndarray:
    """Rows brought to another number: sinc(x) sinc(x / 3), as wide as the shrinking asks."""
    scale = len(values) / size
    places = (np.arange(size) + 0.5) * scale
    x = (np.arange(len(values)) + 0.5 - places[:, None]) / max(scale, 1)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True) @ values


@pytest.mark.parametrize(("side", "size"), [(23, 7), (9, 4), (8, 32), (5, 12)])
def test_resize_is_lanczos_by_hand(side, size):
    # No overshoot is cut off.
    values = np.random.RandomState(side).randint(90, 166, (side, side)).astype(np.uint8)
    got = np.array(Framing.of(resize=size).apply(Image.fromarray(values), "a"))
    exact = lanczos(lanczos(values.astype(np.float64), size).T, size).T
    assert np.abs(got - exact).max() < 1.5  # Pillow rounds after rows and after columns
    assert np.abs(got - exact).mean() < 0.4
    other = np.array(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))
    assert np.abs(other - exact).max() > 1.5


def test_shrinking_is_antialiased():
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255  # every other column: without antialiasing all black or all white
    got = np.array(Framing.of(resize=8).apply(Image.fromarray(lines), "a"))
    assert abs(got.astype(int) - 127).max() <= 12


def test_the_same_of_every_source(tmp_path):
    images = torch.from_numpy(RANDOM.randint(0, 256, (3, 3, 8, 8)).astype(np.uint8))
    framed = Framing.of(6, 3).of_tensor(images, "n")
    for one, array in zip(framed, images.permute(0, 2, 3, 1).numpy(), strict=True):
        cut = Image.fromarray(array[1:7, 1:7].copy()).resize((3, 3), Image.LANCZOS)
        assert np.array_equal(one.permute(1, 2, 0), np.array(cut))
    assert sources.digits(crop=6, resize=12).images.shape[1:] == (1, 12, 12)


def test_crop_and_resize_are_part_of_the_fingerprint(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 8, 8)
    options = [{}, {"crop": 6}, {"crop": 6, "resize": 4}, {"resize": 4}]
    prints = [sources.folder("f", tmp_path, **o).fingerprint for o in options]
    assert len(set(prints)) == 4
    assert sources.folder("f", tmp_path, crop="square").fingerprint == prints[0]


REFUSED = {
    "one side": ({"crop": [4]}, "data.crop=[4] is not [height,width]"),
    "too tall": ({"crop": [9, 9]}, "smaller than data.crop=9"),
    "too wide": ({"crop": [4, 11]}, "smaller than data.crop=[4,11]"),
    "another shape": ({"crop": [4, 6], "resize": [4, 8]}, "data.resize=[4,8] would distort"),
    "unknown": ({"crop": "centre"}, "data.crop=centre is unknown; give the side"),
    "nothing": ({"crop": 0}, "data.crop must be a whole number >= 1, got 0"),
    "half": ({"crop": "square", "resize": 2.5}, "data.resize must be a whole number >= 1"),
    "too large": ({"crop": 9}, "a.png is 10x8 (width x height), smaller than data.crop=9; use"),
    "distorting": ({"resize": 4}, "which data.resize=4 would distort; add data.crop=square"),
    "mixed": ({}, "data.resize=64 data.crop=square"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_cure(case, tmp_path):
    save(tmp_path / "a.png", 8, 10)
    save(tmp_path / "b.png", 10, 8)
    options, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        sources.folder("f", tmp_path, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


# CelebA ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def celeba(tmp_path_factory) -> Path:
    """Eight faces as they are downloaded: 4 for training, 2 for validation, 2 for testing."""
    root = tmp_path_factory.mktemp("faces")
    names = [f"{i:06d}.jpg" for i in range(1, 9)]
    for name in names:
        save(root / "celeba" / "img_align_celeba" / name, 218, 178, 3, kind="jpeg")
    parts = "".join(f"{n} {p}\n" for n, p in zip(names, (0, 0, 0, 0, 1, 1, 2, 2), strict=True))
    (root / "celeba" / "list_eval_partition.txt").write_text(parts)
    rows = [f"{n}  {'1' if i % 2 else '-1'} {'1' if i > 5 else '-1'}" for i, n in enumerate(names)]
    table = "\n".join(["8", "Smiling Young ", *rows, ""])
    (root / "celeba" / "list_attr_celeba.txt").write_text(table)
    return root


def recipe(root: Path, **source):
    cfg = OmegaConf.load(CONFIGS / "data" / "celeba.yaml")
    cfg.data.root = str(root)
    options = OmegaConf.to_container(cfg.data.source, resolve=True) | source
    assert options.pop("_target_") == "bayesdiff.data.sources.celeba"
    return sources.celeba(**options)


def middle(path: Path) -> np.ndarray:
    cut = np.array(Image.open(path))[39:179, 19:159]  # 140 of 218 rows and 178 columns
    return np.array(Image.fromarray(cut).resize((64, 64), Image.LANCZOS))


def test_celeba_has_its_official_split_and_no_labels(celeba):
    data = recipe(celeba)
    assert (len(data.images), len(data.test_images), data.labels) == (4, 2, None)
    folder = celeba / "celeba" / "img_align_celeba"
    assert np.array_equal(data.images[0].permute(1, 2, 0), middle(folder / "000001.jpg"))
    assert np.array_equal(data.test_images[1].permute(1, 2, 0), middle(folder / "000008.jpg"))
    assert recipe(celeba / "celeba").fingerprint == data.fingerprint


def test_an_attribute_is_a_label(celeba):
    data = recipe(celeba, attribute="Smiling")
    assert data.classes == ("not Smiling", "Smiling")
    assert (data.labels.tolist(), data.test_labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    with pytest.raises(UserError, match=r"no attribute Smile; choose from Smiling, Young"):
        recipe(celeba, attribute="Smile")
    with pytest.raises(UserError, match=r"no training image of 1 of 2 classes \(Young\)"):
        recipe(celeba, attribute="Young")


def test_celeba_as_kaggle_packs_it(tmp_path):
    names = [f"{i:06d}.jpg" for i in range(1, 5)]
    for name in names:
        save(tmp_path / "img_align_celeba" / "img_align_celeba" / name, 218, 178, 3, kind="jpeg")
    with pytest.raises(UserError, match="needs list_attr_celeba.txt"):
        recipe(tmp_path, attribute="Young")
    assert len(recipe(tmp_path, test_fraction=0.5).test_images) == 2  # at random without a list
    lines = ["image_id,Smiling,Young", *(f"{n},-1,{2 * (i % 2) - 1}" for i, n in enumerate(names))]
    (tmp_path / "list_attr_celeba.csv").write_text("\n".join(lines))
    parts = ["image_id,partition", *(f"{n},{2 * (i > 1)}" for i, n in enumerate(names))]
    (tmp_path / "list_eval_partition.csv").write_text("\n".join(parts))
    data = recipe(tmp_path, attribute="Young")
    assert (data.labels.tolist(), data.test_labels.tolist()) == ([0, 1], [0, 1])
    save(tmp_path / "img_align_celeba" / "img_align_celeba" / "9.jpg", 218, 178, 3, kind="jpeg")
    with pytest.raises(UserError, match=r"has no line with 0, 1 or 2 for 9\.jpg"):
        recipe(tmp_path)
    with pytest.raises(UserError, match="holds no img_align_celeba/; download"):
        recipe(tmp_path / "nowhere")
