"""The settings that a table, an HPARAMS row or a logger shows beside a run's numbers."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bayesdiff.laplace.block.layers import in_words
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.options.targets import word_of
from bayesdiff.runs.address import overridden
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.defaults import LEARNT, damage_of, is_aside, likelihood_choice, preset
from bayesdiff.runs.fit_key import has_weights, likelihood_options, takes_weights
from bayesdiff.solvers import Solver
from bayesdiff.storage.checkpoints import note_at
from bayesdiff.uncertainty import Estimator

# Groups that the standing columns name already.
_NAMED = ("data", "model", "net", "path", "solver", "laplace", "uncertainty", "metrics")


def settings(
    this: Run, posterior: HeadPosterior, solver: Solver, estimator: Estimator
) -> dict[str, Any]:
    """Standing settings first, then everything that was overridden, flat."""
    cfg = this.cfg
    standing = {
        "data": this.data.data.name,
        "corruption": damage_of(cfg),
        "model": this.model.path.family,
        "prediction": this.model.prediction,
        **_likelihood(cfg),
        "net": preset("net", cfg.net),
        "path": preset("path", cfg.path),
        **_learnt(cfg),
        "seed": cfg.seed,
        "features": word_of(cfg.metrics.features),
        "structure": posterior.structure,
        **({} if posterior.rank is None else {"rank": posterior.rank}),
        "subset": in_words(plain(cfg.laplace)["subset"]),
        "sigma_noise": posterior.sigma_noise,
        "prior_precision": posterior.prior_precision,
        "n_eff": posterior.n_eff,
        **_group("solver", cfg.solver, getattr(solver, "called", solver.name)),
        **_group("uncertainty", cfg.uncertainty, estimator.name),
        **({"uncertainty.instead_of": this.instead_of} if this.instead_of else {}),
    }
    more = overridden(this, solver, estimator, posterior) | typed(cfg)
    if takes_weights(cfg):
        more = {k: v for k, v in more.items() if not LEARNT.fullmatch(k)}
    return standing | {k: v for k, v in more.items() if k not in standing}


def _likelihood(cfg: DictConfig) -> dict[str, Any]:
    """The likelihood, where it is not the usual one."""
    return {"likelihood": likelihood_choice(cfg)} if likelihood_options(cfg) else {}


def _learnt(cfg: DictConfig) -> dict[str, Any]:
    """How the weights were trained; None where a file of weights does not say."""
    config: Any = plain(cfg)
    if has_weights(cfg):
        config = {}
    elif takes_weights(cfg):
        config = note_at(Path(cfg.ckpt_path)).get("config") or {}
    names = {
        "lr": "model.optimizer.lr",
        "epochs": "trainer.max_epochs",
        "batch_size": "data.batch_size",
    }
    return {name: OmegaConf.select(OmegaConf.create(config), key) for name, key in names.items()}


def typed(cfg: DictConfig) -> dict[str, Any]:
    """What the command line set, also where it is the default: a sweep has it in every cell.

    Nothing in Python, where there is no command line.
    """
    if not HydraConfig.initialized():
        return {}
    found: dict[str, Any] = {}
    words = [str(word) for word in HydraConfig.get().overrides.task]
    for override in OverridesParser.create().parse_overrides(words):
        key = override.get_key_element().lstrip("+~").partition("@")[0]
        if is_aside(key, cfg) or key in _NAMED or override.is_delete():
            continue
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_dict(value):
            continue  # a whole part: its differences are there
        chosen = key not in cfg and "." not in key  # a group with no place, such as experiment
        found[key] = override.get_value_string() if chosen else plain(value)
    return found


def _is_made(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _group(group: str, options: DictConfig, name: str) -> dict[str, Any]:
    values = {k: v for k, v in plain(options).items() if k != "_target_"}
    values = {k: word_of(v) if _is_made(v) else v for k, v in values.items()}
    return {f"{group}.{key}": value for key, value in ({"name": name} | values).items()}
