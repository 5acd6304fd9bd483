"""``run.log``: all that was said during a run, in its own folder."""

import logging
import sys
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from bayesdiff.cli import mendable

NAME = "run.log"
_FORMAT = logging.Formatter(
    "%(asctime)s %(levelname)s [%(process)d] %(message)s", "%Y-%m-%d %H:%M:%S"
)


class StandardError(logging.StreamHandler[Any]):
    """Writes to what is standard error at that moment: lines stand above a bar, not in it."""

    def __init__(self, stream: Any = None) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard error, which bars replace while they are shown."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


class _Record(logging.Handler):
    """Keeps lines until the run folder is known, then writes there what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_FORMAT)
        self.lines: list[str] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.flush()

    def flush(self) -> None:
        # Opened for every line: nothing is left open between cells, and a line is whole where
        # several processes append.
        if self.path is None or not self.lines:
            return
        text = "".join(f"{line}\n" for line in self.lines)
        try:
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(text)
        except OSError:  # what is wrong with the disk is told by the results, not by the log
            return
        self.lines.clear()


_now: _Record | None = None


@contextmanager
def recording(*first: str) -> Generator[None, None, None]:
    """Keep what is logged and warned from here on, the line of a failure included.

    One record serves a run; a second one inside it adds nothing.

    Args:
        first: words of the first line, such as the command.
    """
    global _now
    if _now is not None:
        yield
        return
    root, usual = logging.getLogger(), warnings.showwarning
    record = _now = _Record()

    def warn(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        usual(message, category, filename, lineno, *more)
        _say(record, logging.WARNING, f"{filename}:{lineno}: {category.__name__}: {message}")

    with _heard():
        root.addHandler(record)
        warnings.showwarning = warn  # type: ignore[assignment]
        try:
            _say(record, logging.INFO, " ".join(("begun:", *first)))
            yield
            _say(record, logging.INFO, "done")
        except BaseException as error:
            _say(record, logging.ERROR, _line(error))
            raise
        finally:
            root.removeHandler(record)
            if warnings.showwarning is warn:
                warnings.showwarning = usual
            _now = None


@contextmanager
def _heard() -> Generator[None, None, None]:
    """All lines reach a record, where a script or a notebook has not set up logging.

    Warnings go to standard error as they would without a record, the rest to the record alone.
    """
    root, ours = logging.getLogger(), logging.getLogger("bayesdiff")
    if root.handlers:
        yield
        return
    shown, level = StandardError(), ours.level
    shown.setLevel(logging.WARNING)
    root.addHandler(shown)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(shown)
        ours.setLevel(level)


def command() -> list[str]:
    """Overrides that Hydra was given, none where a configuration was made by hand."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return [str(word) for word in given]


def write_to(folder: Path) -> None:
    """The run folder is known: write there, beginning with what was said before."""
    if _now is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _now.path = folder / NAME
        _now.flush()


def _say(record: _Record, level: int, text: str) -> None:
    record.handle(logging.LogRecord("bayesdiff", level, "", 0, text, None, None))


def _line(error: BaseException) -> str:
    """As the command ends with it; with its place where that is needed too."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return f"ended: {error.code}"
    if (line := mendable(error)) is not None:
        return f"error: {line}"
    return "".join(traceback.format_exception(error)).rstrip()
