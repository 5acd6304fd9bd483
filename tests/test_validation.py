"""Comparison with a reference: figures against loops, a stage done once, a callback."""

import json
from collections import Counter
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import CPU, Double, certain, curved, model_of, posterior_of
from hand import Noise as HandNoise
from scipy import stats

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.metrics.validation import (
    COLUMNS,
    FLOOR,
    Validation,
    compare,
    reference_of,
    validate,
)
from bayesdiff.report import board, figures
from bayesdiff.report.pictures import Pictures
from bayesdiff.report.validation_callback import ValidateUncertainty
from bayesdiff.solvers import DDPM, Euler, Heun, SampleNoise
from bayesdiff.uncertainty import Ensemble, Published, Start

SHAPE = (1, 3, 3)


def drawn(size=(1, 4, 4), images=5, members=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    variance = torch.rand(images, *size, generator=generator, dtype=torch.float64) + 0.1
    image = torch.randn(images, *size, generator=generator, dtype=torch.float64)
    spread = torch.randn(members, images, *size, generator=generator, dtype=torch.float64)
    return variance, image, image + 1.3 * variance.sqrt() * spread


def test_rows_equal_a_loop_over_images_and_pixels():
    variance, image, members = drawn()
    variance[0, 0, 0, 0] = -1.0  # a published recursion can do that
    variance[1, 0, 1, 1] = FLOOR * 1e-3
    rows = compare(variance, image, members)
    for b in range(len(variance)):
        v, x, m = (part.flatten(-3).numpy() for part in (variance[b], image[b], members[:, b]))
        counted = [p for p in range(16) if v[p] > FLOOR * np.maximum(v, 0).mean()]
        z = np.array([[(m[k, p] - x[p]) / v[p] ** 0.5 for p in counted] for k in range(len(m))])
        reference = m.var(0, ddof=1)
        truth = {
            "estimate": v.sum(),
            "reference": reference.sum(),
            "pixel_rank": stats.spearmanr(v, reference).statistic,
            "z2": (z**2).mean(),
            "coverage": (abs(z) < 1.96).mean(),
            "pixels": len(counted) / 16,
        }
        got = dict(zip(COLUMNS, rows[b].tolist(), strict=True))
        assert got == pytest.approx(truth, rel=1e-9)


def test_figures_are_those_of_the_rows_and_lie_in_their_intervals():
    variance, image, members = drawn(images=12)
    variance *= torch.linspace(0.2, 3, 12)[:, None, None, None]
    found = Validation(*compare(variance, image, members).unbind(1))
    metrics = found.metrics(seed=0)
    ratio = (found.estimate / found.reference).log()
    truth = {
        "image_rank": stats.spearmanr(found.estimate, found.reference).statistic,
        "pixel_rank": found.pixel_rank.mean(),
        "log_ratio": ratio.quantile(0.5),
        "log_ratio_sd": ratio.std(),
        "calibration_z2": found.z2.mean(),
        "coverage95": found.coverage.mean(),
        "pixels": 1.0,
    }
    for name, value in truth.items():
        assert metrics[f"validation/{name}"] == pytest.approx(float(value), rel=1e-9), name
    for name in truth.keys() - {"log_ratio_sd", "pixels"}:
        low, high = (metrics[f"validation/{name}_{end}"] for end in ("low", "high"))
        assert low < metrics[f"validation/{name}"] < high, name
    assert len(metrics) == len(truth) + 10
    assert metrics == found.metrics(seed=0) != found.metrics(seed=1)


def test_right_variances_are_called_calibrated_and_wrong_ones_by_how_much():
    generator = torch.Generator().manual_seed(1)
    variance = torch.rand(20, 1, 10, 10, generator=generator, dtype=torch.float64) + 0.01
    noise = torch.randn(64, 20, 1, 10, 10, generator=generator, dtype=torch.float64)
    image = torch.zeros_like(variance)
    members = noise * variance.sqrt()
    for factor, z2, coverage in ((1, 1, 0.95), (0.25, 4, 0.6729), (9, 1 / 9, 1.0)):
        found = Validation(*compare(factor * variance, image, members).unbind(1))
        metrics = found.metrics(seed=0)
        assert metrics["validation/calibration_z2"] == pytest.approx(z2, rel=0.02)
        assert metrics["validation/coverage95"] == pytest.approx(coverage, abs=0.003)
        log = metrics["validation/log_ratio"]
        assert log == pytest.approx(torch.tensor(float(factor)).log().item(), abs=0.03)


def test_a_bias_of_the_members_counts_against_the_map():
    """z is about the trained model's image, which is what is shown."""
    variance, image, members = drawn(members=400)
    right = Validation(*compare(1.69 * variance, image, members).unbind(1))
    shifted = members + 2 * 1.3 * variance.sqrt()
    biased = Validation(*compare(1.69 * variance, image, shifted).unbind(1))
    torch.testing.assert_close(biased.reference, right.reference)
    torch.testing.assert_close(biased.z2, right.z2 + 4, rtol=0.05, atol=0.3)


def test_maps_without_any_variance_give_nan_and_no_error():
    variance, image, members = drawn()
    found = Validation(*compare(0 * variance, image, members).unbind(1))
    metrics = found.metrics(seed=0)
    assert metrics["validation/pixels"] == 0
    for name in ("image_rank", "log_ratio", "calibration_z2", "coverage95"):
        assert np.isnan(metrics[f"validation/{name}"]), name


def starts(model, solver):
    def start(numbers):
        noise = Double(SampleNoise(0, list(numbers), SHAPE))
        return Start(model, solver, None, noise, CPU)

    return start


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("solver", [Heun(4), DDPM(7)])
def test_the_images_of_the_members_are_those_behind_the_map(solver, skip):
    from hand import FLOW, LINEAR

    net, posterior, _ = curved()
    path = LINEAR if isinstance(solver, DDPM) else FLOW
    model = model_of(net, path, "v" if path is LINEAR else "velocity")
    ensemble = Ensemble(members=5, skip_interval=skip)
    start = starts(model, solver)
    samples = ensemble(start(range(3)), posterior)
    image, members = ensemble.images(start(range(3)), posterior)
    assert torch.equal(image, samples.images) and members.shape == (5, 3, *SHAPE)
    assert torch.equal(members.var(0), samples.variance)


def test_an_ensemble_agrees_with_its_reference_and_a_shuffled_one_does_not():
    net, _, covariance = curved()
    # So certain that the mean of the members is the image; else z^2 has that shift in it.
    posterior = posterior_of(net.head, covariance / 100)
    start = starts(model_of(net), Euler(4))
    ensemble = Ensemble(members=2000, validate_members=2000)
    samples = ensemble(start(range(16)), posterior)
    found = validate(samples.variance, start, posterior, reference_of(ensemble), 16)
    metrics = found.metrics(seed=0)
    assert metrics["validation/image_rank"] > 0.8
    assert metrics["validation/calibration_z2"] == pytest.approx(1, abs=4 * (4 / 2000) ** 0.5)
    other = validate(samples.variance.flip(0), start, posterior, reference_of(ensemble), 16)
    assert other.metrics(seed=0)["validation/image_rank"] < 0.5
    torch.testing.assert_close(found.reference, other.reference)


def test_batches_of_the_reference_change_nothing():
    net, posterior, _ = curved()
    start = starts(model_of(net), Euler(4))
    ensemble = Ensemble(members=4, validate_members=3)
    variance = ensemble(start(range(5)), posterior).variance
    whole, parts = (
        validate(variance, start, posterior, reference_of(ensemble), size) for size in (5, 2)
    )
    for name in COLUMNS:
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-6, atol=0)


def test_the_reference_never_shares_the_draws_of_what_it_judges():
    ensemble = Ensemble(seed=3, validate_members=9, noise_members=4, max_memory=1.5)
    reference = reference_of(ensemble)
    assert (reference.seed, reference.members, reference.max_memory) == (4, 9, 1.5)
    assert reference.noise_members == 0 and reference.skip_interval == 1
    assert reference_of(Published(seed=7)).seed == 8


def test_a_certain_posterior_needs_no_comparison_but_survives_one():
    net, _, _ = curved()
    start = starts(model_of(net), Euler(3))
    ensemble = Ensemble(members=3)
    posterior = certain(net.head)
    variance = ensemble(start(range(4)), posterior).variance
    metrics = validate(variance, start, posterior, reference_of(ensemble), 4).metrics(seed=0)
    assert "validation/image_rank" in metrics


VALIDATE = (
    "uncertainty.validate=true",
    "uncertainty.validate_images=3",
    "uncertainty.validate_members=2",
    "metrics.num_images=0",
)


@pytest.fixture
def work(monkeypatch) -> Counter:
    """Counts maps, member runs and reports."""
    calls: Counter = Counter()
    for name, owner, attribute in (
        ("maps", Ensemble, "__call__"),
        ("reference", Ensemble, "images"),
        ("report", board, "write"),
    ):
        real = getattr(owner, attribute)

        def counted(*args, name=name, real=real, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counted)
    return calls


def test_validation_is_asked_for_by_one_option_and_done_once(
    copied: Trained, compose: Compose, work: Counter, capsys
):
    """The maps made before are the ones that are checked; a second run checks nothing."""
    result = pipeline.run(compose(*VALIDATE))
    assert work == {"reference": 2, "report": 1}  # batches of 2 and 1; no new maps
    assert result.samples == copied.samples and result.folder != copied.cell
    (path,) = copied.folder.glob("validation-*.json")
    stored = json.loads(path.read_text())
    names = ("image_rank", "pixel_rank", "log_ratio", "calibration_z2", "coverage95")
    for name in names:
        assert {f"validation/{name}{end}" for end in ("", "_low", "_high")} <= set(result.metrics)
        assert result.metrics[f"validation/{name}"] == pytest.approx(
            stored["metrics"][f"validation/{name}"], nan_ok=True
        )
    assert set(stored["images"]) == set(COLUMNS) and len(stored["images"]["z2"]) == 3
    summed = np.load(result.samples)["variance"].reshape(4, -1).sum(1)
    np.testing.assert_allclose(stored["images"]["estimate"], summed[:3], rtol=1e-5)
    assert (result.folder / "figures" / "validation.png").is_file()
    pipeline.show(result)
    shown = capsys.readouterr().out
    assert all(f"validation/{name} " in shown for name in names) and " to " in shown
    assert "_low" not in shown
    again = pipeline.run(compose(*VALIDATE))
    assert work == {"reference": 2, "report": 1}
    assert again.metrics == pytest.approx(result.metrics, nan_ok=True)


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures: one test above has drawn them."""
    monkeypatch.setattr(Pictures, "every", lambda *_: ())


def test_other_members_are_another_comparison_of_the_same_maps(
    copied: Trained, compose: Compose, work: Counter, undrawn
):
    first = pipeline.run(compose(*VALIDATE))
    second = pipeline.run(compose(*VALIDATE, "uncertainty.validate_members=3"))
    assert work == {"reference": 4, "report": 2}
    assert len({first.folder, second.folder, copied.cell}) == 3
    assert first.samples == second.samples == copied.samples
    plain = pipeline.run(compose())
    assert plain.folder == copied.cell and work["report"] == 2
    assert not [name for name in plain.metrics if name.startswith("validation/")]


def test_cells_of_other_scores_share_maps_and_keep_their_own_numbers(
    copied: Trained, compose: Compose, work: Counter, undrawn
):
    fewer = pipeline.run(compose("metrics.num_images=10"))
    assert work["maps"] == 0 and fewer.samples == copied.samples
    assert fewer.folder != copied.cell
    for folder, count in ((fewer.folder, 10), (copied.cell, 12)):
        metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
        assert f"fid@{count}/classifier" in metrics
    done = work["report"]
    pipeline.run(compose())
    pipeline.run(compose("metrics.num_images=10"))
    assert work["report"] == done


def test_a_damaged_comparison_is_made_again(
    copied: Trained, compose: Compose, work: Counter, undrawn
):
    first = pipeline.run(compose(*VALIDATE))
    (path,) = first.folder.parent.glob("validation-*.json")
    path.write_text(path.read_text()[:40])
    again = pipeline.run(compose(*VALIDATE))
    assert work["reference"] == 4 and work["maps"] == 0
    assert again.metrics == pytest.approx(first.metrics, nan_ok=True)


def test_the_scatter_shows_every_image_and_says_what_it_leaves_out():
    estimate = torch.tensor([1.0, 2.0, -3.0, 4.0])
    rows = Validation(estimate, estimate.abs() / 2, *(torch.ones(4) for _ in range(4)))
    figure = figures.validation_scatter(rows, "NFE 5")
    line, points = figure.axes[0].lines
    np.testing.assert_allclose(points.get_ydata(), [1, 2, 4])
    np.testing.assert_allclose(points.get_xdata(), [0.5, 1, 2])
    np.testing.assert_allclose(line.get_xdata(), line.get_ydata())
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    words = " ".join(" ".join(text.get_text().split()) for text in figure.texts)
    assert "1 without a positive variance are not shown" in words and "NFE 5" in words
    none = replace(rows, estimate=-estimate.abs())
    assert not figures.validation_scatter(none).axes[0].lines


def trainer(folder, *callbacks):
    from lightning.pytorch.loggers import TensorBoardLogger

    return L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_the_callback_validates_in_a_trainer_of_ones_own(compose: Compose, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    this = pipeline.build(compose())
    estimator = Ensemble(members=3, validate_images=4, validate_members=3)
    laplace = LastLayerLaplace(num_images=64, prior_precision=1e3)
    check = ValidateUncertainty(estimator, Euler(2))
    trainer(tmp_path, laplace, check).fit(this.model, datamodule=this.data)
    assert check.validation is not None and len(check.validation.z2) == 4
    events = EventAccumulator(str(tmp_path)).Reload()
    rank = events.Scalars("validation/image_rank")[0].value
    assert rank == pytest.approx(check.metrics["validation/image_rank"], nan_ok=True)
    assert "uncertainty/validation" in events.Tags()["images"]
    assert (check.validation.estimate > 0).all()


@pytest.mark.parametrize("order", ["none", "after"])
def test_the_callback_refuses_to_start_without_a_posterior(order, compose: Compose, tmp_path):
    this = pipeline.build(compose())
    check = ValidateUncertainty(Ensemble(members=2), Euler(2))
    callbacks = [check] if order == "none" else [check, LastLayerLaplace(num_images=64)]
    with pytest.raises(UserError, match="put LastLayerLaplace"):
        trainer(tmp_path, *callbacks).fit(this.model, datamodule=this.data)


def test_the_callback_refuses_a_solver_of_another_family(compose: Compose, tmp_path):
    this = pipeline.build(compose())
    check = ValidateUncertainty(Ensemble(members=2), DDPM(2))
    with pytest.raises(UserError, match="solver=ddpm is for diffusion models"):
        trainer(tmp_path, LastLayerLaplace(num_images=64), check).fit(
            this.model, datamodule=this.data
        )


def test_noise_can_be_drawn_once_more():
    noise = HandNoise(2, SHAPE, first=0.5)
    twin = noise.copy()
    assert torch.equal(noise(), twin())
    later = noise.copy()
    expected = [noise(), noise()]
    assert torch.equal(later(), expected[0]) and torch.equal(later(), expected[1])
    assert not torch.equal(expected[0], expected[1])
