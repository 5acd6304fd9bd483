"""Weights along the training: kept at the ends of its last epochs, read as plain tensors."""

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.models import whole_of
from bayesdiff.options.targets import class_of
from bayesdiff.storage.checked_file import load_checked, save_checked

log = logging.getLogger(__name__)

_KIND = "bayesdiff-snapshot-1"
_NAME = re.compile(r"epoch-(\d+)\.safetensors")


class Snapshots(Callback):
    """Keeps the weights at the end of every k-th epoch, the last few of them.

    They are the optimiser's own weights, not their moving average: the average hardly moves any
    more when training ends. They lie in the run folder as ``snapshots/epoch-00120.safetensors``,
    the number of finished epochs; a training that is continued finds those it has left, and one
    that begins anew removes them.

    Args:
        keep: snapshots, at least 2.
        every: epochs between them. Learning rates fall to zero at the end: the longer, the more
            the snapshots differ.

    Example:
        >>> callbacks = {"snapshots": {"_target_": "bayesdiff.uncertainty.Snapshots", "every": 10}}
        >>> planned_snapshots(callbacks, max_epochs=30)  # after epochs 10, 20 and 30
        3
    """

    def __init__(self, keep: int = 10, every: int = 1) -> None:
        self.keep = at_least("callbacks.snapshots.keep", keep, 2)
        self.every = at_least("callbacks.snapshots.every", every)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what lies ahead of the epoch that training starts from."""
        if trainer.is_global_zero:
            for path in snapshots_of(Path(trainer.default_root_dir)):
                if _epoch(path) > trainer.current_epoch:
                    path.unlink()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep this epoch's weights if it is their turn, and drop the oldest ones."""
        epochs = trainer.current_epoch + 1
        if epochs % self.every:
            return
        model = whole_of(pl_module)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        path = folder / "snapshots" / f"epoch-{epochs:05d}.safetensors"
        save_checked(path, _KIND, model.state_dict(), {"epochs": epochs})
        for old in snapshots_of(folder)[: -self.keep]:
            old.unlink()


def snapshots_of(folder: Path) -> list[Path]:
    """Snapshots in a run folder, oldest first."""
    found = (path for path in (folder / "snapshots").glob("*") if _NAME.fullmatch(path.name))
    return sorted(found, key=_epoch)


def read_snapshot(path: Path) -> dict[str, Tensor]:
    """The weights in a snapshot.

    Raises:
        UserError: if it is damaged.
    """  # noqa: DOC502 - raised one level down
    return load_checked(
        path, [_KIND], "a snapshot", "delete it to do without", lambda _, tensors, __: tensors
    )


def planned_snapshots(callbacks: Any, max_epochs: int | None) -> int:
    """Snapshots that a training with these callbacks will keep, all where its length is open.

    Args:
        callbacks: their configurations, by name; None for none.
        max_epochs: of the training; None or -1 where steps bound it.
    """
    for options in (callbacks or {}).values():
        if options and class_of(options) is Snapshots:
            made = Snapshots(**{k: v for k, v in options.items() if k != "_target_"})
            if not max_epochs or max_epochs < 0:
                return made.keep
            return min(made.keep, max_epochs // made.every)
    return 0


def train_again(folder: Path) -> str:
    """How to get the snapshots that a finished training in a run folder has not kept."""
    return (
        "give the same command with fit=true callbacks=snapshots "
        f"output_dir={folder.parent}-snapshots, which trains once more, beside this training"
    )


def note_missing_snapshots(folder: Path, callbacks: Any, max_epochs: int | None) -> None:
    """Say so where snapshots are asked for and the training, which is done, has kept none.

    Args:
        folder: of the run.
        callbacks: as for ``planned_snapshots``.
        max_epochs: of the training; None or -1 where steps bound it.
    """
    done = (folder / "fit.json").is_file() and not snapshots_of(folder)
    if done and planned_snapshots(callbacks, max_epochs):
        log.warning(
            "callbacks=snapshots is given, but %s was trained without it and is not trained "
            "again; %s",
            *(folder, train_again(folder)),
        )


def _epoch(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0
