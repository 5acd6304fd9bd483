"""Writes the pages that are made from the repository: configuration, interface, studies."""

from pathlib import Path
from typing import Any

from _ext import configuration, interface, studies

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Everything in these folders is made; git ignores them.
MADE = {
    "reference/configuration": configuration.pages,
    "reference/api": interface.pages,
    "studies": studies.pages,
}


def write(docs: Path = DOCS) -> None:
    """Write every page that changed, and remove those that are no longer made."""
    for name, pages in MADE.items():
        folder = docs / name
        wanted = {folder / page: text for page, text in pages(ROOT).items()}
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
        for path in folder.rglob("*.*"):
            if path not in wanted:
                path.unlink()


def _write(app: Any) -> None:
    write(Path(app.srcdir))


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
