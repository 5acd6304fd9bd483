"""What was probably meant: names close to one that nothing has."""

import difflib
from collections.abc import Iterable


def near(name: str, names: Iterable[str], most: int = 3) -> str:
    """``"; did you mean a or b?"`` with those of ``names`` close to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(names), most, 0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
