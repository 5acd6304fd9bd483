"""Lightning's loggers as a run has them configured: checked, made, and written to by reports."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class, instantiate
from lightning import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.report.style import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# What Lightning's own loggers need beside Lightning, as pip knows it.
_PACKAGES = {
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet-ml",
    "NeptuneLogger": "neptune",
}
_LONGEST = 128  # signs that a service takes as the name of a run


def entries(options: Any) -> dict[str, dict[str, Any]]:
    """Options of every logger by name: of one, of a list or a dictionary of several, of none.

    Raises:
        UserError: if one of them has no ``_target_``.
    """
    given: Any = options or {}
    if OmegaConf.is_config(options):
        given = OmegaConf.to_container(options, resolve=True)
    if isinstance(given, list):
        given = {str(place): each for place, each in enumerate(given)}
    elif isinstance(given, Mapping) and "_target_" in given:
        given = {"logger": given}
    elif not isinstance(given, Mapping):
        given = {"": given}
    for name, each in given.items():
        if each and not (isinstance(each, Mapping) and isinstance(each.get("_target_"), str)):
            place = f"logger.{name}".rstrip(".")
            raise UserError(
                f"{place}={each} has no _target_ that makes it; give one, such as "
                f"{place}._target_=lightning.pytorch.loggers.CSVLogger, or give null to switch it "
                "off"
            )
    return {str(name): dict(each) for name, each in given.items() if each}


def check_loggers(options: Any) -> None:
    """Refuse before any work a logger that is not there.

    Raises:
        UserError: one line with the package to install, or the name that leads nowhere.
    """
    for name, each in entries(options).items():
        package = _PACKAGES.get(each["_target_"].rpartition(".")[2])
        if package is not None and not _is_installed(package):
            raise UserError(f"logger={name} needs the package {package}: pip install {package}")
        try:
            get_class(each["_target_"])
        except Exception as error:  # whatever the import of others' code raises
            line = " ".join(str(error).split())[:200]
            raise UserError(f"logger {each['_target_']} cannot be imported: {line}") from error


def _is_installed(package: str) -> bool:
    # A folder of that name, which W&B leaves where it runs, could be imported too.
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@dataclass(frozen=True)
class Loggers:
    """The configured loggers of one training, cell or study; nothing is made before ``make``.

    Attributes:
        options: from the configuration.
        folder: its own, where loggers put their files.
        training: name of the training's folder.
        kind: ``training``, ``cell``, or the study's name.
        had: names of loggers that got this very report before, and get it no second time.
        served: names of those that have got it since.
    """

    options: Any
    folder: Path
    training: str
    kind: str
    had: frozenset[str] = frozenset()
    served: set[str] = field(default_factory=set, compare=False)

    @property
    def name(self) -> str:
        """For a reader, such as ``digits-flow-lr_0.001-1a2b3c4d/euler-ensemble-5e6f7a8b``."""
        if self.folder.name == self.training:
            return self.training
        whole = f"{self.training}/{self.folder.name}"
        return whole if len(whole) <= _LONGEST else self.folder.name

    @property
    def names(self) -> list[str]:
        """Of all that a report is handed to; TensorBoard has files of its own."""
        return [_name(options) for options in self._handed()]

    @property
    def new(self) -> list[dict[str, Any]]:
        """Options of those that lack this report."""
        return [each for each in self._handed() if _name(each) not in self.had | self.served]

    def _handed(self) -> list[dict[str, Any]]:
        given = entries(self.options).values()
        boards = TensorBoardLogger
        return [each for each in given if not issubclass(get_class(each["_target_"]), boards)]

    def make(self, options: Mapping[str, Any]) -> Logger:
        """One logger; place and names are filled in where it takes them and they are not given."""
        known = {
            "save_dir": str(self.folder), "name": self.name, "run_name": self.name,
            "group": self.training, "job_type": self.kind, "keep": self.kind == "training",
        }  # fmt: skip
        takes = {*inspect.signature(get_class(options["_target_"])).parameters, *options}
        more = {k: v for k, v in known.items() if k in takes and options.get(k) is None}
        made: Logger = instantiate({**options, **more}, _convert_="all")
        return made

    def begin(self, hyperparameters: Mapping[str, Any]) -> list[Logger]:
        """Every logger with its hyperparameters; TensorBoard's rows are those of the cells."""
        made = [self.make(options) for options in entries(self.options).values()]
        for logger in made:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(dict(hyperparameters))
        return made

    def places(self, logdir: str) -> list[str]:
        """Where a reader finds the curves of a cell and its training, as far as they are there."""
        found = (self._place(options, logdir) for options in entries(self.options).values())
        return [place for place in found if place]

    def _place(self, options: Mapping[str, Any], logdir: str) -> str:
        """One line; empty for a logger that got nothing, such as one added to a finished cell."""
        kind = options["_target_"].rpartition(".")[2]
        if kind == "TensorBoardLogger":
            return f"tensorboard --logdir {logdir}"
        if kind == "CSVLogger" and options.get("name"):
            end = "/".join(str(options[key]) for key in ("name", "version") if options.get(key))
            return " and ".join(self._there(f"{end}/metrics.csv"))
        if kind == "WandbLogger" and options.get("offline"):
            places = " ".join(self._there("wandb/offline-run-*"))
            return f"wandb sync {places}" if places else ""
        if _name(options) not in self.had | self.served:
            return ""
        project = _project(options)
        return f"{kind}, project {project}" if project else kind

    def _there(self, end: str) -> list[str]:
        """Patterns of files of the training, and of its cells where this one has such a file."""
        training = self.folder.parent
        places = {training: end, self.folder: f"*/{end}"}
        return [f"{training}/{name}" for place, name in places.items() if any(place.glob(end))]


def _project(options: Mapping[str, Any]) -> str:
    return str(options.get("project") or options.get("experiment_name") or "")


def _name(options: Mapping[str, Any]) -> str:
    """What tells a logger from others: its class, and the project that it writes to."""
    return f"{options['_target_']} {_project(options)}".strip()


def close(loggers: Iterable[Logger]) -> None:
    """End what they opened: the next cell in this process is a run of its own."""
    for logger in loggers:
        run = getattr(logger, "_experiment", None)
        end = getattr(run, "finish", None) or getattr(run, "end", None)
        if callable(end):
            try:
                end()
            except Exception as error:  # of others' code, over a network
                _complain(type(logger).__name__, error)


class Sinks:
    """What a report writes to every logger but TensorBoard, which has files of its own.

    The report is on the disk whatever becomes of these: one that fails is named, ended, and left
    out.
    """

    def __init__(self, loggers: Loggers | None) -> None:
        self.given = loggers
        self.open: list[tuple[str, Logger]] = []
        self.pictures: dict[str, str] = {}
        if loggers is not None:
            self._open(loggers)

    def _open(self, loggers: Loggers) -> None:
        for options in loggers.new:
            try:
                loggers.folder.mkdir(parents=True, exist_ok=True)
                self.open.append((_name(options), loggers.make(options)))
            except Exception as error:  # of others' code, over a network
                _complain(_name(options), error)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Scalars of one step."""
        given = {name: float(value) for name, value in values.items()}
        self._each(lambda logger: logger.log_metrics(given, step=step))

    def histogram(self, name: str, values: Tensor) -> None:
        """Where a logger has histograms."""
        self._each(lambda logger: _histogram(logger, name, values))

    def picture(self, tag: str, path: Path) -> None:
        """Where a logger takes images; its file is named among the hyperparameters elsewhere."""
        self.pictures[f"figures/{tag}"] = str(path)
        self._each(lambda logger: log_picture(logger, tag, path))

    def close(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write the hyperparameters, and where figures are that a logger does not take; end."""

        def end(logger: Logger) -> None:
            shown = hasattr(logger, "log_image")
            logger.log_hyperparams({**hyperparameters, **({} if shown else self.pictures)})
            logger.finalize("success")

        self._each(end)
        if self.given is not None:
            self.given.served.update(name for name, _ in self.open)
        self.give_up()

    def give_up(self) -> None:
        """End whatever is open, as after a report that failed."""
        close(logger for _, logger in self.open)
        self.open.clear()

    def _each(self, write: Callable[[Logger], Any]) -> None:
        for each in list(self.open):
            try:
                write(each[1])
            except Exception as error:  # of others' code, over a network
                _complain(type(each[1]).__name__, error)
                self.open.remove(each)
                close([each[1]])


def log_picture(logger: Logger, tag: str, path: Path, step: int | None = None) -> None:
    """Hand a saved figure to a logger that takes images."""
    if callable(log_image := getattr(logger, "log_image", None)):
        log_image(key=tag, images=[str(path)], step=step)


def log_figure(trainer: Trainer, tag: str, figure: "Figure") -> None:
    """Save a figure of a training, in the place of an earlier one, and show it everywhere.

    Args:
        trainer: of the training.
        tag: such as ``uncertainty/validation``; its last part names the file.
        figure: for ``figures`` in the trainer's folder.
    """
    path = Path(trainer.default_root_dir) / "figures" / f"{tag.split('/')[-1]}.png"
    save(figure, path, pdf=False)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
        else:
            log_picture(logger, tag, path, trainer.global_step)


def _histogram(logger: Logger, name: str, values: Tensor) -> None:
    if type(logger).__name__ == "WandbLogger":
        import wandb

        logger.log_metrics({name: wandb.Histogram(values.tolist())}, step=0)  # type: ignore[dict-item]
    elif callable(add := getattr(getattr(logger, "experiment", None), "add_histogram", None)):
        add(name, values, 0)


def _complain(what: str, error: Exception) -> None:
    line = " ".join(str(error).split())[:200]
    log.warning("%s failed (%s: %s); our own files are whole", what, type(error).__name__, line)
