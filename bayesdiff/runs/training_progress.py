"""How far a training is, where no bar shows it: without a terminal, in ``run.log``."""

import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar

from bayesdiff.machine.progress import stage
from bayesdiff.options.trainer import steps_and_epochs


class TrainingProgress(Callback):
    """Says what a training will do, how long it takes, and every half a minute how far it is.

    Bars are switched off where standard error is no terminal: they would fill it with frames.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     max_epochs=2, limit_train_batches=3, limit_val_batches=0, accelerator="cpu",
        ...     callbacks=[TrainingProgress()], logger=False, enable_checkpointing=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())  # the log says: 6 steps, 3 batches an epoch
        >>> trainer.global_step
        6
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._loss: Any = None
        self._meter: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switch bars off that nobody would see."""
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar) and not sys.stderr.isatty():
            bar.disable()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what will be done."""
        bar = trainer.progress_bar_callback
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        known = total if total != float("inf") else 0
        detail = f"{known or 'no fixed number of'} steps, {batches} batches an epoch"
        if trainer.global_step:
            detail += f", going on after step {trainer.global_step}"
        self._loss = None
        self._meter = self._open.enter_context(
            stage(
                "training",
                detail,
                total=known,
                unit="steps",
                start=trainer.global_step,
                done=trainer.global_step,
                note=lambda: self._note(trainer),
                bar=False,
                quiet=bool(getattr(bar, "is_enabled", False)) and sys.stderr.isatty(),
            )
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss for whoever asks; reading it now would wait for a GPU."""
        self._meter.done = trainer.global_step
        self._loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing more to say."""
        self._open.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Nothing more to say."""
        self._open.close()

    def _note(self, trainer: L.Trainer) -> str:
        text = f"epoch {trainer.current_epoch + 1}"
        if (epochs := _epochs(trainer)) is not None:
            text += f" of {epochs}"
        return text if self._loss is None else f"{text}, loss {float(self._loss):.3g}"


def _epochs(trainer: L.Trainer) -> int | None:
    """Epochs of the whole training, the last one of which may be cut; None without an end."""
    names = ("max_epochs", "max_steps", "accumulate_grad_batches")
    batches = trainer.num_training_batches
    if batches == float("inf"):
        return None
    options = {name: getattr(trainer, name) for name in names}
    steps, epochs = steps_and_epochs(options, int(batches))
    return math.ceil(epochs) if steps > 0 else None
