"""What the entry points share: an error the user can mend is one line, not a traceback."""

import os
import re
import select
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayesdiff.checks import UserError
from bayesdiff.storage.atomic import disk_error

# Hydra raises a plain ValueError for model=3.
_NUMBER_FOR_NAME = "Config group override must be a string"
# What gloo and NCCL say of a process that is gone or stands still.
_LOST = re.compile(
    "closed by peer|reset by peer|refused by peer|broken pipe|timed out waiting|socket timeout"
    "|pair closure|watchdog caught|ncclremoteerror|failed to connect",
    re.IGNORECASE,
)
_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"
# Before torch is loaded, since OpenMP reads it once: threads that wait for each other sleep. By
# default they spin, and where another process takes a core, they spin in the way of the one that
# they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def one_line_errors() -> Generator[None, None, None]:
    """Turn user errors and Hydra's own complaints into one line on stderr and exit status 1.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead, as everywhere in Hydra.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if _FULL_ERROR:
        with closed_pipe():
            yield
        return
    # Around Hydra: it then hands errors on instead of printing them. Inside its task the switch
    # is off again, or the processes that a task starts would take it for the user's wish.
    outer = os.environ.pop("HYDRA_FULL_ERROR", None)
    if outer in (None, "0"):
        os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with closed_pipe():
            yield
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error)}")
    except Exception as error:
        line = known(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues from the last checkpoint")
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if outer is not None:
            os.environ["HYDRA_FULL_ERROR"] = outer


class _Output:
    """Standard output that remembers which error its reader's leaving made."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: BrokenPipeError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream does."""
        with self._noted():
            written: int = self._stream.write(text)
            return written

    def writelines(self, lines: Iterable[str]) -> None:
        """As the stream does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As the stream does."""
        with self._noted():
            self._stream.flush()

    @contextmanager
    def _noted(self) -> Generator[None, None, None]:
        try:
            yield
        except BrokenPipeError as error:
            self.error = error
            raise


@contextmanager
def closed_pipe() -> Generator[None, None, None]:
    """End quietly where whoever read standard output has left, as in ``--help | head``.

    Raises:
        BrokenPipeError: if it is another pipe that broke.
    """
    stream = sys.stdout
    output: Any = stream if isinstance(stream, _Output) else _Output(stream)
    sys.stdout = output
    try:
        yield
    except BrokenPipeError as error:
        if error is not output.error:
            raise
        mute()
        sys.exit(0)
    finally:
        sys.stdout = stream
    if _nobody_reads():
        mute()


def mute() -> None:
    """Send standard output nowhere from here on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that has no other end any more."""
    try:
        sys.stdout.flush()
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
    except BrokenPipeError:
        return True
    except (AttributeError, OSError, ValueError):  # closed, captured, or not this system's
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))


def known(error: BaseException) -> str | None:
    """One line for what a user can mend or only try again; None where the place is needed too."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if reason := disk_error(error):
        place = getattr(error, "filename", None)
        return f"cannot write to {place or 'a file of this run'}: {reason}"
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return (
            "another process of this run ended, or kept this one waiting for process_timeout= "
            "seconds; the same command continues"
        )
    if isinstance(error, TypeError) and _in_hydra(error):  # it trips over model=[1,2], _partial_=3
        return f"a value on the command line cannot be read ({_line(error)}); correct its form"
    if type(error).__module__.startswith("yaml."):  # a file of Hydra's that is no YAML
        return f"a configuration file cannot be read: {_line(error)}; correct it there"
    if _NUMBER_FOR_NAME in str(error):
        cure = "choose by name, as in model=flow, or leave a group out, as in ~logger"
        return f"{_line(error)}; {cure}"
    return None


def _in_hydra(error: BaseException) -> bool:
    """Whether Hydra's own code raised it, over what it was given."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "hydra" in Path(trace.tb_frame.f_code.co_filename).parts


def explain(error: BaseException) -> str:
    """One line for an error of ours, of the disk, of Hydra or of OmegaConf."""
    from hydra.errors import (
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )

    if (line := known(error)) is not None:
        return line
    if isinstance(error, OverrideParseException) and error.override:
        return f"{error.override} cannot be read: {_line(error)}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        known_ones = ", ".join(sorted(error.options))
        cure = f"one of your own is configs/{group}/{name}.yaml here, or below --config-dir"
        return f"unknown {group} {name!r}; choose from {known_ones}; {cure}"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return _not_made(str(error), error.__cause__)
    if present := re.search(
        r"Could not append to config. An item is already at '([^']+)'", str(error)
    ):
        return f"{present.group(1)} is there already; leave out the + before it"
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", str(error))
    if unknown:
        name = unknown.group(1) or unknown.group(2)
        return f"unknown option {name!r}{_cure(name)}"
    return _line(error)


def _not_made(text: str, cause: BaseException) -> str:
    """What Hydra could not make, why, and what its target takes."""
    from bayesdiff.options.spelling import near
    from bayesdiff.options.targets import arguments, import_fault

    key = re.search(r"full_key: (\S+)", text)
    place = key.group(1) if key else "a value"
    if (lost := re.search(r"Error loading '([^']+)'", f"{text} {cause}")) and (
        reason := import_fault(lost.group(1))
    ):
        return f"{place}._target_={lost.group(1)} is not found: {' '.join(reason.split())}"
    line = f"{place} does not work: {_line(cause)}"
    called = re.search(r"Error in call to target '([^']+)'", text)
    known = arguments(called.group(1)) if called and isinstance(cause, TypeError) else None
    if not known or not re.search(r"unexpected keyword|missing \d+ required", line):
        return line
    other = re.search(r"unexpected keyword argument '([^']+)'", line)
    close = near(other.group(1), known) if other else ""
    return f"{line}; {called.group(1)} takes {', '.join(sorted(known))}{close}"  # type: ignore[union-attr]


def mendable(error: BaseException) -> str | None:
    """``explain``'s line where it says enough; None for a fault whose place is needed too."""
    line = explain(error)
    return line if isinstance(error, UserError) or line != str(error) else None


def _line(error: BaseException) -> str:
    """The message on one line, without what OmegaConf says for programmers."""
    text = re.sub(r"\s*object_type=\S+", "", str(error) or type(error).__name__)
    text = re.sub(r"\s*full_key: (\S+)", r" (in \1)", text)
    return " ".join(text.split())


def _cure(name: str) -> str:
    from bayesdiff.options.spelling import near
    from bayesdiff.options.trainer import SUPPLIED
    from bayesdiff.options.values import shipped_options

    group, _, last = name.rpartition(".")
    if group == "trainer" and last in SUPPLIED:
        return f", it is given by the run itself; {SUPPLIED[last]}"
    if name.startswith("callbacks.checkpoint"):
        return (
            ", last.ckpt is written in any case; for further checkpoints add "
            "+callbacks.NAME._target_=lightning.pytorch.callbacks.ModelCheckpoint"
        )
    options = shipped_options()
    choices = options.get(name)
    cure = f"; it belongs to {', '.join(choices)}" if choices else near(name, options)
    return f"{cure}; --cfg job lists every option"
