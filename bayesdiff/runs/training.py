"""The fit stage: train, resume, or recognise a finished training."""

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bayesdiff.checks import UserError
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.costs import keep
from bayesdiff.machine.ranks import barrier
from bayesdiff.options.trainer import reached
from bayesdiff.runs.build import Run, is_main_process, plain
from bayesdiff.runs.fit_key import has_weights, takes_weights
from bayesdiff.runs.stopping import cut_by, rule_of
from bayesdiff.runs.trainer import how_far, train
from bayesdiff.storage.artefacts import read_json, weights_key, write_atomic, write_json
from bayesdiff.storage.checkpoints import BEST, LAST, load_weights, note_of, read_checkpoint
from bayesdiff.storage.locks import together
from bayesdiff.storage.same_kind import kind_of, require_guidance, require_options

log = logging.getLogger(__name__)
# Share of an average that its first weights may still have when a training ends.
_LEFT = 0.2


def fit(run: Run, laplace: LastLayerLaplace | None = None) -> str:
    """Leave trained (averaged) weights in the model, training only as far as is needed.

    Args:
        run: with its model.
        laplace: fits the posterior when a training ends; None for none.

    Returns:
        Content key of the weights.

    Raises:
        UserError: if the checkpoint is missing, unreadable, of another run, or training diverges.
    """  # noqa: DOC502 - raised one level down
    last = run.folder / "checkpoints" / LAST
    if has_weights(run.cfg):
        return weights_key(run.model)
    if not run.cfg.fit:
        own = run.cfg.ckpt_path == "last"
        path = last.with_name(chosen(run)) if own else Path(run.cfg.ckpt_path)
        checkpoint = read_checkpoint(path)
        require_same_kind(run, path, checkpoint)
        return load_weights(run.model, path, checkpoint)
    with together(run.folder / "fit.json"):
        return _finish(run, laplace, last)


def _finish(run: Run, laplace: LastLayerLaplace | None, last: Path) -> str:
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
    resume, kept = resume_from(run, last)
    measured: dict[str, Any] = {}
    if resume is not None and resume != last and is_main_process() and is_finished(kept):
        write_atomic(last, partial(shutil.copyfile, resume))
    # A finished one was stopped before fit.json: Lightning would train nothing, and leave the raw
    # weights in place of the averaged ones.
    if not is_finished(kept):
        measured = _trained(run, laplace, resume)
        kept = {}
    barrier()
    kept = kept or read_checkpoint(last)
    weights = load_weights(run.model, sampled, kept if sampled == last else None)
    cost = _state_of(kept).get("cost")
    if cost:
        keep("training", cost | {"amount": kept["global_step"]})
    if is_main_process():
        found = {"key": run.key, "checkpoint": sampled.name, "parent": run.parent}
        write_json(
            run.folder / "fit.json", found | record_of(run, kept) | measured | {"weights": weights}
        )
    return weights


def record_of(run: Run, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What ``fit.json`` says of a finished training, whoever finished it."""
    ended = note_of(checkpoint).get("ended")
    best = chosen(run) == BEST
    return {
        "epochs": _epochs_of(checkpoint),
        "steps": checkpoint["global_step"],
        "seconds": _state_of(checkpoint).get("cost", {}).get("seconds"),
        **({"ended_by": ended} if ended else {}),
        **({"best_val_loss": _best_loss_of(checkpoint)} if best else {}),
    }


def _trained(run: Run, laplace: LastLayerLaplace | None, resume: Path | None) -> dict[str, Any]:
    """Train to the end and return what was logged last."""
    if resume is None and is_main_process():
        _note_short_average(run)
    trainer, checkpoints = train(run, laplace, resume)
    far = how_far(run, trainer, checkpoints)
    if not checkpoints.ended:
        why = cut_by(trainer)
        cure = "; the same command continues"
        if why == "trainer.max_time":
            cure += ", without trainer.max_time to the end"
        elif "should_stop" in why:
            cure += "; a rule that ends trainings sets ended_training = True beside should_stop"
        raise UserError(f"training cut at {far} by {why}{cure}")
    if ended := rule_of(trainer):
        log.info("fit: ended at %s by %s", far, ended)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _note_short_average(run: Run) -> None:
    """Say where averaged weights would mostly be those from before the training."""
    steps = run.length[0]
    for name, options in (plain(run.cfg.callbacks) or {}).items():
        decay = options.get("decay") if isinstance(options, dict) else None
        left = decay**steps if decay and steps > 0 else 0
        if left > _LEFT:
            log.warning(
                "%s: after %d steps, %.0f %% of the averaged weights are those of the first step, "
                "and images may be near noise; train longer, or take a smaller data.ema_decay "
                "than %g",
                *(name, steps, 100 * left, decay),
            )


def images_seen(run: Run) -> int:
    """Images that the training has seen, each time anew with fresh noise; planned ones before it.

    Raises:
        UserError: for weights that were trained elsewhere, of which nobody knows.
    """
    cfg = run.cfg
    if takes_weights(cfg):
        raise UserError(
            "laplace.n_eff=seen counts the images of this run's training, and there is none; "
            "give a number, such as epochs times training images"
        )
    if chosen(run) == BEST:
        raise UserError(
            "laplace.n_eff=seen counts all of the training, and sample_from=best takes weights "
            "from before its end; use sample_from=last, or give a number"
        )
    record = read_json(run.folder / "fit.json") or {}
    steps: int = record.get("steps") or run.length[0]
    return steps * run.data.batch_size * int(cfg.trainer.get("accumulate_grad_batches") or 1)


def chosen(run: Run) -> str:
    """Name of the checkpoint that the stages after the training read."""
    return BEST if run.cfg.sample_from == "best" else LAST


def weights_in_words(run: Run) -> str:
    """Which weights the stages after the training read."""
    if has_weights(run.cfg):
        return "those that the network came with"
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


def is_finished(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a training is finished, and this is what its callbacks left at the very end."""
    return bool(note_of(checkpoint).get("finished"))


def require_same_kind(run: Run, path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose network is another one, which no shape would betray."""
    config = plain(run.cfg)
    require_options(path, checkpoint, config, kind_of(config))
    require_guidance(path, checkpoint, config)
    if note_of(checkpoint).get("data") not in (None, run.data.data.fingerprint):
        if getattr(run.data.space, "fitted", False):
            raise UserError(
                f"checkpoint {path} was trained in states of other data than data="
                f"{run.cfg.data.name}, whose {type(run.data.space).__name__} is another; give the "
                "data it was trained on"
            )
        log.warning("%s was trained on other images than data=%s", path, run.cfg.data.name)


def resume_from(run: Run, last: Path) -> tuple[Path | None, dict[str, Any]]:
    """Checkpoint to continue, and its content: the one asked for, else this run's own.

    Raises:
        UserError: if it is asked for and missing, is that of another run, or cannot be continued.
    """
    asked = run.cfg.ckpt_path
    path = last if asked in (None, "last") else Path(asked)
    if asked is None and not last.is_file():
        return None, {}
    if asked == "last" and not last.is_file():
        raise UserError(f"ckpt_path=last but there is no {last}; leave ckpt_path out to begin")
    checkpoint = read_checkpoint(path)
    note = note_of(checkpoint)
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
    steps = checkpoint["global_step"]
    done = reached(run.cfg.trainer, _epochs_of(checkpoint), steps) or note.get("ended")
    if done and not is_finished(checkpoint):
        raise UserError(
            f"checkpoint {path} has all {steps} steps, but not what callbacks do to the weights "
            f"after the last one; give fit=false ckpt_path={path} to take it as it is, or train "
            "from an earlier one"
        )
    if chosen(run) == BEST and _best_loss_of(checkpoint) is not None:
        _take_best(run, path, last.with_name(BEST))
    log.info("fit: continuing from %s", path)
    return path, checkpoint


def _take_best(run: Run, path: Path, own: Path) -> None:
    """Bring the best checkpoint so far, which lies beside the one to continue, to its place."""
    there = path.with_name(BEST)
    if not there.is_file() or note_of(read_checkpoint(there)).get("key") != run.key:
        raise UserError(
            f"sample_from=best needs the {BEST} of this training beside {path}; put it there, or "
            "train again in another run_dir"
        )
    if there.resolve() != own.resolve() and is_main_process():
        write_atomic(own, partial(shutil.copyfile, there))


def _epochs_of(checkpoint: Mapping[str, Any]) -> int:
    """Epochs that the training has seen the end of."""
    progress: dict[str, int] = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return progress["processed"]


def _best_loss_of(checkpoint: Mapping[str, Any]) -> float | None:
    """The lowest validation loss until then."""
    return _state_of(checkpoint).get("score")


def _state_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What ``RunCheckpoints`` knew."""
    states: dict[str, dict[str, Any]] = checkpoint.get("callbacks") or {}
    return states.get("RunCheckpoints", {})
