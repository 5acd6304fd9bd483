"""The fit stage: what it trains, what it writes, and in which order things happen."""

import json

import lightning as L
import pytest
import torch
from conftest import Compose, Trained, scalars
from lightning.pytorch.callbacks import Callback

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.module import ImageDataModule
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.record import Curvature
from bayesdiff.runs import trainer as trainer_
from bayesdiff.runs import training
from bayesdiff.runs.build import build
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.storage.checkpoints import load_weights, read_checkpoint


def fit(cfg) -> tuple[pipeline.Run, str]:
    this, _, _, laplace = pipeline.prepare(cfg)
    return this, training.fit(this, laplace)


@pytest.mark.parametrize("every", ["2", "5", "null"])
def test_the_last_epoch_is_kept_however_rare_validation_is(compose: Compose, every):
    this, _ = fit(compose(f"trainer.check_val_every_n_epoch={every}", "trainer.max_epochs=3"))
    checkpoint = read_checkpoint(this.folder / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 3 * 2


def test_the_record_of_a_training(trained: Trained, compose: Compose):
    record = json.loads((trained.folder / "fit.json").read_text())
    this = build(compose())
    assert record["key"] == this.key and trained.folder.name.endswith(this.key[:8])
    assert load_weights(this.model, trained.checkpoint) == record["weights"]
    assert (record["epochs"], record["steps"]) == (1, 2)
    assert record["train/loss"] > 0 and record["val/loss"] > 0 and record["seconds"] > 0


def test_a_checkpoint_is_plain_and_says_where_it_is_from(trained: Trained, compose: Compose):
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    assert checkpoint["bayesdiff"]["key"] == build(compose()).key
    assert checkpoint["bayesdiff"]["config"]["net"]["channels"] == [8, 16]
    assert {"state_dict", "current_model_state", "optimizer_states"} <= set(checkpoint)


def test_curves_on_the_board(trained: Trained):
    values = scalars(trained.folder / "tensorboard")
    for tag in ("train/loss", "val/loss", "train/grad_norm", "lr-AdamW"):
        assert values[tag], tag
    for tag in ("effective_parameters", "log_evidence", "sigma_noise", "eigenvalue_max"):
        assert len(values[f"laplace/{tag}"]) == 1, tag


def test_the_curvature_is_that_of_the_averaged_weights(trained: Trained):
    record = json.loads((trained.folder / "fit.json").read_text())
    curvature = Curvature.load(trained.curvature)
    assert curvature.source.startswith(record["weights"])
    head = read_checkpoint(trained.checkpoint)["state_dict"]["net.head.weight"]
    assert torch.equal(curvature.mean[:, :-1], head.flatten(1).double())


def test_averaging_comes_first(compose: Compose, monkeypatch):
    """Later callbacks then see averaged weights, whatever the order in the file."""
    seen = []

    def stop(self, *args, **kwargs):
        seen.extend(type(callback).__name__ for callback in self.callbacks)
        raise InterruptedError

    monkeypatch.setattr(L.Trainer, "fit", stop)
    cfg = compose()
    cfg.callbacks = {**cfg.callbacks, "ema": None, "late": cfg.callbacks.ema}
    with pytest.raises(InterruptedError):
        fit(cfg)
    assert seen[0] == "EMAWeightAveraging"
    assert seen.index("Provenance") < seen.index("PosteriorAtEnd") < seen.index("RunCheckpoints")


def test_it_learns_one_batch_by_heart(compose: Compose):
    options = ["debug=overfit", "trainer.max_epochs=60", "model.optimizer.lr=1e-2"]
    options += ["trainer.check_val_every_n_epoch=60"]
    cfg = compose(
        *options, "callbacks.ema.decay=0.5", "data.batch_size=16", "model.class_dropout=0"
    )
    this, _ = fit(cfg)
    losses = scalars(this.folder / "tensorboard")["train/loss"]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    "overrides",
    [
        ("logger=csv",),
        ("~logger",),
        ("callbacks.ema=null", "trainer.gradient_clip_val=null"),
        ("debug=fdr", "trainer.accumulate_grad_batches=2"),
        ("trainer.max_steps=1", "trainer.max_epochs=-1"),
    ],
    ids=" ".join,
)
def test_variations_run(overrides, compose: Compose):
    this, weights = fit(compose(*overrides))
    assert weights == weights_key(this.model)
    assert list(this.folder.glob("curvature-*.safetensors"))
    assert bool(list(this.folder.rglob("metrics.csv"))) == (overrides[0] == "logger=csv")
    events = list(this.folder.rglob("events.*"))
    assert bool(events) == ("logger" not in overrides[0])


def test_sample_grids_while_it_trains(compose: Compose):
    cfg = compose("trainer.max_epochs=2")
    options = {"grids": 1, "num_steps": 2, "rows": 1}
    cfg.callbacks.samples = {"_target_": "bayesdiff.report.sample_grid.SampleGrid", **options}
    this, _ = fit(cfg)
    assert (this.folder / "figures" / "training.png").stat().st_size > 0


def test_warm_up_then_cosine_to_zero(compose: Compose):
    options = ["trainer.max_epochs=2", "trainer.limit_train_batches=5", "model.warmup_steps=4"]
    this, _ = fit(compose(*options, "model.optimizer.lr=0.008"))
    rates = scalars(this.folder / "tensorboard")["lr-AdamW"]
    assert rates[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[-1] < 0.001


def test_clipping_bounds_the_step(compose: Compose, monkeypatch):
    norms = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.stack(grads).norm()))

    monkeypatch.setattr(trainer_, "Provenance", lambda run: Watch())
    fit(compose("trainer.gradient_clip_val=0.01"))
    assert len(norms) == 2 and max(norms) < 0.0101


def test_the_laplace_callback_in_a_trainer_of_ones_own(compose: Compose):
    """The example of its docstring: no pipeline, no file, any trainer."""
    this = build(compose("model.class_dropout=0"))
    data = ImageDataModule(this.data.data, batch_size=64)
    laplace = LastLayerLaplace(prior_precision="evidence", num_images=32)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[laplace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(this.folder),
    )
    assert laplace.statistics() == {}
    trainer.fit(this.model, datamodule=data)
    features = torch.randn(2, 8, 8, 8)
    assert (laplace.posterior.predictive_variance(features) > 0).all()
    assert laplace.statistics()["laplace/n_eff"] == 32


def test_a_second_checkpoint_callback_is_welcome(compose: Compose):
    cfg = compose(
        "+callbacks.best._target_=lightning.pytorch.callbacks.ModelCheckpoint",
        "+callbacks.best.monitor=val/loss",
        "+callbacks.best.filename=best",
    )
    this, _ = fit(cfg)
    names = {path.name for path in (this.folder / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt"}


def test_the_same_training_twice_is_bit_for_bit_the_same(trained: Trained, compose: Compose):
    _, weights = fit(compose())
    assert weights == json.loads((trained.folder / "fit.json").read_text())["weights"]


def test_a_run_that_cannot_be_continued_says_so(compose: Compose):
    with pytest.raises(UserError, match="no checkpoint"):
        fit(compose("fit=false", "ckpt_path=nowhere.ckpt"))


@pytest.mark.parametrize(("decay", "warned"), [(0.999, True), (0.5, False)])
def test_an_average_that_is_still_of_the_first_step_is_said(compose, caplog, decay, warned):
    run = build(compose(f"data.ema_decay={decay}", "trainer.max_epochs=9"))
    assert run.length[0] == 18  # nine epochs of two batches
    training._note_short_average(run)
    said = [record.getMessage() for record in caplog.records]
    assert any("98 % of the averaged weights" in line for line in said) == warned
