"""Scores by which a run's own report chooses and sorts its images: ``report`` in the options."""

from collections.abc import Mapping

from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.machine.ranks import rank
from bayesdiff.report.options import SUM, ReportOptions
from bayesdiff.runs.build import Run, plain
from bayesdiff.studies.scoring import ScoreOptions, doubts_of, seen_of
from bayesdiff.studies.study import Setup, check_judge
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.scores.likelihood import check_likelihood
from bayesdiff.uncertainty.scores.of_maps_and_images import IMAGE_SCORES, MAP_SCORES
from bayesdiff.uncertainty.scores.of_members import CONFIDENCE_SCORES, MEMBER_SCORES

NLL = "likelihood.bits_per_dim"
# Of images and maps alone; the others read the model, its members or a classifier.
_PLAIN = ("map", "image")
NAMES = (
    *(f"map.{name}" for name in MAP_SCORES),
    *(f"image.{name}" for name in IMAGE_SCORES),
    *(f"classifier.{name}" for name in CONFIDENCE_SCORES),
    *(f"members.{name}" for name in (*MEMBER_SCORES, "joint")),
    *("real.realism", "real.rarity", NLL),
)


def options_of(run: Run) -> ReportOptions:
    """What the figures of this run show.

    Raises:
        UserError: for an option that there is not, or a value of no use.
    """
    given = plain(OmegaConf.select(run.cfg, "report", default={})) or {}
    unknown = set(given) - set(ReportOptions.__dataclass_fields__)
    if unknown:
        raise UserError(
            f"unknown option report.{min(unknown)}; there are "
            f"{', '.join(ReportOptions.__dataclass_fields__)}"
        )
    return ReportOptions(**given)


def check_report(run: Run) -> None:
    """Refuse, before any work, scores that could not be computed.

    Raises:
        UserError: for an unknown score, or one that needs what the run lacks.
    """
    shown = options_of(run)
    for name in shown.scores:
        option = "chosen_by" if name == shown.chosen_by else "sorted_by"
        if name not in NAMES or (name == "classifier.off_label" and not run.model.num_classes):
            raise UserError(
                f"unknown score report.{option}={name}; choose from {', '.join(NAMES)}"
            )
        kind = name.partition(".")[0]
        chosen = [k for k in ("numbers", "labels") if run.cfg.uncertainty.get(k) is not None]
        if chosen and kind in ("members", "likelihood"):
            raise UserError(
                f"report.{option}={name} is known for samples 0, 1, ... alone; leave "
                f"uncertainty.{chosen[0]} out, or sort by map.*, image.* or classifier.*"
            )
        if kind in ("classifier", "members", "real"):
            check_judge(run, f"report.{option}={name}")
        if name == NLL:
            check_likelihood(run.model, shown.likelihood_steps)


def report_scores(at: Setup, samples: Samples) -> dict[str, Tensor]:
    """The scores ``(B,)`` that the report asks for; a higher number is more doubtful.

    Every process takes part; the first one gets them.

    Members, and the likelihood, are computed once and kept with the pools of the studies.

    Args:
        at: the run with its posterior.
        samples: the run's own.
    """
    run, given = at.run, samples.in_model_range()
    shown = options_of(run)
    names = [name for name in shown.scores if name != SUM or name in shown.sorted_by]
    if not names:
        return {}
    kinds = {name.partition(".")[0] for name in names}
    found: Mapping[str, Tensor] = {
        **{f"map.{k}": of(given.variance, given.images) for k, of in MAP_SCORES.items()},
        **{f"image.{k}": of(given.images) for k, of in IMAGE_SCORES.items()},
    }
    if kinds - {*_PLAIN}:
        asked = ScoreOptions(
            members=shown.members if "members" in kinds else 0,
            aleatoric_draws=0,
            likelihood="likelihood" in kinds,
            likelihood_steps=shown.likelihood_steps,
        )
        pool = at.pool(len(given.images), run.cfg.seed)
        seen, _ = seen_of(pool, asked, given.images)
        if rank():
            return {}
        known = kinds - {*_PLAIN, "likelihood"}
        found = {
            **found,
            **(doubts_of(run, {"map": samples}, seen, run.cfg.seed) if known else seen.known),
        }
    return {name: found[name] for name in names}
