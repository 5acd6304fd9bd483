"""Data sources against hand-written files: pixels, order, labels, splits; no network."""

import inspect
import json
import logging
import os
import pickle
import socket
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image
from torchvision import datasets

from bayesdiff.checks import UserError
from bayesdiff.data import sources, toys

CONFIGS = Path(__file__).parents[1] / "configs" / "data"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    tried = []

    def connect(_socket, address):
        tried.append(address)
        raise OSError("the tests have no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: connect(None, a))
    yield
    assert tried == []


def pixels(seed, shape=(6, 6)):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def png(array):
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(array))


def write_zip(path, images, meta=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in images.items():
            archive.writestr(name, png(array))
        if meta is not None:
            archive.writestr("dataset.json", json.dumps(meta))
    return path


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def write_mnist(raw, train=20, test=10):
    for prefix, n, seed in (("train", train, 0), ("t10k", test, 1)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels(seed, (n, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))


def test_digits_are_scaled_exactly_and_split_by_class():
    from sklearn.datasets import load_digits

    data = sources.digits()
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 8)
    assert len(data.test_images) == 300
    assert data.images.dtype == torch.uint8
    assert torch.bincount(data.test_labels).float().sub(30).abs().max() <= 1
    truth = load_digits()
    expected = sorted(
        (int(y), bytes(round(v * 255 / 16) for v in x.flatten()))
        for x, y in zip(truth.images.astype(int), truth.target, strict=True)
    )
    images = torch.cat([data.images, data.test_images])
    labels = torch.cat([data.labels, data.test_labels])
    got = sorted((int(y), x.numpy().tobytes()) for x, y in zip(images, labels, strict=True))
    assert got == expected
    assert sources.digits().fingerprint == data.fingerprint


# torchvision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_family_reads_raw_files(tmp_path, dataset):
    write_mnist(tmp_path / dataset / "raw")
    data = sources.torchvision_images("m", str(tmp_path), dataset)
    assert torch.equal(data.images, torch.from_numpy(pixels(0, (20, 1, 28, 28))))
    assert torch.equal(data.test_images, torch.from_numpy(pixels(1, (10, 1, 28, 28))))
    assert data.labels.tolist() == [*range(10), *range(10)]
    assert data.classes == tuple(getattr(datasets, dataset).classes)


def test_missing_files_are_downloaded_once_and_said_so(tmp_path, monkeypatch, caplog):
    fetched = []

    def fetch(url, download_root, filename, md5):
        fetched.append(filename)
        write_mnist(Path(download_root))

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", fetch)
    with caplog.at_level(logging.INFO):
        data = sources.torchvision_images("m", tmp_path, "MNIST")
    assert len(data.images) == 20
    assert len(fetched) == 4
    assert str(tmp_path / "MNIST" / "raw") in caplog.text
    sources.torchvision_images("m", tmp_path, "MNIST")
    assert len(fetched) == 4


def test_cifar_is_channels_first(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    truth = {"data_batch_1": pixels(0, (12, 3072)), "test_batch": pixels(1, (11, 3072))}
    for name, x in truth.items():
        labels = [i % 10 for i in range(len(x))]
        (base / name).write_bytes(pickle.dumps({"data": x, "labels": labels}))
    names = [f"class {i}" for i in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    # The real lists carry MD5 sums, which is what makes torchvision's pickles safe to read.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    data = sources.torchvision_images("c", tmp_path, "CIFAR10")
    assert torch.equal(data.images, torch.from_numpy(truth["data_batch_1"]).view(12, 3, 32, 32))
    assert data.images.is_contiguous()
    assert data.test_labels.tolist() == [*range(10), 0]
    assert data.classes == tuple(names)


# folder ------------------------------------------------------------------------------------


def test_flat_grey_folder_has_no_labels(tmp_path):
    for i in range(10):
        write_png(tmp_path / f"{i}.png", pixels(i))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    data = sources.folder("f", tmp_path, test_fraction=0.2)
    assert (data.num_classes, data.labels, data.channels, data.image_size) == (0, None, 1, 6)
    assert (len(data.images), len(data.test_images)) == (8, 2)
    truth = {pixels(i).tobytes() for i in range(10)}
    together = torch.cat([data.images, data.test_images])
    assert {x.numpy().tobytes() for x in together} == truth


def test_class_folders_in_sorted_order(tmp_path):
    for i in range(10):
        write_png(tmp_path / ["dog", "cat"][i % 2] / f"{i}.png", pixels(i, (6, 6, 3)))
    data = sources.folder("f", tmp_path, test_fraction=0.2)
    assert data.classes == ("cat", "dog")
    assert data.test_labels.tolist() == [0, 1]
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        for x, y in zip(images, labels, strict=True):
            matches = [
                i for i in range(10) if np.array_equal(pixels(i, (6, 6, 3)), x.permute(1, 2, 0))
            ]
            assert len(matches) == 1
            assert int(y) == [1, 0][matches[0] % 2]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_beside_test_is_used_as_is(tmp_path, held_out):
    for part, n in (("train", 6), (held_out, 2)):
        for i in range(n):
            write_png(tmp_path / part / "ab"[i % 2] / f"{i}.png", pixels(i + 10 * n))
    # The test set lacks nothing but may lack a class.
    (tmp_path / held_out / "b" / "1.png").unlink()
    data = sources.folder("f", tmp_path)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0]
    assert torch.equal(data.test_images[0, 0], torch.from_numpy(pixels(20)))


def test_lone_train_folder_is_not_a_class_and_one_among_others_is_refused(tmp_path):
    for i in range(4):
        write_png(tmp_path / "one" / "train" / "ab"[i % 2] / f"{i}.png", pixels(i))
        write_png(tmp_path / "two" / ["train", "bus"][i % 2] / f"{i}.png", pixels(i))
    assert sources.folder("f", tmp_path / "one").classes == ("a", "b")
    with pytest.raises(UserError, match=r"two has train/ beside bus/: a split or a class\?"):
        sources.folder("f", tmp_path / "two")


@pytest.mark.parametrize(
    ("names", "test"),
    [
        (["Train", "Test"], "Test"),
        (["training", "Validation", "TESTING"], "TESTING"),
        (["TRAIN", "valid"], "valid"),
        (["train", "dev"], "dev"),
        (["Training", "eval", "val"], "val"),
        (["train2017", "val2017"], "val2017"),
        (["images_train", "test1", "val-set"], "test1"),
    ],
)
def test_splits_under_their_usual_names_are_no_classes(tmp_path, names, test, caplog):
    for number, name in enumerate(names):
        for i in range(2):
            write_png(tmp_path / name / "ab"[i] / f"{i}.png", pixels(number))
    data = sources.folder("f", tmp_path)
    assert data.classes == ("a", "b")
    assert torch.equal(data.images[0, 0], torch.from_numpy(pixels(0)))
    assert torch.equal(data.test_images[0, 0], torch.from_numpy(pixels(names.index(test))))
    others = set(names[1:]) - {test}
    assert all(f"left out: {name}/" in caplog.text for name in others)
    assert bool(others) == ("left out" in caplog.text)


def test_what_is_left_out_is_said_in_one_line(tmp_path, caplog):
    for i in range(4):
        write_png(tmp_path / "ab"[i % 2] / f"{i}.png", pixels(i))
    for name in ("a/x.heic", "a/y.HEIC", "b/notes.txt", "README", "c/.keep", "a/@eaDir/t.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    data = sources.folder("f", tmp_path)
    assert len(data.images) + len(data.test_images) == 4 and data.classes == ("a", "b")
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == [
        f"{tmp_path}: left out 4 file(s) that are no images Pillow reads "
        "(2 .heic, 1 no ending, 1 .txt)",
        f"{tmp_path}: 1 folder(s) without images are no classes: c",
    ]


def test_links_in_a_circle_are_not_followed(tmp_path, caplog):
    for i in range(4):
        write_png(tmp_path / "ab"[i % 2] / f"{i}.png", pixels(i))
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    data = sources.folder("f", tmp_path)
    assert len(data.images) + len(data.test_images) == 4
    assert "a/back links to a folder that holds it; not followed" in caplog.text


def test_linked_class_folders_are_followed(tmp_path):
    for i in range(4):
        write_png(tmp_path / "store" / f"{i}.png", pixels(i))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    assert len(sources.folder("f", tmp_path / "set").images) == 3


def test_palette_and_bilevel_files_keep_their_pixels(tmp_path):
    colour = pixels(0, (6, 6, 3)) // 128 * 255
    Image.fromarray(colour).quantize(8).save(tmp_path / "p.png")
    write_png(tmp_path / "q.png", colour)
    data = sources.folder("f", tmp_path, test_fraction=0.5)
    assert torch.equal(data.images, data.test_images)
    bits = pixels(0) // 128 * 255
    (tmp_path / "bits").mkdir()
    Image.fromarray(bits).convert("1").save(tmp_path / "bits" / "a.png")
    write_png(tmp_path / "bits" / "b.png", bits)
    data = sources.folder("f", tmp_path / "bits", test_fraction=0.5)
    assert torch.equal(data.images, data.test_images)


def test_jpeg_is_decoded_as_pillow_does(tmp_path):
    for i in range(2):
        Image.fromarray(pixels(i, (8, 8, 3))).save(tmp_path / f"{i}.JPG", "jpeg")
    data = sources.folder("f", tmp_path)
    truth = {np.asarray(Image.open(tmp_path / f"{i}.JPG")).tobytes() for i in range(2)}
    got = [x.permute(1, 2, 0).numpy().tobytes() for x in (data.images[0], data.test_images[0])]
    assert set(got) == truth


def test_order_survives_the_threads(tmp_path):
    images = {f"{i:04d}.png": np.full((2, 2), i % 251, np.uint8) for i in range(1000)}
    path = write_zip(tmp_path / "many.zip", images)
    data = sources.zip_images("z", path, path)
    assert data.images[:, 0, 0, 0].tolist() == [i % 251 for i in range(1000)]


# zip ---------------------------------------------------------------------------------------


def test_zip_is_read_in_order_of_names_with_labels(tmp_path):
    names = ["00001/b.png", "00000/z.png", "00000/a.png", "00001/a.png"]
    meta = {"labels": [[n, i] for i, n in enumerate(names)]}
    write_zip(tmp_path / "x.zip", {n: pixels(i) for i, n in enumerate(names)}, meta)
    data = sources.zip_images("z", tmp_path / "x.zip", tmp_path / "x.zip")
    assert data.labels.tolist() == [2, 1, 3, 0]  # as sorted(names) finds them
    assert data.classes == ("0", "1", "2", "3")
    for x, y in zip(data.images, data.labels, strict=True):
        assert torch.equal(x[0], torch.from_numpy(pixels(int(y))))
    assert sorted(os.listdir(tmp_path)) == ["x.zip"]  # nothing is unpacked


@pytest.mark.parametrize("meta", [None, {"labels": None}])
def test_zip_without_labels(tmp_path, meta):
    write_zip(tmp_path / "x.zip", {f"{i}.png": pixels(i, (4, 4, 3)) for i in range(10)}, meta)
    data = sources.zip_images("z", tmp_path / "x.zip", test_fraction=0.3)
    assert (data.labels, data.test_labels, data.num_classes) == (None, None, 0)
    assert (len(data.images), len(data.test_images), data.channels) == (7, 3, 3)


def test_zip_names_classes_and_takes_a_second_zip(tmp_path):
    images = {f"{i}.png": pixels(i) for i in range(3)}
    meta = {"labels": [[n, i] for i, n in enumerate(images)], "classes": ["x", "y", "z"]}
    train = write_zip(tmp_path / "a.zip", images, meta)
    test = write_zip(tmp_path / "b.zip", {"9.png": pixels(9)}, {"labels": [["9.png", 1]]})
    data = sources.zip_images("z", train, str(test))
    assert data.classes == ("x", "y", "z")
    assert data.test_labels.tolist() == [1]
    assert torch.equal(data.test_images[0, 0], torch.from_numpy(pixels(9)))


def test_labels_with_gaps_are_the_classes_that_exist(tmp_path):
    images = {f"{i}.png": pixels(i) for i in range(9)}
    numbers = [7, 3, 99999]
    meta = {"labels": [[n, numbers[i % 3]] for i, n in enumerate(images)]}
    train = write_zip(tmp_path / "a.zip", images, meta)
    held_out = sources.zip_images("z", train)
    assert held_out.classes == ("3", "7", "99999")
    test = {"labels": [["0.png", 99999], ["1.png", 3]]}
    test = write_zip(tmp_path / "b.zip", {f"{i}.png": pixels(i) for i in range(2)}, test)
    data = sources.zip_images("z", train, test)
    assert data.labels.tolist() == [1, 0, 2] * 3
    assert data.test_labels.tolist() == [2, 0]


def test_names_of_classes_go_by_the_original_number(tmp_path, caplog):
    images = {f"{i}.png": pixels(i) for i in range(4)}
    meta = {"labels": [[n, [0, 2][i % 2]] for i, n in enumerate(images)]}
    train = write_zip(tmp_path / "a.zip", images, meta | {"classes": ["x", "y", "z"]})
    data = sources.zip_images("z", train)
    assert data.classes == ("x", "z")
    assert '1 of the 3 "classes" of dataset.json have no image, and are none: y' in caplog.text
    other = write_zip(tmp_path / "b.zip", images, meta | {"classes": ["z", "y", "x"]})
    with pytest.raises(UserError, match=r"b\.zip calls class 0 z, but .*a\.zip calls it x"):
        sources.zip_images("z", train, other)


def test_zip_leaves_out_what_systems_add_and_says_the_rest(tmp_path, caplog):
    images = {f"{i}.png": pixels(i) for i in range(4)}
    path = write_zip(tmp_path / "x.zip", images)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("__MACOSX/a.png", "__MACOSX/._0.png", ".DS_Store", "a.heic", "b.heic"):
            archive.writestr(name, b"x")
    data = sources.zip_images("z", path)
    assert len(data.images) + len(data.test_images) == 4
    assert "left out 2 file(s) that are no images Pillow reads (2 .heic)" in caplog.text


def test_folders_in_a_zip_are_no_classes_and_it_says_so(tmp_path, caplog):
    write_zip(tmp_path / "x.zip", {f"{'ab'[i % 2]}/{i}.png": pixels(i) for i in range(4)})
    assert sources.zip_images("z", tmp_path / "x.zip").labels is None
    assert "its 2 folders (b, ...) are no classes without dataset.json" in caplog.text
    caplog.clear()
    write_zip(tmp_path / "y.zip", {f"0000{i % 2}/{i}.png": pixels(i) for i in range(4)})
    assert sources.zip_images("z", tmp_path / "y.zip").labels is None
    assert "no classes" not in caplog.text  # EDM's own layout


def test_names_in_a_zip_without_the_mark_of_utf8(tmp_path):
    images = {"caf\xe9.png": pixels(0), "tea.png": pixels(1)}
    path = write_zip(tmp_path / "x.zip", images, {"labels": [["caf\xe9.png", 0], ["tea.png", 1]]})
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + flags + 1] &= ~8
            start = content.find(mark, start + 1)
    path.write_bytes(content)
    data = sources.zip_images("z", path, path)
    assert data.labels.tolist() == [0, 1]
    assert torch.equal(data.images[0, 0], torch.from_numpy(pixels(0)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_config_holds_the_arguments_of_its_function(path):
    whole = OmegaConf.to_container(OmegaConf.load(path))
    data = whole["data"]
    if "source" not in data:  # of another file's function
        base = OmegaConf.load(CONFIGS / f"{whole['defaults'][0]}.yaml")
        config = OmegaConf.to_container(base)["data"]["source"]
        assert data["name"] == path.stem and config["name"] == "${data.name}"
        return
    config = data["source"]
    parameters = dict(inspect.signature(get_object(config.pop("_target_"))).parameters)
    if "options" in parameters:  # of all toys
        del parameters["options"]
        common = inspect.signature(toys._points).parameters.items()
        parameters |= {key: parameter for key, parameter in common if key != "toy"}
        if not getattr(toys, path.stem.upper()).classes:
            del parameters["labels"]
        parameters["noise"] = inspect.signature(getattr(toys, path.stem)).parameters["noise"]
    assert set(config) == set(parameters)
    assert data["name"] == path.stem and config["name"] == "${data.name}"
    assert "root" not in parameters or config["root"] == "${data.root}"
    for key, parameter in parameters.items():
        if key in {"crop", "resize"}:
            assert config[key] == f"${{data.{key}}}" and data[key] == parameter.default
        elif parameter.default is not parameter.empty and key not in {"name", "root"}:
            assert config[key] == parameter.default
    if "dataset" in config:
        assert hasattr(datasets, config["dataset"])


@pytest.mark.parametrize("ending", ["", ".png"])
def test_a_link_that_leads_nowhere_ends_in_no_traceback(ending, tmp_path):
    for number in range(3):
        write_png(tmp_path / "a" / f"{number}.png", pixels(number))
        write_png(tmp_path / "b" / f"{number}.png", pixels(number))
    for place in (tmp_path, tmp_path / "a"):
        (place / f"itself{ending}").symlink_to(place / f"itself{ending}")
    if not ending:  # a file that is no image
        assert sources.folder("f", tmp_path).classes == ("a", "b")
        return
    (tmp_path / "itself.png").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a/itself\.png \(.*; replace or remove it"):
        sources.folder("f", tmp_path)


def test_a_link_below_what_may_not_be_entered_is_no_folder(tmp_path, monkeypatch):
    write_png(tmp_path / "0.png", pixels(0))
    write_png(tmp_path / "1.png", pixels(1))
    (tmp_path / "locked").symlink_to(tmp_path / "elsewhere")

    def refused(entry):
        raise PermissionError(13, "Permission denied")

    class Entry:
        def __init__(self, entry):
            self.name, self.is_symlink = entry.name, entry.is_symlink
            locked = entry.name == "locked"
            self.is_dir = (lambda: refused(entry)) if locked else entry.is_dir
            self.is_file = (lambda: refused(entry)) if locked else entry.is_file

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: [Entry(entry) for entry in scan(path)])
    data = sources.folder("f", tmp_path)
    assert len(data.images) + len(data.test_images) == 2
