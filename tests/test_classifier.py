import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from bayesdiff.checks import UserError
from bayesdiff.metrics.classifier import (
    Classifier,
    cache_path,
    load_classifier,
    load_or_train,
    train_classifier,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Tiny batches gain nothing from threads and lose much when the cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_classes(size=64, *, channels=1, side=8, seed=0):
    """Dark images with label 0, bright ones with label 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=generator)
    noise = torch.randint(0, 100, (size, channels, side, side), generator=generator)
    return (noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def dataset(**changes):
    images, labels = two_classes()
    test_images, test_labels = two_classes(32, seed=1)
    record = dict(
        images=images,
        labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=2,
        name="toy",
        images_fingerprint="abc",
    )
    return SimpleNamespace(**{**record, **changes})


def weights(network):
    return torch.cat([value.flatten().float() for value in network.state_dict().values()])


def test_digits_held_out_accuracy():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    network = train_classifier(
        images[train], labels[train], images[test], labels[test], 10, seed=0, epochs=15
    )
    with torch.no_grad():
        guesses = network(images[test]).argmax(1)
    assert network.test_accuracy == pytest.approx((guesses == labels[test]).double().mean())
    assert network.test_accuracy >= 0.97


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 16), (1, 28), (3, 33), (3, 64)])
def test_every_size_gives_the_same_feature_length(channels, side):
    images, labels = two_classes(4, channels=channels, side=side)
    network = train_classifier(images, labels, None, None, 2, seed=0, epochs=1)
    with torch.no_grad():
        features = network.features(images)
        torch.testing.assert_close(network(images), network.head(features))
    assert features.shape == (4, 128) and features.dtype == torch.float32
    assert not network.training and math.isnan(network.test_accuracy)


def test_same_seed_same_weights_and_the_global_state_is_kept():
    images, labels = two_classes()
    state = torch.get_rng_state()
    first, again, other = (
        train_classifier(images, labels, None, None, 2, seed=seed, epochs=2) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_cache_gives_the_same_network_without_training(tmp_path, monkeypatch):
    data = dataset()
    trained = load_or_train(tmp_path, data, 0, epochs=2)
    (file,) = tmp_path.glob("[!.]*")
    assert file == cache_path(tmp_path, "abc", 0, 2) and file.match("classifier-*.safetensors")
    with safe_open(file, framework="pt") as stored:
        facts = json.loads(stored.metadata()["record"])
    assert facts["test_accuracy"] == trained.test_accuracy and facts["fingerprint"] == "abc"

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("bayesdiff.metrics.classifier.train_classifier", refuse)
    cached = load_or_train(tmp_path, data, 0, epochs=2)
    assert torch.equal(weights(cached), weights(trained))
    assert cached.test_accuracy == trained.test_accuracy and not cached.training
    for changed in (dataset(images_fingerprint="abd"), data):
        with pytest.raises(AssertionError, match="trained again"):
            load_or_train(tmp_path, changed, 0 if changed is not data else 1, epochs=2)


@pytest.mark.parametrize(
    "damage", ["text", "truncated", "one byte", "other network", "no metadata"]
)
def test_damaged_cache_file_is_trained_again_with_a_warning(tmp_path, caplog, damage):
    from safetensors.torch import save_file

    data = dataset()
    good = load_or_train(tmp_path, data, 0, epochs=2)
    (file,) = tmp_path.glob("[!.]*")
    if damage == "text":
        file.write_text("not tensors")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "one byte":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "no metadata":
        save_file(Classifier(1, 2).state_dict(), file)
    else:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        save_file(Classifier(3, 7).state_dict(), file, metadata=metadata)
    with caplog.at_level(logging.WARNING):
        repaired = load_or_train(tmp_path, data, 0, epochs=2)
    assert "delete it to train it again; done now" in caplog.text
    assert torch.equal(weights(repaired), weights(good))
    assert torch.equal(weights(load_classifier(file)), weights(good))
    assert list(tmp_path.glob("[!.]*")) == [file]


@pytest.mark.parametrize("changes", [{"labels": None}, {"num_classes": 1}])
def test_data_without_classes_is_refused_with_the_cure(tmp_path, changes):
    with pytest.raises(UserError, match="toy.*metrics.features=inception") as refusal:
        load_or_train(tmp_path, dataset(**changes), 0)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())
