"""Callbacks of a run: what keeps its weights, and says where they are from."""

import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bayesdiff.checks import UserError
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.costs import peak_memory
from bayesdiff.models import whole_of
from bayesdiff.options.trainer import reached
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.stopping import SigtermHandler, is_cut, rule_of
from bayesdiff.storage.artefacts import weights_key, write_atomic
from bayesdiff.storage.checkpoints import BEST, LAST, load_weights, read_checkpoint

log = logging.getLogger(__name__)

_ENDING = "ending.ckpt"  # of the last epoch, until callbacks have done what they do after it


class RunCheckpoints(Checkpoint):
    """Keeps what resuming and sampling read, whatever other checkpoints are asked for.

    ``last.ckpt`` is written at the end of every epoch, and in the middle of one where a training
    is cut: it then goes on with the next batch. The one of the last epoch is put there only when
    all callbacks have done what they do to the weights at the end, and says that the training is
    finished. ``best.ckpt`` is written where the validation loss is lower than before.

    Args:
        folder: of both files.
        best: whether to keep the best one too.
        sigterm: knows whether the process is told to end.
        place: device, processes and threads of the training.

    Attributes:
        score: the lowest validation loss so far.
        cut: whether the training stops before its end.
        kept_step: of ``last.ckpt``.
        ended: whether the training is finished and all of it kept.
    """

    def __init__(
        self, folder: Path, best: bool, sigterm: SigtermHandler, place: dict[str, Any]
    ) -> None:
        self.folder, self.best, self.sigterm = folder, best, sigterm
        self.place, self._begun = place, time.perf_counter()
        self._before: dict[str, Any] = {"seconds": 0.0, **place}
        self.score: float | None = None
        self.cut = self.ended = False
        self.kept_step = 0
        self._postponed = self._ending = False

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far, and what the training has taken until then."""
        return {"score": self.score, "cost": self._cost()}

    def _cost(self) -> dict[str, Any]:
        """Of all commands; no seconds where an earlier one ran elsewhere, or did not count."""
        before = self._before
        known = before.get("seconds") is not None and before | self.place == before
        seconds = before["seconds"] + time.perf_counter() - self._begun if known else None
        memory = max(before.get("memory", 0.0), peak_memory())
        return {"seconds": seconds, "memory": memory, **self.place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.score = state_dict["score"]
        self._before = state_dict.get("cost", {})

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember where the training goes on from."""
        self.kept_step = checkpoint["global_step"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say whether the training is finished, beside where the checkpoint is from."""
        checkpoint.setdefault("bayesdiff", {})["finished"] = self._ending

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Keep the place where a training is cut in the middle of an epoch."""
        trainer.should_stop = trainer.should_stop or self._postponed
        self._heed(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep better weights than before; the place, where a callback cuts the training here.

        Raises:
            UserError: if the weights are chosen by a validation loss that there is not.
        """
        if trainer.sanity_checking or self.cut or self._heed(trainer):
            return
        if not self.best:
            return
        loss = trainer.callback_metrics.get("val/loss")
        if loss is None:
            raise UserError(
                f"sample_from=best chooses by val/loss, which {type(pl_module).__name__} does not "
                "log; log it in validation_step, or give sample_from=last"
            )
        if self.score is None or float(loss) < self.score:
            self.score = float(loss)
            trainer.save_checkpoint(self.folder / BEST, weights_only=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the end of every whole epoch.

        Raises:
            SIGTERMException: where the process is told to end.
        """
        if self.cut:
            return
        self._ending = self._has_all(trainer)
        if self._ending:
            trainer.save_checkpoint(self.folder / _ENDING, weights_only=False)
            return
        self._save(trainer)
        if self.sigterm.received:
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what callbacks made of the weights after the last epoch, such as an average.

        Raises:
            SIGTERMException: where the process is told to end.
        """
        if not self._ending:
            return
        ending, differ = self.folder / _ENDING, False
        if whole_of(pl_module) is pl_module and trainer.is_global_zero:  # split ones are kept so
            saved, now = read_checkpoint(ending)["state_dict"], pl_module.state_dict()
            differ = any(not torch.equal(saved[name], now[name].cpu()) for name in saved)
        if trainer.strategy.broadcast(differ):
            trainer.save_checkpoint(ending, weights_only=False)
        if trainer.is_global_zero:
            if self.best and self.score is None:
                log.warning("fit: nothing was validated, and the last step counts as the best")
                write_atomic(self.folder / BEST, partial(shutil.copyfile, ending))
            ending.replace(self.folder / LAST)
        trainer.strategy.barrier()
        self.kept_step, self.ended = trainer.global_step, True
        if self.sigterm.received:
            raise SIGTERMException

    def _has_all(self, trainer: L.Trainer) -> bool:
        """Whether the training has done what was asked for, or a rule of its own has ended it."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        done = reached(limits, progress.processed, trainer.global_step)
        return done or rule_of(trainer) is not None

    def _heed(self, trainer: L.Trainer) -> bool:
        """Keep the place where the training stops here, and say whether it does."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or self._has_all(trainer):
            return False  # the end of the epoch is kept
        cut = is_cut(trainer)
        if not cut and not self.sigterm.received:
            return False
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done % trainer.accumulate_grad_batches:  # half a step cannot be kept
            if cut:
                self._postponed, trainer.should_stop = True, False
            return False
        self.cut = True
        self._save(trainer)
        if self.sigterm.received:
            raise SIGTERMException
        return True

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.kept_step = trainer.global_step


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
        if self.checkpoints.ended:
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


class Provenance(Callback):
    """Writes into every checkpoint which run it is of, and with what configuration."""

    def __init__(self, run: Run) -> None:
        self.note = {
            "key": run.key,
            "config": plain(run.cfg),
            "data": run.data.data.fingerprint,
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
