"""Two digits on a square: which, where and in which part, against digits that tell their place."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, compose_list
from hydra.utils import instantiate
from test_sources import write_idx

from bayesdiff.checks import UserError
from bayesdiff.data.binarised import binarised
from bayesdiff.data.two_digits import composed, two_digits

TRAIN, TESTS = 40, 30
FIRST_TEST = 101  # grey level of the first test digit


def write_digits(folder, train=TRAIN, tests=TESTS):
    """Digit i is a full square of the level 1 + i, 101 + i for tests; its class i % 10."""
    raw = folder / "MNIST" / "raw"
    for prefix, count, first in (("train", train, 1), ("t10k", tests, FIRST_TEST)):
        levels = np.arange(first, first + count, dtype=np.uint8)[:, None, None]
        write_idx(raw / f"{prefix}-images-idx3-ubyte", levels.repeat(28, 1).repeat(28, 2))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_digits(folder)
    return folder


def made(root, **options):
    given = {"images": 1500, "test_images": 300} | options
    return two_digits("two", root, False, **given)


@pytest.fixture(scope="module")
def plain(root):
    return made(root)


def read(image, first):
    """Places of the two digits, and (top, left) of each, from the pixels of an image."""
    found = []
    for half in (0, 32):
        part = image[0, :, half : half + 32]
        rows, columns = (part.nonzero()[:, axis].unique() for axis in (0, 1))
        top, left = int(rows[0]), int(columns[0])
        level = int(part[top, left])
        whole = torch.zeros(64, 32, dtype=torch.uint8)
        whole[top : top + 28, left : left + 28] = level
        assert torch.equal(part, whole)  # in its own half, whole, and nothing else
        found.append((level - first, top, left))
    return found


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_is_two_digits_of_its_part_each_in_its_half_and_the_label_is_theirs(plain, part):
    train = part == "train"
    images, labels = (
        (plain.images, plain.labels) if train else (plain.test_images, plain.test_labels)
    )
    first, count = (1, TRAIN) if train else (FIRST_TEST, TESTS)
    assert images.shape == (1500 if train else 300, 1, 64, 64) and images.dtype == torch.uint8
    used = set()
    for image, label in zip(images, labels.tolist(), strict=True):
        (left, top, x), (right, other_top, other_x) = read(image, first)
        assert label == 10 * (left % 10) + right % 10
        assert 0 <= min(top, other_top) and max(top, other_top) <= 36
        assert 0 <= min(x, other_x) and max(x, other_x) <= 4
        used |= {left, right}
    assert used == set(range(count))  # every digit of its part, none of the other
    assert plain.classes == tuple(f"{n:02}" for n in range(100))
    assert plain.unseen is None


@pytest.mark.parametrize("compat, most", [(False, (36, 4)), (True, (35, 3))])
def test_every_offset_is_equally_likely_and_the_largest_one_belongs_or_not(compat, most):
    found = composed(torch.arange(50) % 10, 20_000, part=0, compat=compat)
    for offsets, last in ((found.top, most[0]), (found.left, most[1])):
        for half in (0, 1):
            counts = torch.bincount(offsets[:, half]).double()
            assert len(counts) == last + 1
            expected = 20_000 / (last + 1)
            chi2 = float(((counts - expected) ** 2 / expected).sum())
            assert chi2 < last + 5 * (2 * last) ** 0.5
    both = torch.stack([found.top[:, 0], found.top[:, 1]]).double()
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.03  # the digits move independently


def test_digits_come_as_often_as_mnist_has_them_or_classes_equally_often():
    labels = torch.cat([torch.arange(10), torch.zeros(10, dtype=torch.long)])  # 11 of 20 are 0
    as_there = composed(labels, 20_000, part=0)
    assert float((as_there.numbers == 0).double().mean()) == pytest.approx(0.55**2, abs=0.015)
    equal = composed(labels, 20_000, part=0, compat=True)
    counts = torch.bincount(equal.numbers, minlength=100).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 99 + 5 * 198**0.5
    zeros = equal.digits[equal.numbers == 0].flatten()
    assert set(labels[zeros].tolist()) == {0} and len(zeros.unique()) == 11


def test_an_image_is_a_function_of_seed_part_and_place(root, plain):
    again, more = made(root), made(root, images=1600, test_images=310)
    assert again.fingerprint == plain.fingerprint != more.fingerprint
    assert torch.equal(more.images[:1500], plain.images)
    assert torch.equal(more.test_images[:300], plain.test_images)
    other = made(root, seed=1)
    assert not torch.equal(other.images, plain.images) and other.fingerprint != plain.fingerprint
    labels = torch.arange(TRAIN) % 10  # with the same digits, parts still differ
    one, two = (composed(labels, 50, part=part).digits for part in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("compat", [False, True])
def test_held_out_classes_are_never_trained_on_and_are_tested_apart(root, compat):
    held = [42, "07", 99]
    data = made(root, holdout_classes=held, generator_compat=compat)
    full = made(root, generator_compat=compat)
    assert data.num_classes == 97 and not {"42", "07", "99"} & set(data.classes)
    for images, labels, first in (
        (data.images, data.labels, 1),
        (data.test_images, data.test_labels, FIRST_TEST),
    ):
        for image, label in list(zip(images, labels.tolist(), strict=True))[:200]:
            (left, *_), (right, *_) = read(image, first)
            assert data.classes[label] == f"{left % 10}{right % 10}"
    assert data.unseen.classes == ("07", "42", "99") and len(data.unseen.images) > 0
    names = [data.unseen.classes[label] for label in data.unseen.labels.tolist()]
    known = torch.isin(full.test_labels, torch.tensor([7, 42, 99]))
    # The test images are those that there are without it, in two places.
    assert torch.equal(data.unseen.images, full.test_images[known])
    assert torch.equal(data.test_images, full.test_images[~known])
    assert names == [full.classes[label] for label in full.test_labels[known].tolist()]


@pytest.mark.parametrize("compat", [False, True])
def test_holding_a_class_out_draws_only_its_own_images_anew(compat):
    """Equally likely classes all move, as there are fewer of them."""
    labels = torch.arange(TRAIN) % 10
    few = composed(labels, 3000, part=0, compat=compat, without=range(20))
    more = composed(labels, 3000, part=0, compat=compat, without=[*range(20), 42])
    assert int(few.numbers.min()) >= 20 and not (more.numbers == 42).any()
    if not compat:
        same = few.numbers != 42
        assert torch.equal(few.digits[same], more.digits[same])
        assert torch.equal(few.top[same], more.top[same])
        assert 0 < int((~same).sum()) < 100


def test_fingerprints_tell_the_options_and_all_parts_are_black_and_white(root, plain):
    options = [{}, {"generator_compat": True}, {"holdout_classes": [7]}, {"holdout_classes": [8]}]
    assert len({made(root, **each).fingerprint for each in options}) == 4
    data = binarised(made(root, holdout_classes=[7, 8, 9]), "dynamic")
    for images in (data.images, data.test_images, data.unseen.images):
        assert set(images.unique().tolist()) == {0, 255}
    drawn = float(data.test_images.double().mean())
    kept = made(root, holdout_classes=[7, 8, 9]).test_images
    assert drawn == pytest.approx(float(kept.double().mean()), rel=0.01)


def test_the_preset_is_what_it_says(root):
    sizes = ["data.source.images=1500", "data.source.test_images=40"]
    cfg = compose_list(["data=two_digit_mnist", f"data.root={root}", *sizes]).data
    data = binarised(instantiate(cfg.source), cfg.binarise)
    assert (data.name, data.image_size, data.num_classes) == ("two_digit_mnist", 64, 100)
    assert data.intensities is not None and len(data.test_images) == 40


WHERE = "data.source.holdout_classes"
WRONG = [
    ({"holdout_classes": "7"}, f"{WHERE} must be a list of numbers from 0 to 99, got '7'"),
    ({"holdout_classes": 7}, f"{WHERE} must be a list"),
    ({"holdout_classes": [100]}, f"{WHERE} must be numbers from 0 to 99, got 100"),
    ({"holdout_classes": [-1]}, f"{WHERE} must be numbers from 0 to 99, got -1"),
    ({"holdout_classes": ["seven"]}, f"{WHERE} must be numbers from 0 to 99, got 'seven'"),
    ({"holdout_classes": [1.5]}, f"{WHERE} must be numbers from 0 to 99, got 1.5"),
    ({"holdout_classes": [7, "07"]}, f"{WHERE}=[7, 7] names a class twice"),
    ({"holdout_classes": list(range(100))}, f"{WHERE} holds out all classes"),
    ({"images": 0}, "data.source.images must be a whole number >= 1, got 0"),
    ({"test_images": 2.5}, "data.source.test_images must be a whole number"),
    ({"seed": -1}, "data.source.seed must be a whole number"),
    ({"generator_compat": "yes"}, "data.source.generator_compat must be true or false"),
    ({"images": 30}, "no training image of"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_bad_options_are_one_line(root, options, message):
    with pytest.raises(UserError) as error:
        made(root, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_digit_that_mnist_lacks_is_said(tmp_path):
    write_digits(tmp_path, tests=9)
    with pytest.raises(UserError, match="no image of the digit 9"):
        made(tmp_path)


@pytest.fixture(scope="module")
def study():
    place = ROOT / "experiments" / "bfn-mnist" / "two_digits.py"
    spec = importlib.util.spec_from_file_location("two_digits_study", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_reads_each_half_alone(study, root):
    data = made(root)
    halves, digits = study.halves(data.images), study.digits(data.labels, data.classes)
    for image, pair, labels in zip(data.images[:20], halves, digits, strict=False):
        places = [place for place, _, _ in read(image, 1)]
        assert [place % 10 for place in places] == labels.tolist()
        assert torch.equal(torch.cat([*pair], -1), image)
    data = replace(data, images=data.images[:64], labels=data.labels[:64])
    classifier = study.reader(data, epochs=1)
    probabilities = study.read(classifier, data.images[:3])
    alone = classifier(data.images[1:2, ..., 32:]).softmax(1)[0]
    torch.testing.assert_close(probabilities[1, 1], alone)
    assert 0 <= classifier.test_accuracy <= 1


def test_the_study_counts_confident_samples_and_held_out_numbers_among_them(study):
    sure, vague = 0.95, 0.85

    def half(digit, p):
        return [p if k == digit else (1 - p) / 9 for k in range(10)]

    shown = [((4, sure), (2, sure)), ((4, sure), (2, vague)), ((1, sure), (3, sure))]
    shown.append(((0, sure), (7, sure)))
    probabilities = torch.tensor([[half(*one) for one in pair] for pair in shown])
    found = study.shares(probabilities, [7, 42])
    assert found["two_confident_digits"] == 0.75 and found["two_confident_digits.of"] == 4
    assert found["two_confident_digits.standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert found["held_out_share"] == pytest.approx(2 / 3) and found["held_out_share.of"] == 3
    assert found["different_numbers"] == 3
    none = study.shares(probabilities[1:2], [7], "_real")
    assert none["two_confident_digits_real"] == 0 and "held_out_share_real" not in none


def test_the_study_draws_samples_in_rows_of_eight(study):
    figure = study.drawn(torch.zeros(10, 1, 64, 64))
    assert len(figure.axes[0].images) == 10
