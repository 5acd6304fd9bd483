"""Further trainings of a run's own configuration from other seeds, inside its folder."""

import copy
import logging
from pathlib import Path

from omegaconf import DictConfig, open_dict, read_write

from bayesdiff.checks import UserError
from bayesdiff.data.module import ImageDataModule
from bayesdiff.models import GenerativeModel
from bayesdiff.options.targets import class_of
from bayesdiff.runs.build import Run, build_model, is_main_process, plain, start_from
from bayesdiff.runs.fit_key import displays, fit_key
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import key_of

log = logging.getLogger(__name__)

FOLDER = "calibration"
# Callbacks that say how far a training is; of the others that only show something none is needed.
_PROGRESS = ("TrainingProgress", "ProgressBar", "RichProgressBar", "TQDMProgressBar")


def retrained(run: Run, number: int) -> GenerativeModel:
    """The network of further training ``number``, from 1 on; trained as far as is needed."""
    other = _other(run, number)
    if is_main_process():
        log.info("calibration: training %d, from seed %d", number, other.cfg.seed)
    fit(other)
    return other.model.to(run.device).eval()


def retraining_key(run: Run, number: int) -> str:
    """Content key of the weights of further training ``number``."""
    weights = run.parent["weights"] if run.parent else None
    return fit_key(_options(run, number), run.data.data.fingerprint, weights)


def check_retraining(run: Run, asked: int) -> None:
    """Refuse to train further networks where this one is not trained either.

    Raises:
        UserError: one line with the cure.
    """
    if not run.cfg.fit:
        raise UserError(
            f"uncertainty.calibrate={asked} trains further networks of this configuration, and "
            "fit=false trains none; give a list of run folders of other seeds, held_out, or null"
        )


def seed_of_retraining(seed: int, number: int) -> int:
    """Another seed for each further training, far from those that people count up from 0."""
    return int(key_of(FOLDER, seed, number)[:7], 16)


def _options(run: Run, number: int) -> DictConfig:
    """The run's configuration from another seed, at a place of its own."""
    cfg = copy.deepcopy(run.cfg)
    seed = seed_of_retraining(run.cfg.seed, number)
    with read_write(cfg), open_dict(cfg):
        own = cfg.model.get("seed") == cfg.seed  # a copy that is resolved does not follow
        cfg.seed = seed
        if own:
            cfg.model.seed = seed
        cfg.run_dir = str(run.folder / FOLDER / str(number))
        cfg.ckpt_path = cfg.logger = None
        cfg.callbacks = {
            name: options
            for name, options in (cfg.callbacks or {}).items()
            if options and _is_needed(plain(options))
        }
    return cfg


def _is_needed(options: dict) -> bool:
    kind = class_of(options)
    return not displays(options) or (kind is not None and kind.__name__ in _PROGRESS)


def _other(run: Run, number: int) -> Run:
    """The run of a further training, with the same images in memory."""
    cfg, data = _options(run, number), run.data
    own = ImageDataModule(data.data, data.batch_size, data.flip, cfg.seed, data.given)
    model = build_model(cfg, own)
    parent = start_from(cfg, model)
    key = retraining_key(run, number)
    return Run(cfg, own, model, run.device, key, Path(cfg.run_dir), parent)
