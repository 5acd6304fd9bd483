"""Progress with time left, for everything longer than a few seconds.

On a terminal a bar; elsewhere lines of the log, at least every half a minute, also from within a
single long batch. Whatever takes long is inside a ``stage``, and loops in it go through ``track``.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from bayesdiff.machine.ranks import rank

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)
Item = TypeVar("Item")

# Seconds: between lines; until a first estimate; and of what is worth an estimate.
EVERY, FIRST, LONG = 20.0, 3.0, 10.0
_WAKE = 0.5


def duration(seconds: float) -> str:
    """A time that nobody takes for exact."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 6000)):
        rough = float(f"{seconds / size:.2g}")  # 99.6 s are 1.7 min, and not 1e+02 s
        if rough * size < limit:
            return f"{rough:g} {unit}"
    return f"{float(f'{seconds / 3600:.2g}'):.12g} h"


def per_image(evaluations: float | None) -> str:
    """What each image costs, for the end of a line; nothing where nobody knows."""
    return "" if not evaluations else f", {evaluations:.4g} network evaluations each"


@dataclass(eq=False)
class Meter:
    """How far one piece of work is.

    Attributes:
        what: its name.
        total: units of it, 0 where nobody knows.
        unit: what these are.
        each: network evaluations per unit, None until the first units are done.
        done: units, within the present one estimated from the network's evaluations.
        start: units that were done before.
        note: what else a line says, such as a loss.
        bar: whether it has one on a terminal.
        quiet: whether something else shows how far it is.
    """

    what: str
    total: float = 0
    unit: str = ""
    each: float | None = None
    done: float = 0.0
    start: float = 0.0
    note: Callable[[], str] | None = None
    bar: bool = True
    quiet: bool = False
    began: float = field(default_factory=time.monotonic)
    size: float = 1.0  # units of the present item
    work: float = 0.0  # evaluations in it
    spent: float = 0.0  # evaluations in all items before it
    said: bool = False  # an estimate
    task: "TaskID | None" = None

    @property
    def at(self) -> float:
        """Units that are done, with the present item's share."""
        whole = self.each and self.each * self.size
        return self.done + (self.size * min(self.work / whole, 0.99) if whole else 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds to go at the rate so far, None where nobody knows."""
        at = min(self.at, self.total)
        made = at - self.start
        return self.elapsed * (self.total - at) / made if made > 0 else None

    def finish(self) -> None:
        """The present item is done."""
        self.done += self.size
        self.spent += self.work
        self.each = self.spent / self.done if self.spent else None
        self.work = 0.0

    def line(self) -> str:
        """Where it is."""
        text = self.what
        if self.total:
            text += f": {int(self.at)} of {int(self.total)} {self.unit}".rstrip()
        text += f", {self.note()}" if self.note else ""
        text += f", {duration(self.elapsed)} so far"
        return text + ("" if self.left is None else f", about {duration(self.left)} left")

    def speak(self, now: float, last: float) -> float:
        """Say an estimate once there is one, then how far it is, as often as it should be.

        Args:
            now: the time.
            last: when somebody last spoke.

        Returns:
            When somebody last spoke, this call included.
        """
        if not self.said:
            whole = None if self.left is None else self.elapsed + self.left
            if whole is not None and self.elapsed >= FIRST:
                self.said = True
                if whole >= LONG:
                    log.info("%s: about %s in all", self.what, duration(whole))
                    return now
        if not self.quiet and now - last >= EVERY:
            log.info("%s", self.line())
            return now
        return last


class _Watch:
    """What is under way in this process, the innermost last, and who tells of it."""

    def __init__(self) -> None:
        self.open: list[Meter] = []
        self.bars: Progress | None = None
        self.terminal = False
        self.last = 0.0
        self.stop = threading.Event()
        self.evaluations = 0

    def push(self, meter: Meter) -> None:
        """Begin a piece of work."""
        if not self.open:
            self.terminal, self.last = sys.stderr.isatty(), meter.began
        if self.terminal and meter.total and meter.bar:
            self.bars = self.bars or _bars()
            if self.bars is not None:
                meter.task, meter.quiet = self.bars.add_task(meter.what, total=meter.total), True
        self.open.append(meter)
        if len(self.open) == 1:
            self.stop = threading.Event()
            threading.Thread(
                target=self._tell, args=(self.stop,), daemon=True, name="progress"
            ).start()

    def pop(self, meter: Meter) -> None:
        """End it, and whatever an error left open inside it."""
        while meter in self.open:
            last = self.open.pop()
            if self.bars is not None and last.task is not None:
                self.bars.remove_task(last.task)
        if self.bars is not None and not any(m.task is not None for m in self.open):
            self.bars.stop()
            self.bars = None
        if not self.open:
            self.stop.set()

    def refresh(self, meter: Meter) -> None:
        """Move the bar."""
        if self.bars is not None and meter.task is not None:
            self.bars.update(meter.task, completed=meter.at)

    def _tell(self, stop: threading.Event) -> None:
        while not stop.wait(_WAKE):
            for meter in self.open[-1:]:  # it may end meanwhile
                self.last = meter.speak(time.monotonic(), self.last)


_watch = _Watch()


@contextmanager
def stage(what: str, detail: str = "", **options: Any) -> Generator[Meter, None, None]:
    """A piece of work that may take long; with a ``detail``, a line at once says what it will do.

    Args:
        what: its name.
        detail: of the line.
        options: of the meter, such as total and unit, for work that counts itself.

    Yields:
        The meter.
    """
    meter = Meter(what, **options)
    if rank():
        yield meter
        return
    if detail:
        log.info("%s: %s", what, detail)
        _watch.last = meter.began
    _watch.push(meter)
    try:
        yield meter
    finally:
        _watch.pop(meter)


def track(
    items: Sequence[Item],
    what: str,
    unit: str = "",
    size: Callable[[Item], float] | None = None,
    each: float | None = None,
) -> Iterator[Item]:
    """The items, counted; one voice for many processes.

    Args:
        items: known beforehand.
        what: the work's name.
        unit: what is counted.
        size: units in an item, by default one.
        each: network evaluations that a unit is expected to take: an estimate before the first
            item is done.

    Yields:
        Each item.
    """
    sizes = [1.0 if size is None else size(item) for item in items]
    with stage(what, total=sum(sizes), unit=unit, each=each) as meter:
        for item, meter.size in zip(items, sizes, strict=True):
            yield item
            meter.finish()
            _watch.refresh(meter)


def evaluated(inputs: int) -> None:
    """The network was evaluated at this many images: part of the present item is done."""
    _watch.evaluations += inputs
    if _watch.open:
        meter = _watch.open[-1]
        meter.work += inputs
        _watch.refresh(meter)


def evaluations() -> int:
    """Images that this process has evaluated the network at so far."""
    return _watch.evaluations


def _bars() -> "Progress | None":
    """Bars with their time left on standard error, None where another one has the screen."""
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        bars.start()
    except LiveError:
        return None
    return bars
