"""Reading trained weights: of this program, of Lightning, of anyone; no code in a file is run."""

import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.storage.artefacts import read_json, weights_key

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"

# Where other programs keep weights in their files; averaged ones, of whatever name, go first.
_NESTED = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights",
)  # fmt: skip
_AVERAGED = ("ema", "averag", "shadow")
_DEPTH = 3  # dictionaries within each other


def sampled_checkpoint(folder: Path) -> Path:
    """The checkpoint in a run folder that its stages read: the last, or the best one."""
    record = read_json(folder / "fit.json") or {}
    return folder / "checkpoints" / str(record.get("checkpoint", LAST))


def checkpoint_at(path: str | Path) -> Path:
    """The checkpoint that a path names, a file or the folder of a finished run.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    found = sampled_checkpoint(path) if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"no checkpoint at {found}; train first, or correct the path")
    return found


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain values and tensors, the weights under ``state_dict``.

    Args:
        path: of a Lightning checkpoint, a state dict (``.pth``, ``.pt``), alone or nested under a
            usual name such as ``model`` or ``ema``, or a ``.safetensors`` file.

    Raises:
        UserError: if it is missing, truncated, holds code, or has no weights.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train first, or correct ckpt_path")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content, dict):
        for name, state in _states(content):
            if name not in ("", "state_dict"):
                _say(path, name)
            return content | {"state_dict": state} if name else {"state_dict": state}
    raise UserError(
        f"{path} has no weights: it is not a Lightning checkpoint or a state_dict of tensors; "
        "save model.state_dict()"
    )


@cache  # a run reads a file several times
def _say(path: Path, name: str) -> None:
    log.info("%s: its weights are those under %r", path, name)


def _states(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Where weights are in a file's content.

    Yields:
        Names and dictionaries of tensors, the best guess first.

    Raises:
        UserError: if there are averages in a form that cannot be read beside other weights.
    """
    found = dict(_nested(content))
    raw = {name: found[name] for name in _names(found) if not _is_averaged(name)}
    if "pytorch-lightning_version" not in content:  # its state_dict has the averages in it already
        least = len(next(iter(raw.values()), ()))
        averaged = {n: s for n, s in found.items() if _is_averaged(n) and len(s) >= least}
        yield from averaged.items()
        odd = [n for n, v in content.items() if _is_averaged(str(n)) and _has_tensors(v)]
        if raw and odd and not averaged:
            raise UserError(
                f"the averaged weights under {odd[0]!r} are no dictionary of tensors, and those "
                f"under {next(iter(raw))!r} are not averaged; save the ones you mean alone"
            )
    yield from raw.items()
    if content and all(map(torch.is_tensor, content.values())):
        yield "", content


def _nested(content: dict[Any, Any], above: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors inside of another one.

    Yields:
        Its place, dotted, and itself.
    """
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            if all(map(torch.is_tensor, value.values())):
                yield name, value
            elif name.count(".") + 1 < _DEPTH:
                yield from _nested(value, f"{name}.")


def _names(found: Mapping[str, Any]) -> list[str]:
    """The usual ones of these names, or what is right below them, in order."""
    return [n for start in _NESTED for n in (start, f"{start}.state_dict") if n in found]


def _is_averaged(name: str) -> bool:
    return any(word in name.lower() for word in _AVERAGED)


def _has_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return any(map(_has_tensors, values))
    return torch.is_tensor(value) and value.ndim > 0


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is truncated or corrupt; copy it again") from error


def _read_torch(path: Path) -> Any:
    damaged = (
        f"checkpoint {path} is truncated or corrupt; correct ckpt_path, or delete a run's own "
        "last.ckpt to train again"
    )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # torch reads past a wrong checksum
                if file.testzip() is not None:
                    raise UserError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} holds code or is no checkpoint, it was not run; "
            "save plain tensors and values instead"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the reader meets arbitrary bytes and may raise anything
        raise UserError(damaged) from error


def note_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run it is of: key, config, data; empty in others' files."""
    note = read_checkpoint(path).get("bayesdiff")
    return note if isinstance(note, dict) else {}


def require_options(path: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a checkpoint that was trained with other options, which no shape need betray.

    Args:
        path: of the checkpoint; those of other programs say nothing and are taken.
        config: options here, nested.
        names: of those that must be the same, such as ``model.prediction``; ``net`` is all of it.

    Raises:
        UserError: if one is not.
    """
    there = note_of(path).get("config")
    if not there:
        return
    for name in names:
        one, other = (_leaves(values, name) for values in (config, there))
        for leaf in one | other:
            if one.get(leaf) != other.get(leaf):
                raise UserError(
                    f"checkpoint {path} was trained with {leaf}={other.get(leaf)}, not "
                    f"{one.get(leaf)}; give the options it was trained with"
                )


def require_guidance(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse guidance by an answer without class that the checkpoint never learnt.

    Args:
        path: of the checkpoint; those of other programs say nothing and are taken.
        config: options here, nested.

    Raises:
        UserError: if its training hid no class.
    """
    guidance = config["solver"].get("guidance", 1)
    learnt = (note_of(path).get("config") or {}).get("model", {})
    if guidance != 1 and learnt.get("class_dropout") == 0:
        raise UserError(
            f"solver.guidance={guidance} needs a network that was trained with classes left out, "
            f"and checkpoint {path} had model.class_dropout=0; use solver.guidance=1"
        )


def _leaves(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values at ``name`` and below it, by their full names."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key in value for k, v in _leaves(config, f"{name}.{key}").items()}


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a checkpoint's (averaged) weights into the model and return their key.

    Raises:
        UserError: if the checkpoint cannot be read, or belongs to another network.
    """  # noqa: DOC502 - raised one level down
    checkpoint = read_checkpoint(path)
    state, own = checkpoint["state_dict"], model.state_dict()
    if "bayesdiff" not in checkpoint and own.keys() != state.keys():
        state = _renamed(own, state, path)
    return load_state(model, state, path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> str:
    """Load the weights that were read from ``path`` into the model and return their key.

    Raises:
        UserError: if they belong to another network.
    """
    own = model.state_dict()
    odd = [n for n in own.keys() | state.keys() if _shape(own, n) != _shape(state, n)]
    if odd:
        name = min(odd)
        raise UserError(
            f"checkpoint {path} belongs to another network: {name} is {_shape(state, name)} there "
            f"and {_shape(own, name)} here; {_cure(odd)}"
        )
    model.load_state_dict(state)
    return weights_key(model)


def _renamed(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path
) -> Mapping[str, Tensor]:
    """The state under the names of this model, where others' only have another beginning.

    Names may lack ``net.``, or have more before it: ``module.``, ``ema_model.module.net.``.
    """
    bare = {name.removeprefix("net."): name for name in own}
    # An average may keep a count of its updates beside its weights, a module its other parts.
    first = max(bare, key=len)
    starts = [name.removesuffix(first) for name in state if name.endswith(first)]
    whole = [start for start in starts if all(start + name in state for name in bare)]
    if not whole:
        return state
    averaged = [start for start in whole if any(word in start.lower() for word in _AVERAGED)]
    start = min(averaged or whole, key=len)
    unknown = [n for n in state if n.startswith(start) and n.removeprefix(start) not in bare]
    beside = [n for n in state if not n.startswith(start)]
    if unknown:
        return state
    if beside:
        log.info("%s: %d tensors beside %s... are left out", path, len(beside), start)
    return {full: state[start + name] for name, full in bare.items()}


def _cure(odd: Sequence[str]) -> str:
    """What to do about weights that do not fit."""
    if all(".classes." in f".{name}" for name in odd):
        return (
            "the number of classes differs; give data with as many classes as it was trained on, "
            "or train on the new data from the beginning"
        )
    return "give the options it was trained with"


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "missing"
