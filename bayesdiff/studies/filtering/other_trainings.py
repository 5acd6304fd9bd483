"""Other trainings of the run's network: the same noise through other weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bayesdiff.checks import UserError, listed
from bayesdiff.data.spaces import to_uint8
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.machine.ranks import rank
from bayesdiff.runs.build import plain
from bayesdiff.runs.fit_key import pass_context
from bayesdiff.runs.scores import judge
from bayesdiff.runs.setup import Setup
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.scoring import ScoreOptions, score_table, seen_of
from bayesdiff.uncertainty import Ensemble, Estimator
from bayesdiff.uncertainty.members.other_trainings import OtherTrainings

OPTION = "filtering.also"


def trainings(paths: Sequence[str]) -> OtherTrainings:
    """Those that the option names.

    Raises:
        UserError: if it is no list of paths.
    """
    for path in listed(OPTION, paths, "[path/to/run]"):
        if not isinstance(path, str):
            raise UserError(f"{OPTION} must list run folders or checkpoints, got {path!r}")
    needs = "its threshold is tried on the images of others"
    return OtherTrainings(tuple(paths), OPTION, needs, among=False)


def trained_otherwise(at: Setup, paths: Sequence[str]) -> Iterator[tuple[str, Setup]]:
    """What makes images with the weights of other trainings, and with their own posteriors.

    Their curvatures and pools are kept below this run's folder.

    Args:
        at: with this run's weights.
        paths: of the others' folders or checkpoints, or patterns.

    Yields:
        Path, or pattern and key of the weights, of each with what it works with.
    """
    cfg: Any = at.run.cfg
    for path in paths:
        found = trainings([path]).networks(at.run.model, at.run.folder)
        for key, model in found.items():
            folder = at.run.folder / "also" / key[:8]
            model.to(at.run.device).eval()
            # Resolved for this run: the other has the same data, and was trained as long.
            options = plain(cfg.laplace) | {"n_eff": at.posterior.n_eff}
            laplace = LastLayerLaplace(**options, folder=folder, context=pass_context(cfg))
            posterior = laplace.fit(model, at.run.data.data)
            run = replace(at.run, model=model, folder=folder)
            there = Setup(run, at.solver, at.estimator, posterior, key, at.settings)
            yield path if len(found) == 1 else f"{path} {key[:8]}", there


def scored_otherwise(
    options: ScoreOptions, at: Setup, maps: Mapping[str, Estimator], score: str, pool: ImagePool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """One score of a pool, and what the judge says of it; nothing that these do not read is made.

    Args:
        options: of the scores.
        at: with the weights that make the pool.
        maps: estimators that a score may be named by.
        score: its name.
        pool: of these weights.

    Returns:
        Score ``(N,)``, logits ``(N, K)``, labels ``(N,)`` or None; None but on the first process.
    """
    from bayesdiff.metrics.features import extract

    kind = score.partition(".")[0]
    # Where no map is read any estimator gives the images, which are the model's own samples.
    name = kind if kind in maps else Ensemble.name
    estimator = maps.get(kind, Ensemble(members=2, noise_members=0))
    samples = pool.maps(estimator).in_model_range()
    seen, _ = seen_of(pool, _needed(options, kind), samples.images)
    if rank():
        return None
    read = score_table(at.run, {name: samples}, seen, 0)[score]
    extractor, _ = judge(at.run)
    logits = extract(extractor, to_uint8(samples.images), at.run.cfg.metrics.batch_size).logits
    return read, logits, samples.labels


def _needed(options: ScoreOptions, kind: str) -> ScoreOptions:
    """What scores of one kind look at; scores of the user's own look at anything."""
    own, of_members = bool(options.own_scores), kind == "members"
    noisy = kind == "aleatoric"
    return ScoreOptions(
        members=options.members if own or of_members else 0,
        aleatoric_draws=options.aleatoric_draws if noisy else 0,
        aleatoric_zigzag=options.aleatoric_zigzag if noisy else 0,
        likelihood=kind == "likelihood",
        likelihood_steps=options.likelihood_steps,
        segmentation=options.segmentation,
        encoders=options.encoders if of_members else {},
        own_scores=options.own_scores,
    )
