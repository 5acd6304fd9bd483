"""What ends a training before its last step: rules, limits of time, and signals."""

import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

_KNOWN = ("lightning.", "bayesdiff.")


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


def is_cut(trainer: L.Trainer) -> bool:
    """Whether something other than a rule stops the training now."""
    can_stop = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(can_stop and rule_of(trainer) is None)


def cut_by(trainer: L.Trainer) -> str:
    """What stopped a training that is not finished, in words for its user."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            return "trainer.max_time" if isinstance(callback, RunTime) else "a Timer callback"
    others = [type(c).__name__ for c in callbacks if not type(c).__module__.startswith(_KNOWN)]
    return f"trainer.should_stop{' of ' + ' or '.join(others) if others else ''}"


class RunTime(Timer):
    """``trainer.max_time`` of one command: the next one has as much again."""

    def __init__(self, duration: timedelta) -> None:
        super().__init__(duration, verbose=False)

    def state_dict(self) -> dict[str, Any]:
        """Nothing that a checkpoint should hold."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin anew."""


class SigtermHandler(Callback):
    """Takes SIGTERM in the place of Lightning's handler, which ends a step's accumulation.

    One process notes it, for whoever can keep the place where the training is. Several end as on
    Ctrl-C: Lightning's own answer talks to the other processes from inside the signal, where they
    may already be talking of something else, and then all of them wait for ever.

    Attributes:
        received: whether it came.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look who else listens, before Lightning does."""
        self._before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it removes after the training."""
        if threading.current_thread() is threading.main_thread():
            own = signal.default_int_handler if trainer.world_size > 1 else self._note
            signal.signal(signal.SIGTERM, own)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if callable(self._before):
            self._before(number, frame)
