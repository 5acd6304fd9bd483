"""Callbacks of a run: what keeps its weights, says where they are from, and ends it."""

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.plugins import TorchCheckpointIO

from bayesdiff.checks import UserError
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.runs.build import Run, plain
from bayesdiff.storage.artefacts import weights_key, write_atomic
from bayesdiff.storage.checkpoints import BEST, LAST, load_weights, read_checkpoint


class RunCheckpoints(Checkpoint):
    """Keeps what resuming and sampling read, whatever other checkpoints are asked for.

    ``last.ckpt`` is written at the end of every epoch, and in the middle of one where a training
    is cut: it then goes on with the next batch. ``best.ckpt`` is written where the validation loss
    is lower than before.

    Args:
        folder: of both files.
        best: whether to keep the best one too.
    """

    def __init__(self, folder: Path, best: bool = False) -> None:
        self.folder, self.best = folder, best
        self.score: float | None = None
        self.cut = False
        self.kept_step = 0
        self._postponed = False

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far."""
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.score = state_dict["score"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Keep the place where a training is cut in the middle of an epoch."""
        if trainer.received_sigterm and trainer.world_size == 1:
            trainer.should_stop = True
        trainer.should_stop = trainer.should_stop or self._postponed
        if not _is_cut(trainer) or _ends_epoch(trainer):
            return
        if _accumulates(trainer):  # half a step cannot be kept
            self._postponed, trainer.should_stop = True, False
        else:
            self._keep_place(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep better weights than before; the place, where a callback cuts the training here."""
        if trainer.sanity_checking or self.cut:
            return
        if _is_cut(trainer) and not _ends_epoch(trainer):
            if not _accumulates(trainer):
                self._keep_place(trainer)
            self.cut = True
            return
        loss = trainer.callback_metrics.get("val/loss")
        if self.best and loss is not None and (self.score is None or float(loss) < self.score):
            self.score = float(loss)
            trainer.save_checkpoint(self.folder / BEST)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the end of every whole epoch."""
        if not self.cut:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what a callback made of the weights after the last epoch, such as an average."""
        model: Any = pl_module
        if not self.finished(trainer) or model.whole() is not model:  # split ones are kept so
            return
        differ = False
        if trainer.is_global_zero:
            saved = read_checkpoint(self.folder / LAST)["state_dict"]
            now = pl_module.state_dict()
            differ = any(not torch.equal(saved[name], now[name].cpu()) for name in saved)
        if trainer.strategy.broadcast(differ):
            self._save(trainer)

    def finished(self, trainer: L.Trainer) -> bool:
        """Whether the training has done what was asked for, or a rule of its own has ended it."""
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        progress: Any = trainer.fit_loop.epoch_progress.current
        done = progress.processed
        whole = 0 < epochs <= done and not self.cut
        return whole or 0 < steps <= trainer.global_step or rule_of(trainer) is not None

    def _keep_place(self, trainer: L.Trainer) -> None:
        self.cut = True
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self.kept_step = trainer.global_step


def rule_of(trainer: L.Trainer) -> str | None:
    """Name of the rule that has ended the training, None where something else did, or nothing.

    Rules are Lightning's ``EarlyStopping``, and every callback that says so: it sets its attribute
    ``ended_training`` to true with ``trainer.should_stop``. Both are part of the training's key.
    """
    if not trainer.should_stop or not trainer.fit_loop._can_stop_early:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        stopped = isinstance(callback, EarlyStopping) and (
            callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        )
        if stopped or getattr(callback, "ended_training", False):
            return type(callback).__name__
    return None


def cut_by(trainer: L.Trainer) -> str:
    """What stopped a training that is not finished, in words for its user."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.received_sigterm:
        return "SIGTERM"
    for callback in callbacks:
        if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:
            return "trainer.max_time" if isinstance(callback, RunTime) else "a Timer callback"
    others = [type(c).__name__ for c in callbacks if not type(c).__module__.startswith(_KNOWN)]
    return f"trainer.should_stop{' of ' + ' or '.join(others) if others else ''}"


_KNOWN = ("lightning.", "bayesdiff.")


def _is_cut(trainer: L.Trainer) -> bool:
    can_stop = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(can_stop and rule_of(trainer) is None)


def _ends_epoch(trainer: L.Trainer) -> bool:
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def _accumulates(trainer: L.Trainer) -> bool:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(done % trainer.accumulate_grad_batches) and not _ends_epoch(trainer)


class RunTime(Timer):
    """``trainer.max_time`` of one command: the next one has as much again."""

    def __init__(self, duration: timedelta) -> None:
        super().__init__(duration, verbose=False)

    def state_dict(self) -> dict[str, Any]:
        """Nothing that a checkpoint should hold."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin anew."""


class PosteriorAtEnd(Callback):
    """Fits the posterior when a training is finished, and not when it is cut.

    Args:
        laplace: makes and logs it.
        checkpoints: knows whether the training is finished.
    """

    def __init__(self, laplace: LastLayerLaplace, checkpoints: RunCheckpoints) -> None:
        self.laplace, self.checkpoints = laplace, checkpoints

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit it for the weights that are sampled from."""
        if self.checkpoints.finished(trainer):
            if self.checkpoints.best:
                load_weights(pl_module, self.checkpoints.folder / BEST)
            self.laplace.discard_others(weights_key(pl_module))
            self.laplace.on_fit_end(trainer, pl_module)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own are written elsewhere and moved, which between two disks is a copy: one that is
    interrupted leaves half of the newest checkpoint in place of the one before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write it beside its place first."""

        def write(file: Path) -> None:
            with file.open("wb") as opened:  # a full disk is told by Python's files, not by torch
                torch.save(checkpoint, opened)

        write_atomic(Path(path), write)


class EndsWhenTold(Callback):
    """Makes SIGTERM end several processes as Ctrl-C does.

    Lightning's own answer talks to the other processes from inside the signal, where they may
    already be talking of something else: then all of them wait for ever.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it removes after the training."""
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, signal.default_int_handler)


class Provenance(Callback):
    """Writes into every checkpoint which run it is of, and with what configuration."""

    def __init__(self, run: Run) -> None:
        self.note = {
            "key": run.key,
            "config": plain(run.cfg),
            "data": run.data.data.fingerprint,
            "classes": list(run.classes),
            "parent": run.parent,
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the note; plain values only, so that loading it needs no code.

        Raises:
            UserError: if the last step made the weights infinite or NaN; the file of the epoch
                before is then still there.
        """
        for name, value in checkpoint["state_dict"].items():
            if not value.isfinite().all():
                raise UserError(
                    f"{name} is not finite after step {trainer.global_step}; the last good "
                    "checkpoint is kept, lower model.optimizer.lr or trainer.gradient_clip_val"
                )
        checkpoint["bayesdiff"] = self.note | {"ended": rule_of(trainer)}
