"""Formulas as MathML, which browsers set by themselves: a site without a script from elsewhere."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

log = logging.getLogger(__name__)


def _mathml(node: nodes.Element, block: bool) -> str:
    # The converter knows no typewriter, in which names of options are set.
    formula = re.sub(r"\\texttt\{([^{}]*)\}", _upright, node.astext())
    try:
        made: str = tex2mathml(formula, as_block=block)
    except MathError as error:
        log.warning("formula %s: %s", formula, error, location=node)
        return f"<code>{formula}</code>"
    return f'<div class="math">{made}</div>' if block else made


def _upright(match: re.Match[str]) -> str:
    return rf"\text{{{match[1].replace(chr(92), '')}}}"


def _inline(writer: Any, node: nodes.Element) -> None:
    writer.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _display(writer: Any, node: nodes.Element) -> None:
    writer.body.append(_mathml(node, block=True))
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
