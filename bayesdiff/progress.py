"""Progress with time left, for everything longer than a few seconds."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from bayesdiff.distributed import rank

Item = TypeVar("Item")


def track(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on stderr that goes away when done; one bar for many processes."""
    if len(items) < 2 or rank():
        return items
    return _bar(items, what)


def _bar(items: Sequence[Item], what: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(
        items, what, console=console, transient=True, disable=not console.is_terminal
    )
