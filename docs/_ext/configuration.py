"""Reference of the configuration."""

from pathlib import Path


def pages(root: Path) -> dict[str, str]:
    """Texts of all pages by their names."""
    return {"index.md": "# Configuration\n"}
