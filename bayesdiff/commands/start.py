"""How a command starts: where it finds configurations and parts of the user's own."""

import os
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from bayesdiff.options.config_folders import own_configs, shipped_configs

_CONFIG_DIR = ("--config-d", "-cd")  # argparse takes the beginning of a long option too


def start(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Hand the words of the command line to Hydra, and its configuration to the task.

    Args:
        task: called with every configuration that the words ask for.
        config_name: of the shipped file that everything begins with.
    """
    import hydra

    sys.argv = with_own_configs(sys.argv)
    if (here := os.getcwd()) not in sys.path:  # parts of the user's own, as for python -m
        sys.path.append(here)
    folder = str(shipped_configs())
    hydra.main(version_base="1.3", config_path=folder, config_name=config_name)(task)()


def with_own_configs(words: list[str]) -> list[str]:
    """The command's words, the user's ``configs`` here as ``--config-dir`` if none is given."""
    if any(word.startswith(_CONFIG_DIR) for word in words) or (own := own_configs()) is None:
        return words
    return [words[0], "--config-dir", str(own), *words[1:]]
