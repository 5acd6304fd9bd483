"""The fit stage: train, resume, or recognise a finished training."""

import logging
import shutil
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
)
from lightning.pytorch.plugins import TorchCheckpointIO
from omegaconf import OmegaConf

from bayesdiff.artefacts import (
    load_weights,
    note_of,
    read_checkpoint,
    read_json,
    require_options,
    write_atomic,
    write_json,
    write_text,
)
from bayesdiff.build import Run, is_main_process, plain, precision
from bayesdiff.checks import UserError
from bayesdiff.disk import named_disk
from bayesdiff.distributed import world_size
from bayesdiff.locks import together
from bayesdiff.models import GenerativeModel

log = logging.getLogger(__name__)

# Lightning's remarks on its own code, on a short epoch, and on a resume, which is wanted here.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"The number of training batches",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed",
)


def fit(run: Run, laplace: Callback) -> str:
    """Leave trained (averaged) weights in the model, training only as far as is needed.

    Returns:
        Content key of the weights.

    Raises:
        UserError: if the checkpoint is missing, unreadable, of another run, or training diverges.
    """  # noqa: DOC502 - raised one level down
    last = run.folder / "checkpoints" / "last.ckpt"
    if not run.cfg.fit:
        path = last if run.cfg.ckpt_path == "last" else Path(run.cfg.ckpt_path)
        require_same_kind(run, path)
        return load_weights(run.model, path)
    with together(run.folder / "fit.json"):
        return _finish(run, laplace, last)


def _finish(run: Run, laplace: Callback, last: Path) -> str:
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
    resume = resume_from(run, last)
    finished: dict[str, Any] = {"key": run.key}
    if resume is not None and is_finished(run, resume):
        # Stopped between the last epoch and fit.json. Lightning would now train nothing and leave
        # the raw weights in place of the averaged ones.
        if resume != last and is_main_process():
            write_atomic(last, partial(shutil.copyfile, resume))
        weights = load_weights(run.model, resume)
    else:
        started = time.perf_counter()
        trainer = train(run, laplace, resume)
        finished |= {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(time.perf_counter() - started, 1),
            **{name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        weights = load_weights(run.model, last)
    if is_main_process():
        write_json(run.folder / "fit.json", finished | {"weights": weights})
    return weights


def is_finished(run: Run, path: Path) -> bool:
    """Whether a checkpoint of this run has all the epochs or steps that were asked for."""
    trainer, checkpoint = run.cfg.trainer, read_checkpoint(path)
    epochs, steps = trainer.get("max_epochs") or -1, trainer.get("max_steps") or -1
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return 0 < epochs <= done or 0 < steps <= checkpoint["global_step"]


def require_same_kind(run: Run, path: Path) -> None:
    """Refuse a checkpoint whose network predicts something else, which no shape would betray."""
    require_options(path, plain(run.cfg), ("model.prediction", "path"))


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
    key = note_of(path).get("key")
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
        KeyboardInterrupt: on Ctrl-C, which a sweep must not take for one failed cell.
    """
    if is_main_process():
        write_text(run.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(run.cfg, resolve=True))
    for remark in _NOISE:
        warnings.filterwarnings("ignore", message=remark)
    L.seed_everything(run.cfg.seed, workers=True, verbose=False)
    model, options = shared_out(run)
    callbacks = callbacks_of(run, sharded=model is not run.model)
    logger = run.cfg.get("logger") and instantiate(
        run.cfg.logger, save_dir=run.folder, name="tensorboard", version=""
    )
    if not logger:  # Lightning refuses curves of the learning rate that go nowhere
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if model is run.model:  # a split network is whole again only after the training
        callbacks.append(laplace)
    if "plugins" not in run.cfg.trainer:
        options["plugins"] = [WholeCheckpoints()]
    trainer: L.Trainer = instantiate(
        run.cfg.trainer,
        callbacks=callbacks,
        logger=logger or False,
        default_root_dir=str(run.folder),
        precision=precision(run.cfg, run.device),
        _convert_="all",
        **options,
    )
    try:
        with named_disk(run.folder):
            trainer.fit(
                model,
                datamodule=run.data,
                ckpt_path=None if ckpt_path is None else str(ckpt_path),
                weights_only=True,
            )
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    return trainer


def shared_out(run: Run) -> tuple[GenerativeModel, dict[str, Any]]:
    """What is trained, and options of the trainer: how several processes share it."""
    strategy = run.cfg.trainer.get("strategy", "auto")
    if isinstance(strategy, str):
        return run.model, {}
    if world_size() == 1:  # nothing to split
        return run.model, {"strategy": "auto"}
    from bayesdiff.sharding import ShardedModel

    return ShardedModel.of(run.model), {}


def callbacks_of(run: Run, sharded: bool) -> list[Callback]:
    """The callbacks that are asked for, and the note in every checkpoint.

    Raises:
        UserError: if the checkpoint callback is switched off.
    """
    folder = run.folder / "checkpoints"
    told = [c for c in (run.cfg.callbacks or {}).values() if c]
    callbacks = [instantiate(c, **_place(c, folder), **_split(c, sharded)) for c in told]
    if not any(map(_keeps_last, told)):
        raise UserError(
            "callbacks.checkpoint is switched off or changed, but later stages read the last "
            "epoch's last.ckpt; leave it as it is, and add further callbacks under other names"
        )
    # Averaging first: every other callback then sees the averaged weights where Lightning does.
    callbacks.sort(key=lambda callback: not isinstance(callback, EMAWeightAveraging))
    return [*callbacks, Provenance(run), EndsWhenTold()]


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
        checkpoint["bayesdiff"] = self.note


def _keeps_last(options: Any) -> bool:
    """Whether a callback leaves the last epoch's weights in last.ckpt, whatever the epoch."""
    rare = [options.get(name) for name in ("every_n_train_steps", "train_time_interval")]
    return (
        options._target_.endswith("ModelCheckpoint")
        and options.get("filename") == "last"
        and options.get("save_on_train_epoch_end") is True
        and options.get("every_n_epochs") in (None, 1)
        and not any(rare)
    )


def _place(callback: Any, folder: Path) -> dict[str, str]:
    return {"dirpath": str(folder)} if callback._target_.endswith("ModelCheckpoint") else {}


def _split(callback: Any, sharded: bool) -> dict[str, str]:
    averages = callback._target_.endswith(".EMAWeightAveraging")
    return {"_target_": "bayesdiff.sharding.ShardedAveraging"} if sharded and averages else {}
