"""The callbacks that a configuration asks for, made and checked before any work."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L
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
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from bayesdiff.checks import UserError, share
from bayesdiff.models import GenerativeModel
from bayesdiff.options.spelling import near
from bayesdiff.options.targets import arguments, class_of
from bayesdiff.options.trainer import is_validated
from bayesdiff.report.loggers import entries
from bayesdiff.runs.build import Run
from bayesdiff.storage.checkpoints import BEST, LAST

_KNOWN = ("lightning.", "bayesdiff.")


def callbacks_of(run: Run, sharded: bool = False) -> list[Callback]:
    """The callbacks that are asked for, averages first, each for one training.

    Args:
        run: has them, as ``check_callbacks`` made them, or their options.
        sharded: whether the weights are split over processes, as averages then must be.
    """
    made = dict(run.callbacks) or _named(run.cfg, run.folder / "checkpoints")
    run.callbacks.clear()  # they remember what they have seen
    if not sharded:
        return list(made.values())
    from bayesdiff.runs.sharding import ShardedAveraging

    return [
        ShardedAveraging.of(c) if isinstance(c, EMAWeightAveraging) else c for c in made.values()
    ]


def check_callbacks(run: Run) -> dict[str, Callback]:
    """Make the callbacks; refuse those that would fail or mislead once training runs.

    Returns:
        Them by their names in the configuration, averages first.

    Raises:
        UserError: one line with the name and the cure.
    """
    folder = run.folder / "checkpoints"
    named = _named(run.cfg, folder)
    for kind, why in (
        (WeightAveraging, "both average the weights, and a checkpoint holds one average"),
        (ProgressBar, "are both progress bars, and a screen has room for one"),
    ):
        alike = [name for name, callback in named.items() if isinstance(callback, kind)]
        if len(alike) > 1:
            one, other = (f"callbacks.{name}" for name in alike[:2])
            raise UserError(f"{one} and {other} {why}; leave one out, as in {one}=null")
    best = run.cfg.sample_from == "best"
    if best:
        _check_best(run)
    for name, callback in named.items():
        if isinstance(callback, ModelCheckpoint):
            _check_checkpoint(name, callback, folder, best)
    _check_monitors(run, named)
    return named


def _named(cfg: DictConfig, folder: Path) -> dict[str, Callback]:
    """Callbacks by their names in the configuration."""
    found: dict[str, Callback] = {}
    for name, options in (cfg.callbacks or {}).items():
        if not options:
            continue
        kind = class_of(options) or Callback
        if issubclass(kind, EMAWeightAveraging) and options.get("decay") is not None:
            share(f"callbacks.{name}.decay", options.decay)
        try:
            made = instantiate(options, **_place(kind, options, folder))
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


def _check_best(run: Run) -> None:
    """Refuse to choose by a validation that there will not be."""
    if not is_overridden("validation_step", run.model, L.LightningModule):
        raise UserError(
            f"sample_from=best chooses by val/loss, and {type(run.model).__name__} has no "
            "validation_step that logs it; add one, or give sample_from=last"
        )
    if not is_validated(run.cfg.trainer, run.data.batches):
        raise UserError(
            "sample_from=best chooses by the validation loss, and this training has none; raise "
            "trainer.limit_val_batches, or lower trainer.check_val_every_n_epoch or "
            "trainer.val_check_interval, or train for longer"
        )


def _check_monitors(run: Run, named: Mapping[str, Callback]) -> None:
    """Refuse to watch what nobody logs, where everybody who logs something is known."""
    own = [c for c in named.values() if not type(c).__module__.startswith(_KNOWN)]
    if type(run.model) is not GenerativeModel or own:
        return
    logged = ["train/loss"]
    if is_validated(run.cfg.trainer, run.data.batches):
        logged.append("val/loss")
    if run.cfg.trainer.get("gradient_clip_val"):
        logged.append("train/grad_norm")
    rates = any(isinstance(callback, LearningRateMonitor) for callback in named.values())
    for name, callback in named.items():
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in logged:
            continue
        if not (rates and monitor.startswith("lr-")):
            raise UserError(
                f"callbacks.{name}.monitor={monitor} is never logged{near(monitor, logged)}; "
                f"choose from {', '.join(logged)}"
            )


def _check_checkpoint(name: str, callback: ModelCheckpoint, folder: Path, best: bool) -> None:
    """Refuse a callback that would write over the run's own checkpoints, or writes nothing."""
    own = {LAST, BEST} if best else {LAST}
    written = {f"{callback.filename}{callback.FILE_EXTENSION}"}
    if callback.save_last:
        written.add(f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}")
    # Lightning's own place, where one takes none, may be this one.
    here = callback.dirpath is None or Path(callback.dirpath).resolve() == folder.resolve()
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


def _place(kind: type, options: DictConfig, folder: Path) -> dict[str, str]:
    """The run's folder, for checkpoints that have no other place."""
    known = arguments(str(options.get("_target_")))
    takes = issubclass(kind, ModelCheckpoint) and (known is None or "dirpath" in known)
    return {"dirpath": str(folder)} if takes and options.get("dirpath") is None else {}
