"""A configuration file of a user's own that one of this repository stands in front of."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from bayesdiff.checks import UserError
from bayesdiff.options.values import CONFIGS


def check_shadows() -> None:
    """``refuse_shadows`` for the command that runs, if there is one."""
    if HydraConfig.initialized():
        refuse_shadows(HydraConfig.get().runtime)


def refuse_shadows(runtime: Any) -> None:
    """Refuse a chosen file of ``--config-dir`` that is named like a shipped one.

    Hydra looks into the shipped configurations first, and would take that without a word.

    Args:
        runtime: Hydra's record of what was chosen and where it was looked for.

    Raises:
        UserError: if the two differ.
    """
    folders = [Path(s.path) for s in runtime.config_sources if s.schema == "file"]
    for group, choice in runtime.choices.items():
        for name in [choice] if isinstance(choice, str) else choice or []:
            part = Path(group.partition("@")[0]) / f"{name}.yaml"
            shipped = CONFIGS / part
            for own in (folder / part for folder in folders):
                if not (own.is_file() and shipped.is_file()) or own.samefile(shipped):
                    continue
                if own.read_bytes() != shipped.read_bytes():
                    raise UserError(
                        f"{group}={name}: {own} has the name of a file of this repository, which "
                        "is read in its place; give yours another name"
                    )
