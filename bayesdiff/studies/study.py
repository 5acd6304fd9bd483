"""What all studies share: asked for in the configuration, made once, results.json last.

Hydra's ``_target_`` is the registry: a new study is a subclass of ``Study`` and a YAML that names
it, and nothing else knows its name.
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import require_pixels
from bayesdiff.machine.ranks import barrier
from bayesdiff.metrics.classifier import check_classifiable
from bayesdiff.options.config_folders import shipped_configs
from bayesdiff.report import board
from bayesdiff.report.layout import conditions_of
from bayesdiff.report.loggers import Loggers
from bayesdiff.report.options import options_of
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.defaults import is_aside, named
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import finite, key_of, read_json, write_json, write_text
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Estimator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# How a study's work is cut up.
_CUT = ("batch_size", "max_memory")
# Without scores of the user's own a study is what it was before there were any.
_NO_OWN: tuple[str, dict[str, Any]] = ("own_scores", {})


@dataclass(frozen=True)
class Report:
    """What a study leaves in its folder.

    Attributes:
        results: everything, for results.json.
        figures: tags and figures, made when asked for.
        tables: Markdown by the names of their files.
        scalars: for TensorBoard and other loggers; the study's name is put before theirs.
        headlines: the few numbers that go into the cell's metrics, with their conditions in their
            names: ``gain@0.8`` becomes ``filtering/gain@0.8``.
        curves: points (prior_precision, value) by name, None for a missing value.

    Example:
        >>> report = Report({"sums": [1.5, 4.0]}, headlines={"max@2": 4.0})
        >>> report.headlines  # in metrics.json as loudest/max@2, of a study that is called loudest
        {'max@2': 4.0}
    """

    results: Mapping[str, Any]
    figures: Iterable[tuple[str, "Figure"]] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    headlines: Mapping[str, float | None] = field(default_factory=dict)
    curves: Mapping[str, Iterable[tuple[float, float | None]]] = field(default_factory=dict)


class Study(ABC):
    """A study with its options, as its ``_target_`` makes it.

    Example:
        >>> class Loudest(Study):
        ...     def make(self, at, place):
        ...         variance = torch.ones(8, 1, 4, 4)
        ...         sums = variance.flatten(1).sum(1)
        ...         return Report({"sums": sums.tolist()}, headlines={"max@8": float(sums.max())})
        >>> Loudest().make(None, None).headlines
        {'max@8': 16.0}
    """

    @property
    def map_count(self) -> int:
        """Maps that the run's own estimator makes for it."""
        return 0

    @property
    def settled(self) -> dict[str, Any]:
        """Options that a file gave, for the configuration to hold in its place."""
        return {}

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:  # noqa: B027
        """Refuse, before any work, what could not be made; the options themselves are fine."""

    def check_data(self, data: ImageData, name: str) -> None:
        """Refuse states that are no pixels; a study that works on others says so here."""
        require_pixels(data, name, f"leave {name} out")

    def made_from(self, at: Setup) -> list[Any]:
        """All that it is made from beside its options, for its key."""
        return [at.made_from]

    @abstractmethod
    def make(self, at: Setup, place: "Place") -> Report | None:
        """Do the work; every process calls it.

        Args:
            at: what it works with.
            place: its folder and its key, for files that an interrupted study goes on from.

        Returns:
            What to write, None but on the first process.
        """


@dataclass(frozen=True)
class Place:
    """One study's folder.

    Attributes:
        name: of its options in the configuration.
        folder: named by the key.
        key: of all that it comes from.
    """

    name: str
    folder: Path
    key: str

    @classmethod
    def of(cls, at: Setup, name: str, study: Study) -> "Place":
        """The study of this name, for its options and all that it is made from."""
        key = study_key(at, name, study)
        return cls(name, named(at.run.folder, name, f"-{at.solver.name}", key), key)

    @property
    def is_made(self) -> bool:
        """Whether its results are there."""
        return (read_json(self.folder / "results.json") or {}).get("key") == self.key

    def write(self, report: Report, at: Setup) -> None:
        """Write everything; results.json comes last: its presence says that all else is there."""
        for file, text in report.tables.items():
            write_text(self.folder / file, text)
        cfg, mine = at.run.cfg, f"{self.name}/"
        board.write_study(
            self.folder / "tensorboard",
            {mine + name: value for name, value in report.scalars.items()},
            {mine + name: points for name, points in report.curves.items()},
            report.figures,
            Loggers(cfg.get("logger"), self.folder, self.folder.parent.name, self.name),
            {**at.settings, self.name: plain(cfg[self.name])},
            pdf=options_of(cfg).pdf,
        )
        headlines = {mine + name: value for name, value in report.headlines.items()}
        record = {"key": self.key, "headlines": headlines, **report.results}
        write_json(self.folder / "results.json", finite(record))


def studies_of(cfg: DictConfig) -> dict[str, Study]:
    """The studies that are asked for, by name; the configuration then holds what files gave.

    Raises:
        UserError: for anything else in the place of one.
    """
    found: dict[str, Study] = {}
    for name, options in cfg.items():
        if makes_a_study(options):
            study = found[str(name)] = instantiate(options, _convert_="all")
            with read_write(cfg), open_dict(cfg):
                options.update(study.settled)
        elif options is not None and name in open_places():
            raise UserError(f"{name}={options} is no study; ask for one by experiment=...")
    return found


def check_studies(run: Run, solver: Solver, estimator: Estimator) -> None:
    """Refuse, before any work, what the run's studies could not make."""
    for name, study in run.studies.items():
        study.check_data(run.data.data, name)
        study.check(run, solver, estimator)


def makes_a_study(options: Any) -> bool:
    """Whether a part of the configuration is a study with its options."""
    target = options.get("_target_") if isinstance(options, DictConfig) else None
    if not isinstance(target, str):
        return False
    try:
        kind = get_object(target)
    except Exception:  # instantiate says what is wrong with it
        return True
    return inspect.isclass(kind) and issubclass(kind, Study)


@cache
def open_places() -> frozenset[str]:
    """Names that the shipped configuration leaves to studies."""
    shipped: Any = OmegaConf.load(shipped_configs() / "train.yaml")
    names = (str(name) for name, value in shipped.items() if value is None)
    return frozenset(name for name in names if not is_aside(name, shipped))


def make_study(at: Setup, name: str, study: Study) -> Path:
    """The study's folder; what is missing in it is made."""
    place = Place.of(at, name, study)
    made = place.is_made
    barrier()  # nobody writes before everybody has looked
    if not made:
        report = study.make(at, place)
        if report is not None:
            place.write(report, at)
        barrier()
    log.info("%s: %s %s", name, "made before, in" if made else "in", place.folder)
    return place.folder


def study_key(at: Setup, name: str, study: Study) -> str:
    """Key of all that a study comes from."""
    options = _uncut(plain(at.run.cfg[name]))
    return key_of(*study.made_from(at), options, code_of(options))


def study_keys(at: Setup) -> list[str]:
    """Keys of all studies that are asked for."""
    return [study_key(at, name, study) for name, study in at.run.studies.items()]


def _uncut(options: Any) -> Any:
    """Options without those that say how the work is cut up, in any nesting."""
    if isinstance(options, Mapping):
        return {k: _uncut(v) for k, v in options.items() if k not in _CUT and (k, v) != _NO_OWN}
    return [_uncut(each) for each in options] if isinstance(options, list) else options


def check_judge(run: Run, name: str) -> None:
    """Refuse a study that could not be judged by a classifier of the training data.

    Raises:
        UserError: without labels, under another extractor, or if the training data is corrupted.
    """
    if run.cfg.metrics.features != "classifier":
        raise UserError(f"{name} reads classifiers of the data; use metrics=classifier")
    check_classifiable(run.data.data, f"{name} is judged by it: give data with labels")
    if "corruption" in run.cfg.data.source:
        raise UserError(
            f"{name} is judged by a classifier of the training data, which corruption= damages; "
            "leave the corruption out, or see experiments/known-corruption for a clean judge"
        )


def check_unconditional(run: Run, about: str) -> None:
    """Refuse a model that has another distribution for each condition.

    Args:
        run: with its model.
        about: what there must be one of, such as "coverage is of one distribution".

    Raises:
        UserError: for a conditional model.
    """
    if run.model.condition is not None:
        raise UserError(
            f"{about}, and this model has one for each condition; use model.num_classes=null"
        )


def conditions(settings: Mapping[str, Any]) -> str:
    """What figures are made from, a sentence for their captions, by the run's settings.

    Args:
        settings: those that count; without ``uncertainty.name`` no estimator is named.
    """
    name = settings.get("uncertainty.name")
    more = "" if name is None else f", estimator\u00a0{name}"
    return f"Conditions: {conditions_of(settings)}{more}."


def without(settings: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """Settings whose names begin with none of these."""
    return {name: value for name, value in settings.items() if not name.startswith(prefixes)}


def headlines_of(folders: Iterable[Path]) -> dict[str, float]:
    """Headline numbers of studies that are made, those without a value left out."""
    records = [read_json(folder / "results.json") or {} for folder in folders]
    numbers = [record.get("headlines", {}) for record in records]
    return {k: float(v) for each in numbers for k, v in each.items() if v is not None}
