"""The key of a run's weights: everything that they depend on, and nothing else."""

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bayesdiff.options.targets import class_of, taken
from bayesdiff.options.trainer import weighty
from bayesdiff.options.values import plain
from bayesdiff.storage.artefacts import key_of
from bayesdiff.storage.source_code import ARITHMETIC, code_of

# Callbacks that show, keep or time what is learnt. Whatever is not named here is in the key.
_DISPLAY = frozenset({
    "RichProgressBar", "TQDMProgressBar", "ProgressBar", "LearningRateMonitor", "ModelCheckpoint",
    "DeviceStatsMonitor", "ThroughputMonitor", "ModelSummary", "RichModelSummary", "Timer",
    "SampleGrid", "Snapshots", "OnExceptionCheckpoint", "TrainingProgress",
})  # fmt: skip
_OURS = ("lightning.", "bayesdiff.", "pytorch_lightning.")
# Options of the model that only a training reads.
_LEARNING = ("optimizer", "warmup_steps", "class_dropout", "time_sampling")


def fit_key(cfg: DictConfig, fingerprint: str, parent: str | None = None) -> str:
    """Content key of everything the weights depend on, devices left out.

    Weights that are taken from a file depend on it, and on nothing that only a training reads.

    Args:
        cfg: whole configuration.
        fingerprint: of the data.
        parent: key of the weights that the training starts from, see ``init_from``, or of those
            that the network is built with.
    """
    parts: dict[str, Any] = {
        "arithmetic": ARITHMETIC,
        "seed": cfg.seed,
        "net": taken(cfg.net),
        "path": plain(cfg.path),
    }
    if takes_weights(cfg):
        model = {k: v for k, v in model_options(cfg).items() if k not in _LEARNING}
        parts |= {"data": [fingerprint], "model": model, "code": _code(model, cfg.net, cfg.path)}
        own = None if has_weights(cfg) else Path(cfg.ckpt_path).read_bytes()
        parts["checkpoint"] = parent if own is None else hashlib.sha256(own).hexdigest()
        return key_of(parts)
    callbacks = learning_callbacks(cfg)
    best = cfg.sample_from == "best"
    parts |= {
        "data": [fingerprint, cfg.data.batch_size, cfg.data.flip],
        "model": model_options(cfg) | {"optimizer": taken(cfg.model.optimizer)},
        "trainer": weighty(cfg.trainer, best or not all(map(_heedless, callbacks))),
        "callbacks": callbacks,
        "code": _code(cfg.model, cfg.net, cfg.path, cfg.trainer, callbacks),
    }
    if best:
        parts["sample_from"] = "best"
    if parent is not None:
        parts["parent"] = parent
    return key_of(parts)


def takes_weights(cfg: DictConfig) -> bool:
    """Whether a run takes the weights of a file and trains nothing of its own."""
    return not cfg.fit and cfg.ckpt_path != "last"


def has_weights(cfg: DictConfig) -> bool:
    """Whether the network comes with its weights, and nothing is trained or loaded here."""
    return not cfg.fit and cfg.ckpt_path == "built"


def model_options(cfg: DictConfig) -> dict[str, Any]:
    """Options of the model that weights depend on.

    A Gaussian likelihood is none, as where there was no other; whether and where another one is
    sampled is no matter of the training.
    """
    options = {n: v for n, v in plain(cfg.model).items() if (n, v) != ("likelihood", None)}
    if "likelihood" in options:
        given = options["likelihood"].items()
        options["likelihood"] = {k: v for k, v in given if k not in ("sampled", "final")}
    return options


def likelihood_options(cfg: DictConfig) -> list[Any]:
    """Of the likelihood, as a part of keys; nothing of a Gaussian one."""
    given = plain(cfg.model).get("likelihood")
    return [] if given is None else [given]


def seen_options(cfg: DictConfig) -> list[Any]:
    """What the pass over the data depends on beside weights, path and prediction.

    The condition, and a likelihood other than a Gaussian; not whether it is sampled.
    """
    options = model_options(cfg)
    return [options[name] for name in ("condition", "likelihood") if name in options]


def pass_context(cfg: DictConfig) -> tuple[Any, ...]:
    """What a curvature comes from beside the weights, the data and the options of its pass."""
    own = (cfg.model.prediction, plain(cfg.path), network_code(cfg))
    return (*own, *seen_options(cfg))


def network_code(cfg: DictConfig) -> list[Any]:
    """What code features and predictions depend on, beside the weights."""
    return [ARITHMETIC, _code(cfg.model, cfg.net, cfg.path)]


def _code(*options: Any) -> dict[str, str]:
    return code_of(*map(plain, options))


def learning_callbacks(cfg: DictConfig) -> list[Any]:
    """Options of the callbacks that may change what is learnt, whatever they are called here."""
    given = [plain(options) for options in (cfg.callbacks or {}).values() if options]
    return [options for options in given if not displays(options)]


def displays(options: dict[str, Any]) -> bool:
    """Whether a callback shows, keeps or times what is learnt, and changes nothing of it."""
    return _ours(options) in _DISPLAY


def _heedless(options: dict[str, Any]) -> bool:
    """Whether a callback does the same whatever the validation finds."""
    return _ours(options) == "EMAWeightAveraging"


def _ours(options: dict[str, Any]) -> str | None:
    """Name of Lightning's or this package's class that a callback is; None for a user's own."""
    made = class_of(options)
    return made.__name__ if made and f"{made.__module__}.".startswith(_OURS) else None
