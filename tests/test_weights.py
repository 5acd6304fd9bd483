"""Weights of other programs, of the best epoch, and those that a training starts from."""

from pathlib import Path

import pytest
import torch
from conftest import Compose, Trained, compose_list, smallest
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.runs import training
from bayesdiff.runs.build import build, build_model
from bayesdiff.runs.callback_options import check_callbacks
from bayesdiff.storage.artefacts import read_json, weights_key
from bayesdiff.storage.checkpoints import load_weights, read_checkpoint


def fit(cfg):
    this, _, _, laplace = pipeline.prepare(cfg)
    return this, training.fit(this, laplace)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> GenerativeModel:
    cfg = compose_list(smallest(tmp_path_factory.mktemp("model"), "seed=3"))
    return build(cfg).model


def other(state: dict) -> dict:
    return {name: value + 1 for name, value in state.items()}


# What is in a file whose weights are those of the network.
FORMS = {
    "with net.": lambda s, net: s,
    "without": lambda s, net: net,
    "under model": lambda s, net: {"model": net, "epoch": 3},
    "under state_dict": lambda s, net: {"state_dict": net},
    "of DataParallel": lambda s, net: {"model": {f"module.{k}": v for k, v in net.items()}},
    "ema before model": lambda s, net: {"model": other(net), "ema": net},
    "state_dict_ema": lambda s, net: {"state_dict": other(net), "state_dict_ema": net},
    "params_ema": lambda s, net: {"params": other(net), "params_ema": net},
    "shadow": lambda s, net: {"model": other(net), "ema": {"decay": 0.9, "shadow": net}},
    "ema module": lambda s, net: {"model": other(net), "ema": {"module": net, "decay": 0.9}},
    "ema_params": lambda s, net: {"model": other(net), "ema_params": net},
    "ema beside net": lambda s, net: (
        {f"net.{k}": v + 1 for k, v in net.items()} | {f"ema_model.{k}": v for k, v in net.items()}
    ),
    "with an optimiser": lambda s, net: {"net": net, "optimizer": {"state": {}, "lr": 0.1}},
    "of another module": lambda s, net: {"state_dict": s | {"loss.weight": torch.ones(2)}},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_other_programs(form, model, tmp_path):
    net = model.net.state_dict()
    torch.save(FORMS[form](model.state_dict(), net), tmp_path / "a.pth")
    check_taken(model, tmp_path / "a.pth")


def test_averages_that_cannot_be_read_are_not_passed_over(model, tmp_path):
    net = model.net.state_dict()
    ema = {"decay": 0.9, "shadow_params": list(net.values())}
    torch.save({"model": other(net), "ema": ema}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="averaged weights under 'ema'.*'model' are not"):
        load_weights(model, tmp_path / "a.pth")


def check_taken(model: GenerativeModel, path: Path) -> None:
    twin = build(compose_list(smallest(path.parent, "seed=4"))).model
    assert weights_key(twin) != weights_key(model)
    assert load_weights(twin, path) == weights_key(model) == weights_key(twin)


def test_an_averaged_model_and_safetensors(model, tmp_path):
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), tmp_path / "average.pt")
    check_taken(model, tmp_path / "average.pt")
    save_file(
        {k: v.contiguous() for k, v in model.net.state_dict().items()}, tmp_path / "a.safetensors"
    )
    check_taken(model, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_weights(model, tmp_path / "a.safetensors")


def test_a_larger_network_is_not_taken_for_this_one(model, tmp_path):
    net = model.net.state_dict() | {"extra.weight": torch.ones(1)}
    torch.save(net, tmp_path / "a.pth")
    with pytest.raises(UserError, match="belongs to another network"):
        load_weights(model, tmp_path / "a.pth")


def test_another_number_of_classes_is_one_line(trained: Trained, compose: Compose, tmp_path):
    state = {
        k.removeprefix("net."): v
        for k, v in read_checkpoint(trained.checkpoint)["state_dict"].items()
    }
    state["classes.weight"] = state["classes.weight"][:4]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="the number of classes differs"):
        build(compose(f"init_from={tmp_path}/a.pth"))


def test_a_plain_state_dict_is_sampled_from(trained: Trained, compose: Compose, tmp_path):
    state = read_checkpoint(trained.checkpoint)["state_dict"]
    torch.save({k.removeprefix("net."): v for k, v in state.items()}, tmp_path / "a.pth")
    _, weights = fit(compose("fit=false", f"ckpt_path={tmp_path}/a.pth"))
    assert weights == read_json(trained.folder / "fit.json")["weights"]
    with pytest.raises(UserError, match="another program, which cannot be continued; init_from="):
        fit(compose(f"ckpt_path={tmp_path}/a.pth", "seed=1"))


def test_options_that_contradict_the_checkpoint(trained: Trained, compose: Compose):
    """No shape betrays an attention that is switched off, of which there is none here to load."""
    given = ("fit=false", f"ckpt_path={trained.checkpoint}")
    with pytest.raises(UserError, match=r"trained with net\.blocks=1, not 2"):
        fit(compose(*given, "net.blocks=2"))
    fit(compose(*given, "net.dropout=0.1"))


def test_a_training_that_starts_from_another(trained: Trained, compose: Compose, tmp_path):
    parent = read_json(trained.folder / "fit.json")
    starts = []

    def watch(self):
        starts.append(weights_key(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerativeModel, "on_fit_start", watch)
        this, weights = fit(compose(f"init_from={trained.folder}"))
    assert starts == [parent["weights"]] and weights != parent["weights"]
    record = read_json(this.folder / "fit.json")["parent"]
    assert (record["key"], record["weights"]) == (parent["key"], parent["weights"])
    assert record["path"] == str(trained.checkpoint.resolve())
    note = read_checkpoint(this.folder / "checkpoints" / "last.ckpt")["bayesdiff"]
    assert note["parent"] == record
    assert this.key != build(compose()).key
    copy = tmp_path / "copy.ckpt"  # what counts are the weights, not where they lie
    copy.write_bytes(trained.checkpoint.read_bytes())
    assert build(compose(f"init_from={copy}")).key == this.key
    fit(compose(f"init_from={copy}"))
    assert len(starts) == 1


def test_a_start_that_there_is_not(compose: Compose, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*nowhere"):
        build(compose("init_from=nowhere"))
    with pytest.raises(UserError, match="init_from begins a training and fit=false has none"):
        (tmp_path / "x.ckpt").touch()
        build(compose("init_from=x", "fit=false", f"ckpt_path={tmp_path}/x.ckpt"))


def test_the_best_epoch_is_sampled_from_where_asked(compose: Compose, monkeypatch):
    losses = {0: 3.0, 1: 1.0, 2: 2.0}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", losses[self.trainer.current_epoch], batch_size=1)

    monkeypatch.setattr(GenerativeModel, "validation_step", validation_step)
    options = ("trainer.max_epochs=3", "callbacks.ema.decay=0.5")
    last, of_last = fit(compose(*options))
    best, of_best = fit(compose(*options, "sample_from=best"))
    assert best.folder != last.folder and of_best != of_last
    record = read_json(best.folder / "fit.json")
    assert (record["checkpoint"], record["best_val_loss"]) == ("best.ckpt", 1.0)
    assert read_checkpoint(best.folder / "checkpoints" / "best.ckpt")["global_step"] == 4
    assert read_checkpoint(best.folder / "checkpoints" / "last.ckpt")["global_step"] == 6
    (curvature,) = best.folder.glob("curvature-*")
    assert of_best in curvature.read_bytes()[:4000].decode(errors="replace")
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trains again"))
    assert fit(compose(*options, "sample_from=best"))[1] == of_best


CHECKPOINT = "+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([CHECKPOINT, "+callbacks.mine.filename=last"], "would write over last.ckpt"),
        ([CHECKPOINT, "+callbacks.mine.save_last=true"], "would write over last.ckpt"),
        (
            [CHECKPOINT, "+callbacks.mine.filename=best", "sample_from=best"],
            "would write over best.ckpt",
        ),
        ([CHECKPOINT, "+callbacks.mine.save_top_k=0"], "save_top_k=0 keeps no checkpoint"),
        ([CHECKPOINT, "+callbacks.mine.monitor=val/los"], "never logged; did you mean val/loss"),
        ([CHECKPOINT, "+callbacks.mine.every=1"], "callbacks.mine does not work: .*every"),
        (
            ["+callbacks.mine._target_=lightning.pytorch.callbacks.EMAWeightAveraging"],
            "both average the weights",
        ),
        (
            ["+callbacks.mine._target_=torch.nn.Identity"],
            "is a Identity and no Lightning Callback",
        ),
        (["sample_from=best", "trainer.limit_val_batches=0"], "has none; raise"),
        (["sample_from=best", "trainer.check_val_every_n_epoch=9"], "has none; raise"),
        (["sample_from=first"], "unknown sample_from 'first'"),
    ],
)
def test_callbacks_that_cannot_be_honoured(overrides, line, compose: Compose):
    with pytest.raises(UserError, match=line):
        check_callbacks(build(compose(*overrides)))


def test_checkpoints_of_ones_own_change_nothing_that_is_read(trained: Trained, compose: Compose):
    """Raw weights, chosen epochs, other places: the stages read the averages of the last step."""
    raw = [CHECKPOINT, "+callbacks.mine.save_weights_only=true", "+callbacks.mine.filename=raw"]
    second = [
        o.replace("mine", "second") for o in (CHECKPOINT, "+callbacks.mine.monitor=val/loss")
    ]
    second += ["+callbacks.second.every_n_epochs=7"]
    this, weights = fit(compose(*raw, *second, "callbacks.progress=null"))
    assert weights == read_json(trained.folder / "fit.json")["weights"]
    assert this.key == build(compose()).key
    names = {path.name for path in (this.folder / "checkpoints").iterdir()}
    assert {"last.ckpt", "raw.ckpt"} <= names


def test_build_model_is_where_labels_and_networks_meet(compose: Compose):
    cfg = compose()
    data = build(cfg).data
    assert build_model(cfg, data).net.num_classes == 10
