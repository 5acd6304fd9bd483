"""The fit stage: train, resume, or recognise a finished training."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from omegaconf import OmegaConf

from bayesdiff.artefacts import load_weights, read_checkpoint, read_json, write_json, write_text
from bayesdiff.build import Run, is_main_process, plain, precision
from bayesdiff.checks import UserError

log = logging.getLogger(__name__)


def fit(run: Run, laplace: Callback) -> str:
    """Leave trained (averaged) weights in the model, training only as far as is needed.

    Returns:
        Content key of the weights.

    Raises:
        UserError: if the checkpoint is missing, unreadable, of another run, or training diverges.
    """
    last = run.folder / "checkpoints" / "last.ckpt"
    if not run.cfg.fit:
        return load_weights(run.model, Path(run.cfg.ckpt_path))
    record = read_json(run.folder / "fit.json") or {}
    if record.get("key") == run.key and last.is_file():
        weights = load_weights(run.model, last)
        if weights == record.get("weights"):
            log.info("fit: done before, weights %s", weights)
            return weights
        raise UserError(
            f"{last} is not the checkpoint that fit.json beside it names; delete {run.folder} "
            "to train again, or give fit=false ckpt_path=... to use it as it is"
        )
    started = time.perf_counter()
    trainer = train(run, laplace, resume_from(run, last))
    seconds = time.perf_counter() - started
    weights = load_weights(run.model, last)
    if is_main_process():
        finished = {
            "key": run.key,
            "weights": weights,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            **{name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        write_json(run.folder / "fit.json", finished)
    return weights


def resume_from(run: Run, last: Path) -> Path | None:
    """Checkpoint to continue: the one asked for, else this run's own interrupted one.

    Raises:
        UserError: if it is asked for and missing, or is that of another run.
    """
    wanted = run.cfg.ckpt_path
    path = last if wanted in (None, "last") else Path(wanted)
    if wanted is None and not last.is_file():
        return None
    if wanted == "last" and not last.is_file():
        raise UserError(f"ckpt_path=last but there is no {last}; leave ckpt_path out to begin")
    key = read_checkpoint(path).get("bayesdiff", {}).get("key")
    if key != run.key:
        raise UserError(
            f"checkpoint {path} is of run {key}, this is run {run.key}: other data, model or "
            "training options; give the options it was started with, or another run_dir"
        )
    log.info("fit: continuing from %s", path)
    return path


def train(run: Run, laplace: Callback, ckpt_path: Path | None) -> L.Trainer:
    """Run Lightning's trainer and return it.

    Raises:
        UserError: if this process was interrupted; the last checkpoint continues it.
    """
    if is_main_process():
        write_text(run.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(run.cfg, resolve=True))
    L.seed_everything(run.cfg.seed, workers=True, verbose=False)
    folder = run.folder / "checkpoints"
    callbacks = [
        instantiate(c, **_place(c, folder)) for c in (run.cfg.callbacks or {}).values() if c
    ]
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        raise UserError(
            "callbacks.checkpoint is switched off, but later stages read the checkpoint"
        )
    # Averaging first: every other callback then sees the averaged weights where Lightning does.
    callbacks.sort(key=lambda callback: not isinstance(callback, EMAWeightAveraging))
    logger = run.cfg.logger and instantiate(
        run.cfg.logger, save_dir=run.folder, name="tensorboard", version=""
    )
    options: dict[str, Any] = {"precision": precision(run.cfg, run.device)}
    trainer: L.Trainer = instantiate(
        run.cfg.trainer,
        callbacks=[*callbacks, Provenance(run), laplace],
        logger=logger or False,
        default_root_dir=str(run.folder),
        _convert_="all",
        **options,
    )
    trainer.fit(
        run.model,
        datamodule=run.data,
        ckpt_path=None if ckpt_path is None else str(ckpt_path),
        weights_only=True,
    )
    if trainer.interrupted:
        raise UserError("training was interrupted; the same command continues it")
    return trainer


class Provenance(Callback):
    """Writes into every checkpoint which run it is of, and with what configuration."""

    def __init__(self, run: Run) -> None:
        self.note = {"key": run.key, "config": plain(run.cfg)}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the note; plain values only, so that loading it needs no code."""
        checkpoint["bayesdiff"] = self.note


def _place(callback: Any, folder: Path) -> dict[str, str]:
    return {"dirpath": str(folder)} if callback._target_.endswith("ModelCheckpoint") else {}
