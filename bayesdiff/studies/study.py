"""What all studies share: asked for in the configuration, made once, results.json last."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.data.images import check_classifiable
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.ranks import barrier
from bayesdiff.report.layout import conditions_of
from bayesdiff.report.loggers import Loggers
from bayesdiff.runs.build import Run, plain
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import finite, key_of, read_json, write_json
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.estimator import WITHOUT_EFFECT

log = logging.getLogger(__name__)

# Names of their options in the configuration, in the order they are made in.
STUDIES = ("ablation", "filtering", "repair", "interpolation", "head_chain")


def configured(run: Run, name: str) -> Any:
    """The study of this name as the configuration has it, None where it is not asked for.

    Raises:
        UserError: if it is no study.
    """
    given = run.cfg.get(name)
    if given is None:
        return None
    if not isinstance(given, DictConfig) or "_target_" not in given:
        raise UserError(f"{name}={given} is no study; ask for one by experiment=...")
    return instantiate(given, _convert_="all")


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


def with_effect(options: Any) -> dict[str, Any]:
    """Options of a configuration group, without those that change no result."""
    return {k: v for k, v in plain(options).items() if k not in WITHOUT_EFFECT}


def scored(run: Run) -> dict[str, Any]:
    """Options of ``metrics`` that change a score."""
    return {k: v for k, v in plain(run.cfg.metrics).items() if k != "export"}


def conditions(
    run: Run, solver: Solver, posterior: HeadPosterior, estimator: Estimator | None = None
) -> str:
    """What a study's figures are made from, a sentence for their captions."""
    found = {
        "data": run.data.data.name,
        "model": run.model.path.family,
        "prediction": run.model.prediction,
        "solver.name": solver.name,
        "solver.num_steps": solver.num_steps,
        "structure": posterior.structure,
        "sigma_noise": posterior.sigma_noise,
        "prior_precision": posterior.prior_precision,
    }
    more = "" if estimator is None else f", estimator\u00a0{estimator.name}"
    return f"Conditions: {conditions_of(found)}{more}."


def pdf(run: Run) -> bool:
    """Whether a figure is there as PDF as well."""
    return bool(OmegaConf.select(run.cfg, "report.pdf", default=True))


@dataclass(frozen=True)
class Study:
    """One study's folder.

    Attributes:
        name: of its options in the configuration.
        folder: named by the key.
        key: of all that it comes from.
        is_made: whether its results are there.
        options: of the loggers.
    """

    name: str
    folder: Path
    key: str
    is_made: bool
    options: Any = None

    @classmethod
    def of(cls, run: Run, name: str, solver: str, *made_from: Any) -> "Study":
        """The study for these options and all that it is made from."""
        key = key_of(*made_from, with_effect(run.cfg[name]))
        folder = run.folder / f"{name}-{solver}-{key[:8]}"
        is_made = (read_json(folder / "results.json") or {}).get("key") == key
        barrier()  # nobody writes before everybody has looked
        if is_made:
            log.info("%s: made before, in %s", name, folder)
        return cls(name, folder, key, is_made, run.cfg.get("logger"))

    @property
    def loggers(self) -> Loggers:
        """The run's, for this study."""
        return Loggers(self.options, self.folder, self.folder.parent.name, self.name)

    def close(
        self, results: dict[str, Any], headlines: Mapping[str, float | None] | None = None
    ) -> None:
        """Write results.json, whose presence says that all else is there.

        Args:
            results: everything.
            headlines: the few numbers that go into the cell's metrics, with their conditions in
                their names: ``gain@0.8`` becomes ``filtering/gain@0.8``.
        """
        numbers = {f"{self.name}/{name}": value for name, value in (headlines or {}).items()}
        record = {"key": self.key, "headlines": numbers, **results}
        write_json(self.folder / "results.json", finite(record))


def headlines_of(folders: Iterable[Path]) -> dict[str, float]:
    """Headline numbers of studies that are made, those without a value left out."""
    records = [read_json(folder / "results.json") or {} for folder in folders]
    numbers = [record.get("headlines", {}) for record in records]
    return {k: float(v) for each in numbers for k, v in each.items() if v is not None}
