"""Options of Lightning's Trainer: what they may be, which of them change the weights."""

import math
import re
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.options.spelling import near
from bayesdiff.options.targets import class_of
from bayesdiff.options.values import plain

# What the pipeline gives the Trainer itself, and what to use instead.
SUPPLIED = {
    "logger": "choose logger=csv or logger=tensorboard, or ~logger for none",
    "callbacks": "add +callbacks.NAME._target_=..., or leave one out as callbacks.NAME=null",
    "default_root_dir": "give output_dir= or run_dir=",
    "enable_checkpointing": "last.ckpt is what resuming and sampling read, it is always written",
}
# What cannot change the weights. Whatever is not named here is part of the key of a training.
_HARMLESS = frozenset({
    "accelerator", "devices", "strategy", "num_nodes",  # the same weights up to rounding
    "deterministic", "benchmark",  # other roundings
    "max_time",  # a training that it cuts does not count as finished
    "fast_dev_run", "barebones",  # refused
    "limit_test_batches", "limit_predict_batches", "inference_mode", "use_distributed_sampler",
    "reload_dataloaders_every_n_epochs", "log_every_n_steps", "num_sanity_val_steps",
    "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "model_registry",
    "profiler", "detect_anomaly",
})  # fmt: skip
# What changes them only where something listens to the validation.
_VALIDATION = frozenset({"limit_val_batches", "check_val_every_n_epoch", "val_check_interval"})
# Weights in half precision would lose the steps, and scaled gradients the bound on their norm.
_PRECISIONS = ("auto", "32-true", "bf16-mixed")
_DURATION = re.compile(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d)")


def weighty(trainer: DictConfig, validated: bool) -> dict[str, Any]:
    """The options that change what is learnt.

    Args:
        trainer: all options.
        validated: whether a callback, or the choice of the weights, depends on the validation.
    """
    left_out = _HARMLESS if validated else _HARMLESS | _VALIDATION
    return {name: value for name, value in plain(trainer).items() if name not in left_out}


def check_trainer(trainer: DictConfig) -> None:
    """Refuse, before any work, what the Trainer could not use or the pipeline could not honour.

    Args:
        trainer: options of Lightning's Trainer, with ``_target_``.

    Raises:
        UserError: one line with the value and the cure.
    """
    for name, cure in SUPPLIED.items():
        if name in trainer:
            raise UserError(f"trainer.{name} is given by the run itself; {cure}")
    _check_limits(trainer)
    _check_refused(trainer)
    if trainer.precision not in _PRECISIONS:
        raise UserError(
            f"trainer.precision={trainer.precision} is not offered; "
            f"choose from {', '.join(_PRECISIONS)}"
        )
    if (clip := trainer.get("gradient_clip_val")) is not None:
        positive("trainer.gradient_clip_val", clip, "give a number above 0, or null")
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        algorithm = trainer.gradient_clip_algorithm
        raise UserError(f"trainer.gradient_clip_algorithm={algorithm} is not offered; use norm")
    for name in ("check_val_every_n_epoch", "min_epochs", "min_steps", "accumulate_grad_batches"):
        if (value := trainer.get(name)) is not None:
            at_least(f"trainer.{name}", value)
    time_limit(trainer.get("max_time"))
    _check_plugins(plain(trainer.get("plugins")))
    _check_construction(trainer)


def _check_limits(trainer: DictConfig) -> None:
    """Refuse a training without an end, or of no batch."""
    limit = "max_epochs" if trainer.get("max_steps", -1) in (-1, None) else "max_steps"
    at_least(f"trainer.{limit}", trainer[limit])
    if limit == "max_steps" and trainer.get("max_epochs") not in (None, -1):
        at_least("trainer.max_epochs", trainer.max_epochs)
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        value = trainer.get(name)
        if value is None or (name != "limit_train_batches" and value == 0):
            continue
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or value <= 0 or (isinstance(value, float) and value > 1):
            raise UserError(
                f"trainer.{name}={value} must be a number of batches, or a share above 0 and at "
                "most 1.0; for a quick look at everything use debug=fdr"
            )


def _check_refused(trainer: DictConfig) -> None:
    """Refuse options under which the later stages would have no weights, or no machine."""
    for name in ("fast_dev_run", "barebones"):
        if trainer.get(name):
            raise UserError(
                f"trainer.{name}={trainer[name]} leaves no weights to sample from; "
                "debug=fdr runs one batch of everything"
            )
    if trainer.get("num_nodes", 1) != 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes} is not offered: all stages share one machine; "
            "use trainer.devices"
        )


def _check_plugins(plugins: Any) -> None:
    """Refuse another writer of checkpoints, which this program could not read or find half of."""
    from lightning.pytorch.plugins import CheckpointIO

    for options in plugins if isinstance(plugins, list) else [plugins]:
        made = class_of(options) if isinstance(options, dict) else None
        if made is not None and issubclass(made, CheckpointIO):
            raise UserError(
                f"trainer.plugins={options['_target_']} writes checkpoints, and the run's own "
                "writer puts them there whole or not at all; leave it out"
            )


def check_interval(trainer: DictConfig, batches: int) -> None:
    """Refuse what Lightning would only refuse once the training starts.

    Args:
        trainer: options of Lightning's Trainer.
        batches: in one epoch of the whole data.

    Raises:
        UserError: one line with the value and the cure.
    """
    for name in ("limit_train_batches", "overfit_batches"):
        share = trainer.get(name)
        if isinstance(share, float) and share and int(share * batches) == 0:
            raise UserError(f"trainer.{name}={share} of {batches} batches is none; give more")
    interval, batches = trainer.get("val_check_interval"), batches_per_epoch(trainer, batches)
    whole = isinstance(interval, int) and not isinstance(interval, bool)
    if trainer.get("check_val_every_n_epoch") is None:
        if interval is not None and isinstance(interval, float):
            raise UserError(
                f"trainer.val_check_interval={interval} counts a share of an epoch, which "
                "trainer.check_val_every_n_epoch=null has none of; give a number of batches"
            )
    elif whole and interval > batches and trainer.get("limit_val_batches") != 0:
        raise UserError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an "
            "epoch; lower it, or count over epochs with trainer.check_val_every_n_epoch=null"
        )


def _check_construction(trainer: DictConfig) -> None:
    """Let Lightning look at the rest."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from lightning.pytorch.trainer.trainer import Trainer

    if trainer._target_ in ("lightning.Trainer", "lightning.pytorch.Trainer"):
        import inspect

        known = inspect.signature(Trainer.__init__).parameters
        for name in map(str, trainer):
            if name not in known and not name.startswith("_"):
                raise UserError(
                    f"trainer.{name} is no option of Lightning's Trainer{near(name, known)}"
                )
    quiet: dict[str, Any] = {"logger": False, "callbacks": [], "enable_checkpointing": False}
    quiet |= {"max_time": None, "precision": "32-true", "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    quiet |= {"strategy": "auto", "plugins": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            instantiate(trainer, _convert_="all", **quiet)
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"trainer does not work: {reason}; correct its options") from error


def batches_per_epoch(trainer: Mapping[Any, Any], batches: int) -> int:
    """Batches of one epoch, of which there are ``batches`` without any limit."""
    for name in ("limit_train_batches", "overfit_batches"):
        limit = trainer.get(name)
        if limit:
            batches = min(batches, limit) if isinstance(limit, int) else int(limit * batches)
    return max(1, batches)


def steps_and_epochs(trainer: Mapping[Any, Any], batches: int) -> tuple[int, float]:
    """Optimiser steps and epochs of a whole training; ``batches`` as above.

    A training that neither bounds has steps below 0.
    """
    each = math.ceil(
        batches_per_epoch(trainer, batches) / (trainer.get("accumulate_grad_batches") or 1)
    )
    most, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs") or -1
    if most > 0 and (epochs < 0 or most < each * epochs):
        return most, max(1.0, most / each)
    return each * epochs, float(epochs)


def reached(trainer: Mapping[Any, Any], epochs: int, steps: int) -> bool:
    """Whether so many epochs or steps are all that the options ask for."""
    most, all_steps = trainer.get("max_epochs") or -1, trainer.get("max_steps") or -1
    return 0 < most <= epochs or 0 < all_steps <= steps


def is_validated(trainer: Mapping[Any, Any], batches: int) -> bool:
    """Whether a training of ``batches`` without limit gets as far as its first validation.

    One by the clock counts as reached: nobody knows.
    """
    if trainer.get("limit_val_batches") == 0:
        return False
    interval, every = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch", 1)
    steps, _ = steps_and_epochs(trainer, batches)
    each, batches = (
        trainer.get("accumulate_grad_batches") or 1,
        batches_per_epoch(trainer, batches),
    )
    epochs, rest = divmod(steps, math.ceil(batches / each))
    seen = epochs * batches + min(rest * each, batches)
    if interval is None:
        interval = batches
    elif isinstance(interval, float):
        interval = max(1, int(batches * interval))
    if not isinstance(interval, int):
        return True
    return interval <= seen if every is None else (every - 1) * batches + interval <= seen


def time_limit(value: Any) -> timedelta | None:
    """``trainer.max_time`` as Lightning's users write it, and as HH:MM:SS or seconds.

    Raises:
        UserError: for anything else.
    """
    value = plain(value)
    if value is None:
        return None
    try:
        found = _timedelta(value)
    except (TypeError, ValueError, OverflowError):  # not a number, or more than there is time
        found = None
    if found is None or found <= timedelta(0):
        raise UserError(
            f"trainer.max_time={value!r} is no duration; give HH:MM:SS, DD:HH:MM:SS or seconds"
        )
    return found


def _timedelta(value: Any) -> timedelta | None:
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return timedelta(seconds=value)
    if isinstance(value, dict):
        return timedelta(**{str(name): part for name, part in value.items()})
    return None
