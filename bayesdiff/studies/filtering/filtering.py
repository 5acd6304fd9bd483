"""Does a score find the bad images? One pool per seed, every score, the kept share swept.

All scores see the same images, so that they differ by their choice alone; random choices of the
same size are the baseline. Another classifier than the one that judges gives the scores their
features.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of, share
from bayesdiff.data.module import to_uint8
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.ranks import barrier, rank
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.selection import kept_count
from bayesdiff.metrics.subsets import pool
from bayesdiff.report import board, table
from bayesdiff.runs.build import Run
from bayesdiff.runs.stages import judge
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import write_text
from bayesdiff.studies.filtering import figures as pictures
from bayesdiff.studies.filtering.choice import choice
from bayesdiff.studies.filtering.gains import NAMES, SCORES, VALUES, Row, gains
from bayesdiff.studies.filtering.profile import PROFILE, profile
from bayesdiff.studies.filtering.rules import RULE_NAMES, factor_of, rule_gains
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.scoring import ScoreOptions, check_scores, doubts_of, seen_of
from bayesdiff.studies.study import (
    Study,
    check_judge,
    conditions,
    configured,
    pdf,
    scored,
    with_effect,
)
from bayesdiff.uncertainty import Estimator, Samples
from bayesdiff.uncertainty.memory import images_at_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Judged(NamedTuple):
    """Rows of one pool: what every score gains, what it follows, and what rules gain by it."""

    gains: list[Row]
    profile: list[Row]
    rules: Sequence[Row] = ()


# Samples with their scores by name.
Shown = tuple[Samples, dict[str, Tensor]]

log = logging.getLogger(__name__)

# What a rule keeps is its own choice.
_KEPT = ("keep", "kept")


@dataclass(frozen=True, kw_only=True)
class Filtering(ScoreOptions):
    """What is generated, scored and kept; the options of the scores come on top.

    Args:
        num_images: of the pool of each seed.
        seeds: of the pools' noise; the same network makes all of them.
        keep: shares that are kept.
        main_keep: the share whose gains have intervals over images, one of ``keep``.
        rules: that keep as many as they will, such as ``mean+1sd``: discarded is every score above
            its mean + 1 sd.
        maps: estimators beside the run's own, by name; their maps get the same scores.
        subsets: random choices that a score is compared with.
        draws: bootstrap samples of the intervals over images.
        seed: of the random choices.
    """

    num_images: int = 3000
    seeds: Sequence[int] = (0, 1, 2)
    keep: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    main_keep: float = 0.8
    rules: Sequence[str] = ()
    maps: Mapping[str, Estimator] = field(default_factory=dict)
    subsets: int = 10
    draws: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("filtering.num_images", self.num_images, 20)
        for seed in listed("filtering.seeds", self.seeds, "[0,1]"):
            seed_of("filtering.seeds", seed)
        listed("filtering.keep", self.keep, "[0.8]")
        for value in self.keep:
            if share("filtering.keep", value) == 0:
                raise UserError("filtering.keep=0 keeps nothing; give shares above 0")
        if self.main_keep not in self.keep:
            raise UserError(
                f"filtering.main_keep={self.main_keep} must be one of filtering.keep="
                f"{list(self.keep)}"
            )
        for rule in listed("filtering.rules", self.rules, "[mean+1sd]") if self.rules else ():
            factor_of(rule)
        if not isinstance(self.maps, Mapping):
            raise UserError(
                f"filtering.maps must name estimators with their settings, got {self.maps!r};"
                " for none remove them by name: ~filtering.maps.published"
            )
        super().__post_init__()
        at_least("filtering.subsets", self.subsets, 2)
        at_least("filtering.draws", self.draws, 2)
        seed_of("filtering.seed", self.seed)


def check_filtering(run: Run, solver: Solver, own: Estimator) -> None:
    """Refuse before any work what could not be scored; nothing where no filtering is asked for.

    Raises:
        UserError: for data without labels, or a map that the solver cannot serve.
    """
    wanted: Filtering | None = configured(run, "filtering")
    if wanted is None:
        return
    check_judge(run, "filtering")
    _check_keep(wanted, run)
    if own.name in wanted.maps:
        raise UserError(
            f"filtering.maps.{own.name} has the name of the run's own estimator; "
            f"add it under another name, or remove it: ~filtering.maps.{own.name}"
        )
    for name, estimator in wanted.maps.items():
        if not isinstance(estimator, Estimator):
            raise UserError(
                f"filtering.maps.{name} is no estimator, got {estimator!r}; give its _target_, "
                "such as bayesdiff.uncertainty.MCDropout"
            )
        estimator.check(solver)
        estimator.check_run(run)
        images_at_once(estimator, solver, run.model, run.data.data.images.shape[1:])
    check_scores(wanted, run)


def _check_keep(wanted: Filtering, run: Run) -> None:
    """Refuse shares that discard no image, or keep too few of a class to judge.

    Raises:
        UserError: one line with the cure.
    """
    groups = run.model.num_classes or 1
    each = wanted.num_images // groups
    what = f"{each} images" + (" of each class" if groups > 1 else "")
    for value in wanted.keep:
        if kept_count(value, each) >= each or kept_count(value, each) * groups < 2:
            raise UserError(
                f"filtering.keep={value} of {what} discards or keeps none; raise "
                f"filtering.num_images={wanted.num_images}, or leave that share out"
            )


def filter_images(
    run: Run, solver: Solver, own: Estimator, posterior: HeadPosterior, made_from: str
) -> Path | None:
    """Tables and figures of every score's gain, in a folder of their own; results.json last.

    Args:
        run: with its trained model.
        solver: of the samples.
        own: the run's estimator.
        posterior: of the head.
        made_from: key of the network, the solver and the posterior.

    Returns:
        The folder, None where no filtering is asked for.
    """
    wanted: Filtering | None = configured(run, "filtering")
    if wanted is None:
        return None
    sources = [each.sources(run) for each in (own, *wanted.maps.values())]
    of_maps, of_scores = with_effect(run.cfg.uncertainty), scored(run)
    study = Study.of(run, "filtering", solver.name, made_from, of_maps, sources, of_scores)
    if study.is_made:
        return study.folder
    results, shown = _over_seeds(run, solver, own, posterior, wanted, made_from)
    if shown is not None:  # on the first process
        made = pictures.every(results, *shown, own.name, conditions(run, solver, posterior, own))
        _report(study, wanted, results, made, pdf(run))
        study.close(results, pictures.headlines(results, own.name))
    barrier()
    log.info("filtering: %d seeds in %s", len(wanted.seeds), study.folder)
    return study.folder


def _over_seeds(
    run: Run,
    solver: Solver,
    own: Estimator,
    posterior: HeadPosterior,
    wanted: Filtering,
    made_from: str,
) -> tuple[dict[str, Any], Shown | None]:
    """Numbers of all seeds, empty but on the first process, and what the first pool shows."""
    tables: list[Judged] = []
    shown: Shown | None = None
    for seed in wanted.seeds:
        made = ImagePool(
            run, solver, posterior, wanted.num_images, seed, run.folder / "pools", made_from
        )
        maps = {own.name: made.maps(own)} | {k: made.maps(v) for k, v in wanted.maps.items()}
        seen, spent = seen_of(made, wanted, maps[own.name].in_model_range().images)
        nfe = {name: each.nfe for name, each in maps.items()} | spent
        if rank() == 0:
            scores = doubts_of(run, maps, seen, wanted.seed)
            tables.append(_judged(run, wanted, maps, scores))
            shown = shown or (maps[own.name], scores)
    return (_results(wanted, tables, nfe) if tables else {}), shown


def _judged(
    run: Run, wanted: Filtering, maps: Mapping[str, Samples], doubts: Mapping[str, Tensor]
) -> Judged:
    """What every score of one pool gains, and what it follows."""
    from bayesdiff.metrics.features import extract

    samples = next(iter(maps.values())).in_model_range()
    extractor, reference = judge(run)
    read = extract(extractor, to_uint8(samples.images), run.cfg.metrics.batch_size)
    judged = pool(read.features, reference, groups=samples.labels, more=True, logits=read.logits)
    log.info("filtering: %d scores of %d images", len(doubts), len(judged))
    rest = [each for each in wanted.keep if each != wanted.main_keep]
    chance = {"seed": wanted.seed, "subsets": wanted.subsets}
    rows = gains(doubts, judged, [wanted.main_keep], draws=wanted.draws, **chance)
    few = replace(judged, more=None)  # FID and precision alone over the shares
    rows += gains(doubts, few, rest, **chance) if rest else []
    labels, busy = samples.labels, doubts["image.total_variation"]
    follows = [] if labels is None else profile(doubts, read.logits, labels, busy)
    return Judged(rows, follows, rule_gains(doubts, few, wanted.rules, **chance))


def _results(
    wanted: Filtering, judged: Sequence[Judged], nfe: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Rows of every seed and over all of them, and the choice that the last seed did not see."""
    tables = [each.gains for each in judged]
    results: dict[str, Any] = {
        "conditions": {
            "num_images": wanted.num_images,
            "seeds": list(wanted.seeds),
            "subsets": wanted.subsets,
            "members": wanted.members,
            "main_keep": wanted.main_keep,
            "nfe": dict(nfe or {}),
        },
        "seeds": dict(zip(map(str, wanted.seeds), tables, strict=True)),
        "over_seeds": over_seeds(tables, NAMES, VALUES),
        "profile": over_seeds([each.profile for each in judged], ["score"], PROFILE),
    }
    if len(tables) > 1:
        results |= choice(tables, wanted.main_keep, wanted.maps)
    if wanted.rules:
        results["rules"] = over_seeds([e.rules for e in judged], RULE_NAMES, [*_KEPT, *VALUES])
    return results


def _report(
    study: Study,
    wanted: Filtering,
    results: Mapping[str, Any],
    made: Iterable[tuple[str, "Figure"]],
    as_pdf: bool,
) -> None:
    """Table, figures and loggers."""
    folder = study.folder
    rows = sorted(
        (row for row in results["over_seeds"] if row["keep"] == wanted.main_keep),
        key=lambda row: (row["mode"], -row["z"]),
    )
    columns = ["mode", "score", "z", "z_low", "z_high", "fid", "fid_gain", "precision_gain"]
    of_others = [f"{name}_z" for name in SCORES if name != "fid"]
    write_text(folder / "table.md", table.markdown(rows, columns))
    write_text(folder / "table-z.md", table.markdown(rows, ["mode", "score", "z", *of_others]))
    if results["profile"]:
        # Nothing can be found where the judge sees no image, or every one, as another class.
        shown_of = [name for name in PROFILE if isfinite(results["profile"][0][name])]
        follows = sorted(
            results["profile"],
            key=lambda row: -row[shown_of[0]] if isfinite(row[shown_of[0]]) else 0,
        )
        write_text(folder / "table-profile.md", table.markdown(follows, ["score", *shown_of]))
    if wanted.rules:
        by_rule = sorted(results["rules"], key=lambda row: (row["rule"], row["mode"]))
        columns = [*RULE_NAMES, "keep", "fid", "fid_gain", "z", "z_low", "z_high"]
        write_text(folder / "table-rules.md", table.markdown(by_rule, columns))
    scalars = {f"filtering/{row['mode']}/{row['score']}/z": row["z"] for row in rows}
    told = study.loggers, results["conditions"]
    board.write_study(folder / "tensorboard", scalars, {}, made, *told, pdf=as_pdf)
