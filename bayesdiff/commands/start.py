"""How a command starts: where it finds configurations and parts of the user's own."""

import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from omegaconf import DictConfig

from bayesdiff.options.config_folders import own_configs, shipped_configs

_CONFIG_DIR = ("--config-d", "-cd")  # argparse takes the beginning of a long option too
# Hydra's options with a word of their own behind them.
_WITH_WORD = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c"),
    *("--package", "-p", "--experimental-rerun"),
)
_MAY_HAVE_WORD = ("--info", "-i")


def start(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Hand the words of the command line to Hydra, and its configuration to the task.

    Args:
        task: called with every configuration that the words ask for.
        config_name: of the shipped file that everything begins with.
    """
    import hydra

    sys.argv = options_first(with_own_configs(sys.argv))
    if (here := os.getcwd()) not in sys.path:  # parts of the user's own, as for python -m
        sys.path.append(here)
    folder = str(shipped_configs())
    hydra.main(version_base="1.3", config_path=folder, config_name=config_name)(task)()


def with_own_configs(words: list[str]) -> list[str]:
    """The command's words, the user's ``configs`` here as ``--config-dir`` if none is given."""
    if any(word.startswith(_CONFIG_DIR) for word in words) or (own := own_configs()) is None:
        return words
    return [words[0], "--config-dir", str(own), *words[1:]]


def options_first(words: list[str]) -> list[str]:
    """The command's words, Hydra's options before all choices: argparse wants no mixture."""
    options: list[str] = []
    choices: list[str] = []
    for before, word in pairwise(words):
        follows = before in _WITH_WORD or (before in _MAY_HAVE_WORD and "=" not in word)
        (options if word.startswith("-") or follows else choices).append(word)
    return [words[0], *options, *choices]
