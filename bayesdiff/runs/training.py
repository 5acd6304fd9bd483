"""The fit stage: train, resume, or recognise a finished training."""

import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from omegaconf import OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.data.corruption import images_per_epoch
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.ranks import barrier, world_size
from bayesdiff.models import GenerativeModel
from bayesdiff.report.loggers import Loggers, close
from bayesdiff.runs.build import Run, is_main_process, plain, precision
from bayesdiff.runs.callback_options import callbacks_of
from bayesdiff.runs.callbacks import (
    EndsWhenTold,
    PosteriorAtEnd,
    Provenance,
    RunCheckpoints,
    RunTime,
    WholeCheckpoints,
    cut_by,
    rule_of,
)
from bayesdiff.runs.trainer_options import duration, steps_and_epochs
from bayesdiff.storage.artefacts import read_json, write_atomic, write_json, write_text
from bayesdiff.storage.atomic import named_disk
from bayesdiff.storage.checkpoints import (
    BEST,
    LAST,
    load_weights,
    note_of,
    read_checkpoint,
    require_guidance,
    require_options,
)
from bayesdiff.storage.locks import together

log = logging.getLogger(__name__)

# Lightning's remarks on its own code, on a short epoch, and on a resume, which is wanted here.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"The number of training batches",
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed",
)
# Parts of the configuration that a training's own loggers are given.
_SHOWN = ("seed", "data", "model", "net", "path", "trainer")
_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def fit(run: Run, laplace: LastLayerLaplace) -> str:
    """Leave trained (averaged) weights in the model, training only as far as is needed.

    Returns:
        Content key of the weights.

    Raises:
        UserError: if the checkpoint is missing, unreadable, of another run, or training diverges.
    """  # noqa: DOC502 - raised one level down
    last = run.folder / "checkpoints" / "last.ckpt"
    if not run.cfg.fit:
        own = run.cfg.ckpt_path == "last"
        path = last.with_name(chosen(run)) if own else Path(run.cfg.ckpt_path)
        require_same_kind(run, path)
        return load_weights(run.model, path)
    with together(run.folder / "fit.json"):
        return _finish(run, laplace, last)


def _finish(run: Run, laplace: LastLayerLaplace, last: Path) -> str:
    record = read_json(run.folder / "fit.json") or {}
    sampled = last.with_name(chosen(run))
    if record.get("key") == run.key and last.is_file() and sampled.is_file():
        weights = load_weights(run.model, sampled)
        if weights == record.get("weights"):
            log.info("fit: done before, weights %s", weights)
            return weights
        raise UserError(
            f"{sampled} is not the checkpoint that fit.json beside it names; delete {run.folder} "
            "to train again, or give fit=false ckpt_path=... to use it as it is"
        )
    resume = resume_from(run, last)
    found: dict[str, Any] = {"key": run.key, "checkpoint": sampled.name, "parent": run.parent}
    kept = None if resume is None else read_checkpoint(resume)
    if resume is not None and kept is not None and is_finished(run, kept):
        # Stopped between the last epoch and fit.json. Lightning would now train nothing and leave
        # the raw weights in place of the averaged ones.
        if resume != last and is_main_process():
            write_atomic(last, partial(shutil.copyfile, resume))
        found |= {"epochs": kept["epoch"] + 1, "steps": kept["global_step"]}
    else:
        found |= _trained(run, laplace, resume, last)
    barrier()
    weights = load_weights(run.model, sampled)
    if is_main_process():
        write_json(run.folder / "fit.json", found | {"weights": weights})
    return weights


def _trained(
    run: Run, laplace: LastLayerLaplace, resume: Path | None, last: Path
) -> dict[str, Any]:
    """Train to the end and return what is to be remembered of it.

    Raises:
        UserError: if something cut the training before its end; the same command continues.
    """
    started = time.perf_counter()
    trainer, checkpoints = train(run, laplace, resume)
    if not checkpoints.finished(trainer):
        why = cut_by(trainer)
        cure = "; the same command continues"
        if why == "trainer.max_time":
            cure += ", without trainer.max_time to the end"
        elif "should_stop" in why:
            cure += "; a rule that ends trainings sets ended_training = True beside should_stop"
        raise UserError(f"training cut at {progress(run, trainer, checkpoints)} by {why}{cure}")
    ended = rule_of(trainer)
    if ended:
        log.info("fit: ended at %s by %s", progress(run, trainer, checkpoints), ended)
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        **({"ended_by": ended} if ended else {}),
        **({"best_val_loss": checkpoints.score} if checkpoints.best else {}),
        "seconds": round(time.perf_counter() - started, 1),
        **{name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def progress(run: Run, trainer: L.Trainer, checkpoints: RunCheckpoints) -> str:
    """How far a training is, and from where it would go on, as "7 of 440 steps"."""
    batches = images_per_epoch(run.data.data) // run.data.batch_size
    total = steps_and_epochs(run.cfg.trainer, batches)[0]
    kept = checkpoints.kept_step
    place = "" if kept == trainer.global_step else f" (the checkpoint is that of step {kept})"
    return f"{trainer.global_step} of {total} steps{place}"


def chosen(run: Run) -> str:
    """Name of the checkpoint that the stages after the training read."""
    return BEST if run.cfg.sample_from == "best" else LAST


def weights_in_words(run: Run) -> str:
    """Which weights the stages after the training read."""
    if not run.cfg.fit:
        return f"those in {run.cfg.ckpt_path}"
    record = read_json(run.folder / "fit.json") or {}
    if chosen(run) == BEST:
        loss = record.get("best_val_loss")
        return "lowest validation loss" + ("" if loss is None else f", {loss:.4g}")
    steps, rule = record.get("steps"), record.get("ended_by")
    return (
        f"last step{'' if steps is None else f', {steps}'}{f', ended by {rule}' if rule else ''}"
    )


def is_finished(run: Run, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has all that was asked for, or a rule of the run's own ended it."""
    trainer, loop = run.cfg.trainer, checkpoint["loops"]["fit_loop"]
    epochs, steps = trainer.get("max_epochs") or -1, trainer.get("max_steps") or -1
    done = loop["epoch_progress"]["current"]["processed"]
    if (checkpoint.get("bayesdiff") or {}).get("ended"):
        return True
    return 0 < epochs <= done or 0 < steps <= checkpoint["global_step"]


def require_same_kind(run: Run, path: Path) -> None:
    """Refuse a checkpoint whose network is another one, which no shape would betray."""
    config = plain(run.cfg)
    net = [f"net.{name}" for name in config["net"] if name != "dropout"]
    require_options(path, config, ("model.prediction", "path", *net))
    require_guidance(path, config)
    trained_on = note_of(path).get("data")
    if trained_on not in (None, run.data.data.fingerprint):
        log.warning("%s was trained on other images than data=%s", path, run.cfg.data.name)


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
    note = note_of(path)
    if not note:
        raise UserError(
            f"checkpoint {path} has weights of another program, which cannot be continued; "
            f"init_from={path} begins a training with them, fit=false takes them as they are"
        )
    key = note.get("key")
    if key != run.key:
        raise UserError(
            f"checkpoint {path} is of run {key}, this is run {run.key}: other data, model or "
            "training options; give the options it was started with, or another run_dir"
        )
    log.info("fit: continuing from %s", path)
    return path


def train(
    run: Run, laplace: LastLayerLaplace, ckpt_path: Path | None
) -> tuple[L.Trainer, RunCheckpoints]:
    """Run Lightning's trainer and return it, with what kept the checkpoints.

    Raises:
        KeyboardInterrupt: on Ctrl-C, which a sweep must not take for one failed cell.
    """
    if is_main_process():
        write_text(run.folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(run.cfg, resolve=True))
    for remark in _NOISE:
        warnings.filterwarnings("ignore", message=remark)
    L.seed_everything(run.cfg.seed, workers=True, verbose=False)
    model, options = shared_out(run)
    checkpoints = RunCheckpoints(run.folder / "checkpoints", best=chosen(run) == BEST)
    trainer = trainer_of(run, laplace, checkpoints, model is not run.model, options)
    try:
        with named_disk(run.folder):
            trainer.fit(
                model,
                datamodule=run.data,
                ckpt_path=None if ckpt_path is None else str(ckpt_path),
                weights_only=True,
            )
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        log.warning("fit: interrupted at %s", progress(run, trainer, checkpoints))
        raise KeyboardInterrupt from error
    except Exception as error:
        log.warning("fit: cut at %s by %r", progress(run, trainer, checkpoints), error)
        raise
    finally:
        close(trainer.loggers)
    return trainer, checkpoints


def trainer_of(
    run: Run,
    laplace: LastLayerLaplace,
    checkpoints: RunCheckpoints,
    sharded: bool,
    options: dict[str, Any],
) -> L.Trainer:
    """Lightning's trainer with all that is asked for, and what the run itself needs."""
    callbacks = [*callbacks_of(run, sharded), Provenance(run), EndsWhenTold(), checkpoints]
    if limit := duration(run.cfg.trainer.get("max_time")):
        callbacks.append(RunTime(limit))
    if not sharded:  # a split network is whole again only after the training
        callbacks.append(PosteriorAtEnd(laplace, checkpoints))
    loggers = Loggers(run.cfg.get("logger"), run.folder, run.folder.name, "training")
    plugins = instantiate(run.cfg.trainer.get("plugins"), _convert_="all") or []
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, WholeCheckpoints()]
    profiler = run.cfg.trainer.get("profiler")
    if profiler in _PROFILERS:  # Lightning's own would only say it where nobody listens
        options["profiler"] = _PROFILERS[profiler](dirpath=run.folder, filename="profile")
    trainer: L.Trainer = instantiate(
        run.cfg.trainer,
        callbacks=callbacks,
        logger=loggers.begin({name: plain(run.cfg[name]) for name in _SHOWN}) or False,
        default_root_dir=str(run.folder),
        precision=precision(run.cfg, run.device),
        max_time=None,
        plugins=plugins,
        _convert_="all",
        **options,
    )
    return trainer


def shared_out(run: Run) -> tuple[GenerativeModel, dict[str, Any]]:
    """What is trained, and options of the trainer: how several processes share it."""
    strategy = run.cfg.trainer.get("strategy", "auto")
    if isinstance(strategy, str):
        return run.model, {}
    if world_size() == 1:  # nothing to split
        return run.model, {"strategy": "auto"}
    from bayesdiff.runs.sharding import ShardedModel

    return ShardedModel.of(run.model), {}
