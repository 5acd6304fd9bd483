"""Lightning's trainer, with all that a run needs of it."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from omegaconf import OmegaConf

from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.ranks import world_size
from bayesdiff.models import GenerativeModel
from bayesdiff.options.trainer import time_limit
from bayesdiff.report.loggers import Loggers, close
from bayesdiff.runs.build import Run, is_main_process, plain, precision
from bayesdiff.runs.callback_options import callbacks_of
from bayesdiff.runs.callbacks import (
    PosteriorAtEnd,
    Provenance,
    RunCheckpoints,
    WholeCheckpoints,
)
from bayesdiff.runs.stage_costs import machine
from bayesdiff.runs.stopping import RunTime, SigtermHandler
from bayesdiff.storage.artefacts import write_text
from bayesdiff.storage.atomic import named_disk

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


def train(
    run: Run, laplace: LastLayerLaplace | None, ckpt_path: Path | None
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
    best = run.cfg.sample_from == "best"
    place = machine(run.device, world_size())
    checkpoints = RunCheckpoints(run.folder / "checkpoints", best, SigtermHandler(), place)
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
        by = " by SIGTERM" if checkpoints.sigterm.received else ""
        log.warning("fit: interrupted%s at %s", by, how_far(run, trainer, checkpoints))
        raise KeyboardInterrupt from error
    except Exception as error:
        far = how_far(run, trainer, checkpoints)
        if checkpoints.ended:
            log.warning("fit: finished and kept at %s, then came %r", far, error)
        else:
            log.warning("fit: cut at %s by %r", far, error)
        raise
    finally:
        close(trainer.loggers)
    return trainer, checkpoints


def how_far(run: Run, trainer: L.Trainer, checkpoints: RunCheckpoints) -> str:
    """How far a training is, and from where it would go on, as "7 of 440 steps"."""
    kept = checkpoints.kept_step
    place = "" if kept == trainer.global_step else f" (the checkpoint is that of step {kept})"
    return f"{trainer.global_step} of {run.length[0]} steps{place}"


def trainer_of(
    run: Run,
    laplace: LastLayerLaplace | None,
    checkpoints: RunCheckpoints,
    sharded: bool,
    options: dict[str, Any],
) -> L.Trainer:
    """Lightning's trainer with all that is asked for, and what the run itself needs."""
    asked = callbacks_of(run, sharded)
    callbacks = [*asked, Provenance(run), checkpoints.sigterm, checkpoints]
    if run.cfg.trainer.get("enable_progress_bar") is None:  # Lightning would add one of its own
        options["enable_progress_bar"] = any(isinstance(c, ProgressBar) for c in asked)
    if limit := time_limit(run.cfg.trainer.get("max_time")):
        callbacks.append(RunTime(limit))
    if (
        laplace is not None and not sharded
    ):  # a split network is whole again only after the training
        callbacks.append(PosteriorAtEnd(laplace, checkpoints))
    loggers = Loggers(run.cfg.get("logger"), run.folder, run.folder.name, "training")
    plugins = instantiate(run.cfg.trainer.get("plugins"), _convert_="all") or []
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
        plugins=[*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpoints()],
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
