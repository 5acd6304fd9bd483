"""From a configuration to checked objects: all that can be refused is refused here."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bayesdiff.artefacts import key_of
from bayesdiff.checks import UserError, at_least, positive, seed_of, share
from bayesdiff.data.module import ImageDataModule
from bayesdiff.device import autocast_dtype
from bayesdiff.disk import check_writable
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.models import GenerativeModel

# Trainer options that change the weights; devices and strategy must not.
_TRAINER_KEYS = (
    "max_epochs", "max_steps", "gradient_clip_val", "accumulate_grad_batches",
    "limit_train_batches", "overfit_batches", "precision",
)  # fmt: skip


# Weights in half precision would lose the steps, and scaled gradients the bound on their norm.
_PRECISIONS = ("auto", "32-true", "bf16-mixed")


@dataclass(frozen=True)
class Run:
    """One configured run: what it works with and where its artefacts are.

    Attributes:
        cfg: resolved configuration.
        data: images and batches.
        model: network, path and loss; its weights are loaded by the fit stage.
        device: where sampling and scoring happen.
        key: content key of everything the trained weights depend on.
        folder: the run folder.
    """

    cfg: DictConfig
    data: ImageDataModule
    model: GenerativeModel
    device: torch.device
    key: str
    folder: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes the model knows, none for an unconditional model."""
        return self.data.data.classes if self.model.num_classes else ()


def build(cfg: DictConfig) -> Run:
    """Make and check everything a run needs; what cannot work is a UserError here."""
    check_values(cfg)
    device = choose_device(str(cfg.trainer.accelerator))
    data = ImageDataModule(
        instantiate(cfg.data.source),
        batch_size=cfg.data.batch_size,
        flip=cfg.data.flip,
        seed=cfg.seed,
    )
    model = build_model(cfg, data)
    key = fit_key(cfg, data)
    name = f"{data.data.name}-{model.path.family}-{key[:8]}"
    folder = Path(cfg.run_dir or Path(cfg.output_dir) / name)
    if is_main_process() and not cfg.get("dry_run"):
        check_writable(Path(cfg.run_dir or cfg.output_dir))
    return Run(cfg, data, model, device, key, folder)


def build_model(cfg: DictConfig, data: ImageDataModule) -> GenerativeModel:
    """The model for this data, with freshly initialised weights.

    Raises:
        UserError: if the class count, the head or the optimiser's options do not fit.
    """
    images = data.data
    classes: Any = cfg.model.num_classes
    if classes == "auto":
        classes = images.num_classes or None
    if classes is not None:
        at_least("model.num_classes", classes)
        if classes != images.num_classes:
            raise UserError(
                f"model.num_classes={classes} but {images.name} has {images.num_classes} classes; "
                "use model.num_classes=auto, or null for an unconditional model"
            )
    torch.manual_seed(cfg.seed)
    net = instantiate(
        cfg.net,
        in_channels=images.channels,
        image_size=images.image_size,
        num_classes=classes,
        _convert_="all",
    )
    path = instantiate(cfg.path)
    model = instantiate(cfg.model, net=net, path=path, num_classes=classes, _convert_="all")
    HeadGeometry.of(model.net.head)
    try:
        instantiate(cfg.model.optimizer, _convert_="all")(model.parameters())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.optimizer does not work: {error}; correct its options") from error
    return model


_GROUPS = (
    "data", "data.source", "model", "model.optimizer", "net", "path", "laplace", "solver",
    "uncertainty", "metrics", "trainer",
)  # fmt: skip
_PATHS = ("output_dir", "run_dir", "ckpt_path")


def check_groups(cfg: DictConfig) -> None:
    """Refuse a configuration that lacks a part, or has a value in the place of one.

    Raises:
        UserError: one line with the name and the cure.
    """
    for name in _GROUPS:
        if not isinstance(found := OmegaConf.select(cfg, name), DictConfig):
            raise UserError(
                f"{name}={found} leaves a part out; choose it by name, or leave it as it is"
            )
    if cfg.callbacks is not None and not isinstance(cfg.callbacks, DictConfig):
        raise UserError(f"callbacks={cfg.callbacks} are no callbacks; use callbacks=default")
    switched: dict[Any, Any] = {**(cfg.callbacks or {}), "logger": cfg.get("logger")}
    for name, options in switched.items():
        target = options.get("_target_") if isinstance(options, DictConfig) else None
        if options and not isinstance(target, str):
            place = name if name == "logger" else f"callbacks.{name}"
            raise UserError(f"{place}={options} has no options; give null to switch it off")
    for name in _PATHS:
        value = cfg.get(name)
        if not isinstance(value, str) and (value is not None or name == "output_dir"):
            raise UserError(f"{name}={value} is no path; give it as text, as in {name}=outputs")


def check_values(cfg: DictConfig) -> None:
    """Refuse plain values that no stage could use.

    Raises:
        UserError: one line with the value and the cure.
    """
    seed_of("seed", cfg.seed)
    at_least("data.batch_size", cfg.data.batch_size)
    for name in ("fit", "data.flip", "dry_run"):
        if not isinstance(value := OmegaConf.select(cfg, name), bool):
            raise UserError(f"{name} must be true or false, got {value!r}")
    positive("model.optimizer.lr", cfg.model.optimizer.lr)
    for name in ("model.class_dropout", "net.dropout", "callbacks.ema.decay"):
        if (value := OmegaConf.select(cfg, name)) is not None:
            share(name, value)
    limit = "max_epochs" if cfg.trainer.get("max_steps", -1) in (-1, None) else "max_steps"
    at_least(f"trainer.{limit}", cfg.trainer[limit])
    if cfg.trainer.precision not in _PRECISIONS:
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} is not offered; "
            f"choose from {', '.join(_PRECISIONS)}"
        )
    if (clip := cfg.trainer.get("gradient_clip_val")) is not None:
        positive("trainer.gradient_clip_val", clip, "give a number above 0, or null")
    if cfg.trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        algorithm = cfg.trainer.gradient_clip_algorithm
        raise UserError(f"trainer.gradient_clip_algorithm={algorithm} is not offered; use norm")
    if (every := cfg.trainer.get("check_val_every_n_epoch")) is not None:
        at_least("trainer.check_val_every_n_epoch", every)
    if not cfg.fit and not cfg.ckpt_path:
        raise UserError("fit=false needs a checkpoint; give ckpt_path=/path/to/last.ckpt")
    if cfg.ckpt_path not in (None, "last") and not Path(cfg.ckpt_path).is_file():
        raise UserError(f"no checkpoint at {cfg.ckpt_path}; correct ckpt_path, or leave it out")


def choose_device(accelerator: str) -> torch.device:
    """Device for sampling and scoring, the one Lightning would choose for training.

    Raises:
        UserError: for a device that is not there.
    """
    cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not cuda:
        raise UserError(f"trainer.accelerator={accelerator} but there is no GPU here; use cpu")
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"unknown trainer.accelerator {accelerator!r}; choose auto, cpu or gpu")
    if cuda and accelerator != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def precision(cfg: DictConfig, device: torch.device) -> str:
    """Lightning's precision flag, with ``auto`` resolved for this device."""
    if cfg.trainer.precision != "auto":
        return cfg.trainer.precision
    return "bf16-mixed" if autocast_dtype(device) else "32-true"


def fit_key(cfg: DictConfig, data: ImageDataModule) -> str:
    """Content key of everything the trained weights depend on, devices left out."""
    ema: Mapping[str, Any] | None = (cfg.callbacks or {}).get("ema")
    parts = {
        "data": [data.data.fingerprint, data.batch_size, data.flip],
        "seed": cfg.seed,
        "model": plain(cfg.model),
        "net": plain(cfg.net),
        "path": plain(cfg.path),
        "trainer": {k: cfg.trainer[k] for k in _TRAINER_KEYS if k in cfg.trainer},
        "ema": plain(ema) if ema else None,
    }
    if not cfg.fit and cfg.ckpt_path != "last":
        # A checkpoint from elsewhere has a folder of its own, whatever the options say.
        parts["checkpoint"] = hashlib.sha256(Path(cfg.ckpt_path).read_bytes()).hexdigest()
    return key_of(parts)


def plain(cfg: Any) -> Any:
    """A configuration node as plain values."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def is_main_process() -> bool:
    """Whether this process writes the artefacts."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
