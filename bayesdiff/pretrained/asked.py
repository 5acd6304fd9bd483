"""What users ask of a Bayesian pipeline, refused where it cannot be."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import check_settings
from bayesdiff.options.spelling import near
from bayesdiff.pretrained.classes import check_classes
from bayesdiff.pretrained.followed import FollowedPipeline
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty import Estimator

_SETTINGS = ("structure", "sigma_noise", "prior_precision", "n_eff", "rank")
_PASS = ("draws", "num_images", "seed", "time_bins")


def shown_by(
    followed: FollowedPipeline,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | None,
    count: int | None,
) -> list[Any]:
    """What images show, one value each; nothing where the pipeline takes no condition.

    Raises:
        UserError: for values that it does not take, or another number of them.
    """
    who, name = followed.who, followed.condition
    for kind, plural, values in (
        ("prompt", "prompts", prompts), ("class_labels", "class labels", labels),
    ):  # fmt: skip
        if kind != name and values is not None:
            raise UserError(f"{who} takes no {plural}; leave them out")
        if kind == name and values is None:
            raise UserError(f"{who} takes {plural}; give one for each image")
        if kind == name and values is not None and count not in (None, len(values)):
            raise UserError(f"{len(values)} {plural} for {count} images; give one for each")
    values = prompts if name == "prompt" else labels
    if values is not None and not len(values):
        raise UserError(
            f"{who} takes prompts or class labels, and there are none; give at least one"
        )
    shown = [] if values is None else as_list(values)
    if name == "class_labels":
        check_classes(shown, followed.class_rows, who)
    return shown


def count_of(shown: Sequence[Any], num_images: int | None) -> int:
    """Images that are asked for: one for each of what they show, unless a number is given.

    Raises:
        UserError: for fewer than there are prompts or classes.
    """
    if num_images is None:
        return len(shown) or 1
    if at_least("num_images", num_images) < len(shown):
        raise UserError(
            f"num_images={num_images} leaves out some of the {len(shown)} prompts or classes; "
            "give as many or more, or fewer of these"
        )
    return num_images


def as_list(values: Any) -> list[Any]:
    """Values of a tensor or an array as plain ones, and any others as they are."""
    plain = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    return [each.item() if isinstance(each, Tensor | np.generic) else each for each in plain]


def check_posterior(settings: Mapping[str, Any]) -> None:
    """Refuse settings that a posterior does not have, or cannot have.

    Raises:
        UserError: for one that it does not have.
    """
    for name in settings:
        if name not in _SETTINGS:
            raise UserError(f"a posterior has no {name!r}{near(name, _SETTINGS)}")
    check_settings(**{"structure": "full", **settings})


def check_pass_options(options: Mapping[str, Any]) -> None:
    """Refuse options that the pass over the images does not have.

    Raises:
        UserError: with the name that was meant.
    """
    for name in options:
        if name not in _PASS:
            raise UserError(f"fit takes no {name!r}{near(name, _PASS)}")


def check_kinds(estimator: Any, solver: Any) -> None:
    """Refuse words in the place of objects.

    Raises:
        UserError: with an example of what to give.
    """
    if not isinstance(estimator, Estimator):
        raise UserError(
            f"uncertainty={estimator!r} is no estimator; give one, as Ensemble(members=16)"
        )
    if solver is not None and not isinstance(solver, Solver):
        raise UserError(f"solver={solver!r} is no solver; give one, as DDIM(num_steps=20)")
