"""Which scores a threshold can be set on: those that a single new image has by itself."""

from collections.abc import Mapping
from typing import Any, Protocol

from bayesdiff.checks import UserError, few
from bayesdiff.studies.own_scores import OwnScore
from bayesdiff.uncertainty.scores.of_maps_and_images import IMAGE_SCORES, MAP_SCORES
from bayesdiff.uncertainty.scores.of_members import CONFIDENCE_SCORES, MEMBER_SCORES

# Ranks among the images of a pool, and a lot that follows their places.
_OF_POOLS = {
    "members.joint": "ranks an image among the others of its pool",
    "random": "is drawn by an image's place in its pool",
}


class Scored(Protocol):
    """The options of a study that say which scores there are."""

    members: int
    aleatoric_draws: int
    aleatoric_zigzag: int
    likelihood: bool
    encoders: Mapping[str, Any]

    @property
    def own(self) -> Mapping[str, OwnScore]:
        """Scores of the user's own."""
        ...


def usable(options: Any, estimator: str, labelled: bool) -> list[str]:
    """Names of the scores that read nothing of other images, if the user's own do not.

    Args:
        options: of the study, ``Scored`` with its ``maps``.
        estimator: name of the run's own.
        labelled: whether images are asked for by class.
    """
    given: Scored = options
    estimators = (estimator, *options.maps)
    names = [f"{each}.{name}" for each in estimators for name in MAP_SCORES]
    names += [f"image.{name}" for name in IMAGE_SCORES]
    names += [f"classifier.{n}" for n in CONFIDENCE_SCORES if labelled or n != "off_label"]
    names += ["real.realism", "real.rarity"]
    if given.members:
        names += [f"members.{name}" for name in MEMBER_SCORES]
        of_features = [name for name, each in MEMBER_SCORES.items() if each.reads == "features"]
        names += [f"members.{name}_{each}" for name in of_features for each in given.encoders]
    if given.aleatoric_draws:
        kinds = ("", "zigzag_") if given.aleatoric_zigzag else ("",)
        names += [f"aleatoric.{kind}{n}" for kind in kinds for n in ("centred", "variance")]
    if given.likelihood:
        names.append("likelihood.bits_per_dim")
    for own in given.own.values():
        names += [own.of_estimator(e) for e in estimators] if own.of_map else [own.name]
    return names


def require_usable(options: Any, score: str, estimator: str, labelled: bool) -> None:
    """Refuse a score that a single new image does not have.

    Raises:
        UserError: one line with the cure.
    """
    option = f"filtering.guarantee_score={score}"
    if score in _OF_POOLS:
        raise UserError(
            f"{option} {_OF_POOLS[score]}, so that a threshold of it means nothing for a new one; "
            "use members.predictive_entropy, or classifier.class_entropy"
        )
    if str(score).startswith("members.") and not options.members:
        raise UserError(
            f"{option} reads members; give filtering.members, 2 or more, or "
            "filtering.guarantee_score=classifier.class_entropy"
        )
    there = usable(options, estimator, labelled)
    if score not in there:
        known = sorted(there, key=lambda name: name.startswith(tuple(options.maps)))
        raise UserError(f"unknown {option}; choose from {few(known, 100)}")
