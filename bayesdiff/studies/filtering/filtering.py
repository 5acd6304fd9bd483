"""Does a score find the bad images? One pool per seed, every score, the kept share swept.

All scores see the same images, so that they differ by their choice alone; random choices of the
same size are the baseline. Another classifier than the one that judges gives the scores their
features.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of, share
from bayesdiff.data.spaces import to_uint8
from bayesdiff.machine.ranks import rank
from bayesdiff.metrics.seeds import over_seeds
from bayesdiff.metrics.selection import kept_count
from bayesdiff.metrics.subsets import pool
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import judge
from bayesdiff.runs.setup import Setup, scored
from bayesdiff.solvers import Solver
from bayesdiff.studies.filtering import figures as pictures
from bayesdiff.studies.filtering.calibration import (
    LINE,
    Calibration,
    guarantee_headlines,
    guarantee_results,
    lines_of,
    marked_otherwise,
)
from bayesdiff.studies.filtering.choice import choice
from bayesdiff.studies.filtering.gains import NAMES, SCORES, VALUES, Row, gains
from bayesdiff.studies.filtering.guarantee_sheet import under_guarantee
from bayesdiff.studies.filtering.guaranteed import GuaranteeOptions
from bayesdiff.studies.filtering.profile import PROFILE, profile
from bayesdiff.studies.filtering.rules import RULE_NAMES, factor_of, rule_gains
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.scoring import ScoreOptions, check_scores, score_table, seen_of
from bayesdiff.studies.study import Place, Report, Study, check_judge, conditions
from bayesdiff.uncertainty import Estimator, Samples
from bayesdiff.uncertainty.memory import images_at_once


class Judged(NamedTuple):
    """One pool: what every score gains, what it follows, and what rules gain by it."""

    gains: list[Row]
    profile: list[Row]
    rules: Sequence[Row] = ()
    logits: Tensor = torch.empty(0)  # of the classifier that judges


# Samples with their scores by name.
Shown = tuple[Samples, dict[str, Tensor]]

log = logging.getLogger(__name__)

# What a rule keeps is its own choice.
_KEPT = ("keep", "kept")


@dataclass(frozen=True, kw_only=True)
class Filtering(GuaranteeOptions, ScoreOptions, Study):
    """What is generated, scored and kept; options of scores and of the guarantee come on top.

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

    Example:
        >>> study = Filtering(num_images=1000, keep=[0.5, 0.8], rules=["mean+2sd"])
        >>> [kept_count(share, study.num_images) for share in study.keep]
        [500, 800]
        >>> factor_of(study.rules[0])
        2.0
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
        ScoreOptions.__post_init__(self)
        self.check_guarantee_values()
        at_least("filtering.subsets", self.subsets, 2)
        at_least("filtering.draws", self.draws, 2)
        seed_of("filtering.seed", self.seed)

    @property
    def map_count(self) -> int:
        """Those of all pools."""
        return self.num_images * len(self.seeds)

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what could not be scored.

        Raises:
            UserError: for data without labels, or a map that the solver cannot serve.
        """
        check_judge(run, "filtering")
        _check_keep(self, run)
        if estimator.name in self.maps:
            raise UserError(
                f"filtering.maps.{estimator.name} has the name of the run's own estimator; "
                f"add it under another name, or remove it: ~filtering.maps.{estimator.name}"
            )
        for name, other in self.maps.items():
            if not isinstance(other, Estimator):
                raise UserError(
                    f"filtering.maps.{name} is no estimator, got {other!r}; give its _target_, "
                    "such as bayesdiff.uncertainty.MCDropout"
                )
            try:
                other.check(solver)
                other.check_run(run)
                other.check_data(run.data.data)
                images_at_once(other, solver, run.model, run.data.space.shape)
            except UserError as error:
                raise UserError(f"{error}; or leave it out: ~filtering.maps.{name}") from error
        check_scores(self, run)
        self.check_guarantee(run, estimator.name, self.seeds, self.num_images)

    def made_from(self, at: Setup) -> list[Any]:
        """Every estimator's maps, and what judges them."""
        others = [other.sources(at.run) for other in self.maps.values()]
        more = self.guarantee_sources(at.run)
        return [at.made_from, at.of_maps, others, scored(at.run), *more]

    def make(self, at: Setup, place: Place) -> Report | None:
        """Every score's gain, and what the guarantee comes to."""
        own, beside = at.estimator.name, Calibration.of(self, self.seeds, self.num_images)
        results, shown = self._over_seeds(at, beside)
        others = marked_otherwise(self, at, self._estimators(at))
        if shown is None:  # on another process than the first
            return None
        said = conditions(at.settings)
        tables, figures = {}, pictures.every(results, *shown, own, said)
        headlines = pictures.headlines(results, own)
        if beside.shown is not None:
            found = results["guarantee"] = guarantee_results(self, beside.pools, others)
            tables["table-guarantee.md"] = table.markdown(lines_of(found), LINE)
            figures = chain(figures, under_guarantee(*beside.shown, found, said))
            headlines |= guarantee_headlines(found)
        rows = sorted(
            (row for row in results["over_seeds"] if row["keep"] == self.main_keep),
            key=lambda row: (row["mode"], -row["z"]),
        )
        scalars = {f"{row['mode']}/{row['score']}/z": row["z"] for row in rows}
        return Report(results, figures, _tables(results, rows) | tables, scalars, headlines)

    def _over_seeds(self, at: Setup, beside: Calibration) -> tuple[dict[str, Any], Shown | None]:
        """Numbers of all seeds, empty but on the first process, and what the first pool shows."""
        tables: list[Judged] = []
        shown: Shown | None = None
        for seed in self.seeds:
            made = ImagePool(at, self.num_images, seed)
            maps = {k: made.maps(e).in_model_range() for k, e in self._estimators(at).items()}
            own = maps[at.estimator.name]
            seen, spent = seen_of(made, self, own.images)
            nfe = {name: each.nfe for name, each in maps.items()} | spent
            if rank() == 0:
                scores = score_table(at.run, maps, seen, self.seed)
                tables.append(_judged(at.run, self, maps, scores))
                shown = shown or (own, scores)
                beside.add(seed, own, scores, tables[-1].logits)
        return (_results(self, tables, nfe) if tables else {}), shown

    def _estimators(self, at: Setup) -> dict[str, Estimator]:
        return {at.estimator.name: at.estimator, **self.maps}


def _check_keep(options: Filtering, run: Run) -> None:
    """Refuse shares that discard no image, or keep too few of a class to judge."""
    groups = run.model.num_classes or 1
    each = options.num_images // groups
    what = f"{each} images" + (" of each class" if groups > 1 else "")
    for value in options.keep:
        if kept_count(value, each) >= each or kept_count(value, each) * groups < 2:
            raise UserError(
                f"filtering.keep={value} of {what} discards or keeps none; raise "
                f"filtering.num_images={options.num_images}, or leave that share out"
            )


def _judged(
    run: Run, options: Filtering, maps: Mapping[str, Samples], scores: Mapping[str, Tensor]
) -> Judged:
    """What every score of one pool gains, and what it follows."""
    from bayesdiff.metrics.features import extract

    samples = next(iter(maps.values())).in_model_range()
    extractor, reference = judge(run)
    read = extract(extractor, to_uint8(samples.images), run.cfg.metrics.batch_size)
    judged = pool(read.features, reference, groups=samples.labels, more=True, logits=read.logits)
    log.info("filtering: %d scores of %d images", len(scores), len(judged))
    rest = [each for each in options.keep if each != options.main_keep]
    chance = {"seed": options.seed, "subsets": options.subsets}
    rows = gains(scores, judged, [options.main_keep], resamples=options.draws, **chance)
    few = replace(judged, more=None)  # FID and precision alone over the shares
    rows += gains(scores, few, rest, **chance) if rest else []
    labels, busy = samples.labels, scores["image.total_variation"]
    follows = [] if labels is None else profile(scores, read.logits, labels, busy)
    by_rules = rule_gains(scores, few, options.rules, **chance)
    return Judged(rows, follows, by_rules, read.logits)


def _rivals(options: Filtering) -> set[str]:
    """Names of maps, and of scores of the user's own, that do not read the run's posterior."""
    return {*options.maps, *(name for name, own in options.own.items() if not own.of_posterior)}


def _results(
    options: Filtering, judged: Sequence[Judged], nfe: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Rows of every seed and over all of them, and the choice that the last seed did not see."""
    tables = [each.gains for each in judged]
    results: dict[str, Any] = {
        "conditions": {
            "num_images": options.num_images,
            "seeds": list(options.seeds),
            "subsets": options.subsets,
            "members": options.members,
            "main_keep": options.main_keep,
            "nfe": dict(nfe or {}),
        },
        "seeds": dict(zip(map(str, options.seeds), tables, strict=True)),
        "over_seeds": over_seeds(tables, NAMES, VALUES),
        "profile": over_seeds([each.profile for each in judged], ["score"], PROFILE),
    }
    if len(tables) > 1:
        results |= choice(tables, options.main_keep, _rivals(options))
    if options.rules:
        results["rules"] = over_seeds([e.rules for e in judged], RULE_NAMES, [*_KEPT, *VALUES])
    return results


def _tables(results: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """Markdown by the names of the files; ``rows`` are those of the main share."""
    columns = ["mode", "score", "z", "z_low", "z_high", "fid", "fid_gain", "precision_gain"]
    of_others = [f"{name}_z" for name in SCORES if name != "fid"]
    tables = {
        "table.md": table.markdown(rows, columns),
        "table-z.md": table.markdown(rows, ["mode", "score", "z", *of_others]),
    }
    if results["profile"]:
        # Nothing can be found where the judge sees no image, or every one, as another class.
        shown_of = [name for name in PROFILE if isfinite(results["profile"][0][name])]
        follows = sorted(
            results["profile"],
            key=lambda row: -row[shown_of[0]] if isfinite(row[shown_of[0]]) else 0,
        )
        tables["table-profile.md"] = table.markdown(follows, ["score", *shown_of])
    if "rules" in results:
        by_rule = sorted(results["rules"], key=lambda row: (row["rule"], row["mode"]))
        columns = [*RULE_NAMES, "keep", "fid", "fid_gain", "z", "z_low", "z_high"]
        tables["table-rules.md"] = table.markdown(by_rule, columns)
    return tables
