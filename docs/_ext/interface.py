"""Reference of the packages."""

from pathlib import Path


def pages(root: Path) -> dict[str, str]:
    """Texts of all pages by their names."""
    return {"index.md": "# Python interface\n"}
