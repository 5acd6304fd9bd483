"""Options that something takes and does not read, and code that changes behind a name."""

import importlib
import sys
import textwrap
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import Compose
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.sources import digits
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.report.sample_grid import SampleGrid
from bayesdiff.report.validation_callback import ValidateUncertainty
from bayesdiff.runs.build import build
from bayesdiff.solvers import Euler
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Published


@pytest.mark.parametrize(
    ("name", "close"),
    [("hessian_structure", "structure"), ("prior_precison", "prior_precision"), ("x", None)],
)
def test_laplace_refuses_what_it_does_not_know(name, close):
    with pytest.raises(UserError, match=f"no option '{name}'") as error:
        LastLayerLaplace(**{name: "kron"})
    assert (f"did you mean {close}" in str(error.value)) == bool(close)


def model_of(net: nn.Module, **options) -> GenerativeModel:
    adam = partial(torch.optim.Adam, lr=1e-3)
    return GenerativeModel(net, CondOT(), "velocity", adam, **options)


@pytest.mark.parametrize(("of_net", "of_model"), [(10, None), (None, 10), (10, 9)])
def test_a_network_and_a_model_agree_about_classes(of_net, of_model):
    net = UNet(1, 8, of_net, channels=(8,), blocks=1)
    with pytest.raises(
        UserError, match=f"UNet has num_classes={of_net} and the model.*{of_model}"
    ):
        model_of(net, num_classes=of_model)


class Plain(L.LightningModule):
    """A user's own module, without anything that ours has."""

    def __init__(self, net=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        if net is not None:
            self.net, self.path, self.prediction = net, CondOT(), "velocity"
            self.condition, self.corrupt = None, None

    def training_step(self, *args):
        raise AssertionError("trains")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def own_fit(tmp_path, module, *callbacks):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=ImageDataModule(digits(), batch_size=64))


@pytest.mark.parametrize(
    ("net", "fragments"),
    [
        (None, ["Plain.net", "derive your module from bayesdiff.models.GenerativeModel"]),
        (nn.Sequential(nn.Linear(1, 1)), ["Sequential lacks head, features, fold", "def fold("]),
    ],
)
@pytest.mark.parametrize(
    "callback",
    [LastLayerLaplace, SampleGrid, lambda: ValidateUncertainty(Published(), Euler(4))],
    ids=["laplace", "samples", "validate"],
)
def test_a_module_of_ones_own_is_refused_before_it_trains(callback, net, fragments, tmp_path):
    callbacks = [callback()]
    if isinstance(callbacks[0], ValidateUncertainty):
        callbacks.insert(0, LastLayerLaplace())
    with pytest.raises(UserError) as error:
        own_fit(tmp_path, Plain(net), *callbacks)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_a_second_training_does_not_take_the_first_ones_file(tmp_path):
    net = UNet(1, 8, None, channels=(8,), blocks=1)
    path = str(tmp_path / "curv.safetensors")
    own_fit(tmp_path, model_of(net), LastLayerLaplace(path, num_images=32))
    assert (tmp_path / "curv.safetensors").is_file()
    with pytest.raises(UserError, match="curv.safetensors holds .*delete it, or give"):
        own_fit(tmp_path, model_of(net), LastLayerLaplace(path, num_images=32))


OWN = """
import torch
from torch import nn
from own_base import Base

class Net(Base):
    def __init__(self, in_channels, image_size, width{more}):
        super().__init__()
        self.body = nn.Conv2d(in_channels, width, 3, padding=1)
        self.head = nn.Conv2d(width, in_channels, 1)

    def features(self, x, t, y=None):
        return self.body(x){edit}
"""
BASE = """
from torch import nn

class Base(nn.Module):
    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))

    def fold(self, output):
        return output{edit}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own(edit, edit of the base)``: modules of a user's own, written anew."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(edit: str = "", base: str = "", more: str = "", name: str = "own_net") -> None:
        (folder / f"{name}.py").write_text(textwrap.dedent(OWN.format(edit=edit, more=more)))
        (folder / "own_base.py").write_text(BASE.format(edit=base))
        for module in (name, "own_base"):
            sys.modules.pop(module, None)

    yield write
    for module in ("own_net", "own_base"):
        sys.modules.pop(module, None)


def test_edited_code_is_another_training(own, compose: Compose):
    def key() -> str:
        options = ("net._target_=own_net.Net", "+net.width=4", "model.num_classes=null")
        return build(compose(*options)).key

    own()
    first = key()
    assert key() == first
    own(edit=" * 2")
    second = key()
    own(base=".clone()")
    assert len({first, second, key()}) == 3
    own()
    assert key() == first


def test_only_code_of_ones_own_is_read(own):
    own()
    found = code_of({"net": [{"_target_": "own_net.Net"}]}, {"_target_": "torch.optim.Adam"})
    assert set(found) == {"own_net", "own_base"}
    assert code_of({"_target_": "bayesdiff.networks.UNet"}, {"_target_": "no.such.thing"}) == {}


@pytest.mark.parametrize(
    "line",
    [
        "from shown_{n} import SCALE",
        "import shown_{n} as s",
        "def f():\n    from shown_{n} import SCALE",
    ],
)
def test_constants_and_imports_inside_functions_count(line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    number = abs(hash(line))
    shown = tmp_path / f"shown_{number}.py"
    shown.write_text("SCALE = 1.0\n")
    (tmp_path / f"user_{number}.py").write_text(line.format(n=number) + "\nclass Net: ...\n")
    options = {"_target_": f"user_{number}.Net"}
    before = code_of(options)
    assert set(before) == {f"shown_{number}", f"user_{number}"}
    shown.write_text("SCALE = 7.0\n")
    for module in before:  # as the next command loads them
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert code_of(options) != before


def test_an_edit_under_a_running_process_counts_once_it_is_loaded(own, compose, caplog):
    """A key says what has run: cells of one process, and a notebook that loads a module anew."""
    options = ("net._target_=own_net.Net", "+net.width=4", "model.num_classes=null")
    own()
    first = build(compose(*options))
    path = Path(sys.modules["own_net"].__file__)
    path.write_text(path.read_text().replace("self.body(x)", "self.body(x) * 2"))
    second = build(compose(*options))
    assert type(second.model.net) is type(first.model.net) and second.key == first.key
    assert "own_net.py was edited after this process loaded it" in caplog.text
    caplog.clear()
    assert build(compose(*options)).key == first.key and "edited" not in caplog.text
    importlib.invalidate_caches()
    importlib.reload(sys.modules["own_net"])
    assert build(compose(*options)).key != first.key


@pytest.mark.parametrize("init", ["raise SystemError", None], ids=["package", "namespace"])
def test_a_key_imports_nothing_that_no_target_names(init, tmp_path, monkeypatch):
    """The file of ``parcel.inner.deep`` counts, and its packages' files too; none of them runs."""
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = tmp_path / "parcel" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner) if init else ():
        (folder / "__init__.py").write_text(init)
    (inner / "deep.py").write_text("SCALE = 1.0\n")
    (tmp_path / "late.py").write_text("def f():\n    import parcel.inner.deep\n")
    found = code_of({"_target_": "late.f"})
    packages = {"parcel", "parcel.inner"} if init else set()
    assert set(found) == {"late", "parcel.inner.deep"} | packages
    assert not [name for name in sys.modules if name.startswith("parcel")]
    monkeypatch.delitem(sys.modules, "late")


def test_another_network_drops_what_the_group_chose(own, compose: Compose, caplog):
    own()
    options = ("net._target_=own_net.Net", "+net.width=4")
    with caplog.at_level("INFO"):
        net = build(compose(*options, "model.num_classes=null")).model.net
    assert net.body.out_channels == 4
    assert "net.channels" in caplog.text and "left out" in caplog.text
    with pytest.raises(
        UserError, match="net.widht is no option of own_net.Net; did you mean width"
    ):
        build(compose(*options, "+net.widht=3", "model.num_classes=null"))
    with pytest.raises(UserError, match="takes no num_classes"):
        build(compose(*options))


def test_another_optimiser_drops_what_the_group_chose(compose: Compose):
    options = ("model.optimizer._target_=torch.optim.SGD", "+model.optimizer.momentum=0.5")
    model = build(compose(*options)).model
    optimizer = model._optimizer(model.parameters())
    assert optimizer.defaults["momentum"] == 0.5
    with pytest.raises(UserError, match="model.optimizer.momentun is no option.*momentum"):
        build(compose(options[0], "+model.optimizer.momentun=0.5"))


def test_callbacks_are_in_the_key_whatever_they_are_called(compose: Compose):
    ema = "lightning.pytorch.callbacks.EMAWeightAveraging"
    early = "lightning.pytorch.callbacks.EarlyStopping"
    renamed = (
        "callbacks.ema=null",
        f"+callbacks.mine._target_={ema}",
        "+callbacks.mine.decay=0.5",
    )
    first = build(compose("callbacks.ema.decay=0.5")).key
    assert build(compose(*renamed)).key == first != build(compose()).key
    stopping = build(
        compose(f"+callbacks.s._target_={early}", "+callbacks.s.monitor=val/loss")
    ).key
    assert stopping != build(compose()).key
    shown = ("callbacks=snapshots", "callbacks.samples=null", "callbacks.progress=null")
    assert build(compose(*shown)).key == build(compose()).key
    bar = "+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar"
    assert build(compose(bar)).key == build(compose()).key
