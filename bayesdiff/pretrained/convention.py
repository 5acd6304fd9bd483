"""What a pipeline's run tells of its network: arguments, units of time, guidance, what is kept."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.pretrained.call import Call, Row
from bayesdiff.pretrained.listening import Heard, Key, NetworkCall, SchedulerStep
from bayesdiff.pretrained.loop_checks import check_loop, check_weights


@dataclass(frozen=True)
class Convention:
    """One run of a pipeline for one sample, understood.

    Attributes:
        call: how the network is called.
        given: arguments that belong to the sample.
        nothing: the same for the half without a condition; None without guidance.
        guidance: w, where outputs are combined as u + w (c - u); 1 for none.
        shape: of a state.
    """

    call: Call
    given: Row
    nothing: Row | None
    guidance: float
    shape: tuple[int, ...]


def convention_of(heard: Heard, who: str) -> Convention:
    """What a run of a pipeline for one sample tells, over at least two steps.

    Args:
        heard: the run; its network's outputs must be generic, noise for example.
        who: name of the pipeline, for errors.

    Raises:
        UserError: for a pipeline that does something else with its network.
    """
    step, calls = heard.steps[0], heard.calls[: heard.steps[0].calls]
    state = step.sample[:1]
    network_input = _network_input(heard, state)
    sample = _sample_key(calls[0], network_input, who)
    check_loop(heard, who)
    time, follows, scale, shift = _clock(heard, sample, who)
    parts = [(call, row) for call in calls for row in range(len(call.given[sample]))]
    channels, weights = _kept(step, parts, state.shape[1], who)
    rows = [_row(call, row, sample, time) for call, row in parts]
    total = sum(weights)
    sign = -1.0 if total < 0 else 1.0
    if abs(total - sign) > 1e-3:
        raise UserError(
            f"{who} gives its scheduler {total:.3g} times the network's output, and bayesdiff "
            "follows weights that add up to 1 or -1; a rescaled guidance is not linear, give "
            "guidance_rescale=0"
        )
    check_weights(heard, weights, state.shape[1], who)
    weights = [sign * weight for weight in weights]
    guided = max(range(len(weights)), key=lambda k: weights[k])
    others = [k for k in range(len(weights)) if k != guided and abs(weights[k]) > 1e-6]
    if len(others) > 1:
        raise UserError(f"{who} combines {len(others) + 1} outputs; guidance here has two")
    constants = {
        key: value
        for key, value in calls[0].given.items()
        if key not in (sample, time) and key not in rows[0]
    }
    call = Call(sample, time, scale, shift, follows, constants, channels, sign)
    nothing = rows[others[0]] if others else None
    guidance = round(weights[guided], 6) if others else 1.0
    return Convention(call, rows[guided], nothing, guidance, tuple(state.shape[1:]))


def _network_input(heard: Heard, state: Tensor) -> Tensor:
    """What the network should get for the first state, as the scheduler scales it."""
    scheduler = copy.deepcopy(heard.scheduler)
    if not hasattr(scheduler, "scale_model_input"):
        return state
    scaled: Tensor = scheduler.scale_model_input(state, scheduler.timesteps[0])
    return scaled


def _sample_key(call: NetworkCall, network_input: Tensor, who: str) -> Key:
    for key, value in call.given.items():
        if (
            isinstance(value, Tensor)
            and value.shape[1:] == network_input.shape[1:]
            and torch.allclose(value[:1].float(), network_input.to(value).float(), rtol=1e-5)
        ):
            return key
    raise UserError(
        f"{who} does not give its network the scheduler's state as scale_model_input makes it; "
        "some pipelines scale it twice or never, which spoils images with schedulers that scale: "
        "use one that does not, such as DDIMScheduler"
    )


def _clock(heard: Heard, sample: Key, who: str) -> tuple[Key, str, float, float]:
    """The argument that is the time, and what it is of the schedule's time steps or sigmas."""
    ends = [0, *(step.calls for step in heard.steps)]
    firsts = [heard.calls[k] for k in ends[:-1]]
    times = torch.tensor([step.time for step in heard.steps], dtype=torch.float64)
    for key, value in firsts[0].given.items():
        if key == sample or not isinstance(value, Tensor | float | int) or value is True:
            continue
        own = [_number(call.given.get(key)) for call in firsts]
        if any(each is None for each in own):
            continue
        told = torch.tensor(own, dtype=torch.float64)
        if len(told.unique()) < 2:
            continue
        # Two steps lie on a line whatever they are: what needs no shift comes first.
        ratio, rtol = float(told[0] / times[0]), _rounding(value)
        if torch.allclose(ratio * times, told, rtol=rtol, atol=0):
            return key, "timesteps", _plain(ratio), 0.0
        levels = _sigmas(heard.scheduler, len(times))
        if levels is not None and torch.allclose(levels, told, rtol=rtol, atol=0):
            return key, "sigmas", 1.0, 0.0
        scale = float((told[-1] - told[0]) / (times[-1] - times[0]))
        shift = float(told[0] - scale * times[0])
        if torch.allclose(scale * times + shift, told, rtol=rtol, atol=1e-3):
            return key, "timesteps", _plain(scale), _plain(shift)
    raise UserError(f"{who} gives its network no time that follows the scheduler's")


def _rounding(value: Any) -> float:
    """Relative rounding of a time as it is given."""
    half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return 4e-3 if half else 1e-5


def _sigmas(scheduler: Any, count: int) -> Tensor | None:
    """Noise levels of this many steps, where the scheduler has them."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or len(sigmas) < count:
        return None
    return sigmas[:count].double().cpu()


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        flat = value.flatten()
        same = flat.numel() and not value.is_complex() and bool((flat == flat[0]).all())
        return float(flat[0]) if same else None
    return float(value) if isinstance(value, float | int) else None


def _plain(value: float) -> float:
    """The round number that a value is in half precision: 0.001, 1, 1000."""
    for digits in (0, 1, 2, 3, 4):
        near = round(value, digits)
        if abs(value - near) <= 4e-3 * max(abs(near), 1e-3):
            return near
    return value


def _kept(
    step: SchedulerStep, parts: Sequence[tuple[NetworkCall, int]], states: int, who: str
) -> tuple[int | None, list[float]]:
    """Channels of the output that reach the scheduler, and the weight of every output there."""
    given = step.output[:1].double()
    outputs = torch.cat([call.output[row : row + 1] for call, row in parts]).double()
    channels = None if outputs.shape[1] == states else states
    # Schedulers with a learned variance are given it as well, behind the prediction.
    outputs, given = outputs[:, :states], given[:, :states]
    if outputs.shape[1:] != given.shape[1:]:
        raise UserError(
            f"{who} makes {tuple(given.shape[1:])} of the network's {tuple(outputs.shape[1:])}; "
            "bayesdiff follows pipelines that take the output as it is"
        )
    columns = outputs.flatten(1).T
    weights = torch.linalg.lstsq(columns, given.flatten()[:, None]).solution
    rest = (columns @ weights).flatten() - given.flatten()
    tolerance = 1e-4 if step.output.dtype in (torch.float32, torch.float64) else 3e-2
    if float(rest.abs().max()) > tolerance * float(given.abs().max()):
        raise UserError(
            f"{who} combines the network's outputs in a way that is not linear, such as a "
            "rescaled guidance; give guidance_rescale=0, or follow it with members alone"
        )
    return channels, [float(weight) for weight in weights]


def _row(call: NetworkCall, row: int, sample: Key, time: Key) -> Row:
    """Arguments that belong to one row of the network's batch."""
    batch = len(call.given[sample])
    return {
        key: value[row : row + 1].cpu()
        for key, value in call.given.items()
        if key not in (sample, time)
        and isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == batch
    }
