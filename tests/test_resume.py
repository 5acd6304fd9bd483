"""A run that was stopped and continued ends bit for bit where an uninterrupted one ends."""

import json

import pytest
import torch
from conftest import Compose
from torch import Tensor

from bayesdiff import pipeline
from bayesdiff.models import GenerativeModel
from bayesdiff.runs import training
from bayesdiff.storage.checkpoints import read_checkpoint

# Everything that carries state over: dropout, mirroring, label dropout, averaged weights.
SETTINGS = (
    "trainer.max_epochs=4",
    "trainer.limit_train_batches=3",
    "net.dropout=0.3",
    "data.flip=true",
    "model.class_dropout=0.3",
    "callbacks.ema.decay=0.9",
    "model.warmup_steps=3",
    "metrics.num_images=0",
)


def fit(cfg) -> str:
    this, _, _, laplace = pipeline.prepare(cfg)
    return training.fit(this, laplace)


def tensors(value: object, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its place."""
    if torch.is_tensor(value):
        return {name: value}
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in tensors(item, f"{name}.{key}").items()
        }
    return {}


def stop_at(monkeypatch, step: int, error: BaseException) -> None:
    """Make the training stop before this optimiser step."""
    real = GenerativeModel.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            raise error
        return real(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModel, "training_step", training_step)


@pytest.mark.parametrize(("precision", "ckpt_path"), [("32-true", "last"), ("bf16-mixed", "null")])
def test_stopped_and_continued(precision, ckpt_path, compose: Compose, tmp_path, monkeypatch):
    settings = [*SETTINGS, f"trainer.precision={precision}"]
    whole = fit(compose(*settings, f"run_dir={tmp_path}/whole"))
    mine = [*settings, f"run_dir={tmp_path}/mine"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7, RuntimeError("the power went out"))  # in the middle of the third epoch
        with pytest.raises(RuntimeError, match="power"):
            fit(compose(*mine))
    last = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 6
    assert not (tmp_path / "mine" / "fit.json").exists()
    steps = []
    real = GenerativeModel.training_step

    def watched(self, batch, batch_idx):
        steps.append(self.global_step)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModel, "training_step", watched)
    assert fit(compose(*mine, f"ckpt_path={ckpt_path}")) == whole
    assert steps == [6, 7, 8, 9, 10, 11]
    one, two = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
        for name in ("whole", "mine")
    )
    parts = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")
    for part in parts[:2]:
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), f"{part} {name}"
    first, second = (tensors(c["optimizer_states"][0]) for c in (one, two))
    assert len(first) > 50 and all(torch.equal(first[name], second[name]) for name in first)
    assert one["lr_schedulers"] == two["lr_schedulers"]
    assert not torch.equal(
        one["state_dict"]["net.head.weight"], one["current_model_state"]["net.head.weight"]
    )


def test_ctrl_c_is_one_line_and_can_be_continued(compose: Compose, monkeypatch):
    cfg = compose(*SETTINGS, "trainer.max_epochs=2")
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fit(cfg)
    this, *_ = pipeline.prepare(cfg)
    assert read_checkpoint(this.folder / "checkpoints" / "last.ckpt")["global_step"] == 3
    fit(cfg)
    record = json.loads((this.folder / "fit.json").read_text())
    assert (record["epochs"], record["steps"]) == (2, 6)


def test_a_run_stopped_after_its_last_epoch_trains_no_more(compose: Compose, monkeypatch):
    """The laplace pass or the note of completion may fail; the training is not lost."""
    cfg = compose(*SETTINGS, "trainer.max_epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(cfg)
    this, *_ = pipeline.prepare(cfg)
    averaged = read_checkpoint(this.folder / "checkpoints" / "last.ckpt")["state_dict"]
    stop_at(monkeypatch, 3, AssertionError("trains again"))
    fit(cfg)
    pipeline.run(cfg)  # the curvature that is there belongs to these weights
    assert (this.folder / "fit.json").is_file()
    this, _, _, laplace = pipeline.prepare(cfg)
    training.fit(this, laplace)
    assert torch.equal(this.model.state_dict()["net.head.weight"], averaged["net.head.weight"])


def test_a_finished_checkpoint_from_elsewhere_is_taken_over(trained, compose: Compose, tmp_path):
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(trained.checkpoint.read_bytes())
    cfg = compose(f"ckpt_path={copy}", f"run_dir={tmp_path}/mine")
    recorded = json.loads((trained.folder / "fit.json").read_text())
    assert fit(cfg) == recorded["weights"]
    assert (tmp_path / "mine" / "checkpoints" / "last.ckpt").read_bytes() == copy.read_bytes()
