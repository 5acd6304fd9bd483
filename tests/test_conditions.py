"""What networks are given beside the time: labels, a vector, nothing."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand import CPU, Noise, plain, posterior_of, random_covariance
from own_sources import AngleNet, digits_with_angles

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.coupled import groups_of
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.laplace.objective import OfLikelihood
from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.likelihoods import Bernoulli
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import Embedding, Labels, repeated, values_of
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.runs.build import build
from bayesdiff.runs.setup import starts
from bayesdiff.solvers import Euler
from bayesdiff.storage.same_kind import kind_of
from bayesdiff.uncertainty import Start, starts_of
from bayesdiff.uncertainty.members.ensemble import Ensemble

SOURCE = "data.source._target_=own_sources.digits_with_angles"
OWN_NET = ("net._target_=own_sources.AngleNet", "+net.width=6")
SHOWN = "callbacks.samples={_target_:bayesdiff.report.sample_grid.SampleGrid,grids:1}"


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


def test_training_hides_a_share_of_the_vectors(data, monkeypatch):
    condition = Embedding(data.test_embeddings, empty=(7.0, 7.0))
    model = GenerativeModel(
        AngleNet(1, 2), CondOT(), "velocity", torch.optim.SGD, None, 0.3, condition=condition
    )
    seen = []
    real = model.net.features
    monkeypatch.setattr(model.net, "features", lambda x, t, y: (seen.append(y), real(x, t, y))[1])
    monkeypatch.setattr(GenerativeModel, "trainer", SimpleNamespace(world_size=1))
    given = data.embeddings[:1000]
    model._loss(torch.zeros(1000, 1, 8, 8), given, 0, slice(0, None, 1))
    hidden = (seen[0] == 7).all(1)
    assert 0.25 < hidden.double().mean() < 0.35
    assert torch.equal(seen[0][~hidden], given[~hidden])
    model.eval()._loss(torch.zeros(1000, 1, 8, 8), given, 0, slice(None))
    assert torch.equal(seen[1], given), "nothing is hidden in validation"


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


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_maps_of_a_model_with_vectors_are_those_of_its_members(data, model, guidance):
    """Features are guided before the head; the truth guides outputs, member by member."""
    posterior = posterior_of(model.net.head, random_covariance(7, 0.3))
    solver, numbers = Euler(4, guidance=guidance), [2, 11, 40]
    vectors = model.condition.of_samples(numbers).double()
    noise = Noise(3, (1, 8, 8))
    start = Start(model, solver, vectors, noise, CPU)
    ensemble = Ensemble(members=5, seed=3)
    with torch.no_grad():
        found = ensemble(start, posterior)
    images = brute_force(
        model, solver, ensemble.weights(posterior), vectors, Noise(3, (1, 8, 8))(),
        [0.0, 0.25, 0.5, 0.75, 1.0],
    )  # fmt: skip
    torch.testing.assert_close(found.variance, images.var(0), rtol=1e-6, atol=1e-12)
    mean = brute_force(
        model, solver, [head_matrix(model.net.head)], vectors, Noise(3, (1, 8, 8))(),
        [0.0, 0.25, 0.5, 0.75, 1.0],
    )  # fmt: skip
    torch.testing.assert_close(found.images, mean[0], rtol=1e-6, atol=1e-9)
    assert start.nfe == (4 if guidance == 1 else 8)


def test_other_vectors_give_other_images_and_the_classes_of_their_test_images(data, model):
    starts = starts_of(model.float(), Euler(3), 0, (1, 8, 8), CPU)
    start = starts([0, 1])
    other = replace(start, condition=start.condition.flip(0))
    with torch.no_grad():
        assert not torch.allclose(plain(start), plain(replace(other, noise=starts([0, 1]).noise)))
    model.double()
    assert torch.equal(start.labels, model.condition.classes[:2])


def test_the_pass_over_the_data_gives_every_image_its_vector(monkeypatch):
    """Images are as bright as their vectors are long."""
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, 8, 8)
    vectors = torch.arange(9.0)[:, None].expand(9, 2)
    model = GenerativeModel(
        AngleNet(1, 2), CondOT(), "velocity", torch.optim.SGD, condition=Embedding(vectors)
    )
    data = SimpleNamespace(embeddings=vectors)
    seen, real = [], model.corrupt
    monkeypatch.setattr(model, "corrupt", lambda x, *rest: (seen.append(x), real(x, *rest))[1])
    given = values_of(model.condition, data)
    drawn = [draw.y for draw in draws_of(model, images, given, batch_size=4)]
    bright = torch.cat([(x[:, 0, 0, 0] + 1) * 127.5 for x in seen])
    torch.testing.assert_close(torch.cat(drawn)[:, 0], bright, rtol=0, atol=1e-3)
    assert sorted(bright.round().tolist()) == list(range(9))
    found = fit_curvature(model, images, given, source="test", batch_size=4)
    others = fit_curvature(model, images, given.flip(0), source="test", batch_size=4)
    assert not torch.equal(found.gram, others.gram)


class Both(Labels):
    """Classes, beside values of its own: even classes are asked for alone."""

    def of_samples(self, numbers):
        return 2 * super().of_samples(numbers) % self.num_classes


def both(data, num_classes="auto"):
    """The ``_target_`` of a condition that is not this package's and has classes."""
    return Both(data.num_classes)


def test_a_condition_of_ones_own_reaches_the_model_with_classes_too(compose):
    run = pipeline.prepare(compose("model.condition._target_=test_conditions.both"))[0]
    assert type(run.model.condition).__name__ == "Both" and run.model.num_classes == 10
    assert starts(run, Euler(2))([1, 2]).labels.tolist() == [2, 4]


def test_a_condition_that_a_network_needs_is_given_where_its_head_is_looked_at():
    model = GenerativeModel(
        AngleNet(1, 2), CondOT(), "data", torch.optim.SGD, condition=Embedding(torch.ones(3, 2)),
        likelihood=Bernoulli(),
    )  # fmt: skip
    assert groups_of(model, (1, 8, 8), OfLikelihood(Bernoulli())).tolist() == [[0]]


def test_weights_of_another_empty_vector_are_of_another_kind():
    config = {"net": {}, "model": {"condition": {"_target_": "x", "empty": [0.0, 1.0]}}}
    assert "model.condition.empty" in kind_of(config)


@pytest.mark.parametrize("net", [OWN_NET, ("net=tiny",)], ids=["own", "unet"])
def test_a_whole_run_on_vectors(compose, net):
    """Training, guided samples, maps, scores and figures, from the command line's options."""
    options = (SOURCE, "condition=embedding", "solver.guidance=1.5", "model.class_dropout=0.5")
    result = pipeline.run(compose(*options, *net, SHOWN))
    assert result.metrics["nfe"] == 2 * 8  # as below, with the vectors and without them
    assert any(name.startswith("fid@12") for name in result.metrics)
    assert (result.folder / "figures").is_dir()


def test_without_labels_there_are_vectors_all_the_same(compose):
    options = (SOURCE, "+data.source.labelled=false", "metrics.num_images=0")
    result = pipeline.run(compose(*options, "condition=embedding", "metrics.num_images=0"))
    assert result.metrics["nfe"] == 8  # image and two members, whose first step is one


def test_data_with_vectors_can_be_conditioned_on_labels_or_nothing(compose):
    assert build(compose(SOURCE)).model.condition.num_classes == 10
    assert build(compose(SOURCE, "model.num_classes=null")).model.condition is None
    assert build(compose(SOURCE, "model.condition=null")).model.condition is None


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("condition=embedding",), "data set digits has none"),
        ((SOURCE, "condition=embedding", "model.num_classes=10"), "leave it at auto"),
        ((SOURCE, "condition=embedding", "+model.condition.empty=[1]"), "1 numbers"),
        ((SOURCE, *OWN_NET), "takes no num_classes"),
        ((SOURCE, "condition=embedding", "uncertainty.labels=[3]"), "condition=labels"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_any_work(compose, options, fragment):
    with pytest.raises(UserError, match=fragment):
        pipeline.prepare(compose(*options))


def test_a_network_for_another_condition_is_refused(data):
    with pytest.raises(UserError, match="embedding_size=3 and the model has embedding_size=2"):
        GenerativeModel(
            UNet(1, 8, channels=(8, 16), embedding_size=3), CondOT(), "velocity",
            torch.optim.SGD, condition=Embedding(data.test_embeddings),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda v: v.double(), "float64"),
        (lambda v: v[:-1], "a vector for each image"),
        (lambda v: v.log(), "nan or inf"),
        (lambda v: v[:, :1], "give both the same"),
    ],
)
def test_vectors_that_do_not_fit_the_images_are_refused(data, change, fragment):
    parts = (data.images, data.labels, data.test_images, data.test_labels, data.classes)
    with pytest.raises(UserError, match=fragment):
        ImageData.build("angles", *parts, (change(data.embeddings), data.test_embeddings))


def test_the_fingerprint_follows_the_vectors(data):
    parts = (data.images, data.labels, data.test_images, data.test_labels, data.classes)
    without = ImageData.build("angles", *parts)
    moved = ImageData.build("angles", *parts, (data.embeddings + 1, data.test_embeddings))
    assert len({data.fingerprint, without.fingerprint, moved.fingerprint}) == 3
