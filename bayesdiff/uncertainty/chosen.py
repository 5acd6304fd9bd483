"""Which samples get a map: the first ones, those of some classes, or those with given numbers.

A sample's number decides its class (all in turn) and its noise, so that number 17 is the same
image with the same map wherever it is asked for.
"""

from collections.abc import Sequence
from typing import Any

from bayesdiff.checks import UserError, few
from bayesdiff.uncertainty.estimator import Estimator, Training

_MOST = 2**32  # seeds of the noise repeat from there on


def sample_numbers(estimator: Estimator, run: Training) -> list[int] | None:
    """Numbers of the samples that get a map; None for 0, 1, ...

    Of chosen classes, these are the samples of lowest number, the classes in the order they are
    asked for, again and again.

    Args:
        estimator: with what is asked for.
        run: whose samples they are.

    Raises:
        UserError: for classes that the model does not know, or numbers that no sample has.
    """  # noqa: DOC502 - raised one level down
    if estimator.numbers is not None:
        return [_number(number) for number in estimator.numbers]
    if estimator.labels is None:
        return None
    count = run.model.num_classes
    if not count:
        raise UserError(
            f"uncertainty.labels={list(estimator.labels)} of a model that has no classes in "
            "turn; use model.num_classes=auto with condition=labels, or uncertainty.numbers"
        )
    classes = [_class(label, run.data.data.classes, count) for label in estimator.labels]
    if len(set(classes)) < len(classes):
        raise UserError(
            f"uncertainty.labels={list(estimator.labels)} names a class twice; give each once"
        )
    turns = range(estimator.num_images)
    return [classes[k % len(classes)] + count * (k // len(classes)) for k in turns]


def check_samples(estimator: Estimator, run: Training) -> None:
    """Refuse samples that there are none of, and data that cannot have such maps or files."""
    estimator.check_data(run.data.data)
    sample_numbers(estimator, run)
    check_export("uncertainty.export", estimator.export, run)


def check_export(name: str, kind: Any, run: Training, images: int = 1) -> None:
    """Refuse another format than PNG, or images that it cannot hold.

    Args:
        name: of the option.
        kind: its value.
        run: whose images are to be written.
        images: their number.

    Raises:
        UserError: one line with the cure.
    """
    if kind is None:
        return
    if not images:
        raise UserError(
            f"{name}={kind} has no images with metrics.num_images=0; ask for some, or use "
            "uncertainty.export for the images with maps"
        )
    if kind != "png":
        raise UserError(f"unknown {name} {kind!r}; choose png, or null for no files")
    if not run.data.space.pictures:
        raise UserError(f"{name}=png writes pictures, and {run.data.data.name} has none; use null")
    channels = run.data.data.channels
    if channels not in (1, 3):
        raise UserError(
            f"{name}=png shows images of 1 or 3 channels, these have {channels}; use null and "
            "read samples-*.npz"
        )


def _number(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < _MOST:
        raise UserError(
            f"uncertainty.numbers must be whole numbers from 0 to below {_MOST}, got {given!r}"
        )
    return given


def _class(label: Any, classes: Sequence[str], count: int) -> int:
    """Number of a class, given by it or by its name."""
    number = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count
    named = None if isinstance(label, bool) or str(label) not in classes else str(label)
    if named is not None and not number:  # text, or a number that no class has
        return classes.index(named)
    if named is not None and (other := classes.index(named)) != label:
        raise UserError(
            f"uncertainty.labels {label} is the number of class {classes[label]!r}, and the name "
            f"of class number {other}; give names in quotes, such as '\"{label}\"'"
        )
    if not number:
        raise UserError(
            f"unknown uncertainty.labels {label!r}; choose from 0 to {count - 1}"
            + (f", or by name: {few(classes, 20)}" if classes else "")
        )
    return int(label)
