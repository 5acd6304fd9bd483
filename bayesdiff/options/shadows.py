"""A configuration file of a user's own that Hydra would not read as it is meant."""

import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from bayesdiff.checks import UserError
from bayesdiff.options.config_folders import shipped_configs

_WHOLE = ("train", "sweep")  # what everything begins with, chosen or not


def check_shadows() -> None:
    """``refuse_shadows`` for the command that runs, if there is one."""
    if HydraConfig.initialized():
        refuse_shadows(HydraConfig.get().runtime)


def refuse_shadows(runtime: Any) -> None:
    """Refuse a chosen file of the user's own that is named like a shipped one.

    Hydra looks into the shipped configurations first, and would take that without a word. Nor
    does it say that a ``# @package`` below another comment is one.

    Args:
        runtime: Hydra's record of what was chosen and where it was looked for.

    Raises:
        UserError: if the two differ, or the package is not in the first line.
    """
    folders = [Path(s.path) for s in runtime.config_sources if s.schema == "file"]
    parts = {name: Path(f"{name}.yaml") for name in _WHOLE}
    for group, choice in runtime.choices.items():
        for name in [choice] if isinstance(choice, str) else choice or []:
            parts[f"{group}={name}"] = Path(group.partition("@")[0]) / f"{name}.yaml"
    for chosen, part in parts.items():
        shipped = shipped_configs() / part
        for own in (folder / part for folder in folders):
            if not own.is_file() or (shipped.is_file() and own.samefile(shipped)):
                continue
            if _has_late_package(own.read_text("utf-8")):
                raise UserError(
                    f"{chosen}: {own} has # @package below another line, where Hydra does not "
                    "read it; make it the first line"
                )
            if shipped.is_file() and own.read_bytes() != shipped.read_bytes():
                raise UserError(
                    f"{chosen}: {own} has the name of a shipped file, which is read in its place; "
                    "give yours another name, or run from a folder without it"
                )


def _has_late_package(text: str) -> bool:
    """Whether a file names its package after the header, which ends at any other line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    header = [bool(re.match(r"#\s*@", line)) for line in lines]
    end = header.index(False) if False in header else len(lines)
    return any(re.match(r"#\s*@package\b", line) for line in lines[end:])
