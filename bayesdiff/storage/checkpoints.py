"""Reading trained weights: of this program, of Lightning, of anyone; no code in a file is run."""

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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
# Words of a name: state_dict_ema, netEMA and shadow_params are averages, semantic is none.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGED = re.compile(r"ema|shadow|averag.*", re.IGNORECASE)
_DEPTH = 3  # dictionaries within each other


def sampled_checkpoint(folder: Path) -> Path:
    """The checkpoint in a run folder that its stages read: the last, or the best one."""
    record = read_json(folder / "fit.json") or {}
    return folder / "checkpoints" / str(record.get("checkpoint", LAST))


def checkpoint_at(path: str | Path, option: str, own: Path | None = None) -> Path:
    """The checkpoint that an option names, by a file or by the folder of a finished run.

    Args:
        path: of the file or folder.
        option: whose value it is, for the message.
        own: folder of the present run, which need not be finished yet.

    Raises:
        UserError: if there is none, or the run has not finished: its checkpoint changes as it
            goes on.
    """
    path = Path(path)
    if not path.is_dir():
        if path.is_file():
            return path.resolve()
        raise UserError(f"no checkpoint at {path}, which {option} names; correct the path")
    last = sampled_checkpoint(path.resolve())
    mine = own is not None and path.resolve() == own.resolve()
    if not mine and not ((path / "fit.json").is_file() and last.is_file()):
        raise UserError(
            f"{path}, which {option} names, holds no finished training; finish it with its own "
            "command, or name another one"
        )
    return last


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain values and tensors, the weights under ``state_dict``.

    Args:
        path: of a Lightning checkpoint, a state dict (``.pth``, ``.pt``), alone or nested under a
            usual name such as ``model`` or ``ema``, or a ``.safetensors`` file.

    Raises:
        UserError: if it is missing, truncated, holds code, or has no weights.
    """
    content = _content(path)
    if isinstance(content, dict):
        for name, state in _states(content):
            if name not in ("", "state_dict"):
                log.info("%s: its weights are those under %r", path, name)
            return content | {"state_dict": state} if name else {"state_dict": state}
    raise UserError(
        f"{path} has no weights: it is not a Lightning checkpoint or a state_dict of tensors; "
        "save model.state_dict()"
    )


def _content(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train first, or correct ckpt_path")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


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


def _nested(
    content: dict[Any, Any], above: str = "", depth: int = 1
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors inside of another one.

    Yields:
        Its place, dotted, and itself.
    """
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            if all(map(torch.is_tensor, value.values())):
                yield name, value
            elif depth < _DEPTH:
                yield from _nested(value, f"{name}.", depth + 1)


def _names(found: Mapping[str, Any]) -> list[str]:
    """The usual ones of these names, or what is right below them, in order."""
    return [n for start in _NESTED for n in (start, f"{start}.state_dict") if n in found]


def _is_averaged(name: str) -> bool:
    return any(map(_AVERAGED.fullmatch, _WORD.findall(name)))


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


def note_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run it is of: key, config, data; empty in others' files."""
    note = checkpoint.get("bayesdiff")
    return note if isinstance(note, dict) else {}


def note_at(path: Path) -> dict[str, Any]:
    """``note_of`` a file whose weights have been read before.

    Raises:
        UserError: if it is missing, truncated, or holds code.
    """  # noqa: DOC502 - raised one level down
    content = _content(path)
    return note_of(content) if isinstance(content, dict) else {}


def load_weights(model: nn.Module, path: Path, checkpoint: Mapping[str, Any] | None = None) -> str:
    """Load a checkpoint's (averaged) weights into the model and return their key.

    Args:
        model: takes them.
        path: of the file.
        checkpoint: its content, where it has been read already.

    Raises:
        UserError: if the checkpoint cannot be read, or belongs to another network.
    """  # noqa: DOC502 - raised one level down
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
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
    start = min([s for s in whole if _is_averaged(s)] or whole, key=len)
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
