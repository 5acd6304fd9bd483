"""Rivals that are not Laplace: MC dropout, deep ensembles, snapshots of a training, SWAG."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import (
    CPU,
    SCALE,
    SOLVERS,
    Double,
    Hand,
    M,
    curved,
    model_of,
    plain,
    posterior_of,
    random_covariance,
    real_start,
    small_unet,
    start_of,
)
from test_bad_input import check_line, refused
from test_resume import SETTINGS, fit, stop_at
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.head import head_matrix
from bayesdiff.solvers import DDIM, Euler, SampleNoise
from bayesdiff.storage.checked_file import save_checked
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.uncertainty import (
    Checkpoints,
    DeepEnsemble,
    MCDropout,
    Samples,
    Snapshots,
    Start,
    Swag,
)
from bayesdiff.uncertainty.members.base import twin
from bayesdiff.uncertainty.members.snapshots import read_snapshot, snapshots_of
from bayesdiff.uncertainty.members.swag import swag_draws, swag_moments

pytestmark = pytest.mark.usefixtures("without_reports")


class Flat(Hand):
    """The same formula with a linear head, which reads every pixel's features alone."""

    def __init__(self, formula, weights, bias=0.0):
        super().__init__(formula, weights, bias)
        conv, self.head = self.head, nn.Linear(len(weights[0]), len(weights)).double()
        with torch.no_grad():
            self.head.weight.copy_(conv.weight.flatten(1))
            self.head.bias.copy_(conv.bias)

    def features(self, x, t, y=None):
        return super().features(x, t, y).permute(0, 2, 3, 1)

    def fold(self, output):
        return output.permute(0, 3, 1, 2)


def four_features(x, t, y):
    return torch.cat([torch.tanh(x), x**2, torch.sin(3 * x), 1 + 0 * x], 1)


WEIGHTS = [[0.5, -1.2, 0.8, 2.0]]


def any_posterior(net):
    return posterior_of(net.head, random_covariance(head_matrix(net.head).shape[1]))


def of_hand(net, estimator, solver=None, shape=(1, 3, 3), **options):
    start = start_of(model_of(net), solver or Euler(1), 2, shape, **options)
    return estimator(start, any_posterior(net))


def contributions(net, x):
    """c_k, what feature k alone adds to an output: a loop over features, ``(D, ...)``."""
    features, bias = net.features(x, torch.zeros(len(x))), net.fold(net.head(0 * x_like(net, x)))
    axis = -1 if isinstance(net.head, nn.Linear) else 1
    parts = []
    for k in range(features.shape[axis]):
        only = torch.zeros_like(features)
        only.select(axis, k).copy_(features.select(axis, k))
        parts.append(net.fold(net.head(only)) - bias)
    return torch.stack(parts)


def x_like(net, x):
    return net.features(x, torch.zeros(len(x)))


HEADS = {
    "linear": lambda: Flat(four_features, WEIGHTS, 0.3),
    "1x1": lambda: Hand(four_features, WEIGHTS, 0.3),
    "3x3": lambda: Hand(four_features, WEIGHTS, 0.3, kernel=3),
}


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_dropout_has_the_closed_form_over_all_masks(head, monkeypatch):
    """(1 - q) / q sum_k w_k^2 phi_k^2, q = 1/2: every mask once; a 3x3 head adds taps first."""
    net = HEADS[head]()
    every = torch.tensor(list(itertools.product([0.0, 2.0], repeat=4)), dtype=torch.float64)
    monkeypatch.setattr(MCDropout, "masks", lambda self, size: iter([every]))
    got = of_hand(net, MCDropout(members=16, p=0.5)).variance * 15 / 16
    x_0 = start_of(model_of(net), Euler(1), 2, (1, 3, 3)).draw()
    if head != "3x3":  # one pixel sees its own features alone: the formula of the docstring
        weights = torch.tensor(WEIGHTS, dtype=torch.float64)[0]
        truth = (weights.view(1, 4, 1, 1) * four_features(x_0, 0, None)).square().sum(1, True)
        torch.testing.assert_close(contributions(net, x_0).square().sum(0), truth)
    torch.testing.assert_close(got, contributions(net, x_0).square().sum(0), rtol=1e-12, atol=0)


@torch.no_grad()
def test_dropout_draws_its_masks_with_the_given_probability():
    masks = next(MCDropout(members=20_000, p=0.2).masks(4))
    assert set(masks.unique().tolist()) == {0.0, 1.25}
    assert masks.mean(0).tolist() == pytest.approx([1] * 4, abs=4 * 0.5 / math.sqrt(20_000))
    net = HEADS["3x3"]()
    x_0 = start_of(model_of(net), Euler(1), 2, (1, 3, 3)).draw()
    truth = 0.2 / 0.8 * contributions(net, x_0).square().sum(0)
    got = of_hand(net, MCDropout(members=20_000, p=0.2)).variance
    torch.testing.assert_close(got, truth, rtol=0.06, atol=0)


def test_a_fixed_mask_is_a_weight_draw_and_fresh_masks_fade_with_the_steps():
    """dx/dt = f b / q with m = 0: fixed masks give f^2 p / q for every N, fresh ones 1 / N of it.

    With fixed masks the variance is that of the masks drawn, exactly.
    """
    net = Hand(lambda x, t, y: SCALE + 0 * x, [[1.0]])
    fixed, fresh = [], []
    for steps in (1, 4, 16):
        for mask, found in (("fixed", fixed), ("fresh", fresh)):
            estimator = MCDropout(members=4000, p=0.3, mask=mask)
            samples = of_hand(net, estimator, Euler(steps), (1, 1, 1))
            found.append(float(samples.variance[0]))
    drawn = next(MCDropout(members=4000, p=0.3).masks(1))[:, 0]
    assert fixed == pytest.approx([SCALE**2 * float(drawn.var())] * 3, rel=1e-9)
    wanted = [SCALE**2 * 0.3 / 0.7 / steps for steps in (1, 4, 16)]
    assert fresh == pytest.approx(wanted, rel=4 * math.sqrt(2 / 3999))
    assert fresh[2] < 0.08 * fixed[2]


@pytest.mark.parametrize("mask", ["fixed", "fresh"])
def test_dropout_equals_following_every_masked_flow_by_itself(mask):
    """T6 with two features: x' = x + h (b_1 m x + b_2 f) / q, a loop over members and steps."""
    steps, members = 10, 7
    net = Hand(lambda x, t, y: torch.cat([M * x, SCALE + 0 * x], 1), [[1.0, 1.0]])
    estimator = MCDropout(members=members, p=0.4, mask=mask, seed=3)
    samples = of_hand(net, estimator, Euler(steps), (1, 1, 1), first=0.7)
    drawn = list(itertools.islice(estimator.masks(2), steps))
    ends = []
    for member in range(members):
        x = 0.7
        for step in range(steps):
            b = drawn[step if mask == "fresh" else 0][member]
            x += (float(b[0]) * M * x + float(b[1]) * SCALE) / steps
        ends.append(x)
    assert float(samples.variance[0]) == pytest.approx(float(np.var(ends, ddof=1)), rel=1e-9)
    assert f"p 0.4, {mask} masks" in samples.estimator


def biased(*biases):
    """Affine flows that differ in their constant alone."""
    models = []
    for bias in biases:
        models.append(model_of(Hand(lambda x, t, y: M * x, [[1.0]], bias=bias)))
    return tuple(models)


def test_an_ensemble_of_known_flows_has_their_variance():
    """T6: x_N = ... + G b_i / f, so the variance is (G / f)^2 times that of the constants."""
    biases, steps = (0.3, -0.5, 1.1, 0.2), 10
    models = biased(*biases)
    gain = ((1 + M / steps) ** steps - 1) / M
    start = start_of(models[0], Euler(steps), 2, first=0.7)
    samples = DeepEnsemble(networks=models)(start, any_posterior(models[0].net))
    wanted = gain**2 * np.var(biases, ddof=1)
    assert float(samples.variance[0]) == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(samples.images, plain(start_of(models[0], Euler(steps), 2, first=0.7)))
    assert samples.nfe == steps * 5


def shaken(model, count, size=0.05):
    """Networks around the model's."""
    torch.manual_seed(7)
    others = []
    for _ in range(count):
        other = twin(model)
        for parameter in other.parameters():
            parameter.data += size * torch.randn_like(parameter)
        others.append(other)
    return tuple(others)


@pytest.mark.parametrize("name", SOLVERS)
@torch.no_grad()
def test_members_equal_sampling_every_network_with_the_same_noise(name):
    """The slow truth, for stochastic solvers and guidance too."""
    solver, path, prediction = SOLVERS[name]
    net, posterior, _ = curved(kernel=3, patch=2)
    labels, shape = torch.tensor([0, 2, 1]), (1, 4, 4)
    model = model_of(net, path, prediction, num_classes=3)
    networks = shaken(model, 4)
    samples = DeepEnsemble(networks=networks)(
        start_of(model, solver, 3, shape, labels=labels), posterior
    )
    images = [plain(start_of(m, solver, 3, shape, labels=labels)) for m in networks]
    torch.testing.assert_close(samples.variance, torch.stack(images).var(0), rtol=1e-9, atol=0)
    assert torch.equal(samples.images, plain(start_of(model, solver, 3, shape, labels=labels)))
    _, members = DeepEnsemble(networks=networks).images(
        start_of(model, solver, 3, shape, labels=labels), posterior
    )
    torch.testing.assert_close(members, torch.stack(images))


@pytest.mark.parametrize("name", SOLVERS)
def test_members_that_agree_leave_no_variance_and_the_plain_image(name, one_thread):
    """Exactly zero and bit for bit, in single precision on a real network."""
    net, posterior = small_unet()
    image = plain(real_start(net, name))
    model = real_start(net, name).model
    same = (model, twin(model), twin(model))
    for estimator in (
        DeepEnsemble(networks=same),
        Checkpoints(networks=same),
        Swag(networks=same),
        MCDropout(members=3, p=0),
        MCDropout(members=3, p=0, mask="fresh"),
    ):
        samples = estimator(real_start(net, name), posterior)
        assert torch.equal(samples.images, image), estimator.name
        assert not samples.variance.any() and not samples.summed.any(), estimator.name


@pytest.mark.parametrize("estimator", ["deep", "fixed", "fresh"])
def test_maps_do_not_depend_on_how_images_are_batched(estimator):
    net, posterior, _ = curved()
    model = model_of(net)
    chosen = MCDropout(members=4, p=0.3, mask=estimator) if estimator != "deep" else None
    chosen = chosen or DeepEnsemble(networks=shaken(model, 3))

    def run(indices):
        noise = Double(SampleNoise(0, indices, (1, 3, 3)))
        return chosen(Start(model, Euler(4), None, noise, CPU), posterior)

    whole = run(range(5))
    joined = Samples.join([run(part) for part in ([0, 1], [2], [3, 4])])
    for name in ("images", "variance", "summed"):
        one, other = getattr(joined, name), getattr(whole, name)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-18)
    assert whole.variance.min() > 0


def test_evaluations_are_counted_and_never_exceed_what_was_said():
    net, posterior, _ = curved()
    model = model_of(net, SOLVERS["ddim"][1], "v", num_classes=3)
    labels = torch.tensor([0, 1])
    networks = (model, *shaken(model, 2))
    cases = [
        (DeepEnsemble(networks=networks), 1, 10 + 3 * 10),
        (DeepEnsemble(networks=networks, skip_interval=5), 1, 10 + 3 * 2),
        (DeepEnsemble(networks=networks), 2, 2 * (10 + 3 * 10)),
        (MCDropout(members=4), 1, 10 + 1 + 9 * 4),
        (MCDropout(members=4, mask="fresh"), 1, 10 + 1 + 9 * 4),
    ]
    for estimator, guidance, nfe in cases:
        net.calls.clear()
        solver = DDIM(10, guidance=float(guidance))
        start = start_of(model, solver, 2, (1, 2, 2), labels=labels)
        assert estimator(start, posterior).nfe == nfe
        assert max(size for size, _ in net.calls) <= 2 * estimator.copies(solver)


def test_members_before_fit_are_an_error_not_an_empty_variance():
    net, posterior, _ = curved()
    with pytest.raises(UserError, match="swag has no members yet; call its fit"):
        Swag()(start_of(model_of(net), Euler(2)), posterior)


def test_swag_moments_are_those_of_numpy():
    values = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, variance, deviations = swag_moments(values)
    table = values.numpy()
    np.testing.assert_allclose(mean, table.mean(0), atol=1e-14)
    np.testing.assert_allclose(variance, table.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(deviations.T @ deviations / 5, np.cov(table.T), atol=1e-13)


def test_swag_draws_have_half_a_diagonal_and_half_a_low_rank_covariance():
    """Over tensors too: one vector u moves them all."""
    generator = torch.Generator().manual_seed(2)
    snapshots = [
        {
            "a": torch.randn(2, 2, dtype=torch.float64, generator=generator),
            "b": torch.randn(3, generator=generator),
            "count": torch.tensor(number),
        }
        for number in range(4)
    ]
    draws = swag_draws(snapshots, 10_000, seed=0)
    assert draws[0]["a"].shape == (2, 2) and draws[0]["b"].dtype == torch.float32
    assert draws[0]["count"] == 3
    flat = [
        np.stack([np.r_[s["a"].flatten().numpy(), s["b"].double().numpy()] for s in states])
        for states in (snapshots, draws)
    ]
    whole = np.cov(flat[0].T)
    wanted = whole / 2 + np.diag(np.diag(whole)) / 2
    sizes = np.sqrt(np.outer(np.diag(whole), np.diag(whole)))
    np.testing.assert_allclose(np.cov(flat[1].T) / sizes, wanted / sizes, atol=0.06)
    assert abs(whole / sizes - wanted / sizes).max() > 0.2  # the test tells the two apart
    error = (flat[1].mean(0) - flat[0].mean(0)) / np.sqrt(np.diag(whole))
    assert abs(error).max() < 5 / np.sqrt(10_000)


def test_equal_snapshots_are_drawn_exactly():
    state = {"a": torch.randn(100), "b": torch.randn(3, 3)}
    for draw in swag_draws([state] * 7, 3, seed=0):
        assert all(torch.equal(draw[name], value) for name, value in state.items())


DEEP = ("seed=1", "uncertainty=deep_ensemble")
SNAPS = ("callbacks=snapshots", "callbacks.progress=null", "callbacks.samples=null")


def test_snapshots_every_other_epoch_and_none_by_default(compose: Compose, trained: Trained):
    cfg = compose(*SNAPS, *SETTINGS, "trainer.max_epochs=2", "callbacks.snapshots.every=2")
    fit(cfg)
    files = snapshots_of(pipeline.build(cfg).folder)
    assert [path.name for path in files] == ["epoch-00002.safetensors"]
    assert not (trained.folder / "snapshots").exists()


def test_snapshots_are_the_last_epochs_raw_weights_and_a_continued_training_has_the_same(
    compose: Compose, tmp_path, monkeypatch
):
    given = (*SNAPS, *SETTINGS, "trainer.max_epochs=3", "callbacks.snapshots.keep=2")
    fit(compose(*given, f"run_dir={tmp_path}/whole"))
    last = read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    files = snapshots_of(tmp_path / "whole")
    assert [path.stem for path in files] == ["epoch-00002", "epoch-00003"]
    assert {path.name for path in (tmp_path / "whole" / "snapshots").iterdir()} == {
        path.name for path in files
    }
    state = read_snapshot(files[-1])
    assert state.keys() == last["current_model_state"].keys()
    assert all(torch.equal(state[k], v) for k, v in last["current_model_state"].items())
    assert not torch.equal(state["net.head.weight"], last["state_dict"]["net.head.weight"])
    mine = compose(*given, f"run_dir={tmp_path}/mine")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, RuntimeError("the power went out"))  # in the middle of the third epoch
        with pytest.raises(RuntimeError):
            fit(mine)
    left = snapshots_of(tmp_path / "mine")
    assert [path.stem for path in left] == ["epoch-00001", "epoch-00002"]
    shutil.copy(left[0], left[0].with_stem("epoch-00099"))  # of a longer training
    fit(mine)
    again = snapshots_of(tmp_path / "mine")
    assert [path.name for path in again] == [path.name for path in files]
    for first, second in zip(files, again, strict=True):
        one, two = read_snapshot(first), read_snapshot(second)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("bayesdiff.report.board.write", lambda *args, **options: None)


@pytest.fixture
def kept(compose: Compose, no_pictures):
    """Options of a run whose training has left three snapshots."""
    given = (*SNAPS, "trainer.max_epochs=3", "metrics.num_images=0")
    fit(compose(*given))
    return given


def test_snapshots_that_a_finished_training_has_not_kept_are_named_and_the_line_works(
    copied: Trained, compose: Compose, no_pictures, caplog
):
    with caplog.at_level("WARNING", "bayesdiff.uncertainty.members.snapshots"):
        pipeline.prepare(compose(*SNAPS))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "trained without it" in line
    words = line.split()
    (output_dir,) = [word.rstrip(",") for word in words if word.startswith("output_dir=")]
    caplog.clear()
    given = (*SNAPS, "fit=true", output_dir, "trainer.max_epochs=2", "metrics.num_images=0")
    result = pipeline.run(compose(*given, "uncertainty=checkpoints"))
    assert len(snapshots_of(result.folder.parent)) == 2 and copied.checkpoint.is_file()
    pipeline.prepare(compose(*given, "uncertainty=checkpoints"))
    pipeline.prepare(compose())  # without snapshots asked for, nothing is said
    assert not [r for r in caplog.records if "trained without it" in r.getMessage()]


@torch.no_grad()
def test_checkpoints_and_swag_follow_the_runs_own_snapshots(kept, compose: Compose):
    """Against sampling each network by itself; images are those of every other estimator."""
    result = pipeline.run(compose(*kept, "uncertainty=checkpoints"))
    folder = result.folder.parent
    samples = np.load(result.samples)
    cfg = compose(*kept, "uncertainty=checkpoints")
    this, solver, estimator, _ = pipeline.prepare(cfg)
    this.model.eval()
    images = []
    for path in snapshots_of(folder):
        this.model.load_state_dict(read_snapshot(path))
        images.append(plain(pipeline_start(this, solver)))
    np.testing.assert_allclose(samples["variance"], torch.stack(images).var(0), rtol=1e-3)
    assert samples["nfe"] == 3 * (1 + 3) and len(images) == 3
    drawn = pipeline.run(compose(*kept, "uncertainty=swag", "uncertainty.members=3"))
    other = np.load(drawn.samples)
    assert np.array_equal(other["images"], samples["images"])
    assert (other["variance"] > 0).all()
    again = pipeline.run(compose(*kept, "uncertainty=swag", "uncertainty.members=3"))
    assert again.folder == drawn.folder
    snapshots_of(folder)[0].unlink()
    fewer = pipeline.run(compose(*kept, "uncertainty=swag", "uncertainty.members=3"))
    assert fewer.folder != drawn.folder


def pipeline_start(this, solver):
    from bayesdiff.runs.setup import starts

    return starts(this, solver)(range(4))


@torch.no_grad()
def test_a_deep_ensemble_of_two_trainings(copied: Trained, compose: Compose, no_pictures):
    """Own image, own noise; a member that was trained again makes other maps."""
    given = (*DEEP, "metrics.num_images=0", f"uncertainty.members=[{copied.folder}]")
    result = pipeline.run(compose(*given))
    samples = np.load(result.samples)
    this, solver, estimator, _ = pipeline.prepare(compose(*given))
    this.model.eval()
    images = []
    for path in (this.folder / "checkpoints" / "last.ckpt", copied.checkpoint):
        this.model.load_state_dict(read_checkpoint(path)["state_dict"])
        images.append(plain(pipeline_start(this, solver)))
    np.testing.assert_allclose(samples["images"], images[0], atol=1e-6)
    np.testing.assert_allclose(
        samples["variance"], torch.stack(images).var(0), rtol=1e-4, atol=1e-9
    )
    assert samples["variance"].min() > 0 and samples["nfe"] == 3 * (1 + 2)
    # The pattern of a sweep over seeds names this run as well; it counts once.
    pattern = f"uncertainty.members=['{copied.output_dir}/digits-flow-*']"
    whole = pipeline.run(compose(*given[:3], pattern))
    other = np.load(whole.samples)
    np.testing.assert_array_equal(other["variance"], samples["variance"])
    checkpoint = torch.load(copied.checkpoint, weights_only=True)
    checkpoint["state_dict"]["net.head.bias"] += 1
    torch.save(checkpoint, copied.checkpoint)
    after = pipeline.run(compose(*given))
    assert after.folder != result.folder
    changed = np.load(after.samples)
    assert np.array_equal(changed["images"], samples["images"])
    assert not np.array_equal(changed["variance"], samples["variance"])


def test_a_run_trained_on_other_images_of_the_same_name_is_no_member(
    copied: Trained, compose: Compose
):
    checkpoint = torch.load(copied.checkpoint, weights_only=True)
    assert checkpoint["bayesdiff"]["data"] == pipeline.build(compose()).data.data.fingerprint
    checkpoint["bayesdiff"]["data"] = "0123456789abcdef"
    torch.save(checkpoint, copied.checkpoint)
    given = (*DEEP, f"uncertainty.members=[{copied.folder}]")
    check_line(refused(compose, *given), ["other images", "0123456789abcdef", "share their data"])


def test_members_are_read_without_running_code(compose: Compose, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": Harm()}, tmp_path / "bad.ckpt")
    given = ("uncertainty=deep_ensemble", f"uncertainty.members=[{tmp_path / 'bad.ckpt'}]")
    check_line(refused(compose, *given), ["bad.ckpt", "holds code"])
    assert not (tmp_path / "harm").exists()


REFUSALS = [
    (DEEP, ["needs uncertainty.members", "seed=0,1,2,3,4"]),
    ((*DEEP, "uncertainty.members=[nowhere/*]"), ["nowhere/*", "nothing is"]),
    ((*DEEP, "uncertainty.members=[{out}/cache]"), ["cache", "no finished training"]),
    ((*DEEP, "uncertainty.members=[{run},{copy}]"), ["copy.ckpt", "the same weights"]),
    (
        (*DEEP, "net.channels=[16,16]", "uncertainty.members=[{run}]"),
        ["net.channels=[8, 16], not [16, 16]", "the options it was trained with"],
    ),
    (
        (*DEEP, "model.prediction=data", "uncertainty.members=[{run}]"),
        ["model.prediction=velocity, not data"],
    ),
    (("uncertainty=deep_ensemble", "uncertainty.members=[{run}]"), ["this run alone", "seeds"]),
    (("uncertainty=deep_ensemble", "uncertainty.members=[{copy}]"), ["no other network"]),
    (("seed=1", "uncertainty=swag"), ["needs snapshots", "callbacks=snapshots"]),
    (
        ("uncertainty=swag", *SNAPS),
        ["finished training", "has 0", "fit=true callbacks=snapshots output_dir=", "-snapshots"],
    ),
    (("seed=1", "uncertainty=checkpoints", *SNAPS), ["will keep 1", "trainer.max_epochs"]),
]


@pytest.mark.parametrize(
    ("make", "options", "fragments"),
    [
        (MCDropout, {"p": 1}, ["uncertainty.p", "below 1", "got 1"]),
        (MCDropout, {"p": "half"}, ["uncertainty.p", "'half'"]),
        (MCDropout, {"mask": "new"}, ["uncertainty.mask 'new'", "fixed, fresh"]),
        (MCDropout, {"members": 1}, ["uncertainty.members", ">= 2", "got 1"]),
        (Swag, {"members": 1}, ["uncertainty.members", ">= 2", "got 1"]),
        (Checkpoints, {"noise_members": 1}, ["uncertainty.noise_members=1", "2 or more"]),
        (DeepEnsemble, {"members": [3]}, ["must be a list of run folders", "got [3]"]),
        (DeepEnsemble, {"members": None}, ["must be a list of run folders", "None"]),
        (Snapshots, {"keep": 1}, ["callbacks.snapshots.keep", ">= 2", "got 1"]),
        (Snapshots, {"every": 0}, ["callbacks.snapshots.every", "got 0"]),
    ],
)
def test_bad_values_are_refused(make, options, fragments):
    with pytest.raises(UserError) as error:
        make(**options)
    check_line(str(error.value), fragments)


@pytest.mark.parametrize(("overrides", "fragments"), REFUSALS, ids=lambda case: " ".join(case))
def test_refused_in_one_line(overrides, fragments, copied: Trained, compose: Compose, tmp_path):
    copy = tmp_path / "copy.ckpt"
    shutil.copy(copied.checkpoint, copy)
    names = {"{run}": copied.folder, "{copy}": copy, "{out}": copied.output_dir}
    given = list(overrides)
    for name, value in names.items():
        given = [override.replace(name, str(value)) for override in given]
    before = set(tmp_path.rglob("*.ckpt"))
    check_line(refused(compose, *given), fragments)
    assert set(tmp_path.rglob("*.ckpt")) == before  # before any training


def test_damaged_snapshots_and_those_of_another_network_are_refused(kept, compose: Compose):
    cfg = compose(*kept, "uncertainty=swag")
    path = snapshots_of(pipeline.build(cfg).folder)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    given = (*kept, "uncertainty=swag")
    check_line(refused(compose, *given), [path.name, "cannot be read as a snapshot", "delete it"])
    content = bytearray(whole)
    content[-5] ^= 1
    path.write_bytes(content)
    check_line(refused(compose, *given), [path.name, "damaged", "delete it"])
    other = read_snapshot(snapshots_of(path.parents[1])[0]) | {"odd": torch.ones(1)}
    save_checked(path, "bayesdiff-snapshot-1", other, {})
    check_line(refused(compose, *given), [path.name, "another network", "odd"])


def test_a_member_of_an_interrupted_training_is_refused(copied: Trained, compose: Compose):
    (copied.folder / "fit.json").unlink()
    given = (*DEEP, f"uncertainty.members=[{copied.folder}]")
    check_line(refused(compose, *given), [copied.folder.name, "no finished training"])


def test_the_record_names_the_rival(copied: Trained, compose: Compose, no_pictures):
    result = pipeline.run(compose("uncertainty=mc_dropout", "uncertainty.members=3"))
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["estimator"] == "mc_dropout, 3 members, skip 1, p 0.1, fixed masks"
    assert record["settings"]["uncertainty.mask"] == "fixed"
    assert replace(MCDropout(members=3), p=0.2).described.endswith("p 0.2, fixed masks")
