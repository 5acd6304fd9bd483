"""Where configuration files are: those that are shipped, and a user's own."""

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def shipped_configs() -> Path:
    """The folder of the shipped configuration files: in the installed package, or beside it.

    A checkout has them once, beside the package; installing copies them into it.
    """
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def own_configs() -> Path | None:
    """The user's ``configs`` in the current directory; None for none, or the shipped one."""
    here = Path("configs")
    if not here.is_dir() or here.samefile(shipped_configs()):
        return None
    return here.resolve()
