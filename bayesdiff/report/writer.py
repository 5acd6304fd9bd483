"""The place of one report: event files of TensorBoard, and all other loggers at once."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdiff.report import figures
from bayesdiff.report.loggers import Loggers, Sinks
from bayesdiff.report.style import clear

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

Scalar = float | int | str
Curves = Mapping[str, Sequence[tuple[int, float]]]  # steps and values by name
SUFFIX = ".report"


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Scalars for the HPARAMS tab: dotted keys; flags, lists and None as text."""
    row: dict[str, Scalar] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            row.update(flat(value, f"{name}."))
        elif isinstance(value, bool) or value is None:
            # TensorBoard would show a flag as 1.0 and leave None out.
            row[name] = {True: "true", False: "false", None: "null"}[value]
        else:
            row[name] = value if isinstance(value, (int, float, str)) else str(value)
    return row


def new_report(folder: Path) -> "SummaryWriter":
    """A writer in place of an earlier report's: two of one run would draw every value twice."""
    from torch.utils.tensorboard import SummaryWriter

    for earlier in folder.glob(f"*{SUFFIX}"):
        earlier.unlink(missing_ok=True)
    return SummaryWriter(str(folder), filename_suffix=SUFFIX)


@contextmanager
def report(
    folder: Path,
    pictures: Path,
    hparams: Mapping[str, Scalar],
    loggers: Loggers | None,
    pdf: bool,
) -> Generator["Board"]:
    """A report in place of an earlier one; what other loggers opened is closed, come what may.

    Args:
        folder: of TensorBoard.
        pictures: folder of the figures.
        hparams: settings, flat.
        loggers: beside it.
        pdf: whether each figure is there as PDF as well.

    Yields:
        What to write to.
    """
    sinks = Sinks(loggers)
    try:
        clear(pictures)
        with new_report(folder) as writer:
            yield Board(writer, sinks, hparams, pictures, pdf)
        sinks.close(hparams)
    finally:
        sinks.give_up()


@dataclass(frozen=True)
class Board:
    """TensorBoard and all other loggers at once."""

    writer: "SummaryWriter"
    sinks: Sinks
    row: Mapping[str, Scalar]
    pictures: Path
    pdf: bool

    def scalars(self, metrics: Mapping[str, float]) -> None:
        """Values that have no step."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, float(value), 0)
        if metrics:
            self.sinks.metrics(metrics)

    def curves(self, curves: Curves) -> None:
        """Curves, with one call of each logger for all that has the same step."""
        steps: dict[int, dict[str, float]] = {}
        for name, points in curves.items():
            for step, value in points:
                self.writer.add_scalar(name, value, step)
                steps.setdefault(step, {})[name] = value
        for step in sorted(steps):
            self.sinks.metrics(steps[step], step)

    def histogram(self, name: str, values: Tensor) -> None:
        """Of those that are finite, where there are any."""
        finite = values[values.isfinite()]
        if len(finite):
            self.writer.add_histogram(name, finite, 0)
            self.sinks.histogram(name, finite)

    def picture(self, tag: str, figure: "Figure") -> Path:
        """Save ``figure`` and show the same pixels everywhere, so that it is drawn only once."""
        from matplotlib.image import imread

        path = figures.save(figure, self.pictures / f"{tag.split('/')[-1]}.png", pdf=self.pdf)
        pixels = torch.from_numpy(imread(path)[..., :3].copy())
        self.writer.add_image(tag, pixels, 0, dataformats="HWC")
        self.sinks.picture(tag, path)
        return path

    def hparams_row(self, metrics: Mapping[str, float]) -> None:
        """Hyperparameters in this event file; ``add_hparams`` would make a run of its own.

        The list of columns that goes with them is left out: TensorBoard shows the columns of the
        first list it meets, and every run that has other options or metrics would lose its own.
        Without lists it collects the columns of all runs.
        """
        from torch.utils.tensorboard.summary import hparams

        values = {name: float(value) for name, value in metrics.items()}
        _columns, start, end = hparams(dict(self.row), values)
        for summary in (start, end):
            self.writer._get_file_writer().add_summary(summary)
