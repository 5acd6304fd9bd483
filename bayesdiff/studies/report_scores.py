"""Scores by which a run's own report chooses and sorts its images: ``report`` in the options."""

from collections.abc import Mapping

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.machine.ranks import rank
from bayesdiff.report.options import SCORES_FILE, options_of
from bayesdiff.report.pictures import figures_of
from bayesdiff.runs.address import Address
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup, scored
from bayesdiff.storage.artefacts import Artefact, key_of
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.own_scores import (
    OF_CLASSIFIER,
    OF_MEMBERS,
    PREFIX,
    OwnScore,
    inputs_of,
    scores_of_run,
    source_of,
    try_scores,
)
from bayesdiff.studies.scoring import Seen, judged
from bayesdiff.studies.study import check_judge
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.scores.likelihood import check_likelihood
from bayesdiff.uncertainty.scores.of_maps_and_images import IMAGE_SCORES, MAP_SCORES, map_score
from bayesdiff.uncertainty.scores.of_members import CONFIDENCE_SCORES, MEMBER_SCORES

NLL = "likelihood.bits_per_dim"
# Kinds that a classifier of the data sees.
JUDGED = ("classifier", "members", "real")
# Kinds that see images of posterior trajectories.
OF_POOL = ("members", "pool")
NAMES = (
    *(f"map.{name}" for name in MAP_SCORES),
    *(f"image.{name}" for name in IMAGE_SCORES),
    *(f"classifier.{name}" for name in CONFIDENCE_SCORES),
    *(f"members.{name}" for name in (*MEMBER_SCORES, "joint")),
    *("real.realism", "real.rarity", NLL),
)


def check_report(run: Run) -> None:
    """Refuse, before any work, scores that could not be computed.

    Raises:
        UserError: for an unknown score, or one that needs what the run lacks.
    """
    shown, own = options_of(run.cfg), own_of(run)
    figures_of(run.data.space).check(shown)
    try_scores(own.values(), run)
    for name in shown.scores:
        option = "chosen_by" if name == shown.chosen_by else "sorted_by"
        known = name in NAMES or name in own
        if not known or (name == "classifier.off_label" and not run.model.num_classes):
            raise UserError(
                f"unknown score report.{option}={name}; choose from {', '.join(NAMES)}, or own.* "
                "of those that scores= adds"
            )
        kinds = reads_of(name, own)
        chosen = [k for k in ("numbers", "labels") if run.cfg.uncertainty.get(k) is not None]
        if chosen and kinds & {*OF_POOL, "likelihood"}:
            raise UserError(
                f"report.{option}={name} is known for samples 0, 1, ... alone; leave "
                f"uncertainty.{chosen[0]} out, or sort by map.*, image.* or classifier.*"
            )
        if kinds & {*JUDGED}:
            check_judge(run, f"report.{option}={name}")
        if name == NLL:
            check_likelihood(run.model, shown.likelihood_steps)


def kind_of(name: str) -> str:
    """The first part of a score's name: what it reads."""
    return name.partition(".")[0]


def own_of(run: Run) -> dict[str, OwnScore]:
    """Scores of the user's own that the report asks for."""
    asked = options_of(run.cfg).scores
    if not any(name.startswith(PREFIX) for name in asked):
        return {}
    return {name: own for name, own in scores_of_run(run.cfg).items() if name in asked}


def reads_of(name: str, own: Mapping[str, OwnScore]) -> set[str]:
    """Kinds of what a score reads; ``pool`` are members that no classifier looks at."""
    if name not in own:
        return {kind_of(name)}
    reads = own[name].reads
    kinds = {"pool": OF_MEMBERS, "classifier": OF_CLASSIFIER, "map": {"variance"}}
    return {kind for kind, inputs in kinds.items() if reads & inputs} or {"image"}


def kinds_of(run: Run) -> set[str]:
    """Of the scores that the report asks for."""
    own = own_of(run)
    return {kind for name in options_of(run.cfg).scores for kind in reads_of(name, own)}


def report_scores(at: Address, samples: Samples) -> dict[str, Tensor]:
    """The scores ``(B,)`` that the report asks for; a higher number is more uncertain.

    Every process takes part; the first one gets them. They are computed once and kept, exactly,
    beside the figures; members and the likelihood are kept with the pools of the studies.

    Args:
        at: where the cell is, with its run.
        samples: the run's own.
    """
    return scores_of(at).arrays(lambda: _computed(at.setup, samples.in_model_range()))


def scores_of(at: Address) -> Artefact:
    """The file of the scores that the report asks for."""
    return Artefact(at.folder / SCORES_FILE, scores_key(at.setup.run, at.maps.key), "image_scores")


def scores_key(run: Run, maps: str) -> str:
    """What the report's scores come from.

    Args:
        run: with its options.
        maps: key of the maps.
    """
    shown, kinds = options_of(run.cfg), kinds_of(run)
    options = {
        "members": shown.members if kinds & {*OF_POOL} else 0,
        "likelihood_steps": shown.likelihood_steps if "likelihood" in kinds else 0,
        "judge": [scored(run), run.data.data.images_fingerprint] if kinds & {*JUDGED} else None,
    }
    return key_of(maps, shown.scores, options, *source_of(run.cfg, shown.scores))


def _computed(setup: Setup, samples: Samples) -> dict[str, Tensor]:
    """The scores that are asked for and no others, of images in [-1, 1]."""
    run = setup.run
    shown, kinds, images = options_of(run.cfg), kinds_of(run), samples.images
    found: dict[str, Tensor] = {}
    for name in shown.scores:
        kind, _, what = name.partition(".")
        if kind == "map":
            found[name] = map_score(samples, what)
        elif kind == "image":
            found[name] = IMAGE_SCORES[what](images)
    pool = ImagePool(setup, len(images), run.cfg.seed)
    if NLL in shown.scores:
        found[NLL] = pool.likelihood(images, shown.likelihood_steps)["bits_per_dim"]
    members = pool.members(shown.members) if kinds & {*OF_POOL} else None
    if rank():
        return {}
    if kinds & {*JUDGED}:
        found |= judged(run, samples, Seen(members), [*kinds])
    if own := own_of(run):
        given = inputs_of(own.values(), run, samples, members)
        found |= {name: score(given) for name, score in own.items()}
    return {name: found[name] for name in shown.scores}
