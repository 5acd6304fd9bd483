"""The parts of a pipeline as they were when bayesdiff first saw them."""

from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.pretrained.listening import network_name
from bayesdiff.pretrained.loop import check_corrector
from bayesdiff.storage.artefacts import weights_key

_VALUES = 8  # of every tensor that are looked at again


class Parts:
    """Networks, coders and encoders of a pipeline, and whether they are still what they were.

    Weights are compared by PyTorch's count of their changes in place and by a few values of every
    tensor, which takes milliseconds: what writes past that count, as averages of weights do,
    changes values.

    Args:
        pipe: of diffusers.
    """

    def __init__(self, pipe: Any) -> None:
        self._parts = {n: part for n, part in pipe.components.items() if n != "scheduler"}
        self._network = self._parts[network_name(pipe)]
        self._seen = {name: _traces(part) for name, part in self._parts.items()}
        self._key = ""

    @property
    def key(self) -> str:
        """Of the network's weights."""
        self._key = self._key or weights_key(self._network)
        return self._key

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline that has changed.

        Raises:
            UserError: with the part that is another one, or has other weights.
        """
        cure = "make a new BayesianPipeline of it, and fit that"
        for name, part in self._parts.items():
            if pipe.components.get(name) is not part:
                raise UserError(
                    f"the pipeline's {name} is another one than at the beginning; {cure}"
                )
            if _traces(part) != self._seen[name]:
                raise UserError(
                    f"weights of the pipeline's {name} were changed, moved or cast since the "
                    f"beginning; {cure}"
                )


def _traces(part: Any) -> list[str]:
    """Of every tensor of a module what would change with it."""
    if not isinstance(part, nn.Module):
        return []
    named = [*part.named_parameters(), *part.named_buffers()]
    return [f"{name} {_trace(value.detach(), _version(value))}" for name, value in named]


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def _trace(value: Tensor, version: int) -> str:
    text = f"{tuple(value.shape)} {value.dtype} {value.device} {version}"
    if value.is_meta or not value.numel():
        return text
    # In the order of memory, so that nothing is copied whatever the layout is.
    room = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
    count = min(_VALUES, room)
    few = torch.as_strided(value, (count,), (room // count,), value.storage_offset())
    return f"{text} {few.tolist()}"


def check_pipeline(pipe: Any) -> None:
    """Refuse what changes images behind the decoder, and what is no pipeline.

    Raises:
        UserError: one line with the cure.
    """
    if not hasattr(pipe, "components") or not hasattr(pipe, "scheduler"):
        raise UserError(
            f"{type(pipe).__name__} is no pipeline of diffusers; load one with "
            "DiffusionPipeline.from_pretrained(path)"
        )
    check_corrector(pipe.scheduler)
    if pipe.components.get("safety_checker") is not None:
        raise UserError(
            "safety_checker puts black images in the place of some, whose maps would be of "
            "others; load the pipeline with safety_checker=None"
        )
