"""Black and white images: the right odds, the same for (seed, epoch, place), and no grey left."""

import numpy as np
import pytest
import torch
from conftest import Compose, compose_list
from hydra.utils import instantiate
from test_data_module import epoch_of

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.binarised import Intensities, binarised
from bayesdiff.data.corruption import undertrained
from bayesdiff.data.counters import below, keys_of, words
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import Pixels, to_uint8
from bayesdiff.data.toys import moons
from bayesdiff.metrics.classifier import Classifier
from bayesdiff.runs import build


def grey(count: int = 40, side: int = 6, tests: int = 9) -> ImageData:
    """Every level in turn; the first pixel holds black, the second white."""
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count + tests, 1, side, side)))
    x = x.to(torch.uint8)
    x[..., 0, 0], x[..., 0, 1] = 0, 255
    y = torch.arange(count + tests) % 3
    return ImageData.build("n", x[:count], y[:count], x[count:], y[count:], ("a", "b", "c"))


# Counters ----------------------------------------------------------------------------------


def test_the_stream_of_a_key_is_the_published_one():
    """First numbers of SplitMix64 from 1234567, as other languages test theirs."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = words(torch.tensor([1234567]), torch.arange(4)).tolist()
    assert found == [number >> 32 for number in known]


def slow_keys(places: list[int], *numbers: int) -> list[int]:
    """The same in Python's whole numbers."""

    def mixed(state: int) -> int:
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
        return state ^ state >> 31

    key = 0
    for number in numbers:
        key = mixed((key + number + 0x9E3779B97F4A7C15) % 2**64)
    return [mixed((key + place + 0x9E3779B97F4A7C15) % 2**64) for place in places]


@pytest.mark.parametrize("numbers", [(), (0,), (3, 1, 2**32 - 1), (2**62, 0, 5)])
def test_keys_are_those_of_slow_arithmetic(numbers):
    places = [0, 1, 2, 59_999, 2**40]
    found = keys_of(torch.tensor(places), *numbers)
    assert [key % 2**64 for key in found.tolist()] == slow_keys(places, *numbers)


def test_keys_tell_the_numbers_and_their_order():
    given = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (0, 0, 1)]
    found = {int(keys_of(torch.tensor([7]), *numbers)[0]) for numbers in given}
    assert len(found) == len(given)


@pytest.mark.parametrize("bound", [2, 37, 255])
def test_whole_numbers_below_a_bound_are_equally_likely(bound):
    drawn = below(words(keys_of(torch.arange(400))[:, None], torch.arange(500)), bound).flatten()
    counts = torch.bincount(drawn, minlength=bound).double()
    assert len(counts) == bound
    expected = len(drawn) / bound
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - (bound - 1)) < 5 * (2 * (bound - 1)) ** 0.5


# Draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 64, 128, 254, 255])
def test_a_pixel_is_white_with_the_odds_of_its_grey(level):
    x = torch.full((300, 1, 30, 30), level, dtype=torch.uint8)
    drawn = Intensities(x, x).training(torch.arange(300), seed=1, epoch=2)
    assert drawn.dtype == torch.uint8 and set(drawn.unique().tolist()) <= {0, 255}
    odds, found = level / 255, float((drawn == 255).double().mean())
    assert abs(found - odds) <= 4 * (odds * (1 - odds) / drawn.numel()) ** 0.5


def test_pixels_images_epochs_and_parts_are_drawn_independently():
    """Half grey everywhere: any two different draws agree in half of the pixels."""
    x = torch.full((200, 1, 20, 20), 128, dtype=torch.uint8)
    made = Intensities(x, x)
    places = torch.arange(200)
    one = made.training(places, 0, 0)
    others = {
        "epoch": made.training(places, 0, 1),
        "seed": made.training(places, 1, 0),
        "part": made.tests(0),
        "draw": made.tests(1),
        "image": one.roll(1, 0),
        "row": one.roll(1, 2),
        "column": one.roll(1, 3),
    }
    for name, other in others.items():
        assert abs(float((one == other).double().mean()) - 0.5) < 0.01, name
    assert abs(float((others["part"] == others["draw"]).double().mean()) - 0.5) < 0.01


def test_all_else_sees_one_draw_that_is_epoch_0_of_seed_0():
    data, plain = binarised(grey(), "dynamic"), grey()
    assert set(data.images.unique().tolist()) == {0, 255}
    assert set(data.test_images.unique().tolist()) == {0, 255}
    assert torch.equal(data.images, data.intensities.training(torch.arange(40), 0, 0))
    assert torch.equal(data.test_images, data.intensities.tests())
    assert torch.equal(data.images, binarised(plain, "dynamic").images)  # every time the same
    assert torch.equal(plain.images, grey().images)  # the input is left alone
    assert torch.equal(data.labels, plain.labels) and data.classes == plain.classes


def test_many_images_are_drawn_as_few_are(monkeypatch):
    whole = binarised(grey(), "frozen")
    monkeypatch.setattr("bayesdiff.data.binarised._AT_ONCE", 100)
    assert torch.equal(binarised(grey(), "frozen").images, whole.images)


def test_the_mean_is_that_of_the_grey_images():
    plain = grey(count=2000, side=12)
    data = binarised(plain, "dynamic")
    expected = float(plain.images.double().mean())
    assert float(data.images.double().mean()) == pytest.approx(expected, rel=0.01)


def test_frozen_keeps_no_grey_and_is_the_same_draw():
    data = binarised(grey(), "frozen")
    assert data.intensities is None
    assert torch.equal(data.images, binarised(grey(), "dynamic").images)


# Batches -----------------------------------------------------------------------------------


def seen(module: ImageDataModule, data: ImageData, **state: int) -> dict[int, torch.Tensor]:
    """Images of an epoch by their place, which a condition tells."""
    module.given = "embeddings"
    batches = epoch_of(module, **state)
    images, places = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return dict(zip(places.int().flatten().tolist(), to_uint8(images), strict=True))


def numbered(mode: str = "dynamic") -> ImageData:
    plain, places = grey(), torch.arange(49.0)[:, None]
    parts = (plain.images, plain.labels, plain.test_images, plain.test_labels, plain.classes)
    return binarised(ImageData.build("n", *parts, (places[:40], places[40:])), mode)


def test_an_image_is_the_same_in_batches_of_every_size_after_a_resume_and_in_every_process():
    data = numbered()
    whole = seen(ImageDataModule(data, batch_size=4, seed=3), data, epoch=2)
    assert len(whole) == 40
    truth = data.intensities.training(torch.arange(40), 3, 2)
    for place, image in whole.items():
        assert torch.equal(image, truth[place])
    others = [
        seen(ImageDataModule(data, batch_size=10, seed=3), data, epoch=2),
        seen(ImageDataModule(data, batch_size=4, seed=3), data, epoch=2, seen=6),
        *(
            seen(ImageDataModule(data, batch_size=4, seed=3), data, epoch=2, rank=r, world=2)
            for r in (0, 1)
        ),
    ]
    assert [len(each) for each in others] == [40, 16, 20, 20]
    for each in others:
        assert all(torch.equal(image, whole[place]) for place, image in each.items())


def test_another_epoch_or_seed_draws_anew_and_a_frozen_set_does_not():
    data = numbered()
    first = seen(ImageDataModule(data, batch_size=4), data, epoch=0)
    for other in (
        seen(ImageDataModule(data, batch_size=4), data, epoch=1),
        seen(ImageDataModule(data, batch_size=4, seed=1), data, epoch=0),
    ):
        assert not any(torch.equal(image, other[place]) for place, image in first.items())
    still = numbered("frozen")
    one, two = (seen(ImageDataModule(still, batch_size=4), still, epoch=e) for e in (0, 5))
    assert all(torch.equal(image, two[place]) for place, image in one.items())


def test_one_batch_by_heart_is_the_same_draw_in_every_epoch():
    module = ImageDataModule(numbered(), batch_size=4)
    one, two = (epoch_of(module, epoch=e, overfit=1)[0][0] for e in (0, 7))
    assert torch.equal(one, two)


def test_mirroring_comes_after_the_draw():
    data = numbered()
    plain = seen(ImageDataModule(data, batch_size=4), data, epoch=1)
    mirrored = seen(ImageDataModule(data, batch_size=4, flip=True), data, epoch=1)
    same = [torch.equal(mirrored[place], image) for place, image in plain.items()]
    assert 5 < sum(same) < 35
    assert all(
        torch.equal(mirrored[place].flip(-1), image)
        for (place, image), equal in zip(plain.items(), same, strict=True)
        if not equal
    )


def test_validation_is_the_frozen_draw():
    data = numbered()
    module = ImageDataModule(data, batch_size=3)
    for x, _ in module.val_dataloader():
        assert all((data.test_images == image).flatten(1).all(1).any() for image in to_uint8(x))


def test_rare_visits_and_a_draw_go_together():
    data = binarised(undertrained(grey(), ["a"], visits=0.5), "dynamic")
    batches = epoch_of(ImageDataModule(data, batch_size=4), epoch=1)
    assert sum(len(x) for x, _ in batches) == data.fewest // 4 * 4
    assert {float(value) for x, _ in batches for value in x.unique()} == {-1.0, 1.0}


# Keys and options --------------------------------------------------------------------------


def test_fingerprints_tell_grey_dynamic_and_frozen_data():
    plain = grey()
    assert binarised(plain, None) is plain
    found = {plain.fingerprint, *(binarised(plain, m).fingerprint for m in ("dynamic", "frozen"))}
    assert len(found) == 3
    assert binarised(grey(), "dynamic").fingerprint in found  # whatever was drawn before
    assert binarised(grey(tests=8), "dynamic").fingerprint not in found


def test_every_image_source_takes_the_option_and_data_without_it_keep_their_key(compose: Compose):
    plain = build.build(compose("data=digits"))
    assert plain.data.data.intensities is None and "binarise" not in plain.folder.name
    assert plain.data.data.fingerprint == instantiate(plain.cfg.data.source).fingerprint
    runs = [
        build.build(compose("data=digits", f"data.binarise={m}")) for m in ("dynamic", "frozen")
    ]
    assert len({plain.key, *(run.key for run in runs)}) == 3
    assert "-binarise_dynamic-" in runs[0].folder.name
    assert "-binarise_frozen-" in runs[1].folder.name


def test_the_presets_are_what_they_say(tmp_path):
    from test_sources import write_mnist

    write_mnist(tmp_path / "MNIST" / "raw", train=30)
    for given, count, side in (
        (["data=binary_digits"], 1497, 16),
        (["data=binary_mnist", f"data.root={tmp_path}", "data.batch_size=4"], 30, 28),
    ):
        cfg = compose_list(given).data
        found = binarised(instantiate(cfg.source), cfg.binarise)
        assert (len(found.images), found.image_size, found.num_classes) == (count, side, 10)
        assert found.name == cfg.name == given[0].removeprefix("data=")
        assert found.intensities is not None and found.channels == 1


WRONG = [
    (lambda: binarised(grey(), "always"), "data.binarise=always is unknown; use dynamic, frozen"),
    (lambda: binarised(grey(), True), "data.binarise=True is unknown"),
    (
        lambda: binarised(moons(points=20, test_points=5), "frozen"),
        "about pictures, and moons has",
    ),
    (lambda: binarised(colours(), "dynamic"), "those of rgb have 3 channels; convert"),
    (lambda: binarised(ones(), "dynamic"), "the brightest pixel of bits is 1 of 255"),
    (lambda: binarised(grey(), "dynamic").intensities.tests(-1), "draw must be a whole number"),
]


def colours() -> ImageData:
    x = torch.full((4, 3, 2, 2), 200, dtype=torch.uint8)
    return ImageData.build("rgb", x, None, x, None)


def ones() -> ImageData:
    x = torch.tensor([0, 1], dtype=torch.uint8).repeat(8).view(4, 1, 2, 2)
    return ImageData.build("bits", x, None, x, None)


@pytest.mark.parametrize("make, message", WRONG)
def test_bad_options_are_one_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


# Readers -----------------------------------------------------------------------------------


def test_training_curvature_classifier_and_scores_of_a_run_see_black_and_white_alone(
    compose: Compose, monkeypatch, without_reports
):
    """What goes into the network, and all real images that the classifier reads."""
    seen: dict[str, set[int]] = {"encoded": set(), "classified": set()}
    encode, features = Pixels.encode, Classifier.features

    def encoded(self, data):
        seen["encoded"] |= set(data.unique().tolist())
        return encode(self, data)

    def classified(self, images):
        seen["classified"] |= set(images.unique().tolist())
        return features(self, images)

    monkeypatch.setattr(Pixels, "encode", encoded)
    monkeypatch.setattr(Classifier, "features", classified)
    # Samples are grey: decoded as black and white they leave the real images to be seen.
    monkeypatch.setattr(Pixels, "decode", lambda self, x: (255 * (x > 0)).to(torch.uint8))
    pipeline.run(compose("data=digits", "data.binarise=dynamic"))
    assert seen == {"encoded": {0, 255}, "classified": {0, 255}}
