"""A sweep whose cells Optuna proposes, after those before: the best in fewer cells.

Hydra's own Optuna plugin needs Optuna 2, whose storage no longer works with today's SQLAlchemy.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.storage.artefacts import key_of, read_json, write_json
from bayesdiff.storage.locks import alone
from bayesdiff.sweeps.objective import DEFAULT, Direction, check_objective, direction_of, name_of

if TYPE_CHECKING:  # of the extra ``sweep``
    from hydra.core.override_parser.types import Override
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

# Attribute of a study: numbers of failed trials that have been queued again.
_REPEATED = "repeated"

# Overrides of the cells and number of the first one, to their values; None for a failed cell.
Launch = Callable[[list[list[str]], int], Sequence[float | None]]


@dataclass(frozen=True)
class Search:
    """One study.

    Attributes:
        folder: of the sweep; ``study.db`` and ``best.json`` are put there.
        fixed: overrides that all cells share.
        space: what is searched, by key.
        n_trials: cells in all, those of earlier starts among them.
        n_jobs: cells proposed at once.
        seed: of the proposals; trial k draws from the k-th stream of it, so that a study that was
            interrupted goes on as it would have.
        startup_trials: cells drawn at random first.
        objective: metric that is searched for, or the beginning of its name.
        direction: ``minimize`` or ``maximize``.
    """

    folder: Path
    fixed: Sequence[str]
    space: Mapping[str, "BaseDistribution"]
    n_trials: int
    n_jobs: int
    seed: int
    startup_trials: int
    objective: str = DEFAULT
    direction: Direction = "minimize"

    @classmethod
    def of(cls, words: Sequence[str], config: DictConfig, **settings: Any) -> "Search":
        """The study of these overrides.

        Args:
            words: of the command line, those with several values being searched; of two for the
                same key the last one counts.
            config: of the sweep.
            **settings: n_trials, n_jobs, seed and startup_trials.

        Raises:
            UserError: if nothing is searched, or no cell has the objective.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        for name in ("n_trials", "n_jobs", "startup_trials"):
            at_least(f"hydra.sweeper.{name}", settings[name])
        seed_of("hydra.sweeper.seed", settings["seed"])
        given = OverridesParser.create().parse_overrides(list(words))
        last = {override.get_key_element(): override for override in given}
        space = {k: distribution(o) for k, o in last.items() if o.is_sweep_override()}
        if not space:
            raise UserError(
                "nothing to search; give a key several values, such as "
                "'solver.guidance=interval(1.0, 4.0)' or solver.grid=uniform,quadratic"
            )
        objective = config.get("objective", DEFAULT)
        check_objective(objective, config, space)
        settings |= {
            "objective": objective,
            "direction": direction_of(objective, config.get("direction")),
        }
        fixed = [o.input_line or "" for k, o in last.items() if k not in space and o.input_line]
        return cls(Path(os.environ["BAYESDIFF_SWEEP"]), fixed, space, **settings)

    def run(self, launch: Launch) -> None:
        """Propose, launch and note until there are enough trials, one process at a time."""
        with alone(self.folder / "study.db"):
            study = self.study()
            if not self.unopened(study):
                again(study)
            while batch := self.batch(study):
                cells = [[*self.fixed, *self.cell(trial)] for trial in batch]
                for trial, value in zip(batch, launch(cells, batch[0].number), strict=True):
                    self.note(study, trial, value)
            self.close(study)

    def study(self) -> "Study":
        """The study in the sweep's folder, begun or continued.

        Raises:
            UserError: if it was begun with another seed or for another objective.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(self.folder / 'study.db').absolute()}"
        study = optuna.create_study(
            storage=storage, study_name="sweep", direction=self.direction, load_if_exists=True
        )
        here = {"objective": self.objective, "direction": self.direction}
        for name, value in {"hydra.sweeper.seed": self.seed, **here}.items():
            short = name.rpartition(".")[2]
            begun = study.user_attrs.get(short, value)
            if begun != value:
                raise UserError(
                    f"the study in {self.folder} was begun with {name}={begun}, not {value}; "
                    "give that one, or another output_dir"
                )
            study.set_user_attr(short, value)
        return study

    def batch(self, study: "Study") -> list["FrozenTrial"]:
        """The next trials: those that an interruption left open, else new ones."""
        from optuna.trial import TrialState

        left = study.get_trials(states=[TrialState.RUNNING])
        whole = [trial for trial in left if trial.params.keys() == self.space.keys()]
        for trial in left:
            if trial not in whole:  # stopped while it was being proposed
                study.tell(trial.number, state=TrialState.FAIL)
        if whole:
            return whole[: self.n_jobs]
        for _ in range(min(self.n_jobs, self.unopened(study))):
            study.sampler = self.sampler(len(study.get_trials(deepcopy=False)))
            study.ask(fixed_distributions=dict(self.space))
        return study.get_trials(states=[TrialState.RUNNING])

    def unopened(self, study: "Study") -> int:
        """Trials that are still to be begun: new ones, and repetitions of failed ones."""
        from optuna.trial import TrialState

        waiting = len(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))
        made = len(study.get_trials(deepcopy=False)) - len(study.user_attrs.get(_REPEATED, []))
        return max(self.n_trials - made, 0) + waiting

    def sampler(self, number: int) -> Any:
        """What proposes trial ``number``."""
        from optuna.samplers import TPESampler

        stream = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is called experimental
            return TPESampler(
                seed=int(stream),
                n_startup_trials=self.startup_trials,
                multivariate=True,
                constant_liar=self.n_jobs > 1,
            )

    def cell(self, trial: "FrozenTrial") -> list[str]:
        """Overrides of a trial."""
        return [f"{key}={trial.params[key]}" for key in self.space]

    def note(self, study: "Study", trial: "FrozenTrial", value: float | None) -> None:
        """A cell that failed, or lacks the objective, is a failed trial, never a value."""
        from optuna.trial import TrialState

        if value is None or not math.isfinite(value):
            study.tell(trial.number, state=TrialState.FAIL)
            self._explain(trial)
            return
        study.tell(trial.number, value)
        what = trial.number, self.objective, value, study.best_value
        log.info("trial %d: %s %.4g, best %.4g", *what)

    def _explain(self, trial: "FrozenTrial") -> None:
        """Say why a trial has no value."""
        key = key_of(sorted([*self.fixed, *self.cell(trial)]))
        row = read_json(self.folder / "cells" / f"{key}.json") or {}
        metrics = row.get("metrics", {})
        if row.get("status") != "done":
            log.warning("trial %d failed", trial.number)
        elif name := name_of(self.objective, metrics):
            log.warning(
                "trial %d: %s is %s, no value to compare", trial.number, name, metrics[name]
            )
        else:
            raise UserError(
                f"objective={self.objective} is no metric of trial {trial.number}, which is done; "
                f"it has {', '.join(metrics)}"
            )

    def close(self, study: "Study") -> None:
        """Say which trial is best, and keep it as ``best.json``."""
        from optuna.trial import TrialState

        done = study.get_trials(states=[TrialState.COMPLETE])
        if not done:
            return
        best = study.best_trial
        cell = [*self.fixed, *self.cell(best)]
        what = len(done), best.number, self.objective, best.value, cell
        log.info("best of %d: trial %d, %s %.4g: %s", *what)
        record = {
            "trial": best.number,
            "objective": self.objective,
            "direction": self.direction,
            "value": best.value,
            "overrides": cell,
            "trials": len(done),
        }
        write_json(self.folder / "best.json", record)


def again(study: "Study") -> None:
    """Queue what failed once more, as a finished sweep that is started again does."""
    from optuna.trial import TrialState

    repeated = list(study.user_attrs.get(_REPEATED, []))
    for trial in study.get_trials(states=[TrialState.FAIL]):
        if trial.number not in repeated:
            study.enqueue_trial(trial.params)
            repeated.append(trial.number)
            study.set_user_attr(_REPEATED, repeated)


def distribution(override: "Override") -> "BaseDistribution":
    """What Optuna searches for a key with several values.

    ``a=x,y``, ``choice(x, y)``; ``range(1, 9, step=2)``; ``interval(1, 4)``, and of whole numbers
    ``int(interval(1, 4))``; ``tag(log, interval(1e-4, 1e-2))`` is even in the logarithm.

    Raises:
        UserError: for a set of values that cannot be searched.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from optuna import distributions as of

    value: Any = override.value()
    key = override.get_key_element()
    if isinstance(value, ChoiceSweep):
        return of.CategoricalDistribution(list(override.sweep_string_iterator()))
    is_log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind: Any = of.IntDistribution if whole else of.FloatDistribution
            return kind(value.start, value.end, log=is_log)
        if isinstance(value, RangeSweep):
            values = [float(text) for text in override.sweep_string_iterator()]
            if not values:
                raise UserError(f"{override.input_line} is empty; give another range")
            whole = all(isinstance(n, int) for n in (value.start, value.stop, value.step))
            kind, number = (of.IntDistribution, int) if whole else (of.FloatDistribution, float)
            return kind(number(values[0]), number(values[-1]), step=number(value.step))
    except ValueError as error:
        raise UserError(f"{override.input_line} cannot be searched: {error}") from error
    raise UserError(
        f"{key}={override.get_value_string()} cannot be searched; give choice, range or interval"
    )
