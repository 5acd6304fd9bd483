"""The curvature pass against a plain loop in float64, and the callback that runs it."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.laplace import training_draws as draws_module
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.laplace.record import Curvature, TimeBins
from bayesdiff.machine import ranks
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.storage.checked_file import checksum


class Spied(nn.Module):
    """A U-Net that remembers what it was asked; features and head in float64."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, net.head.double()
        self.seen = []

    def features(self, x, t, y=None):
        features = self.net.features(x, t, y).double()
        self.seen.append((x, t, y, features))
        return features

    def fold(self, output):
        return self.net.fold(output)

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


class SpiedPath:
    """A path that remembers the times at which it was asked for coefficients."""

    def __init__(self, path):
        self.path, self.seen = path, []
        self.family, self.last_time = path.family, path.last_time

    def coefficients(self, t):
        self.seen.append(t)
        return self.path.coefficients(t)

    def training_times(self, uniform):
        return self.path.training_times(uniform)


def unet(patch=1, size=4, channels=1, classes=3, **options):
    torch.manual_seed(0)
    net = UNet(channels, size, classes, (4, 8), blocks=1, patch=patch, **options)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def tiny(patch=1, size=4, channels=1, path=None, prediction="velocity", classes=3, **options):
    net = Spied(unet(patch, size, channels, classes, **options))
    path = path or CondOT()
    return GenerativeModel(net, path, prediction, torch.optim.SGD, classes)


def pictures(count=7, channels=1, size=4):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator).byte()
    return images, torch.arange(count) % 3


@torch.no_grad()
def plain_loop(model):
    """Gram matrix and squared error of everything the network saw, pixel by pixel.

    The noise is recovered from x_t, so the residual does not rest on the code under test.
    """
    head = model.net.head
    k = head.kernel_size[0]
    total, squared = 0.0, 0.0
    for x_t, t, _, features in model.net.seen:
        for i in range(len(x_t)):
            rows = F.unfold(features[i : i + 1], k, padding=k // 2)[0].T
            for row in rows:
                phi = torch.cat([row, row.new_ones(1)]) if head.bias is not None else row
                total = total + torch.outer(phi, phi)
            output = model.net.fold(head(features[i : i + 1]))
            squared = squared + residual(model, x_t[i], float(t[i]), output[0])
    return total, float(squared)


def residual(model, x_t, t, output):
    """Squared error for a flow whose image is known, x_t = t x_1 + (1 - t) x_0."""
    x_1 = model.truth[tuple(x_t.shape)](x_t, t)
    x_0 = (x_t.double() - t * x_1) / (1 - t)
    return (output - (x_1 - x_0)).square().sum()


def with_one_image(model, images):
    """All images alike: the loop then knows x_1 whatever the order."""
    picture = images[:1].expand(len(images), -1, -1, -1).contiguous()
    x_1 = picture[0].double() / 127.5 - 1
    model.truth = {tuple(x_1.shape): lambda x_t, t: x_1}
    return picture


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 8, "patch": 2},
        {"size": 8, "head_kernel": 1, "patch": 2, "channels": 3},
        {"size": 8, "patch": 2, "channels": 3},
    ],
    ids=["3x3", "patch", "1x1-rgb", "patch-rgb"],
)
def test_the_pass_equals_a_plain_loop_over_images_and_pixels(options):
    model = tiny(**options)
    size, channels = options.get("size", 4), options.get("channels", 1)
    images, labels = pictures(5, channels, size)
    images = with_one_image(model, images)
    found = fit_curvature(model, images, labels, source="a", batch_size=2)
    gram, squared = plain_loop(model)
    torch.testing.assert_close(found.gram, gram, rtol=1e-10, atol=1e-10 * float(gram.max()))
    assert found.squared_error == pytest.approx(squared, rel=1e-4)
    assert found.num_outputs == images.numel() and found.num_images == 5
    assert found.sigma_mle == pytest.approx(math.sqrt(squared / images.numel()), rel=1e-4)
    assert torch.equal(found.mean, head_matrix(model.net.head))
    assert found.gram.dtype == torch.float64 and torch.equal(found.gram, found.gram.T)
    if model.net.head.bias is not None:
        positions = (size // options.get("patch", 1)) ** 2
        assert found.gram[-1, -1] == 5 * positions


@pytest.mark.parametrize("patch", [1, 2])
def test_the_matrix_is_the_hessian_of_the_loss(patch):
    """Half the summed squared error in the head's weights: I_C (x) G, by autograd."""
    model = tiny(patch, 4 * patch)
    images, labels = pictures(3, size=4 * patch)
    found = fit_curvature(model, images, labels, source="a", batch_size=2)
    head, seen = model.net.head, model.net.seen
    shape, outputs = head.weight.shape, len(head.weight)

    def loss(flat):
        matrix = flat.view(outputs, -1)
        weight, bias = matrix[:, :-1].reshape(shape), matrix[:, -1]
        return sum(
            0.5 * model.net.fold(F.conv2d(features.clone(), weight, bias, padding=1)).sub(0.3)
            .square().sum()
            for *_, features in seen
        )  # fmt: skip

    hessian = torch.autograd.functional.hessian(loss, head_matrix(head).flatten())
    expected = torch.block_diag(*[found.gram] * outputs)
    torch.testing.assert_close(hessian, expected, rtol=1e-9, atol=1e-9 * float(found.gram.max()))


def test_draws_are_divided_out():
    """The sum over all draws, divided by their number: the same scale, less noise."""
    images, labels = pictures()
    model = tiny()
    images = with_one_image(model, images)
    once = fit_curvature(model, images, labels, source="a", batch_size=4)
    model.net.seen.clear()
    thrice = fit_curvature(model, images, labels, source="a", batch_size=4, draws=3)
    assert len(model.net.seen) == 2 * 3
    gram, squared = plain_loop(model)
    torch.testing.assert_close(thrice.gram, gram / 3, rtol=1e-10, atol=1e-9)
    assert thrice.squared_error == pytest.approx(squared / 3, rel=1e-4)
    assert (thrice.num_images, thrice.num_outputs) == (once.num_images, once.num_outputs)
    assert thrice.gram[-1, -1] == once.gram[-1, -1]
    assert float(thrice.gram.trace() / once.gram.trace()) == pytest.approx(1, abs=0.3)
    inputs = [x for x, *_ in model.net.seen]
    assert all(not torch.equal(a, b) for a, b in zip(inputs[:2], inputs[1:3], strict=True))


@pytest.mark.parametrize("path", [CondOT(), VariancePreserving("cosine")], ids=["flow", "vp"])
def test_times_are_uniform_and_the_network_sees_those_of_the_path(path):
    """Stratified in each batch, never beyond the path's last training time."""
    spied = SpiedPath(path)
    model = tiny(path=spied, prediction="v")
    images, labels = pictures(64)
    fit_curvature(model, images, labels, source="a", batch_size=32, draws=2)
    for (_, t, _, _), asked in zip(model.net.seen, spied.seen, strict=True):
        torch.testing.assert_close(t, asked)
        assert t.max() <= path.last_time and t.min() >= 0
        gaps = t.sort().values.diff() / path.last_time
        torch.testing.assert_close(gaps, torch.full((31,), 1 / 32), rtol=1e-3, atol=1e-5)
        assert (t.diff() < 0).sum() > 5, "times are not tied to the order of images"


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_and_add_up_to_the_same_sums(monkeypatch, processes):
    images, labels = pictures(11)
    model = tiny()
    alone = fit_curvature(model, images, labels, source="a", batch_size=3, draws=2)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(draws_module, "dealt", lambda work, rank=rank: work[rank::processes])
        model.net.seen.clear()
        parts.append(fit_curvature(model, images, labels, source="a", batch_size=3, draws=2))
        assert 0 < len(model.net.seen) < 8
    total = sum(part.gram for part in parts)
    torch.testing.assert_close(total, alone.gram, rtol=1e-12, atol=1e-10)
    squared = sum(part.squared_error for part in parts)
    assert squared == pytest.approx(alone.squared_error, rel=1e-12)
    for part in parts:
        assert (part.num_images, part.num_outputs) == (11, images.numel())


def test_a_subset_is_random_and_of_the_asked_size():
    images, labels = pictures(9)
    values = torch.arange(9, dtype=torch.uint8)
    model = tiny()
    found = fit_curvature(model, images, labels, source="a", num_images=4, seed=1)
    assert found.num_images == 4 and found.num_outputs == 4 * 16
    assert sum(len(x) for x, *_ in model.net.seen) == 4
    chosen = model.net.seen[0][2]
    fit_curvature(model, images, values.long() % 3, source="a", num_images=4, seed=2)
    assert not torch.equal(chosen, model.net.seen[1][2])


def test_labels_reach_the_network_with_their_images():
    """Label and image are taken by one order: image i is grey level 80 * (i mod 3)."""
    labels = torch.arange(12) % 3
    images = (80 * labels).byte().view(12, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    model = tiny()
    fit_curvature(model, images, labels, source="a", batch_size=5)
    for x_t, t, y, _ in model.net.seen:
        late = t > 0.9
        grey = ((x_t.mean((1, 2, 3)) / t + 1) * 127.5 / 80)[late]
        assert torch.equal(grey.round().long(), y[late])
    seen = torch.cat([y for _, _, y, _ in model.net.seen])
    assert torch.equal(seen.sort().values, labels.sort().values)


@pytest.mark.parametrize("classes", [None, 3])
def test_data_or_models_without_labels_are_passed_none(classes):
    images, labels = pictures(4)
    model = tiny(classes=classes)
    fit_curvature(model, images, None if classes else labels, source="a")
    assert [y for _, _, y, _ in model.net.seen] == [None]


def test_the_model_is_left_in_the_mode_it_was_in():
    images, labels = pictures(4)
    for training in (True, False):
        model = tiny(dropout=0.5).train(training)
        weights = [p.clone() for p in model.parameters()]
        first = fit_curvature(model, images, labels, source="a")
        assert model.training is training and model.net.net.up[0].training is training
        again = fit_curvature(model, images, labels, source="a")
        assert torch.equal(first.gram, again.gram), "dropout is off, and draws are fixed"
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_other_seeds_give_other_sums():
    images, labels = pictures(4)
    grams = [fit_curvature(tiny(), images, labels, source="a", seed=s).gram for s in (0, 0, 1)]
    assert torch.equal(grams[0], grams[1]) and not torch.equal(grams[0], grams[2])


def test_single_precision_is_close_to_double():
    """The U-Net as users run it; features of 1e-7 accuracy give sums of the same."""
    net = unet(patch=2, size=8)
    images, labels = pictures(6, size=8)
    single = GenerativeModel(net, CondOT(), "velocity", torch.optim.SGD, 3)
    found = fit_curvature(single, images, labels, source="a")
    double = GenerativeModel(Spied(unet(2, 8)), CondOT(), "velocity", torch.optim.SGD, 3)
    exact = fit_curvature(double, images, labels, source="a")
    torch.testing.assert_close(
        found.gram, exact.gram, rtol=1e-4, atol=1e-5 * float(exact.gram.max())
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"draws": 0}, "laplace.draws"),
        ({"batch_size": 0}, "laplace.batch_size"),
        ({"num_images": 0}, "laplace.num_images"),
        ({"num_images": 8}, "laplace.num_images=8"),
        ({"num_images": 2.5}, "laplace.num_images"),
        ({"time_bins": 0}, "laplace.time_bins"),
        ({"time_bins": 8}, "laplace.time_bins=8"),
        ({"time_bins": 4, "num_images": 3}, "laplace.time_bins=4"),
    ],
)
def test_a_pass_that_cannot_work_is_refused(options, named):
    images, labels = pictures(7)
    with pytest.raises(UserError, match=named) as refused:
        fit_curvature(tiny(), images, labels, source="a", **options)
    assert "\n" not in str(refused.value)


def test_features_that_are_not_finite_are_refused():
    model = tiny()
    model.net.net.norm.weight.data[0] = math.nan
    images, labels = pictures(3)
    with pytest.raises(UserError, match="not finite"):
        fit_curvature(model, images, labels, source="a")


@pytest.fixture
def data():
    images, labels = pictures(12, size=8)
    built = ImageData.build(
        "made", images[:8], labels[:8], images[8:], labels[8:], ("a", "b", "c")
    )
    return ImageDataModule(built, batch_size=4)


def trainable():
    net = unet(patch=2, size=8)
    return GenerativeModel(
        net, CondOT(), "velocity", lambda p: torch.optim.AdamW(p, 1e-3), 3, warmup_steps=0
    )


def trained(folder, data, callbacks, logger=False):
    model = trainable()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model


def count_passes(monkeypatch):
    passes = []

    def counted(*args, **options):
        passes.append(options)
        return fit_curvature(*args, **options)

    monkeypatch.setattr("bayesdiff.laplace.callback.fit_curvature", counted)
    return passes


def test_the_callback_fits_the_trained_weights_and_logs_what_it_found(tmp_path, data):
    path = tmp_path / "curvature.safetensors"
    logger = TensorBoardLogger(tmp_path)
    callback = LastLayerLaplace(path, prior_precision=2.0, n_eff=100, draws=2, batch_size=4)
    model = trained(tmp_path, data, [callback], logger)
    again = fit_curvature(
        model, data.data.images, data.data.labels, source="a", draws=2, batch_size=4
    )
    torch.testing.assert_close(callback.posterior.curvature.gram, again.gram)
    assert torch.equal(callback.posterior.curvature.mean, head_matrix(model.net.head))
    assert torch.equal(Curvature.load(path).gram, callback.posterior.curvature.gram)
    statistics = callback.statistics()
    eigenvalues = torch.linalg.eigvalsh(again.gram).clamp(min=0) * 100 / 8 / again.sigma_mle**2
    assert statistics["laplace/parameters"] == 9 * 4 + 1 == len(eigenvalues)
    assert statistics["laplace/effective_parameters"] == pytest.approx(
        float((eigenvalues / (eigenvalues + 2)).sum()), rel=1e-4
    )
    assert statistics["laplace/eigenvalue_max"] == pytest.approx(
        float(eigenvalues.max()), rel=1e-4
    )
    assert statistics["laplace/sigma_noise"] == pytest.approx(again.sigma_mle, rel=1e-5)
    assert statistics["laplace/prior_precision"] == 2 and statistics["laplace/n_eff"] == 100
    assert statistics["laplace/distance_from_optimum"] == callback.posterior.distance > 0
    logger.experiment.flush()
    logged = scalars(logger.log_dir)
    assert logged.keys() >= statistics.keys()
    for name, value in statistics.items():
        assert logged[name] == pytest.approx(value, rel=1e-5, abs=1e-30)


def test_the_callback_sees_averaged_weights(tmp_path, data):
    averaging, callback = EMAWeightAveraging(decay=0.5), LastLayerLaplace()
    model = trained(tmp_path, data, [averaging, callback])
    raw = trained(tmp_path, data, [])
    mean = callback.posterior.curvature.mean
    assert torch.equal(mean, head_matrix(model.net.head))
    assert not torch.equal(mean, head_matrix(raw.net.head))


def test_what_would_fail_after_training_is_refused_before(tmp_path, data):
    with pytest.raises(UserError, match="laplace.structure"):
        LastLayerLaplace(structure="lowrank")
    with pytest.raises(UserError, match="laplace.sigma_noise"):
        LastLayerLaplace(sigma_noise=-1.0)
    with pytest.raises(UserError, match="needs laplace.time_bins >= 2"):
        LastLayerLaplace(sigma_noise="mle_per_time")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[LastLayerLaplace()],
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())]
    with pytest.raises(UserError, match="datamodule.data.images"):
        trainer.fit(trainable(), loader)
    for options, words in (
        ({"structure": "subspace", "rank": 38}, "rank=38 is more than the 37 weights"),
        ({"structure": "empirical_fisher"}, "needs 10 images or more, got 8"),
        ({"time_bins": 9}, "time_bins=9 is more than the 8 images"),
        ({"num_images": 9}, "num_images=9 is more"),
    ):
        trainer.callbacks[0] = LastLayerLaplace(**options)
        with pytest.raises(UserError, match=words):
            trainer.fit(trainable(), datamodule=data)
    trainer.callbacks[0] = LastLayerLaplace()
    model = trainable()
    model.net.head = nn.Sequential(model.net.head)
    with pytest.raises(UserError, match="the head is a Sequential"):
        trainer.fit(model, datamodule=data)


def scalars(folder):
    """Last value of every scalar that TensorBoard finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


def test_a_kept_curvature_of_the_same_weights_is_used_again(tmp_path, data, monkeypatch):
    path = tmp_path / "curvature.safetensors"
    passes = count_passes(monkeypatch)
    model = trainable()
    first = LastLayerLaplace(path, prior_precision=1.0).fit(model, data.data)
    written = path.stat().st_mtime_ns
    second = LastLayerLaplace(path, structure="diag", sigma_noise=0.5, prior_precision="evidence")
    posterior = second.fit(model, data.data)
    assert len(passes) == 1 and path.stat().st_mtime_ns == written
    assert torch.equal(posterior.curvature.gram, first.curvature.gram)
    assert posterior.structure == "diag" and posterior.sigma_noise == 0.5


def test_other_draws_or_images_are_a_new_pass(tmp_path, data, monkeypatch):
    path = tmp_path / "curvature.safetensors"
    passes = count_passes(monkeypatch)
    model = trainable()
    for options in ({}, {"draws": 2}, {"num_images": 5}, {"seed": 1}, {"time_bins": 2}):
        LastLayerLaplace(path, **options).fit(model, data.data)
        kept = Curvature.load(path)
        assert kept.draws == options.get("draws", 1)
        assert kept.num_images == options.get("num_images", 8)
        assert (kept.bins is None) is ("time_bins" not in options)
    assert len(passes) == 5
    LastLayerLaplace(path, time_bins=2, sigma_noise="mle_per_time").fit(model, data.data)
    assert len(passes) == 5


def write_as(version, curvature, path):
    """The file as that version wrote it: without the sums that came later."""
    curvature.save(path)
    later = ["gradient", "bins.gradient"]
    if version == 1:
        later += ["squared_gradients", *(f"bins.{name}" for name in TimeBins.__annotations__)]
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), [n for n in file.keys() if n not in later]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    metadata["format"] = f"bayesdiff-curvature-{version}"
    metadata["checksum"] = checksum(tensors, metadata["record"])
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("time_bins", [1, 2])
def test_a_file_of_an_older_version_is_made_again_with_a_word(
    version, time_bins, tmp_path, data, monkeypatch, caplog
):
    path = tmp_path / "curvature.safetensors"
    passes = count_passes(monkeypatch)
    model = trainable()
    first = LastLayerLaplace(path, time_bins=time_bins).fit(model, data.data).curvature
    write_as(version, first, path)
    old = Curvature.load(path)
    assert old.gradient is None and old.bins is None and torch.equal(old.gram, first.gram)
    assert (old.squared_gradients is None) == (version == 1)
    with caplog.at_level("INFO", "bayesdiff"):
        again = LastLayerLaplace(path, time_bins=time_bins).fit(model, data.data).curvature
    assert len(passes) == 2 and "made again" in caplog.text
    assert again.source == first.source and torch.equal(again.gram, first.gram)
    kept = Curvature.load(path)
    assert torch.equal(kept.gradient, first.gradient)
    assert torch.equal(kept.squared_gradients, first.squared_gradients)
    assert (kept.bins is None) == (time_bins == 1)


def test_a_posterior_that_sees_no_data_has_no_evidence_to_log(data):
    callback = LastLayerLaplace(structure="prior_only")
    callback.fit(trainable(), data.data)
    statistics = callback.statistics()
    assert "laplace/log_evidence" not in statistics
    assert "laplace/distance_from_optimum" not in statistics
    assert "laplace/effective_parameters" in statistics


def test_the_curvature_of_another_checkpoint_or_data_set_is_refused(tmp_path, data, monkeypatch):
    path = tmp_path / "curvature.safetensors"
    passes = count_passes(monkeypatch)
    model = trainable()
    LastLayerLaplace(path).fit(model, data.data)
    kept = path.read_bytes()
    changed = trainable()
    next(changed.parameters()).data[0] += 1e-3
    with pytest.raises(UserError, match="delete the file"):
        LastLayerLaplace(path).fit(changed, data.data)
    images, labels = pictures(12, size=8)
    other = ImageData.build("made", images, labels, images, labels, ("a", "b", "c"))
    with pytest.raises(UserError, match="delete the file"):
        LastLayerLaplace(path, draws=2).fit(model, other)
    assert path.read_bytes() == kept and len(passes) == 1


def test_without_a_path_the_curvature_stays_in_memory(tmp_path, data):
    callback = LastLayerLaplace()
    assert callback.statistics() == {}
    posterior = callback.fit(trainable(), data.data)
    assert posterior is callback.posterior and callback.statistics()
    assert not list(tmp_path.iterdir())
    features = torch.randn(2, 4, 4, 4)
    assert posterior.predictive_variance(features).shape == (2, 1, 4, 4)


def test_work_is_dealt_to_every_process_once(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.dealt(list("abcdefg")))
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
