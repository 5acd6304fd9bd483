"""Every bad data set is refused in one line that names the value and the cure."""

import http.client
import json
import os
import zipfile
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from bayesdiff.checks import UserError
from bayesdiff.data import sources


def png(shape=(4, 4), mode=None):
    image = Image.fromarray(np.zeros(shape, np.uint8))
    buffer = BytesIO()
    (image.convert(mode) if mode else image).save(buffer, "png")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(root: Path, files: dict[str, bytes], meta: object = None) -> Path:
    path = root / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if meta is not None:
            archive.writestr("dataset.json", meta if isinstance(meta, str) else json.dumps(meta))
    return path


TWO = {"a.png": png(), "b.png": png()}
IDX_IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28])
IDX_LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2])
RAW = {
    f"MNIST/raw/{part}-{kind}": content
    for part in ("train", "t10k")
    for kind, content in (
        ("images-idx3-ubyte", IDX_IMAGES + bytes(2 * 784)),
        ("labels-idx1-ubyte", IDX_LABELS + bytes(2)),
    )
}
TRAIN_IMAGES, TRAIN_LABELS = list(RAW)[:2]


def folder(files, **options):
    return lambda root: sources.folder("f", write(root, files), **options)


def zipped(files, meta=None, **options):
    return lambda root: sources.zip_images("z", write_zip(root, files, meta), **options)


def second_zip(root):
    (root / "test").mkdir()
    first = write_zip(root, TWO, {"labels": [["a.png", 0], ["b.png", 1]]})
    second = write_zip(root / "test", TWO, {"labels": [["a.png", 0], ["b.png", 7]]})
    return sources.zip_images("z", first, second)


def cut_zip(root):
    path = write_zip(root, TWO)
    path.write_bytes(path.read_bytes()[:-60])
    return sources.zip_images("z", path)


def flipped_zip(root):
    path = write_zip(root, TWO)
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 6] ^= 255  # the stored CRC no longer fits
    path.write_bytes(content)
    return sources.zip_images("z", path)


def twice_zip(root):
    path = write_zip(root, TWO)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.png", png())
    return sources.zip_images("z", path)


def locked_zip(root):
    path = write_zip(root, TWO)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 8] |= 1  # what marks the last member as encrypted
    path.write_bytes(content)
    return sources.zip_images("z", path)


def mnist(changes, **options):
    return lambda root: sources.torchvision_images(
        "m", write(root, {**RAW, **changes}), "MNIST", **options
    )


CASES = {
    "digits with a root": (
        lambda root: sources.digits(root="/some/where"),
        ["data.root=/some/where", "take no data.root", "leave it out"],
    ),
    "folder: missing": (
        lambda root: sources.folder("f", root / "nowhere"),
        ["nowhere does not exist", "give a folder"],
    ),
    "folder: unset": (lambda root: sources.folder("f", ""), ["data.root is not set", "=PATH"]),
    "folder: a file": (
        lambda root: sources.folder("f", write(root, {"a.png": png()}) / "a.png"),
        ["a.png is a file", "give a folder"],
    ),
    "folder: empty": (folder({}), ["no images below", "set data.root"]),
    "folder: other files": (folder({"a.txt": b"x", ".b.png": b"x"}), ["no images below"]),
    "folder: mixed sizes": (
        folder({"a.png": png((4, 4)), "b.png": png((5, 6))}),
        ["a.png is 4x4", "b.png is 6x5", "data.resize=64 data.crop=square"],
    ),
    "folder: mixed modes": (
        folder({"a.png": png(), "b.png": png((4, 4, 3))}),
        ["a.png is grey", "b.png is RGB", "convert all"],
    ),
    "folder: alpha": (
        folder({"a.png": png((4, 4, 4)), "b.png": png()}),
        ["a.png has mode RGBA and transparency", "convert"],
    ),
    "folder: corrupt": (
        folder({"a.png": png(), "b.png": b"not an image"}),
        ["cannot read", "b.png (its content is no picture", "replace or remove"],
    ),
    "folder: one level too high": (
        folder({f"set/{c}/{c}.png": png() for c in "ab"}),
        ["one folder, set/", "one level too high?", "set; class folders look like"],
    ),
    "folder: one level above the splits": (
        folder({f"set/{s}/{c}/a.png": png() for s in ("train", "test") for c in "ab"}),
        ["set holds a split, test/", "one level too high?", "Set data.root="],
    ),
    "folder: splits inside classes": (
        folder({f"{c}/{s}/a.png": png() for s in ("Train", "Test") for c in "ab"}),
        ["a holds a split, Test/, and is no class", "Test/a/"],
    ),
    "folder: test alone": (folder({"test/a/a.png": png()}), ["has test/ but no train/", "rename"]),
    "folder: two training sets": (
        folder({f"{s}/a.png": png() for s in ("train", "Train", "test")}),
        ["has both Train/ and train/", "keep one"],
    ),
    "folder: two validation sets": (
        folder({f"{s}/a.png": png() for s in ("train", "val", "valid")}),
        ["has both val/ and valid/", "keep one"],
    ),
    "folder: test set without train among classes": (
        folder({f"{s}/a.png": png() for s in ("training", "bus", "car")}),
        ["training/ beside bus/: a split or a class?"],
    ),
    "folder: images beside masks": (
        folder({f"{s}/{i}.png": png() for s in ("images", "masks") for i in "ab"}),
        ["has a folder images/, which is no class", "set data.root=", "rename it"],
    ),
    "folder: a test set without images": (
        folder({"train/a.png": b"never read", "test/a.txt": b""}),
        ["no images below", "/test"],
    ),
    "folder: name that is no text": (
        folder({os.fsdecode(b"caf\xe9/a.png"): png(), "b/b.png": png()}),
        ["the name of the folder", "/caf\\xe9 is not UTF-8", "rename it"],
    ),
    "folder: damaged file of such a name": (
        folder({os.fsdecode(b"caf\xe9.png"): b"x", "b.png": png()}),
        ["cannot read", "/caf\\xe9.png (its content"],
    ),
    "folder: a class of one image each": (
        folder({"a/a.png": png(), "b/b.png": png()}),
        ["2 images of 2 classes", "every class needs one for training"],
    ),
    "folder: truncated": (
        folder({"a.png": png((64, 64)), "b.png": png((64, 64))[:-25]}),
        ["cannot read", "b.png"],
    ),
    "folder: beside and inside": (
        folder({"a.png": png(), "cat/b.png": png()}),
        ["(a.png and cat/b.png)", "move all"],
    ),
    "folder: new test class": (
        folder({"train/cat/a.png": png(), "test/dog/b.png": png()}),
        ["test/dog is no class of the training set", "rename"],
    ),
    "folder: test without classes": (
        folder({"train/cat/a.png": png(), "test/b.png": png()}),
        ["only the training images have labels"],
    ),
    "folder: unpacked EDM set": (
        folder({"0/a.png": png(), "dataset.json": b"{}"}),
        ["holds dataset.json", "data=zip"],
    ),
    "folder: one image": (folder({"a.png": png()}), ["1 image", "held out"]),
    "folder: share 0": (
        folder(TWO, test_fraction=0),
        ["data.source.test_fraction", "between 0 and 1"],
    ),
    "folder: share 1": (folder(TWO, test_fraction=1.0), ["test_fraction=1.0", "use 0.1"]),
    "folder: share text": (folder(TWO, test_fraction="x"), ["must be a number, got 'x'"]),
    "folder: seed": (folder(TWO, seed=-1), ["data.source.seed", "got -1"]),
    "zip: missing": (
        lambda root: sources.zip_images("z", root / "no.zip"),
        ["data.root=", "no.zip does not exist"],
    ),
    "zip: second missing": (
        zipped(TWO, test_root="/no.zip"),
        ["data.source.test_root=/no.zip does not exist"],
    ),
    "zip: a folder": (
        lambda root: sources.zip_images("z", write_zip(root, TWO).parent),
        ["is a folder", "for example data.root=", "x.zip"],
    ),
    "zip: not a zip": (
        lambda root: sources.zip_images("z", write(root, {"x.zip": b"hello"}) / "x.zip"),
        ["x.zip is not a zip", "copy it again"],
    ),
    "zip: truncated": (cut_zip, ["not a whole one", "copy it again"]),
    "zip: flipped byte": (flipped_zip, ["x.zip/a.png", "CRC", "replace"]),
    "zip: no images": (zipped({"a.txt": b"x"}), ["holds no images"]),
    "zip: bad json": (zipped(TWO, "{not json"), ["dataset.json", "cannot be read", '"labels"']),
    "zip: json list": (zipped(TWO, [1, 2]), ["dataset.json", "it must hold"]),
    "zip: no labels key": (zipped(TWO, {"other": 1}), ["'labels'", "it must hold"]),
    "zip: odd labels": (zipped(TWO, {"labels": [1, 2]}), ["it must hold"]),
    "zip: odd names": (zipped(TWO, {"labels": [[["a"], 2]]}), ["it must hold"]),
    "zip: odd classes": (
        zipped(TWO, {"labels": [["a.png", 0], ["b.png", 0]], "classes": "ab"}),
        ["'ab'", "give a list of names"],
    ),
    "zip: label without image": (
        zipped(TWO, {"labels": [["a.png", 0], ["c.png", 0]]}),
        ["names c.png, which is not in the zip", "remove the entry"],
    ),
    "zip: image without label": (
        zipped(TWO, {"labels": [["a.png", 0]]}),
        ["no label for b.png", "add it"],
    ),
    "zip: labelled twice": (
        zipped(TWO, {"labels": [["a.png", 0], ["a.png", 1], ["b.png", 1]]}),
        ["twice", "keep one"],
    ),
    "zip: vector label": (
        zipped(TWO, {"labels": [["a.png", [0, 1]], ["b.png", 1]]}),
        ["a.png has label [0, 1]", "class number"],
    ),
    "zip: more labels than names": (
        zipped(TWO, {"labels": [["a.png", 0], ["b.png", 2]], "classes": ["x", "y"]}),
        ["b.png has label 2", "names 2 classes", "numbers 0 to 1"],
    ),
    "zip: two classes of one name": (
        zipped(TWO, {"labels": [["a.png", 0], ["b.png", 1]], "classes": ["x", "x"]}),
        ["names x twice", "name each class once"],
    ),
    "zip: class only in the test zip": (
        second_zip,
        ["b.png has label 7", "no training image has", "training labels are 0, 1"],
    ),
    "zip: labels in a folder": (
        zipped({"set/a.png": png(), "set/dataset.json": b"{}"}),
        ["holds set/dataset.json", "zip the content of the folder"],
    ),
    "zip: splits": (
        zipped({"set/train/a.png": png(), "set/Test/b.png": png()}),
        ["holds test and train folders", "data.source.test_root", "data=folder"],
    ),
    "zip: one name twice": (twice_zip, ["holds a.png 2 times"]),
    "zip: encrypted": (locked_zip, ["b.png is encrypted", "without a password"]),
    "mnist: unknown": (
        lambda root: sources.torchvision_images("m", root, "SVHN"),
        ["data.source.dataset=SVHN", "FashionMNIST"],
    ),
    "mnist: no root": (
        lambda root: sources.torchvision_images("m", None, "MNIST"),
        ["data.root is not set", "BAYESDIFF_DATA"],
    ),
    "mnist: missing": (
        lambda root: sources.torchvision_images("m", root, "MNIST", download=False),
        ["MNIST/raw is missing", "set data.root or BAYESDIFF_DATA", "data.source.download=true"],
    ),
    "cifar10: missing": (
        lambda root: sources.torchvision_images("m", root, "CIFAR10", download=False),
        ["cifar-10-batches-py is missing", "data.source.download=true"],
    ),
    "mnist: truncated images": (
        mnist({TRAIN_IMAGES: RAW[TRAIN_IMAGES][:-1]}),
        ["MNIST/raw is incomplete or damaged", "delete it"],
    ),
    "mnist: empty images": (mnist({TRAIN_IMAGES: b""}), ["incomplete or damaged"]),
    "mnist: still packed": (mnist({TRAIN_IMAGES: b"\x1f\x8b" * 900}), ["incomplete or damaged"]),
    "mnist: cut labels": (mnist({TRAIN_LABELS: IDX_LABELS + bytes(1)}), ["damaged"]),
    "mnist: fewer labels": (
        mnist({TRAIN_LABELS: bytes([0, 0, 8, 1, 0, 0, 0, 1, 0])}),
        ["1 training labels for 2 images"],
    ),
    "mnist: label 200": (
        mnist({TRAIN_LABELS: IDX_LABELS + b"\0\xc8"}),
        ["label 200", "10 classes"],
    ),
}


def refuse_download(*_args, **_options):
    raise URLError("the tests have no network")


def check(message, fragments):
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case, tmp_path, monkeypatch):
    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse_download)
    call, fragments = CASES[case]
    with pytest.raises(UserError) as error:
        call(tmp_path)
    check(str(error.value), fragments)


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST", "CIFAR10"])
@pytest.mark.parametrize(
    "failure",
    [
        URLError("Name or service not known"),
        RuntimeError("File not found\nor corrupted."),
        TimeoutError(),
        http.client.IncompleteRead(b"abc"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_failed_download_is_one_line(dataset, failure, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise failure

    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    with pytest.raises(UserError) as error:
        sources.torchvision_images("m", tmp_path, dataset)
    fragments = [dataset, str(tmp_path), "data.root", "BAYESDIFF_DATA", "check the network"]
    check(str(error.value), fragments)
