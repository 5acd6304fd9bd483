"""The callbacks that a configuration asks for, made and checked before any work."""

from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from omegaconf import DictConfig

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.report.loggers import entries
from bayesdiff.runs.build import Run
from bayesdiff.spelling import near
from bayesdiff.storage.checkpoints import BEST, LAST

# What a GenerativeModel logs, beside the learning rates.
_LOGGED = ("train/loss", "val/loss", "train/grad_norm")


def callbacks_of(run: Run, sharded: bool = False) -> list[Callback]:
    """The callbacks that are asked for, averages first.

    Args:
        run: gives their options, and the folder that checkpoints are kept in.
        sharded: whether the weights are split over processes, as averages then must be.
    """
    return list(_named(run.cfg, run.folder / "checkpoints", sharded).values())


def check_callbacks(run: Run) -> None:
    """Refuse callbacks that cannot be made, or that would fail or mislead once training runs.

    Raises:
        UserError: one line with the name and the cure.
    """
    folder = run.folder / "checkpoints"
    named = _named(run.cfg, folder, sharded=False)
    averages = [name for name, c in named.items() if isinstance(c, WeightAveraging)]
    if len(averages) > 1:
        raise UserError(
            f"callbacks.{averages[0]} and callbacks.{averages[1]} both average the weights, and a "
            f"checkpoint holds one average; leave one out, as in callbacks.{averages[0]}=null"
        )
    best = run.cfg.sample_from == "best"
    if best:
        _check_best(run.cfg.trainer)
    for name, callback in named.items():
        if isinstance(callback, ModelCheckpoint):
            _check_checkpoint(name, callback, folder, best)
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and type(run.model) is GenerativeModel:
            known = (*_LOGGED, *(f"{one}_{end}" for one in _LOGGED for end in ("step", "epoch")))
            if monitor not in known and not monitor.startswith("lr-"):
                raise UserError(
                    f"callbacks.{name}.monitor={monitor} is never logged{near(monitor, _LOGGED)}; "
                    f"choose from {', '.join(_LOGGED)}"
                )


def _named(cfg: DictConfig, folder: Path, sharded: bool) -> dict[str, Callback]:
    """Callbacks by their names in the configuration.

    Raises:
        UserError: for options that one does not take.
    """
    found: dict[str, Callback] = {}
    for name, options in (cfg.callbacks or {}).items():
        if not options:
            continue
        try:
            made = instantiate(options, **_place(options, folder), **_split(options, sharded))
        except InstantiationException as error:
            reason = " ".join(str(error.__cause__ or error).split())
            known = isinstance(error.__cause__, UserError)
            line = reason if known else f"callbacks.{name} does not work: {reason}"
            raise UserError(line) from error
        if not isinstance(made, Callback):
            raise UserError(
                f"callbacks.{name} is a {type(made).__name__} and no Lightning Callback; "
                "give a _target_ that makes one"
            )
        if isinstance(made, ProgressBar) and cfg.trainer.get("enable_progress_bar") is False:
            continue
        # Lightning refuses curves of the learning rate that go nowhere.
        if not (isinstance(made, LearningRateMonitor) and not entries(cfg.get("logger"))):
            found[str(name)] = made
    # Averaging first: every other callback then sees the averaged weights where Lightning does.
    first = sorted(found, key=lambda name: not isinstance(found[name], WeightAveraging))
    return {name: found[name] for name in first}


def _check_best(trainer: DictConfig) -> None:
    """Refuse to choose by a validation that there will not be.

    Raises:
        UserError: if there is none.
    """
    every, epochs = trainer.get("check_val_every_n_epoch"), trainer.get("max_epochs") or -1
    if trainer.get("limit_val_batches") == 0 or (every and 0 < epochs < every):
        raise UserError(
            "sample_from=best chooses by the validation loss, and this training has none; "
            "raise trainer.limit_val_batches or lower trainer.check_val_every_n_epoch"
        )


def _check_checkpoint(name: str, callback: ModelCheckpoint, folder: Path, best: bool) -> None:
    """Refuse a callback that would write over the run's own checkpoints, or writes nothing.

    Raises:
        UserError: one line with the name and the cure.
    """
    own = {LAST, BEST} if best else {LAST}
    written = {f"{callback.filename}{callback.FILE_EXTENSION}"}
    if callback.save_last:
        written.add(f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}")
    here = callback.dirpath is not None and Path(callback.dirpath).resolve() == folder.resolve()
    if here and written & own:
        raise UserError(
            f"callbacks.{name} would write over {min(written & own)}, which the run keeps itself; "
            "give another filename, and leave save_last out"
        )
    if callback.save_top_k == 0 and not callback.save_last:
        raise UserError(
            f"callbacks.{name}.save_top_k=0 keeps no checkpoint; give -1 for all, or leave "
            f"{name} out: {LAST} is kept in any case"
        )


def _place(callback: Any, folder: Path) -> dict[str, str]:
    """The run's folder, for checkpoints that have no other place."""
    named = callback._target_.endswith("ModelCheckpoint") and callback.get("dirpath") is None
    return {"dirpath": str(folder)} if named else {}


def _split(callback: Any, sharded: bool) -> dict[str, str]:
    averages = callback._target_.endswith(f".{EMAWeightAveraging.__name__}")
    return {"_target_": "bayesdiff.runs.sharding.ShardedAveraging"} if sharded and averages else {}
