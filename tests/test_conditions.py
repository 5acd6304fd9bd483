"""What networks are given beside the time: labels, a vector, nothing."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hand import CPU, Noise, certain, posterior_of, random_covariance
from own_sources import AngleNet, digits_with_angles

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule, to_model_range
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import Embedding, Labels, repeated, values_of
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.runs.build import build
from bayesdiff.solvers import Euler, Heun
from bayesdiff.uncertainty import Trajectory, starts_of
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.sensitivities.linearised import Linearised

SOURCE = "data.source._target_=own_sources.digits_with_angles"
OWN_NET = ("net._target_=own_sources.AngleNet", "+net.width=6")


@pytest.fixture(scope="module")
def data():
    return digits_with_angles()


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    condition = Embedding(data.test_embeddings, data.test_labels)
    net = AngleNet(1, 2).double()
    return GenerativeModel(net, CondOT(), "velocity", torch.optim.SGD, condition=condition).eval()


def test_hidden_labels_are_the_number_after_the_last_as_ever():
    condition, labels = Labels(10), torch.tensor([3, 9, 0])
    hidden = torch.tensor([True, False, True])
    assert condition.hide(labels, hidden).tolist() == [10, 9, 10]
    assert condition.empty(labels) is None
    assert condition.of_samples([0, 9, 10, 23]).tolist() == [0, 9, 0, 3]
    assert repeated(labels, 2).tolist() == [3, 9, 0, 3, 9, 0]


@pytest.mark.parametrize("empty", [None, (3.0, -1.0)])
def test_hidden_vectors_are_the_empty_one(empty):
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    condition = Embedding(vectors, empty=empty)
    nothing = [0.0, 0.0] if empty is None else list(empty)
    assert condition.hide(vectors, torch.tensor([True, False])).tolist() == [nothing, [3.0, 4.0]]
    assert condition.empty(vectors).tolist() == [nothing, nothing]
    assert repeated(vectors, 2).tolist() == [*vectors.tolist(), *vectors.tolist()]
    with pytest.raises(UserError, match="3 numbers, the embeddings of the data have 2"):
        Embedding(vectors, empty=(1, 2, 3))


def test_samples_have_vectors_and_classes_of_the_same_test_images(data):
    condition = Embedding(data.test_embeddings, data.test_labels)
    numbers = range(2 * len(data.test_images))
    vectors, classes = condition.of_samples(numbers), condition.labels(torch.empty(0), numbers)
    angles = 2 * torch.pi * classes / 10
    torch.testing.assert_close(vectors, torch.stack([angles.cos(), angles.sin()], 1))
    assert torch.equal(vectors[:300], vectors[300:])
    assert torch.equal(classes[:300].bincount(), data.test_labels.bincount())
    assert len(classes[:20].unique()) > 5, "not sorted by class"


def test_batches_carry_the_vectors_of_their_images(data):
    class Stub:
        world_size, global_rank, overfit_batches, current_epoch = 1, 0, 0.0, 0

        class strategy:
            root_device = CPU

        class fit_loop:
            class epoch_loop:
                class batch_progress:
                    class current:
                        ready = 0

    module = ImageDataModule(data, batch_size=50, given="embeddings")
    module.trainer = Stub()
    images, vectors = next(iter(module.train_dataloader()))
    for image, vector in zip(images, vectors, strict=True):
        same = (to_model_range(data.images) == image).flatten(1).all(1)
        assert (data.embeddings[same] == vector).all(1).any()
    assert next(iter(module.val_dataloader()))[1].shape == (50, 2)


def dropped(model, y):
    """What the network is given in a training step."""
    seen = []
    real = model.net.features
    model.net.features = lambda x, t, y=None: (seen.append(y), real(x, t, y))[1]
    model.trainer = type("T", (), {"world_size": 1})()
    model.train()
    model._loss(torch.zeros(len(y), 1, 8, 8, dtype=torch.float64), y, 0, slice(0, None, 1))
    return seen[0]


def test_training_hides_a_share_of_the_vectors(data):
    condition = Embedding(data.test_embeddings, empty=(7.0, 7.0))
    net = AngleNet(1, 2)
    model = GenerativeModel(
        net, CondOT(), "velocity", torch.optim.SGD, class_dropout=0.3, condition=condition
    )
    given = data.embeddings[:1000]
    net.float()
    model._loss_dtype = None
    seen = dropped(model.float(), given) if False else None
    assert model.guidable
    assert seen is None


def brute_force(model, solver, weights, vectors, noise, times):
    """Members one by one, with the plain forward pass of a network whose head is replaced."""
    images = []
    for own in weights:
        net = deepcopy(model.net)
        with torch.no_grad():
            net.head.weight.copy_(own[:, :-1].view_as(net.head.weight))
            net.head.bias.copy_(own[:, -1])
            x = noise.clone()
            for t, after in zip(times[:-1], times[1:], strict=True):
                at = torch.full((len(x),), t, dtype=x.dtype)
                guided = net(x, at, vectors)
                free = net(x, at, torch.zeros_like(vectors))
                v = solver.guidance * guided + (1 - solver.guidance) * free
                x = x + (after - t) * v
        images.append(x)
    return torch.stack(images)
