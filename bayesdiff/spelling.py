"""What was probably meant: names close to one that nothing has."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).parents[1] / "configs"


def near(name: str, names: Iterable[str], most: int = 3) -> str:
    """``"; did you mean a or b?"`` with those of ``names`` close to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(names), most, 0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def option_names() -> set[str]:
    """Full names of all options in ``configs``, such as ``trainer.max_epochs``."""
    from omegaconf import OmegaConf

    names: set[str] = set()
    for path in _CONFIGS.rglob("*.yaml"):
        group = ".".join(path.relative_to(_CONFIGS).parent.parts)
        whole = not group or path.read_text(encoding="utf-8").startswith("# @package _global_")
        content = OmegaConf.to_container(OmegaConf.load(path))
        names |= set(_leaves(content, "" if whole else f"{group}."))
    return names


def _leaves(values: Any, prefix: str) -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if name not in ("defaults", "_target_", "_partial_"):
            yield prefix + str(name)
            yield from _leaves(value, f"{prefix}{name}.")
