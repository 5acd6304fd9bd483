"""Lightning's loggers as a run has them configured: checked, made, and written to by reports."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.checks import UserError

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
    """

    options: Any
    folder: Path
    training: str
    kind: str

    @property
    def name(self) -> str:
        """For a reader, such as ``digits-flow-lr_0.001-1a2b3c4d/euler-ensemble-5e6f7a8b``."""
        if self.folder.name == self.training:
            return self.training
        whole = f"{self.training}/{self.folder.name}"
        return whole if len(whole) <= _LONGEST else self.folder.name

    def make(self, without: type[Logger] | None = None) -> list[Logger]:
        """Every logger but those of one class.

        Place and names are filled in where the logger takes them and they are not given.
        """
        known = {
            "save_dir": str(self.folder), "name": self.name, "run_name": self.name,
            "group": self.training, "job_type": self.kind,
        }  # fmt: skip
        made = []
        for options in entries(self.options).values():
            kind = get_class(options["_target_"])
            if without is not None and issubclass(kind, without):
                continue
            takes = {*inspect.signature(kind).parameters, *options}
            more = {k: v for k, v in known.items() if k in takes and options.get(k) is None}
            made.append(instantiate(options | more, _convert_="all"))
        return made

    def begin(self, hyperparameters: Mapping[str, Any]) -> list[Logger]:
        """Every logger with its hyperparameters; TensorBoard's rows are those of the cells."""
        made = self.make()
        for logger in made:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(dict(hyperparameters))
        return made

    def places(self, logdir: str) -> list[str]:
        """Where a reader finds the curves of a cell and its training, a line for each logger."""
        training = self.folder.parent
        return [_place(options, training, logdir) for options in entries(self.options).values()]


def _place(options: Mapping[str, Any], training: Path, logdir: str) -> str:
    kind = options["_target_"].rpartition(".")[2]
    if kind == "TensorBoardLogger":
        return f"tensorboard --logdir {logdir}"
    if kind == "CSVLogger" and options.get("name"):
        end = "/".join(str(options[key]) for key in ("name", "version") if options.get(key))
        return f"{training}/{end}/metrics.csv and {training}/*/{end}/metrics.csv"
    if kind == "WandbLogger" and options.get("offline"):
        return f"wandb sync {training}/wandb/offline-run-* {training}/*/wandb/offline-run-*"
    project = options.get("project") or options.get("experiment_name")
    return f"{kind}, project {project}" if project else kind


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

    The report is on the disk whatever becomes of these: one that fails is named, and left out.
    """

    def __init__(self, loggers: Loggers | None) -> None:
        self.loggers: list[Logger] = []
        self.pictures: dict[str, str] = {}
        if loggers is not None:
            try:
                loggers.folder.mkdir(parents=True, exist_ok=True)
                self.loggers = loggers.make(without=TensorBoardLogger)
            except Exception as error:  # of others' code, over a network
                _complain("the loggers", error)

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
            close([logger])

        self._each(end)

    def _each(self, write: Callable[[Logger], Any]) -> None:
        for logger in list(self.loggers):
            try:
                write(logger)
            except Exception as error:  # of others' code, over a network
                self.loggers.remove(logger)
                _complain(type(logger).__name__, error)


def log_picture(logger: Logger, tag: str, path: Path, step: int | None = None) -> None:
    """Hand a saved figure to a logger that takes images."""
    if callable(log_image := getattr(logger, "log_image", None)):
        log_image(key=tag, images=[str(path)], step=step)


def _histogram(logger: Logger, name: str, values: Tensor) -> None:
    if type(logger).__name__ == "WandbLogger":
        import wandb

        logger.log_metrics({name: wandb.Histogram(values.tolist())}, step=0)  # type: ignore[dict-item]
    elif callable(add := getattr(getattr(logger, "experiment", None), "add_histogram", None)):
        add(name, values, 0)


def _complain(what: str, error: Exception) -> None:
    line = " ".join(str(error).split())[:200]
    log.warning("%s failed (%s: %s); our own files are whole", what, type(error).__name__, line)
