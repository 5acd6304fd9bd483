"""Bad input ends in one line that names the value and the cure, before any training."""

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import ROOT, Compose, Trained
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain, one_line_errors
from bayesdiff.laplace import callback
from bayesdiff.laplace.record import Curvature
from bayesdiff.models import GenerativeModel
from bayesdiff.runs import build, training
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.storage.checkpoints import read_checkpoint

DIFFUSION = ("model=diffusion", "solver.num_steps=3")
PUBLISHED = ("uncertainty=published",)
FILTERING = ("experiment=filtering", "uncertainty=ensemble")
LAST_BLOCK = ("laplace.subset=last_block",)
VALIDATE = ("uncertainty.validate=true", "uncertainty.validate_images=4")

# Overrides, as on the command line, and what the line must contain.
CASES: list[tuple[str | tuple[str, ...], list[str]]] = [
    # Names
    ("model=gan", ["unknown model 'gan'", "diffusion, flow"]),
    ("model=3", ["choose by name", "model=flow"]),
    ("data=svhn", ["unknown data 'svhn'", "digits", "folder"]),
    ("solver=rk5", ["unknown solver 'rk5'", "euler"]),
    ("net=huge", ["unknown net 'huge'", "unet28"]),
    ("path=ve", ["unknown path 've'", "cond_ot"]),
    ("laplace=lowrank", ["unknown laplace 'lowrank'", "diag, empirical_fisher"]),
    ("uncertainty=bootstrap", ["unknown uncertainty 'bootstrap'", "ensemble, linearised"]),
    ("metrics=vgg", ["unknown metrics 'vgg'", "inception"]),
    ("trainer=tpu", ["unknown trainer 'tpu'", "ddp"]),
    ("experiment=nothing", ["unknown experiment 'nothing'", "demo"]),
    ("sampler=euler", ["unknown option 'sampler'", "--cfg job"]),
    ("laplace.prior=1", ["unknown option 'laplace.prior'", "--cfg job"]),
    ("solver.eta=0.5", ["unknown option 'solver.eta'; it belongs to solver=ddim", "--cfg job"]),
    ("callbacks.snapshots.keep=3", ["it belongs to callbacks=snapshots"]),
    ("filtering.keep=[0.5]", ["it belongs to experiment=filtering"]),
    ("data.source.corruption.into=[3]", ["it belongs to corruption=mislabelled"]),
    (
        (*PUBLISHED, "uncertainty.members=8"),
        [
            "unknown option 'uncertainty.members'",
            "it belongs to uncertainty=cross_covariance, uncertainty=deep_ensemble",
        ],
    ),
    (("uncertainty=mc_dropout", "uncertainty.p=0"), ["uncertainty.p=0 leaves no feature out"]),
    ("+solver.order=2", ["solver does not work", "'order'"]),
    ("laplace.structure=lowrank", ["laplace.structure", "full, diag, kron", "'lowrank'"]),
    ("laplace.structure=subspace", ["laplace.structure=subspace", "needs laplace.rank"]),
    ("laplace.rank=4", ["laplace.rank=4", "laplace.structure=subspace", "null"]),
    (("laplace=subspace", "laplace.rank=null"), ["needs laplace.rank"]),
    (("laplace=subspace", "laplace.rank=-1"), ["laplace.rank", "got -1"]),
    (("laplace=subspace", "laplace.rank=abc"), ["laplace.rank", "'abc'"]),
    (("laplace=subspace", "laplace.rank=5000"), ["laplace.rank=5000", "keeps them all"]),
    (
        ("laplace=empirical_fisher", "laplace.num_images=9"),
        ["laplace.structure=empirical_fisher", "10 images", "got 9", "laplace.num_images"],
    ),
    (
        ("laplace=prior_only", "laplace.prior_precision=evidence"),
        ["laplace.structure=prior_only", "no evidence", "number"],
    ),
    ("laplace.subset=body", ["laplace.subset", "head, last_block", "'body'"]),
    ((*LAST_BLOCK, "laplace=diag"), ["laplace.structure=diag", "laplace.subset=head"]),
    (
        (*LAST_BLOCK, "laplace.sigma_noise=mle_per_time", "laplace.time_bins=2"),
        ["mle_per_time", "laplace.subset=last_block", "mle"],
    ),
    ((*LAST_BLOCK, "laplace.probes=0"), ["laplace.probes", "all", "got 0"]),
    ("laplace.probes=few", ["laplace.probes", "all", "'few'"]),
    (
        (*LAST_BLOCK, "laplace.num_images=9"),
        ["laplace.subset=last_block", "10 images", "got 9", "laplace.num_images"],
    ),
    *(
        (
            (*LAST_BLOCK, f"uncertainty={name}"),
            [f"uncertainty={name}", "use uncertainty=ensemble", "laplace.subset=head"],
        )
        for name in (
            "refined published total_variance cross_covariance mc_dropout "
            "deep_ensemble checkpoints swag"
        ).split()
    ),
    (
        (*LAST_BLOCK, *VALIDATE),
        ["uncertainty.validate=true", "laplace.subset=last_block", "uncertainty.validate=false"],
    ),
    (
        (*LAST_BLOCK, "experiment=prior_ablation", "uncertainty=ensemble"),
        ["ablation follows the posterior of the head", "ablation=null", "laplace.subset=head"],
    ),
    (
        (*LAST_BLOCK, "experiment=filtering", "uncertainty=ensemble"),
        ["filtering follows the posterior of the head", "filtering=null", "laplace.subset=head"],
    ),
    ((*FILTERING, "filtering.num_images=5"), ["filtering.num_images", "20", "got 5"]),
    ((*FILTERING, "filtering.seeds=3"), ["filtering.seeds", "list", "3"]),
    ((*FILTERING, "filtering.seeds=[1,1]"), ["filtering.seeds=[1, 1]", "twice"]),
    ((*FILTERING, "filtering.seeds=[-1]"), ["filtering.seeds", "got -1"]),
    ((*FILTERING, "filtering.keep=[0.8,1.5]"), ["filtering.keep", "below 1", "1.5"]),
    ((*FILTERING, "filtering.keep=[0.0,0.8]"), ["filtering.keep=0", "above 0"]),
    ((*FILTERING, "filtering.main_keep=0.75"), ["filtering.main_keep=0.75", "filtering.keep"]),
    ((*FILTERING, "filtering.members=1"), ["filtering.members=1", "2 or more"]),
    ((*FILTERING, "filtering.aleatoric_draws=1"), ["filtering.aleatoric_draws=1", "2 or more"]),
    ((*FILTERING, "filtering.subsets=1"), ["filtering.subsets", "got 1"]),
    ((*FILTERING, "filtering.maps=published"), ["filtering.maps", "'published'"]),
    (
        (*FILTERING, "filtering.num_images=60"),
        ["filtering.keep=0.95", "6 images of each class", "filtering.num_images=60"],
    ),
    (
        (*FILTERING, "uncertainty=published"),
        ["filtering.maps.published", "another name", "~filtering.maps.published"],
    ),
    (
        (*FILTERING, "metrics=inception", "metrics.num_images=0"),
        ["filtering", "metrics=classifier"],
    ),
    (
        (*FILTERING, "filtering.maps.published.skip_interval=9"),
        ["uncertainty.skip_interval=9", "steps"],
    ),
    ("metrics.features=dino", ["unknown metrics.features 'dino'", "inception, clip, dinov2"]),
    ("model.prediction=logit", ["unknown model.prediction 'logit'", "velocity, noise, data, v"]),
    ("model.time_sampling=beta", ["unknown model.time_sampling 'beta'", "logit_normal"]),
    (
        (*DIFFUSION, "path.schedule=x"),
        ["unknown path.schedule 'x'", "linear, scaled_linear, cosine"],
    ),
    (
        (*DIFFUSION, "solver=ddpm", "solver.variance=big"),
        ["unknown solver.variance 'big'", "small"],
    ),
    # Pairs that do not fit
    ("solver=ddim", ["solver=ddim is for diffusion models", "euler, heun"]),
    ((*DIFFUSION, "solver=heun"), ["solver=heun needs a path that is smooth", "solver=ddim"]),
    (
        (*DIFFUSION, "solver.num_steps=1001"),
        ["solver.num_steps=1001", "1000 steps", "choose fewer"],
    ),
    (
        ("model.num_classes=null", "solver.guidance=2"),
        ["solver.guidance=2 needs a class-conditional model", "solver.guidance=1"],
    ),
    (
        ("model.class_dropout=0", "solver.guidance=2"),
        ["solver.guidance=2", "model.class_dropout > 0"],
    ),
    ("model.num_classes=5", ["model.num_classes=5", "10 classes", "auto"]),
    ("model.num_classes=20", ["model.num_classes=20", "10 classes", "auto"]),
    ("uncertainty.skip_interval=4", ["uncertainty.skip_interval=4", "solver.num_steps=3"]),
    ("data.root=/tmp", ["data.root=/tmp", "digits", "data=mnist"]),
    ("data.batch_size=5000", ["5000", "1497 training images", "1497 or fewer"]),
    ("laplace.num_images=5000", ["laplace.num_images=5000", "1497", "null"]),
    ("net.channels=[8,8,8,8,8]", ["8 is not divisible by 16", "net.channels"]),
    ("net.head_kernel=2", ["net.head_kernel=2", "odd"]),
    # Numbers out of range
    ("laplace.sigma_noise=0", ["laplace.sigma_noise", "got 0", "mle"]),
    ("laplace.sigma_noise=-0.1", ["laplace.sigma_noise", "got -0.1", "mle"]),
    ("laplace.sigma_noise=mle_per_time", ["mle_per_time", "laplace.time_bins >= 2"]),
    (
        (
            "laplace=empirical_fisher_published",
            "laplace.sigma_noise=mle_per_time",
            "laplace.time_bins=2",
        ),
        ["laplace.structure=empirical_fisher_published", "one sigma_noise", "mle"],
    ),
    ("laplace.time_bins=0", ["laplace.time_bins", "got 0"]),
    ("laplace.time_bins=2.5", ["laplace.time_bins", "got 2.5"]),
    ("laplace.time_bins=65", ["laplace.time_bins=65", "64 images", "fewer"]),
    ("laplace.sigma_noise=nan", ["laplace.sigma_noise", "nan", "mle"]),
    ("laplace.prior_precision=0", ["laplace.prior_precision", "got 0", "evidence"]),
    ("laplace.prior_precision=-1", ["laplace.prior_precision", "got -1", "evidence"]),
    ("laplace.prior_precision=inf", ["laplace.prior_precision", "inf", "evidence"]),
    ("laplace.n_eff=0", ["laplace.n_eff", "got 0", "null"]),
    ("laplace.n_eff=-5", ["laplace.n_eff", "got -5", "null"]),
    ("laplace.draws=0", ["laplace.draws", "got 0", ">= 1"]),
    ("laplace.num_images=0", ["laplace.num_images", "got 0"]),
    ("laplace.batch_size=0", ["laplace.batch_size", "got 0"]),
    ("laplace.seed=-1", ["laplace.seed", "got -1"]),
    ("solver.num_steps=0", ["solver.num_steps", "got 0"]),
    ("solver.num_steps=-3", ["solver.num_steps", "got -3"]),
    ("solver.num_steps=2.5", ["solver.num_steps", "got 2.5"]),
    ("solver.guidance=-1", ["solver.guidance", "got -1", "1 is none"]),
    ((*DIFFUSION, "solver.eta=1.5"), ["solver.eta", "between 0 and 1", "1.5"]),
    ((*DIFFUSION, "solver.eta=-0.1"), ["solver.eta", "between 0 and 1", "-0.1"]),
    ("uncertainty.skip_interval=0", ["uncertainty.skip_interval", "got 0"]),
    ("uncertainty.skip_interval=-1", ["uncertainty.skip_interval", "got -1"]),
    ("uncertainty.members=1", ["uncertainty.members", ">= 2", "got 1"]),
    ("uncertainty.noise_members=1", ["uncertainty.noise_members=1", "2 or more, or 0"]),
    ("uncertainty.noise_members=-1", ["uncertainty.noise_members", ">= 0", "got -1"]),
    ("uncertainty.max_memory=0", ["uncertainty.max_memory", "got 0", "GiB"]),
    ("uncertainty.max_memory=-4", ["uncertainty.max_memory", "got -4", "GiB"]),
    ("uncertainty.max_memory=nan", ["uncertainty.max_memory", "nan"]),
    ("uncertainty.max_memory=lots", ["uncertainty.max_memory", "'lots'"]),
    (
        "uncertainty.max_memory=1e-5",
        ["uncertainty.max_memory=1e-05", "needs", "raise it", "fewer members"],
    ),
    (
        (*VALIDATE, "uncertainty.max_memory=2e-3", "uncertainty.validate_members=10000"),
        ["uncertainty.max_memory=0.002", "needs", "raise it", "uncertainty.validate_members"],
    ),
    ("uncertainty.validate=2", ["uncertainty.validate must be true or false", "got 2"]),
    ("uncertainty.validate_members=1", ["uncertainty.validate_members", ">= 2", "got 1"]),
    ("uncertainty.validate_images=2", ["uncertainty.validate_images", ">= 3", "got 2"]),
    (
        "uncertainty.validate=true",
        ["uncertainty.validate_images=16", "4 maps of uncertainty.num_images", "compare fewer"],
    ),
    ("uncertainty.times=0.5", ["uncertainty.times must be a list", "got 0.5"]),
    ("uncertainty.times=[0.5,1]", ["uncertainty.times", "between 0 and 1", "got 1"]),
    ("uncertainty.times=[0]", ["uncertainty.times", "between 0 and 1", "got 0"]),
    ("uncertainty.times=[-0.2]", ["uncertainty.times", "between 0 and 1", "got -0.2"]),
    ("uncertainty.times=[half]", ["uncertainty.times", "between 0 and 1", "'half'"]),
    ("uncertainty.times=[nan]", ["uncertainty.times", "between 0 and 1", "nan"]),
    ("uncertainty.times=null", ["uncertainty.times must be a list", "None"]),
    ("uncertainty.units=pixels", ["unknown uncertainty.units 'pixels'", "model, unit"]),
    ((*PUBLISHED, "uncertainty.times=[2]"), ["uncertainty.times", "got 2"]),
    ((*PUBLISHED, "uncertainty.max_memory=1e-5"), ["max_memory=1e-05", "published"]),
    (
        ("uncertainty=total_variance", "uncertainty.units=m"),
        ["unknown uncertainty.units 'm'", "model, unit"],
    ),
    ("uncertainty.num_images=0", ["uncertainty.num_images", "got 0"]),
    ("uncertainty.batch_size=0", ["uncertainty.batch_size", "got 0"]),
    ((*PUBLISHED, "uncertainty.mc_samples=0"), ["uncertainty.mc_samples", "got 0"]),
    ((*PUBLISHED, "uncertainty.skip_interval=9"), ["uncertainty.skip_interval=9", "num_steps=3"]),
    ("metrics.num_images=-1", ["metrics.num_images", "got -1"]),
    ("metrics.num_images=1", ["metrics.num_images=1", "2 or more"]),
    ("metrics.batch_size=0", ["metrics.batch_size", "got 0"]),
    ("data.batch_size=0", ["data.batch_size", "got 0"]),
    ("data.batch_size=-128", ["data.batch_size", "got -128"]),
    ("model.optimizer.lr=0", ["model.optimizer.lr", "got 0"]),
    ("model.optimizer.lr=-1e-3", ["model.optimizer.lr", "got -0.001"]),
    ("model.optimizer.betas=[0.9,1.5]", ["model.optimizer", "1.5"]),
    ("model.class_dropout=1", ["model.class_dropout", "got 1"]),
    ("model.warmup_steps=-1", ["model.warmup_steps", "got -1"]),
    ("net.dropout=2", ["net.dropout", "got 2"]),
    ("net.blocks=0", ["net.blocks", "got 0"]),
    ("callbacks.ema.decay=2", ["callbacks.ema.decay", "got 2"]),
    ("trainer.max_epochs=0", ["trainer.max_epochs", "got 0"]),
    ("trainer.max_epochs=-1", ["trainer.max_epochs", "got -1"]),
    ("trainer.devices=0", ["trainer.devices", "got 0"]),
    ("seed=-1", ["seed", "got -1"]),
    ("seed=4294967296", ["seed", "below 2**32", "4294967296"]),
    # Words where numbers belong, and the other way round
    ("laplace.sigma_noise=abc", ["laplace.sigma_noise", "'abc'", "mle"]),
    ("laplace.prior_precision=abc", ["laplace.prior_precision", "'abc'", "evidence"]),
    ("laplace.draws=abc", ["laplace.draws", "'abc'"]),
    ("solver.num_steps=abc", ["solver.num_steps", "'abc'"]),
    ("solver.num_steps=inf", ["solver.num_steps", "inf"]),
    ("solver.guidance=abc", ["solver.guidance", "'abc'"]),
    ("solver.guidance=nan", ["solver.guidance", "nan"]),
    ((*DIFFUSION, "solver.eta=abc"), ["solver.eta", "'abc'"]),
    ("uncertainty.members=abc", ["uncertainty.members", "'abc'"]),
    ("uncertainty.skip_interval=true", ["uncertainty.skip_interval", "True"]),
    ("metrics.num_images=many", ["metrics.num_images", "'many'"]),
    ("data.batch_size=abc", ["data.batch_size", "'abc'"]),
    ("data.flip=maybe", ["data.flip", "true or false", "'maybe'"]),
    ("model.optimizer.lr=abc", ["model.optimizer.lr", "'abc'"]),
    ("model.optimizer.lr=nan", ["model.optimizer.lr", "nan"]),
    ("model.class_dropout=abc", ["model.class_dropout", "'abc'"]),
    ("model.num_classes=ten", ["model.num_classes", "'ten'"]),
    ("trainer.max_epochs=abc", ["trainer.max_epochs", "'abc'"]),
    ("trainer.precision=half", ["trainer.precision=half", "32-true"]),
    ("dry_run=no", ["dry_run", "true or false", "'no'"]),
    ("trainer.precision=64-true", ["trainer.precision=64-true", "bf16-mixed"]),
    ("trainer.precision=bf16-true", ["trainer.precision=bf16-true", "bf16-mixed"]),
    ("trainer.precision=16-mixed", ["trainer.precision=16-mixed", "bf16-mixed"]),
    ("trainer.gradient_clip_val=abc", ["gradient_clip_val", "abc"]),
    ("uncertainty.seed=4294967296", ["uncertainty.seed", "below 2**32", "4294967296"]),
    ("laplace.seed=4294967296", ["laplace.seed", "below 2**32", "4294967296"]),
    ("metrics.seed=4294967296", ["metrics.seed", "below 2**32", "4294967296"]),
    ("seed=abc", ["seed", "'abc'"]),
    ("seed=1.5", ["seed", "1.5"]),
    ("fit=no", ["fit must be true or false", "'no'"]),
    ("seed=${sed}", ["'sed' not found", "seed"]),
    ("data.root=${oc.env:NO_SUCH_VARIABLE}", ["NO_SUCH_VARIABLE", "not found"]),
    # Parts that are missing, and values in the place of parts
    *(
        (f"{name}=null", [f"{name}=None", "leaves a part out", "by name"])
        for name in ("data.source", "model.optimizer")
    ),
    ("~path", ["path=None", "leaves a part out"]),
    ("model.optimizer=abc", ["model.optimizer=abc", "leave it as it is"]),
    ("model=[1,2]", ["cannot be read", "correct its form"]),
    ("model.optimizer._partial_=abc", ["_partial_", "model.optimizer", "correct its form"]),
    ("callbacks.ema=true", ["callbacks.ema=True", "null to switch it off"]),
    ("callbacks.ema._target_=null", ["callbacks.ema=", "null to switch it off"]),
    ("logger.tensorboard._target_=-1", ["logger.tensorboard=", "null to switch it off"]),
    ("output_dir=null", ["output_dir=None is no path", "output_dir=outputs"]),
    ("run_dir=true", ["run_dir=True is no path"]),
    ("ckpt_path=3", ["ckpt_path=3 is no path"]),
    ("process_timeout=0", ["process_timeout", "got 0", "seconds"]),
    ("process_timeout=soon", ["process_timeout", "'soon'", "seconds"]),
    ("trainer.devices=[0,1]", ["trainer.devices=[0, 1] names GPUs", "number of processes"]),
    # Devices, checkpoints, callbacks
    ("trainer.accelerator=gpu", ["trainer.accelerator=gpu", "no GPU", "cpu"]),
    ("trainer.accelerator=quantum", ["unknown trainer.accelerator 'quantum'", "auto, cpu or gpu"]),
    ("ckpt_path=last", ["ckpt_path=last", "last.ckpt", "leave ckpt_path out"]),
    ("ckpt_path=/no/such.ckpt", ["no checkpoint at /no/such.ckpt", "correct ckpt_path"]),
    ("fit=false", ["fit=false needs a checkpoint", "ckpt_path="]),
    (("fit=false", "ckpt_path=last"), ["no checkpoint at", "last.ckpt"]),
]


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Nothing below may start to train or to pass over the data, whatever else it does."""

    def started(*_args, **_kwargs):
        raise AssertionError("work was started")

    monkeypatch.setattr(L.Trainer, "fit", started)
    monkeypatch.setattr(callback, "fit_curvature", started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def check_line(line: str, fragments: list[str]) -> None:
    assert "\n" not in line and len(line) < 600, line
    for fragment in fragments:
        assert fragment in line, line


def refused(compose: Compose, *overrides: str) -> str:
    """The line that a user would see."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        pipeline.run(compose(*overrides))
    message = str(stop.value.code)
    assert message.startswith("error: ")
    return message


def name_of(case: object) -> str | None:
    if isinstance(case, str):
        return case
    return " ".join(case) if isinstance(case, tuple) else ""


@pytest.mark.parametrize(("overrides", "fragments"), CASES, ids=name_of)
def test_refused_in_one_line(overrides, fragments, compose: Compose):
    given = (overrides,) if isinstance(overrides, str) else overrides
    check_line(refused(compose, *given), fragments)


def png(size: int, value: int = 0, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), value).save(buffer, "png")
    return buffer.getvalue()


def folder_of(tmp_path: Path, **files: bytes) -> list[str]:
    root = tmp_path / "pictures"
    root.mkdir()
    for name, content in files.items():
        path = root / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return ["data=folder", f"data.root={root}", "metrics.num_images=0"]


def zip_with_label(tmp_path: Path, label: int) -> list[str]:
    path = tmp_path / "images.zip"
    labels = ", ".join(f'["{n}.png", {label if n == 3 else n % 2}]' for n in range(8))
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(8):
            archive.writestr(f"{n}.png", png(8, n))
        archive.writestr("dataset.json", f'{{"labels": [{labels}], "classes": ["a", "b"]}}')
    return ["data=zip", f"data.root={path}", "metrics.num_images=0"]


# Data sets, made when the test runs, and what the line must contain; test_bad_data.py has more.
DATA: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "missing folder": (
        lambda tmp: ["data=folder", f"data.root={tmp / 'nowhere'}"],
        ["nowhere does not exist", "give a folder"],
    ),
    "empty folder": (folder_of, ["no images below", "data.root"]),
    "corrupt image": (
        lambda tmp: folder_of(tmp, a=png(8), b=png(8)[:40]),
        ["b.png", "replace or remove"],
    ),
    "mixed sizes": (lambda tmp: folder_of(tmp, a=png(8), b=png(9)), ["8x8", "9x9", "resize"]),
    "mixed colours": (
        lambda tmp: folder_of(tmp, a=png(8), b=png(8, 0, "RGB")),
        ["grey", "RGB", "convert"],
    ),
    "size the network cannot halve": (
        lambda tmp: [*folder_of(tmp, a=png(9), b=png(9)), "data.batch_size=1"],
        ["9 is not divisible by 2", "net.channels"],
    ),
    "batch larger than the data": (
        lambda tmp: folder_of(tmp, a=png(8), b=png(8)),
        ["data.batch_size=128", "1 training images", "give 1 or fewer"],
    ),
    "no labels to score with": (
        lambda tmp: [
            *folder_of(tmp, a=png(8), b=png(8), c=png(8)),
            "data.batch_size=2",
            "laplace.num_images=null",
            "metrics.num_images=10",
        ],
        ["no labels", "metrics=inception", "metrics.num_images=0"],
    ),
    "one class to score with": (
        lambda tmp: [
            *folder_of(tmp, **{f"cat/{name}": png(8) for name in "abc"}),
            "data.batch_size=2",
            "laplace.num_images=null",
            "metrics.num_images=10",
        ],
        ["has one class", "data.root/dog/2.png", "metrics=inception"],
    ),
    "label out of range": (lambda tmp: zip_with_label(tmp, 7), ["label 7", "2 classes"]),
    "negative label": (lambda tmp: zip_with_label(tmp, -1), ["label -1", "from 0"]),
    "not a zip": (
        lambda tmp: ["data=zip", f"data.root={__file__}"],
        ["is not a zip", "copy it again"],
    ),
    "no MNIST and no network": (
        lambda tmp: ["data=mnist", f"data.root={tmp}", "data.source.download=false"],
        ["MNIST/raw is missing", "data.root"],
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_in_one_line(case, compose: Compose, tmp_path):
    prepare, fragments = DATA[case]
    check_line(refused(compose, *prepare(tmp_path)), fragments)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def cut(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-2000])


def other_net(source: Path, target: Path) -> None:
    checkpoint = read_checkpoint(source)
    state = checkpoint["state_dict"]
    state["net.head.weight"] = state["net.head.weight"][:, :4]
    torch.save(checkpoint, target)


def other_prediction(source: Path, target: Path) -> None:
    checkpoint = read_checkpoint(source)
    checkpoint["bayesdiff"]["config"]["model"]["prediction"] = "noise"
    torch.save(checkpoint, target)


def bomb(source: Path, target: Path) -> None:
    torch.save({"state_dict": {}, "x": Bomb(target.parent / "run by the checkpoint")}, target)


def plain_bomb(source: Path, target: Path) -> None:
    target.write_bytes(pickle.dumps(Bomb(target.parent / "run by the checkpoint")))


def renamed_npz(source: Path, target: Path) -> None:
    with target.open("wb") as file:
        np.savez(file, a=np.zeros(3))


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "truncated": (cut, ["truncated or corrupt", "delete a run's own last.ckpt"]),
    "empty": (lambda _, target: target.touch(), ["checkpoint", "model.ckpt"]),
    "another network": (
        other_net,
        ["belongs to another network", "net.head.weight", "(1, 4, 3, 3)", "(1, 8, 3, 3)"],
    ),
    "another prediction": (other_prediction, ["model.prediction=noise", "not velocity"]),
    "holds code": (bomb, ["holds code", "was not run"]),
    "is code": (plain_bomb, ["holds code", "was not run"]),
    "an npz": (renamed_npz, ["model.ckpt", "corrupt"]),
    "text": (lambda _, target: target.write_text("hello"), ["model.ckpt"]),
    "other tensors": (
        lambda _, target: torch.save([1, 2], target),
        ["not a Lightning checkpoint"],
    ),
    "a state of numbers": (
        lambda _, target: torch.save({"state_dict": {"a": 1}}, target),
        ["not a Lightning checkpoint"],
    ),
}


@pytest.mark.parametrize("fit", ["true", "false"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, fit, trained: Trained, compose: Compose, tmp_path):
    spoil, fragments = CHECKPOINTS[case]
    path = tmp_path / "model.ckpt"
    spoil(trained.checkpoint, path)
    # Of another seed, or the finished checkpoint would be this very run's.
    line = refused(compose, f"fit={fit}", f"ckpt_path={path}", "seed=1")
    if fit == "true" and case.startswith("another"):
        fragments = ["is of run", "options it was started with"]
    check_line(line, fragments)
    assert not (tmp_path / "run by the checkpoint").exists()


def test_the_bomb_works(tmp_path):
    """Proof that the test above could fail: an ordinary load runs the code."""
    bomb(tmp_path, tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "run by the checkpoint").exists()


def test_a_checkpoint_of_another_run_is_not_continued(trained: Trained, compose: Compose):
    line = refused(compose, f"ckpt_path={trained.checkpoint}", "model.optimizer.lr=1e-4")
    check_line(line, ["is of run", "options", "run_dir"])


def test_a_swapped_checkpoint_in_the_run_folder(copied: Trained, compose: Compose):
    checkpoint = read_checkpoint(copied.checkpoint)
    checkpoint["state_dict"]["net.head.weight"] += 1
    torch.save(checkpoint, copied.checkpoint)
    check_line(refused(compose), ["last.ckpt", "fit.json", "delete", "fit=false"])


def test_zeroed_weights_of_an_interrupted_training_are_found(copied: Trained, compose: Compose):
    """torch alone reads past them."""
    (copied.folder / "fit.json").unlink()
    content = bytearray(copied.checkpoint.read_bytes())
    with zipfile.ZipFile(copied.checkpoint) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    start = largest.header_offset + 200
    content[start : start + 100] = bytes(100)
    copied.checkpoint.write_bytes(content)
    check_line(refused(compose), ["last.ckpt", "truncated or corrupt", "delete"])


def truncated_curvature(run: Trained) -> None:
    path = run.curvature
    path.write_bytes(path.read_bytes()[:-64])


def changed_curvature(run: Trained) -> None:
    path = run.curvature
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def foreign_curvature(run: Trained) -> None:
    path = run.curvature
    own = Curvature.load(path)
    values = {name: getattr(own, name) for name in own.__dataclass_fields__}
    Curvature(**values | {"source": "0" * 16 + "-" + own.source[17:]}).save(path)


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (truncated_curvature, ["curvature-", "delete it"]),
        (changed_curvature, ["curvature-", "damaged", "delete it"]),
        (foreign_curvature, ["computed from 0000000000000000", "delete the file"]),
    ],
)
def test_bad_curvature(spoil, fragments, copied: Trained, compose: Compose):
    spoil(copied)
    check_line(refused(compose), fragments)


def test_a_broken_curvature_is_found_before_training(copied: Trained, compose: Compose):
    """Training first and refusing its curvature hours later would be cruel."""
    truncated_curvature(copied)
    (copied.folder / "fit.json").unlink()
    copied.checkpoint.unlink()
    check_line(refused(compose), ["curvature-", "delete it"])


@pytest.mark.parametrize("option", ["output_dir", "run_dir"])
def test_a_folder_that_cannot_be_written(option, compose: Compose, tmp_path):
    (tmp_path / "file").touch()
    line = refused(compose, f"{option}={tmp_path}/file/inside")
    check_line(line, [option, f"{tmp_path}/file is a file", "choose a folder"])


def test_inception_without_a_file(compose: Compose, tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    cases = {
        "null": ["cannot be downloaded", "metrics.weights_path", "weights-inception"],
        f"{tmp_path}/none.pth": ["none.pth does not exist", "weights-inception"],
        str(Path(__file__)): ["not a plain weights file", "weights-inception"],
    }
    for path, fragments in cases.items():
        overrides = ["metrics=inception", "metrics.num_images=12", f"metrics.weights_path={path}"]
        check_line(refused(compose, *overrides), fragments)


@pytest.fixture
def real_fit(no_work, monkeypatch):
    """Undo the block on training."""
    monkeypatch.undo()


@pytest.mark.parametrize("way", ["loss", "weights"])
def test_divergence_keeps_the_last_good_checkpoint(way, real_fit, compose, monkeypatch):
    real = GenerativeModel.training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == (2 if way == "loss" else 3):  # 2 batches per epoch
            with torch.no_grad():
                self.net.head.weight.fill_(float("nan"))
            if way == "weights":  # the loss is still good, the weights after it are not
                return sum(p.sum() * 0 for p in self.parameters() if p.isfinite().all())
        return real(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModel, "training_step", poisoned)
    cfg = compose("trainer.max_epochs=3", "metrics.num_images=0")
    with pytest.raises(UserError) as error:
        pipeline.run(cfg)
    check_line(str(error.value), ["not finite", "last good checkpoint is kept", "lr"])
    last = build.build(cfg).folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_huge_learning_rate_stops(real_fit, compose: Compose):
    cfg = compose("model.optimizer.lr=1e30", "trainer.max_epochs=3", "metrics.num_images=0")
    with pytest.raises(UserError) as error:
        pipeline.run(cfg)
    check_line(str(error.value), ["not finite", "model.optimizer.lr"])


def test_programming_errors_are_not_hidden(compose: Compose):
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0
    with pytest.raises(ValueError, match="a bug"), one_line_errors():
        raise ValueError("a bug")


def test_the_switch_of_hydra_is_put_back(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with one_line_errors():
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
        with one_line_errors():  # inside the task: processes started here must not inherit it
            assert "HYDRA_FULL_ERROR" not in os.environ
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_ctrl_c_between_the_stages():
    with pytest.raises(SystemExit, match="interrupted; the same command"), one_line_errors():
        raise KeyboardInterrupt


def test_explain_takes_the_innermost_user_error():
    try:
        try:
            raise UserError("the cure")
        except UserError as cause:
            raise HydraException("long\nstory") from cause
    except HydraException as error:
        assert explain(error) == "the cure"
    assert explain(OmegaConfBaseException("two\n  lines")) == "two lines"


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        # Before torch is there, and after.
        (["model=gan"], ["unknown model 'gan'"]),
        (["fit=false", "ckpt_path=bomb.ckpt", "uncertainty=ensemble"], ["bomb.ckpt holds code"]),
    ],
)
def test_the_command_itself(overrides, fragments, tmp_path):
    bomb(tmp_path, tmp_path / "bomb.ckpt")
    environment = {k: v for k, v in os.environ.items() if not re.search("RANK|WORLD_|HYDRA", k)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    check_line(lines[0], fragments)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"bomb.ckpt", "outputs"}


def test_weights_key_of_a_checkpoint_is_that_of_the_model(trained: Trained, compose: Compose):
    this = build.build(compose())
    assert training.load_weights(this.model, trained.checkpoint) == weights_key(this.model)
    assert OmegaConf.is_config(this.cfg)
