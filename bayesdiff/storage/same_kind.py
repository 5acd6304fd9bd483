"""Whether weights belong to the options here, which no shape of a tensor need betray."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bayesdiff.checks import UserError
from bayesdiff.options.values import leaves_at
from bayesdiff.storage.checkpoints import note_of


def kind_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the options that make weights what they are: another value, other images."""
    net = (f"net.{name}" for name in config["net"] if name != "dropout")
    likelihood = ("_target_", *(config["model"].get("likelihood") or {}))
    law = (f"model.likelihood.{name}" for name in likelihood if name not in ("sampled", "final"))
    given = config["model"].get("condition") or {}
    # Its _target_ is left out: older checkpoints have none, and the network's arguments tell.
    condition = (f"model.condition.{name}" for name in given if name != "_target_")
    return ("model.prediction", "model.wrapper", *law, *condition, "path", "data.space", *net)


def differences(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Options that a checkpoint was trained with and that are others here.

    Args:
        checkpoint: those of other programs say nothing.
        config: options here, nested.
        names: of those that are compared, such as ``model.prediction``; ``net`` is all of it.

    Yields:
        Name, value there and value here.
    """
    there: Mapping[str, Any] = note_of(checkpoint).get("config") or {}
    for name in names if there else ():
        one, other = (leaves_at(values, name) for values in (config, there))
        for leaf in one | other:
            if one.get(leaf) != other.get(leaf):
                yield leaf, other.get(leaf), one.get(leaf)


def require_options(
    path: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Refuse a checkpoint that was trained with other options.

    Args:
        path: of the checkpoint.
        checkpoint: its content; see ``differences`` for the rest.
        config: options here, nested.
        names: of those that must be the same.

    Raises:
        UserError: if one is not.
    """
    for name, there, here in differences(checkpoint, config, names):
        raise UserError(
            f"checkpoint {path} was trained with {name}={there}, not {here}; "
            "give the options it was trained with"
        )


def require_guidance(path: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse guidance by an answer without class that the checkpoint never learnt.

    Args:
        path: of the checkpoint.
        checkpoint: its content; those of other programs say nothing and are taken.
        config: options here, nested.

    Raises:
        UserError: if its training hid no class.
    """
    guidance = config["solver"].get("guidance", 1)
    learnt = (note_of(checkpoint).get("config") or {}).get("model", {})
    if guidance != 1 and learnt.get("class_dropout") == 0:
        raise UserError(
            f"solver.guidance={guidance} needs a network that was trained with classes left out, "
            f"and checkpoint {path} had model.class_dropout=0; use solver.guidance=1"
        )
