"""The key of a training: everything that its weights depend on, and nothing else."""

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bayesdiff.artefacts import key_of
from bayesdiff.source_code import ARITHMETIC, code_of
from bayesdiff.trainer_options import weighty

# Callbacks that show, keep or time what is learnt. Whatever is not named here is in the key.
_DISPLAY = frozenset({
    "RichProgressBar", "TQDMProgressBar", "ProgressBar", "LearningRateMonitor", "ModelCheckpoint",
    "DeviceStatsMonitor", "ThroughputMonitor", "ModelSummary", "RichModelSummary", "Timer",
    "SampleGrid", "Snapshots", "OnExceptionCheckpoint", "TrainingProgress",
})  # fmt: skip
_OURS = ("lightning.", "bayesdiff.", "pytorch_lightning.")


def fit_key(cfg: DictConfig, fingerprint: str, parent: str | None = None) -> str:
    """Content key of everything the trained weights depend on, devices left out.

    Args:
        cfg: whole configuration.
        fingerprint: of the data.
        parent: key of the weights that the training starts from, see ``init_from``.
    """
    callbacks = learning_callbacks(cfg)
    best = cfg.sample_from == "best"
    validated = best or not all(map(_heedless, callbacks))
    parts: dict[str, Any] = {
        "arithmetic": ARITHMETIC,
        "data": [fingerprint, cfg.data.batch_size, cfg.data.flip],
        "seed": cfg.seed,
        "model": plain(cfg.model),
        "net": plain(cfg.net),
        "path": plain(cfg.path),
        "trainer": weighty(cfg.trainer, validated),
        "callbacks": callbacks,
        "code": code_of(*map(plain, (cfg.model, cfg.net, cfg.path, cfg.trainer)), callbacks),
    }
    if best:
        parts["sample_from"] = "best"
    if parent is not None:
        parts["parent"] = parent
    if not cfg.fit and cfg.ckpt_path != "last":
        # A checkpoint from elsewhere has a folder of its own, whatever the options say.
        parts["checkpoint"] = hashlib.sha256(Path(cfg.ckpt_path).read_bytes()).hexdigest()
    return key_of(parts)


def network_code(cfg: DictConfig) -> list[Any]:
    """What code features and predictions depend on, beside the weights."""
    return [ARITHMETIC, code_of(*map(plain, (cfg.model, cfg.net, cfg.path)))]


def learning_callbacks(cfg: DictConfig) -> list[Any]:
    """Options of the callbacks that may change what is learnt, whatever they are called here."""
    given = [plain(options) for options in (cfg.callbacks or {}).values() if options]
    return [options for options in given if not displays(options)]


def displays(options: dict[str, Any]) -> bool:
    """Whether a callback shows, keeps or times what is learnt, and changes nothing of it."""
    name = str(options.get("_target_"))
    return name.startswith(_OURS) and name.rpartition(".")[2] in _DISPLAY


def _heedless(options: dict[str, Any]) -> bool:
    """Whether a callback does the same whatever the validation finds."""
    name = str(options.get("_target_"))
    return name.startswith(_OURS) and name.rpartition(".")[2] == "EMAWeightAveraging"


def plain(cfg: Any) -> Any:
    """A configuration node as plain values."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
