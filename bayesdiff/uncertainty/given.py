"""Whether values that every estimator is given can be meant."""

from collections.abc import Sequence
from typing import Any

from bayesdiff.checks import UserError, at_least, listed


def check_chosen(
    labels: Sequence[int | str] | None = None, numbers: Sequence[int] | None = None
) -> None:
    """Refuse classes or numbers that are no list, or both.

    Raises:
        UserError: one line with the cure.
    """
    if labels is not None:
        listed("uncertainty.labels", labels, "[3,5]")
    if numbers is not None:
        listed("uncertainty.numbers", numbers, "[0,17,905]")
    if labels is not None and numbers is not None:
        raise UserError(
            f"uncertainty.numbers={list(numbers)} have their classes already; leave "
            f"uncertainty.labels={list(labels)} out"
        )


def check_times(given: Any) -> None:
    """Refuse times where there is nothing to record.

    Raises:
        UserError: one line with the cure.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(
            f"uncertainty.times must be a list such as [0.5,0.9], got {given!r}; [] is none"
        )
    for time in given:
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 < time < 1:
            raise UserError(
                f"uncertainty.times must lie between 0 and 1, got {time!r}; "
                "noise is at 0, and the image itself at 1"
            )


def check_validation(validate: Any, images: int, members: int, maps: int) -> None:
    """Refuse a comparison that could not be made.

    Args:
        validate: whether maps are compared.
        images: how many.
        members: of the reference.
        maps: that there are.

    Raises:
        UserError: one line with the cure.
    """
    if not isinstance(validate, bool):
        raise UserError(f"uncertainty.validate must be true or false, got {validate!r}")
    at_least("uncertainty.validate_images", images, 3)
    at_least("uncertainty.validate_members", members, 2)
    if validate and images > maps:
        raise UserError(
            f"uncertainty.validate_images={images} is more than the "
            f"{maps} maps of uncertainty.num_images or numbers; compare fewer, or "
            "map more images"
        )
