"""Links as the repository has them, led to the pages of the site.

A page links to files, so that it works where the repository is read: a study's README.md, a
tutorial's script, the first README.md. On the site these are pages of their own.
"""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

RULES = [
    (r"\]\((?:\.\./)+experiments/([\w-]+)/?(?:README\.md)?(#[^)]*)?\)", r"](/studies/\1.md\2)"),
    (r"\]\((?:\.\./)*tutorials/(\d\d_\w+)\.py\)", r"](/gallery/\1.rst)"),
    (r"\]\((?:\.\./)*tutorials/?(?:GALLERY_HEADER\.rst)?\)", r"](/gallery/index.rst)"),
    (r"\]\((?:\.\./)+README\.md(?:#[^)]*)?\)", r"](/index.md)"),
    # The name of a study in running text.
    (r"(?<!\[)`experiments/([\w-]+)/?`(?!\])", r"[`experiments/\1`](/studies/\1.md)"),
]
_CARD = r"^:::\{grid-item-card\}.*\n:link: (\S+)\n(?:(?!:::).*\n)*:::\n+"
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_the_site(text: str) -> str:
    """A page's text with its links led to pages of the site, code blocks as they are."""
    done, start = [], 0
    for fenced in _FENCED.finditer(text):
        done += [_linked(text[start : fenced.start()]), fenced.group()]
        start = fenced.end()
    return "".join([*done, _linked(text[start:])])


def _linked(text: str) -> str:
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


def with_pages(text: str, pages: Iterable[str]) -> str:
    """The text of a page without cards and lines of its contents that lead to no page.

    Contents name every page in its order, as ``concepts/cost*``, and end with ``concepts/*``: a
    line that stands for no further page would be a warning.
    """
    known = set(pages)
    left = set(known)

    def line(match: re.Match[str]) -> str:
        here = set(fnmatch.filter(left, match[1]))
        left.difference_update(here)
        return match[0] if here else ""

    def card(match: re.Match[str]) -> str:
        return match[0] if match[1] in known else ""

    text = re.sub(_CARD, card, text, flags=re.MULTILINE)
    return re.sub(r"^([\w/-]+\*)\n", line, text, flags=re.MULTILINE)


def _read(app: Any, docname: str, source: list[str]) -> None:
    if str(app.env.doc2path(docname)).endswith(".md"):
        source[0] = on_the_site(source[0])
    if docname == app.config.root_doc:
        source[0] = with_pages(source[0], app.env.found_docs)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
