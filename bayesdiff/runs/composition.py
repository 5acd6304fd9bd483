"""The configuration of one run from words, as the command line makes it."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, open_dict

from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.options.config_folders import own_configs, shipped_configs
from bayesdiff.options.shadows import refuse_shadows

_VERSION = "1.3"  # of Hydra's behaviour, as in train.py


def compose(
    *overrides: str, config_name: str = "train", config_dir: str | Path | None = None
) -> DictConfig:
    """The configuration of one run, as ``python train.py`` with these overrides would have it.

    Relative paths in it, such as ``output_dir``, mean the current directory. Hydra's own global
    state is left as it is, so that this works in a notebook and inside any Hydra application.

    Args:
        *overrides: words of the command line, each a string: ``"model=flow"``, ``"seed=1"``.
        config_name: ``"train"``, or ``"sweep"`` for a cell of a sweep.
        config_dir: a folder of configuration files of your own, as ``--config-dir``; None takes a
            folder ``configs`` in the current directory, if there is one.

    Returns:
        What ``bayesdiff.pipeline.run`` takes.

    Raises:
        UserError: for what the command line would refuse, in one line.

    Example:
        >>> cfg = compose("model=flow", "data=digits", "net=tiny", "seed=1")
        >>> cfg.seed, cfg.path._target_, cfg.model.prediction
        (1, 'bayesdiff.paths.CondOT', 'velocity')
    """
    for word in overrides:
        if not isinstance(word, str):
            raise UserError(f"{word!r} is no override; give each as a string, as in 'seed=1'")
    try:
        cfg = _loaded(overrides, config_name, config_dir)
    except UserError:
        raise
    except Exception as error:  # Hydra's, OmegaConf's, PyYAML's
        raise UserError(explain(error)) from error
    refuse_shadows(cfg.hydra.runtime)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _loaded(
    overrides: tuple[str, ...], config_name: str, config_dir: str | Path | None
) -> DictConfig:
    """What Hydra makes of the words, its own part included."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.utils import setup_globals
    from hydra.types import RunMode

    path = create_config_search_path(str(shipped_configs()))
    own = own_configs()
    if config_dir is not None:
        own = Path(os.path.abspath(os.path.expanduser(config_dir)))
        if not own.is_dir():
            raise UserError(f"config_dir={config_dir} is no folder; give one of your own")
    if own is not None:
        path.prepend("command-line", f"file://{own}", SearchPathQuery(provider="schema"))
    with _version_base():
        setup_globals()
        # Not by hydra.initialize, which refuses where Hydra is at work already.
        loader = ConfigLoaderImpl(config_search_path=path)
        return loader.load_configuration(
            config_name, list(overrides), RunMode.RUN, from_shell=False
        )


@contextmanager
def _version_base() -> Generator[None, None, None]:
    """Hydra's behaviour of the version that train.py asks for; then that of before again."""
    from hydra import version

    base = version.VersionBase.instance()
    before = base.version_base
    version.setbase(_VERSION)
    try:
        yield
    finally:
        base.version_base = before
