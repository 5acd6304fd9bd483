"""Where the artefacts of one cell are, and the keys of what they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.options.targets import word_of
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.calibration import calibration_at
from bayesdiff.runs.defaults import damage_of, differences, likelihood_choice, named, words
from bayesdiff.runs.setup import UNSCORED, Setup, sampled_from, scored, settings_of, with_effect
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import Artefact, key_of
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.chosen import sample_numbers
from bayesdiff.uncertainty.estimator import WITHOUT_EFFECT

_FITTED = ("sigma_noise", "prior_precision", "n_eff")


@dataclass(frozen=True)
class Address:
    """One cell's artefacts.

    What cells share lies in the run folder, under the key of what it comes from.

    Attributes:
        folder: of the cell, inside the run folder: its numbers and pictures.
        images: for the scores.
        scores: of these images.
        uncalibrated: the images with their maps, as the estimator makes them.
        calibration: their factor, None for none.
        maps: the images with their maps, as they are shown.
        checked: the maps' comparison with a reference, None where none is asked for.
        cell: key of all numbers of the cell.
        setup: what the cell works with.
    """

    folder: Path
    images: Artefact
    scores: Artefact
    uncalibrated: Artefact
    calibration: Artefact | None
    maps: Artefact
    checked: Artefact | None
    cell: str
    setup: Setup

    @classmethod
    def of(cls, setup: Setup, studies: Sequence[str] = ()) -> "Address":
        """Of the cell with this setup.

        Args:
            setup: what the cell works with.
            studies: keys of those that are asked for.
        """
        run, solver, estimator, posterior = setup.quartet
        name = f"{solver.name}-{estimator.name}"
        images = images_at(run, solver, setup.weights)
        parts, sources = maps_settings(run, estimator), estimator.sources(run)
        made = key_of(*sampled_from(run, setup.weights), settings_of(posterior), parts, *sources)
        factor = calibration_at(setup)
        maps = made if factor is None else key_of(made, factor.key)
        asked = key_of(maps, estimator.validate_images, estimator.validate_members)
        checked = Artefact(run.folder / f"validation-{asked[:8]}.json", asked, "validation")
        validated = asked if estimator.validate else None
        cell = key_of(maps, images.key, scored(run), validated, *studies)
        return cls(
            folder=named(run.folder, name, cell_words(run, solver, estimator, posterior), cell),
            images=images,
            scores=scores_at(run, images.key),
            uncalibrated=maps_at(run, name, made, "maps"),
            calibration=factor,
            maps=maps_at(run, name, maps, "maps" if factor is None else ""),
            checked=checked if estimator.validate else None,
            cell=cell,
            setup=setup,
        )


def maps_at(run: Run, name: str, key: str, stage: str) -> Artefact:
    """The file of maps with this key."""
    return Artefact(run.folder / f"samples-{name}-{key[:8]}.npz", key, stage)


def maps_settings(run: Run, estimator: Estimator) -> dict[str, Any]:
    """Options that change the run's own maps, chosen samples by their numbers."""
    chosen = sample_numbers(estimator, run)
    parts = with_effect(run.cfg.uncertainty)
    if code := code_of(plain(run.cfg.uncertainty)):
        parts = parts | {"code": code}
    return parts if chosen is None else parts | {"numbers": chosen}


def overridden(
    run: Run, solver: Solver, estimator: Estimator, posterior: HeadPosterior
) -> dict[str, Any]:
    """What a cell has other than the shipped configuration of the same choices, by dotted name."""
    return differences(
        run.cfg,
        data=str(run.cfg.data.get("name")),
        model=run.model.path.family,
        likelihood=likelihood_choice(run.cfg),
        solver=solver.name,
        uncertainty=estimator.name,
        laplace=posterior.structure,
        metrics=word_of(run.cfg.metrics.features),
        corruption=damage_of(run.cfg) or "",
    )


def cell_words(run: Run, solver: Solver, estimator: Estimator, posterior: HeadPosterior) -> str:
    """What the cell is told apart by, with what was fitted in numbers."""
    cfg = run.cfg
    found = overridden(run, solver, estimator, posterior)
    parts: dict[str, Any] = {"studies": list(run.studies)} if run.studies else {}
    parts |= _of_posterior(posterior)
    left = [f"laplace.{name}" for name in (*_FITTED, "structure", "rank")]
    # The chosen samples are in the key, by their numbers.
    idle = {name for name in WITHOUT_EFFECT if name not in ("labels", "numbers")}
    idle = {name for name in idle if not name.startswith("calibrate")}
    left += [f"uncertainty.{name}" for name in idle]
    left += [f"metrics.{name}" for name in UNSCORED]
    parts |= {
        name: value
        for place in ("laplace.", "solver.", "uncertainty.", "metrics.")
        for name, value in found.items()
        if name.startswith(place) and name not in left
    }
    parts = dict(sorted(parts.items(), key=lambda item: item[0].endswith("num_images")))
    known = [f"{n}.{k}" for n in ("laplace", "solver", "uncertainty", "metrics") for k in cfg[n]]
    return words(parts, known)


def _of_posterior(posterior: HeadPosterior) -> dict[str, Any]:
    """Settings that are not those of the default posterior of the same curvature."""
    curvature = posterior.curvature
    numbers = dict(zip(_FITTED, posterior.settings[-3:], strict=True))
    usual = dict(zip(_FITTED, (curvature.sigma_mle, 1.0, curvature.num_images), strict=True))
    parts: dict[str, Any] = {}
    if posterior.structure != "full":
        parts["laplace.structure"] = posterior.structure
    if posterior.rank is not None:
        parts["laplace.rank"] = posterior.rank
    return parts | {
        f"laplace.{name}": value
        for name, value in numbers.items()
        if f"{value:.9g}" != f"{usual[name]:.9g}"
    }


def images_at(run: Run, solver: Solver, weights: str) -> Artefact:
    """The images for the scores; what they come from has no posterior in it."""
    key = key_of(*sampled_from(run, weights), run.cfg.metrics.num_images)
    return Artefact(run.folder / f"images-{solver.name}-{key[:8]}.npz", key, "images")


def scores_at(run: Run, images: str) -> Artefact:
    """The scores of the images with this key, in which the data are."""
    key = key_of(images, scored(run))
    return Artefact(run.folder / f"scores-{images[:8]}.json", key, "scores")
