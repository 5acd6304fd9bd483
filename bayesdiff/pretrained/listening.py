"""A pipeline is not described, it is listened to: what it gives its network and its scheduler.

Pipelines of diffusers differ in names, units of time, order of the two halves of guidance and in
what they make of the output. All that shows in one run of the pipeline's own code, in which the
network answers with whatever is asked for.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, one_line

Key = tuple[int | str, ...]  # an argument's place or name, and names inside of it
# From (number of the call, what the network really would say) to what it says.
Answer = Callable[[int, Callable[[], Tensor]], Tensor]
Decoded = Callable[[Tensor], Tensor]


class Said(tuple):
    """A network's output as pipelines read it: ``[0]``, or ``.sample``."""

    @property
    def sample(self) -> Tensor:
        """The output."""
        first: Tensor = self[0]
        return first


@dataclass
class NetworkCall:
    """One call of the network: its arguments, flat, and its output."""

    given: dict[Key, Any]
    output: Tensor


@dataclass
class SchedulerStep:
    """One step of the scheduler: what it was given, and how many network calls came before.

    Beside it: the state that it gave, and further arguments that are plain numbers.
    """

    output: Tensor
    time: float
    sample: Tensor
    calls: int
    options: dict[str, Any]
    result: Tensor | None = None


@dataclass
class Heard:
    """One run of a pipeline.

    Attributes:
        calls: of its network.
        steps: of its scheduler.
        scheduler: as it was before the first step.
        decoded: what the decoder was given.
        result: what the pipeline gave.
    """

    calls: list[NetworkCall] = field(default_factory=list)
    steps: list[SchedulerStep] = field(default_factory=list)
    scheduler: Any = None
    decoded: list[Tensor] = field(default_factory=list)
    result: Any = None

    @property
    def unscaled_by(self) -> float:
        """What the scheduler's first noise is too small by; 1 where the pipeline scales it."""
        asked = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        found = float(self.steps[0].sample.float().square().mean().sqrt())
        # Of a few hundred numbers; the two differ by a factor of ten or so.
        return asked if abs(math.log(found)) < abs(math.log(found / asked)) else 1.0


def sharing_copy(module: nn.Module) -> nn.Module:
    """A module of its own that shares the memory of its weights with this one."""
    memo: dict[int, Any] = {}
    for weight in module.parameters():
        memo[id(weight)] = nn.Parameter(weight.data, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo).eval()


def network_name(pipe: Any) -> str:
    """Name of the component that a pipeline calls at every step.

    Raises:
        UserError: if none, or more than one, takes a time.
    """
    found = []
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            names = inspect.signature(part.forward).parameters
            if {"timestep", "timesteps"} & set(names):
                found.append(name)
    if len(found) != 1:
        raise UserError(
            f"{type(pipe).__name__} has {len(found)} networks that take a timestep"
            f"{': ' + ', '.join(found) if found else ''}; give a pipeline with one"
        )
    return found[0]


def flat(args: tuple, kwargs: dict[str, Any]) -> dict[Key, Any]:
    """Arguments by where they are, dictionaries opened."""
    found: dict[Key, Any] = {}

    def put(key: Key, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, each in value.items():
                put((*key, name), each)
        else:
            found[key] = value

    for number, value in enumerate(args):
        put((number,), value)
    for name, value in kwargs.items():
        put((name,), value)
    return found


def unflat(given: dict[Key, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments again, from what ``flat`` made of them."""
    kwargs: dict[Any, Any] = {}
    for key, value in given.items():
        place = kwargs
        for name in key[:-1]:
            place = place.setdefault(name, {})
        place[key[-1]] = value
    args = [kwargs.pop(number) for number in range(len(kwargs)) if number in kwargs]
    return args, kwargs


@torch.no_grad()
def listen(
    pipe: Any,
    *args: Any,
    answer: Answer,
    last: Callable[[Tensor], Tensor] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Heard:
    """Run a pipeline whose network answers what it is told, and return what it was given.

    Args:
        pipe: of diffusers; it is never changed.
        args: of the pipeline.
        answer: to every call of the network; calling its second argument runs the network.
        last: makes another state of the last one, before it is decoded; None leaves it.
        beside: further arguments of the network, which the pipeline does not know of.
        kwargs: of the pipeline.

    Raises:
        UserError: if the pipeline does not run.
    """
    heard, own = Heard(), copy.copy(pipe)
    name = network_name(pipe)
    setattr(own, name, _heard_network(getattr(pipe, name), heard, answer, beside or {}))
    own.scheduler = _heard_scheduler(pipe.scheduler, heard, last)
    for part in ("vae", "vqvae"):
        if isinstance(coder := pipe.components.get(part), nn.Module):
            setattr(own, part, _heard_decoder(coder, heard))
    if "safety_checker" in pipe.components:
        own.safety_checker = None
    own.set_progress_bar_config(disable=True)
    try:
        with torch.random.fork_rng(devices=[]):  # the user's own noise goes on as it was
            heard.result = own(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{type(pipe).__name__} does not run with these arguments: {one_line(error)}"
        ) from error
    if not heard.steps:
        raise UserError(f"{type(pipe).__name__} never calls its scheduler's step")
    return heard


def _heard_network(
    module: nn.Module, heard: Heard, answer: Answer, beside: Mapping[str, Tensor]
) -> nn.Module:
    own = sharing_copy(module)
    forward = own.forward

    @functools.wraps(forward)
    def tapped(*args: Any, **kwargs: Any) -> Said:
        kwargs = {**beside, **kwargs}

        def really() -> Tensor:
            output: Any = forward(*args, **kwargs)
            return output if isinstance(output, Tensor) else output[0]

        said = answer(len(heard.calls), really)
        heard.calls.append(NetworkCall(flat(args, kwargs), said))
        return Said((said,))

    own.forward = tapped
    return own


def _heard_scheduler(scheduler: Any, heard: Heard, last: Callable[[Tensor], Tensor] | None) -> Any:
    own = copy.deepcopy(scheduler)
    name = "step_pred" if hasattr(own, "step_pred") else "step"
    step, scale = getattr(own, name), getattr(own, "scale_model_input", None)

    def remember() -> None:
        if heard.scheduler is None:
            bare = copy.copy(own)
            for hook in (name, "scale_model_input"):
                bare.__dict__.pop(hook, None)
            heard.scheduler = copy.deepcopy(bare)

    @functools.wraps(step)
    def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *a: Any, **k: Any) -> Any:
        remember()
        calls = len(heard.calls)
        options = {n: v for n, v in k.items() if isinstance(v, int | float) and n != "return_dict"}
        here = SchedulerStep(model_output, float(timestep), sample, calls, options)
        heard.steps.append(here)
        result = step(model_output, timestep, sample, *a, **k)
        here.result = result[0]
        if last is not None and len(heard.steps) == len(own.timesteps):
            return _with_sample(result, last(sample))
        return result

    setattr(own, name, stepped)
    if scale is not None:

        @functools.wraps(scale)
        def scaled(sample: Tensor, *a: Any, **k: Any) -> Tensor:
            remember()
            result: Tensor = scale(sample, *a, **k)
            return result

        own.scale_model_input = scaled
    return own


def _with_sample(result: Any, state: Tensor) -> Any:
    """A scheduler's answer with another state in it."""
    if isinstance(result, tuple):
        return (state, *result[1:])
    changed = copy.copy(result)
    for name in ("prev_sample", "prev_sample_mean"):
        if getattr(changed, name, None) is not None:
            setattr(changed, name, state)
    return changed


def _heard_decoder(coder: nn.Module, heard: Heard) -> nn.Module:
    own = sharing_copy(coder)

    def decode(z: Tensor, *_args: Any, **_kwargs: Any) -> Said:
        heard.decoded.append(z)
        return Said((z.new_zeros(len(z), 3, 8, 8),))

    setattr(own, "decode", decode)  # noqa: B010 - modules are typed as having tensors
    return own
