"""What one cell works with: the records and objects that travel together through a run."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.options.values import plain
from bayesdiff.runs.build import Run
from bayesdiff.runs.fit_key import likelihood_options, network_code
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Estimator, Starts, starts_of
from bayesdiff.uncertainty.estimator import AS_BEFORE, WITHOUT_EFFECT

# Options of ``metrics`` that change no score.
UNSCORED = ("batch_size", "export")
# Which of the run's own samples get a map.
OF_THE_RUN = ("num_images", "times", "units")


def starts(run: Run, solver: Solver, seed: int | None = None) -> Starts:
    """Start of samples by their numbers; None takes the run's own seed."""
    space = run.data.space
    seed = run.cfg.seed if seed is None else seed
    decoder = space.values if space.decoded else None
    return starts_of(run.model, solver, seed, space.shape, run.device, decoder)


@dataclass(frozen=True)
class Setup:
    """What a cell and its studies work with.

    Attributes:
        run: with its trained model.
        solver: of the samples.
        estimator: the run's own.
        posterior: of the head.
        weights: key of the trained weights.
        settings: of the run, flat, as tables and loggers have them.
    """

    run: Run
    solver: Solver
    estimator: Estimator
    posterior: HeadPosterior
    weights: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def quartet(self) -> tuple[Run, Solver, Estimator, HeadPosterior]:
        """The four in their usual order."""
        return self.run, self.solver, self.estimator, self.posterior

    @cached_property
    def made_from(self) -> str:
        """Key of the network, the solver and the posterior."""
        return key_of(*sampled_from(self.run, self.weights), settings_of(self.posterior))

    @property
    def starts(self) -> Starts:
        """Starts of the run's own samples."""
        return starts(self.run, self.solver)

    @property
    def of_maps(self) -> list[Any]:
        """What any sample's map by the run's own estimator comes from, beside ``made_from``."""
        options = with_effect(self.run.cfg.uncertainty, *OF_THE_RUN)
        return [options, code_of(options), *self.estimator.sources(self.run)]


def sampled_from(run: Run, weights: str) -> list[Any]:
    """All that samples of these weights depend on, apart from their numbers."""
    cfg = run.cfg
    # The same weights make other images where they are to predict something else.
    options = [cfg.model.prediction, plain(cfg.path), plain(cfg.solver), cfg.seed]
    options += [plain(cfg.model).get("condition"), *likelihood_options(cfg)]
    # Samples may have vectors of test images, and latents a coder.
    options.append(run.data.data.fingerprint)
    return [weights, *options, *network_code(cfg), code_of(plain(cfg.solver))]


def settings_of(posterior: HeadPosterior) -> list[Any]:
    """What the posterior depends on, with words like ``mle`` resolved.

    Example:
        After the example of ``starts_of``:

        >>> _, structure, sigma_noise, prior_precision, n_eff = settings_of(posterior)
        >>> structure, prior_precision, n_eff
        ('full', 1.0, 64.0)
    """
    return [posterior.curvature.source, *posterior.settings]


def with_effect(options: Any, *without: str) -> dict[str, Any]:
    """Options of an estimator, without these and those that change no map."""
    given = {k: v for k, v in plain(options).items() if (k, v) not in AS_BEFORE}
    return {k: v for k, v in given.items() if k not in (*WITHOUT_EFFECT, *without)}


def scored(run: Run) -> dict[str, Any]:
    """Options of ``metrics`` that change a score of given images, their number not among them."""
    options = {
        k: v for k, v in plain(run.cfg.metrics).items() if k not in (*UNSCORED, "num_images")
    }
    code = code_of(options)
    return options | ({"code": code} if code else {})
