"""From a configuration to checked objects: all that can be refused is refused here."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError, at_least, positive, seed_of, share
from bayesdiff.data.binarised import binarised
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import in_space
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.requirements import require_module
from bayesdiff.machine.device import autocast_dtype, settle_threads
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import Condition
from bayesdiff.options.shadows import check_shadows
from bayesdiff.options.targets import arguments, fitting
from bayesdiff.options.trainer import check_interval, check_trainer, steps_and_epochs
from bayesdiff.options.values import plain as plain
from bayesdiff.paths.fitting import fitted_path
from bayesdiff.report.loggers import check_loggers
from bayesdiff.runs.defaults import run_folder
from bayesdiff.runs.fit_key import fit_key, has_weights, takes_weights
from bayesdiff.runs.likelihood import build_likelihood
from bayesdiff.runs.network import build_network as build_network
from bayesdiff.runs.network import wrapped
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.storage.atomic import check_writable
from bayesdiff.storage.checkpoints import checkpoint_at, load_weights, note_of, read_checkpoint
from bayesdiff.storage.same_kind import differences, kind_of

log = logging.getLogger(__name__)

_LOOKED_AT = 256  # images, for what a model says of its data


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
        parent: what the training starts from (``init_from``): path, key of its run and weights.
        studies: that are asked for, each a ``Study``, by name.
        instead_of: the estimator that was asked for and why another one makes its maps; None where
            it does.
        callbacks: those that are asked for, made and checked, until a training takes them.
    """

    cfg: DictConfig
    data: ImageDataModule
    model: GenerativeModel
    device: torch.device
    key: str
    folder: Path
    parent: dict[str, Any] | None = None
    studies: Mapping[str, Any] = field(default_factory=dict)
    instead_of: str | None = None
    callbacks: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes the model knows, none for an unconditional model."""
        return self.data.data.classes if self.model.condition is not None else ()

    @property
    def length(self) -> tuple[int, float]:
        """Optimiser steps and epochs of the whole training."""
        return steps_and_epochs(self.cfg.trainer, self.data.batches)


def build(cfg: DictConfig) -> Run:
    """Make and check everything a run needs; what cannot work is a UserError here."""
    check_values(cfg)
    device = choose_device(str(cfg.trainer.accelerator))
    data = ImageDataModule(
        in_space(
            binarised(source_data(cfg.data.source), cfg.data.get("binarise")),
            cfg.data.get("space"),
        ),
        batch_size=cfg.data.batch_size,
        flip=cfg.data.flip,
        seed=cfg.seed,
    )
    check_interval(cfg.trainer, data.batches)
    settle_threads(device, data.data.images[0].numel())
    model = build_model(cfg, data)
    parent = start_from(cfg, model)
    weights = weights_key(model) if has_weights(cfg) else parent["weights"] if parent else None
    key = fit_key(cfg, data.data.fingerprint, weights)
    folder = Path(cfg.run_dir or run_folder(cfg, data.data.name, model.path.family, key))
    if is_main_process() and not cfg.get("dry_run"):
        check_writable(Path(cfg.run_dir or cfg.output_dir))
    return Run(cfg, data, model, device, key, folder, parent)


def source_data(options: DictConfig) -> ImageData:
    """What the source of ``data.source`` gives.

    Raises:
        UserError: if that is no record of images.
    """
    made = instantiate(options)
    if isinstance(made, ImageData) or hasattr(made, "fingerprint"):
        return made
    target = f"data.source._target_={options.get('_target_')}"
    if options.get("_partial_"):
        raise UserError(f"{target} is not called, for _partial_: true; leave _partial_ out")
    raise UserError(
        f"{target} gives a {type(made).__name__} and no ImageData; end it with "
        "bayesdiff.data.images.hold_out or ImageData.build, which make one"
    )


def build_model(cfg: DictConfig, data: ImageDataModule) -> GenerativeModel:
    """The model for this data, with freshly initialised weights.

    Raises:
        UserError: if the class count, the head or the optimiser's options do not fit.
    """
    images = data.data
    condition = build_condition(cfg.model, images)
    torch.manual_seed(cfg.seed)
    likelihood = build_likelihood(cfg.model)
    path = fitted_path(instantiate(cfg.path).for_likelihood(likelihood), data.space)
    optimizer = fitting(cfg.model.optimizer, "model.optimizer", torch.optim.AdamW)
    # Below its name, which errors then give in full.
    # A user's own model need not know of a likelihood.
    aside = {"condition", "wrapper"} | (
        {"likelihood"} if not cfg.model.get("likelihood") else set()
    )
    own = {name: value for name, value in plain(cfg.model).items() if name not in aside}
    options = OmegaConf.create({"model": own | {"optimizer": optimizer}}).model
    net = build_network(cfg.net, images, condition, likelihood)
    net = wrapped(
        cfg.model.get("wrapper"), net, path=path, likelihood=likelihood, space=data.space
    )
    given: dict[str, Any] = {"num_classes": getattr(condition, "num_classes", None)}
    if condition is not None and "condition" in (
        arguments(str(options._target_)) or {"condition"}
    ):
        given["condition"] = condition
    model = instantiate(options, net=net, path=path, **given, _convert_="all")
    if hasattr(model, "objective"):  # a user's own model need not have one
        model.objective.check_data(data.space.encode(images.images[:_LOOKED_AT]), images.name)
    data.given = condition.field if condition else "labels"
    require_module(model, "last-layer Laplace", "class_dropout")
    HeadGeometry.of(model.net.head)
    try:
        instantiate(options.optimizer, _convert_="all")(model.parameters())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.optimizer does not work: {error}; correct its options") from error
    return model


def build_condition(options: DictConfig, images: ImageData) -> Condition | None:
    """What the network is given beside the time, see ``condition``; None for nothing."""
    made = options.get("condition", {"_target_": "bayesdiff.models.conditions.labels"})
    if made is None:
        return None
    condition: Condition | None = instantiate(made, _partial_=True)(images, options.num_classes)
    return condition


def start_from(cfg: DictConfig, model: GenerativeModel) -> dict[str, Any] | None:
    """Load the weights that a training starts from, and say where they are from.

    Raises:
        UserError: if they are missing, or belong to another network.
    """
    if cfg.init_from is None:
        return None
    if not cfg.fit:
        raise UserError("init_from begins a training and fit=false has none; use ckpt_path=")
    path = checkpoint_at(cfg.init_from, "init_from")
    checkpoint, config = read_checkpoint(path), plain(cfg)
    weights = load_weights(model, path, checkpoint)
    odd = [name for name, *_ in differences(checkpoint, config, kind_of(config))]
    if odd and is_main_process():
        log.warning(
            "init_from=%s was trained with another %s, which these weights must now unlearn",
            *(path, " and ".join(odd)),
        )
    key = note_of(checkpoint).get("key")
    return {"path": str(path), "key": key, "weights": weights}


_GROUPS = (
    "data", "data.source", "model", "model.optimizer", "net", "path", "laplace", "solver",
    "uncertainty", "metrics", "trainer",
)  # fmt: skip
_PATHS = ("output_dir", "run_dir", "ckpt_path", "init_from")


def check_groups(cfg: DictConfig) -> None:
    """Refuse a configuration that lacks a part, or has a value in the place of one."""
    check_shadows()
    for name in _GROUPS:
        if not isinstance(found := OmegaConf.select(cfg, name), DictConfig):
            raise UserError(
                f"{name}={found} leaves a part out; choose it by name, or leave it as it is"
            )
    if cfg.callbacks is not None and not isinstance(cfg.callbacks, DictConfig):
        raise UserError(f"callbacks={cfg.callbacks} are no callbacks; use callbacks=default")
    callbacks: dict[Any, Any] = {**(cfg.callbacks or {})}
    for name, options in callbacks.items():
        target = options.get("_target_") if isinstance(options, DictConfig) else None
        if options and not isinstance(target, str):
            raise UserError(
                f"callbacks.{name}={options} has no _target_ that makes it; give one, such as "
                f"callbacks.{name}._target_=lightning.pytorch.callbacks.ModelCheckpoint, or give "
                "null to switch it off"
            )
    check_loggers(cfg.get("logger"))
    for name in _PATHS:
        value = cfg.get(name)
        if not isinstance(value, str) and (value is not None or name == "output_dir"):
            raise UserError(f"{name}={value} is no path; give it as text, as in {name}=outputs")


def check_values(cfg: DictConfig) -> None:
    """Refuse plain values that no stage could use."""
    seed_of("seed", cfg.seed)
    at_least("data.batch_size", cfg.data.batch_size)
    for name in ("fit", "data.flip", "dry_run"):
        if not isinstance(value := OmegaConf.select(cfg, name), bool):
            raise UserError(f"{name} must be true or false, got {value!r}")
    positive("model.optimizer.lr", cfg.model.optimizer.lr)
    for name in ("model.class_dropout", "net.dropout"):
        if (value := OmegaConf.select(cfg, name)) is not None:
            share(name, value)
    check_trainer(cfg.trainer)
    if cfg.sample_from not in ("last", "best"):
        raise UserError(f"unknown sample_from {cfg.sample_from!r}; choose last or best")
    if takes_weights(cfg) and cfg.sample_from != "last":
        raise UserError(
            f"sample_from={cfg.sample_from} chooses among the epochs of a training, and "
            f"ckpt_path={cfg.ckpt_path} with fit=false is one file; leave sample_from out"
        )
    if not cfg.fit and not cfg.ckpt_path:
        raise UserError("fit=false needs a checkpoint; give ckpt_path=/path/to/last.ckpt")
    if cfg.ckpt_path not in (None, "last", "built") and not Path(cfg.ckpt_path).is_file():
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


def is_main_process() -> bool:
    """Whether this process writes the artefacts."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
