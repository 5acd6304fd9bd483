"""One data set in memory: what is refused, the fingerprint, the hold-out split."""

import pytest
import torch

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData, hold_out


def built(images=None, labels=None, test=None, test_labels=None, classes=()):
    good = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images = good if images is None else images
    test = good if test is None else test
    return lambda: ImageData.build("b", images, labels, test, test_labels, classes)


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


LABELS = torch.tensor([0, 1, 0, 1])
REFUSED = {
    "no images": (built(u8(0, 1, 2, 2)), ["no training images", "add some"]),
    "no test images": (built(test=u8(0, 1, 2, 2)), ["no test images"]),
    "float images": (built(torch.zeros(4, 1, 2, 2)), ["torch.float32", "give uint8"]),
    "no channels": (built(u8(4, 2, 2)), ["(4, 2, 2)", "(N,C,H,W)"]),
    "two sizes": (built(test=u8(4, 1, 3, 3)), ["1x2x2", "1x3x3", "one size"]),
    "too few labels": (
        built(None, LABELS[:3], None, LABELS, ("a", "b")),
        ["3 training labels for 4 images"],
    ),
    "label too large": (
        built(None, LABELS, None, torch.tensor([0, 9, 8, 1]), ("a", "b")),
        ["test image 1 has label 9", "2 classes", "labels run from 0"],
    ),
    "negative label": (
        built(None, LABELS - 1, None, LABELS, ("a", "b")),
        ["training image 0 has label -1"],
    ),
    "int32 labels": (
        built(None, LABELS.int(), None, LABELS, ("a", "b")),
        ["torch.int32", "int64"],
    ),
    "half labelled": (
        built(None, LABELS, None, None, ("a", "b")),
        ["only the training images have labels", "label both"],
    ),
    "a class without an image": (
        built(None, LABELS, None, LABELS, ("a", "b", "c")),
        ["no training image of 1 of 3 classes (c)", "leave these classes out"],
    ),
    "two classes of one name": (
        built(None, LABELS, None, LABELS, ("a", "a")),
        ["two classes are named a"],
    ),
    "names without labels": (built(classes=("a",)), ["1 class names but no labels"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    call, fragments = REFUSED[case]
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def small(classes=("a", "b"), value=0):
    images = torch.full((4, 1, 2, 2), value, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    return ImageData.build("s", images, labels, images[:2], labels[:2], classes)


def test_fingerprint_changes_with_pixels_labels_and_names_only():
    base = small()
    assert len(base.fingerprint) == 16
    assert small().fingerprint == base.fingerprint
    images, labels = base.images.clone(), base.labels.clone()
    images[3, 0, 1, 1] = 1
    labels[3] = 0
    tests = (base.test_images, base.test_labels)
    others = [
        small(("a", "c")),
        ImageData.build("s", images, base.labels, *tests, base.classes),
        ImageData.build("s", base.images, labels, *tests, base.classes),
        ImageData.build("s", base.images, None, base.test_images, None),
        ImageData.build("s", base.images.reshape(1, 4, 2, 2), None, images.view(1, 4, 2, 2), None),
    ]
    assert len({d.fingerprint for d in [base, *others]}) == 6
    # A view with other strides holds the same images.
    strided = base.images.transpose(2, 3)
    same = ImageData.build("t", strided, base.labels, *tests, base.classes)
    assert same.fingerprint == base.fingerprint


def test_fingerprint_is_pinned():
    # Artefacts on disk are matched by it: a change here makes every stored one unusable.
    assert small().fingerprint == "3b041c4b4324b8c2"


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("n", "share", "held"), [(100, 0.1, 10), (3, 0.01, 1), (7, 0.7, 5)])
def test_hold_out_is_a_partition(n, share, held, labelled):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    labels = torch.arange(n) % 2 if labelled else None
    classes = ("even", "odd") if labelled else ()
    data = hold_out("h", images, labels, classes, share, seed=3)
    assert len(data.test_images) == held
    parts = (data.images.flatten().tolist(), data.test_images.flatten().tolist())
    assert sorted(parts[0] + parts[1]) == list(range(n))
    assert all(p == sorted(p) for p in parts)  # file order is kept
    if labelled:
        assert torch.equal(data.labels, data.images.flatten() % 2)
        assert abs(int(data.test_labels.sum()) * 2 - held) <= 1


def test_every_class_keeps_a_training_image():
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    labels = torch.tensor([0] * 20 + [1] * 17 + [2, 3, 4])  # three classes of one image each
    for share in (0.1, 0.5, 0.9):
        for seed in range(8):
            data = hold_out("h", images, labels, tuple("abcde"), share, seed)
            assert set(data.labels.tolist()) == set(range(5))
            assert sorted([*data.images.flatten(), *data.test_images.flatten()]) == [*range(40)]
    few = hold_out("h", images[:3], torch.tensor([0, 1, 1]), ("a", "b"), 0.3, 0)
    assert (few.labels.tolist(), few.test_labels.tolist()) == ([0, 1], [1])
    with pytest.raises(UserError, match="2 images of 2 classes, and every class needs one"):
        hold_out("h", images[:2], torch.tensor([0, 1]), ("a", "b"), 0.3, 0)


def test_hold_out_follows_the_seed():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    picks = [hold_out("h", images, None, (), 0.1, s).test_images.flatten() for s in (0, 0, 1)]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])


@pytest.mark.parametrize(("sides", "size"), [((2, 3), (2, 3)), ((4, 4), 4)])
def test_image_size_is_one_side_of_squares(sides, size):
    images = torch.zeros(1, 1, *sides, dtype=torch.uint8)
    assert ImageData.build("s", images, None, images, None).image_size == size
