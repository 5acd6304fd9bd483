"""A diffusers scheduler's own loop, on random pixels instead of a network."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, one_line

# Pixels are independent equations for the coefficients, of which a step has at most 36.
PIXELS = (1, 1, 8, 16)
CURE = "use a solver of ours, e.g. solver=ddim, or uncertainty=ensemble through its own loop"
Advance = Callable[[int, Tensor, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Trace:
    """What went through one loop of N network evaluations, every tensor of one shape, float64.

    Attributes:
        times: the scheduler's own time steps.
        start: ``init_noise_sigma``, standard deviation of the first state.
        scales: s_i of the network's inputs s_i x_i.
        states: x_0 to x_N.
        outputs: network outputs g_0 to g_(N-1).
        noise: z_0 to z_(N-1), None where a step drew none.
    """

    times: tuple[float, ...]
    start: float
    scales: tuple[float, ...]
    states: list[Tensor]
    outputs: list[Tensor]
    noise: list[Tensor | None]


def name_of(scheduler: Any) -> str:
    """What an error message calls it."""
    return type(scheduler).__name__


def setting(scheduler: Any, name: str, default: Any = None) -> Any:
    """A value of its configuration."""
    return getattr(getattr(scheduler, "config", None), name, default)


def check_ready(scheduler: Any, options: Mapping[str, Any]) -> None:
    """Refuse what is no scheduler, has no time steps yet, or stands in the middle of a loop.

    Args:
        scheduler: of diffusers, or one like those.
        options: further arguments of its ``step``.

    Raises:
        UserError: one line with the cure.
    """
    name = name_of(scheduler)
    step = getattr(scheduler, "step", None) or getattr(scheduler, "step_pred", None)
    if step is None or not hasattr(scheduler, "timesteps"):
        raise UserError(f"{name} is no scheduler with timesteps and step; give one of diffusers")
    unset = getattr(scheduler, "num_inference_steps", 1) is None
    if scheduler.timesteps is None or unset and not getattr(scheduler, "custom_timesteps", False):
        raise UserError(f"{name} has no time steps yet; call scheduler.set_timesteps(...) first")
    counter: int = getattr(scheduler, "counter", 0)
    if getattr(scheduler, "step_index", None) is not None or counter > 0:
        raise UserError(
            f"{name} stands in the middle of a loop; call scheduler.set_timesteps(...) again"
        )
    unknown = [key for key in options if key not in inspect.signature(step).parameters]
    if unknown:
        raise UserError(f"{name}.step takes no {unknown[0]!r}; leave it out of step_kwargs")
    check_corrector(scheduler)


def check_corrector(scheduler: Any) -> None:
    """Refuse steps of a predictor with others of a corrector between them.

    Raises:
        UserError: one line with the cure.
    """
    if not hasattr(scheduler, "step") and setting(scheduler, "correct_steps", 0):
        raise UserError(
            f"{name_of(scheduler)} corrects with steps whose size depends on the output; set "
            "scheduler.register_to_config(correct_steps=0)"
        )


def follow(scheduler: Any, seed: int, options: Mapping[str, Any], scale: float = 1.0) -> Trace:
    """Run the loop of a copy of the scheduler on random states, outputs and noise.

    Args:
        scheduler: with its time steps set.
        seed: of all three.
        options: further arguments of its ``step``.
        scale: standard deviation of the outputs, and of the first state in units of its own.
    """
    scheduler = on_cpu(scheduler)
    data = torch.Generator().manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    advance = advance_of(scheduler, options)
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    states = [scale * start * torch.randn(PIXELS, generator=data, dtype=torch.float64)]
    outputs, scales, noise = [], [], []
    with torch.random.fork_rng(devices=[]):
        for place, t in enumerate(scheduler.timesteps):
            scales.append(input_scale(scheduler, states[-1], t))
            outputs.append(scale * torch.randn(PIXELS, generator=data, dtype=torch.float64))
            before = generator.clone_state()
            given = outputs[-1].clone(), states[-1].clone()
            states.append(advance(place, given[0], t, given[1], generator).double())
            noise.append(drawn(scheduler, before, generator))
    times = tuple(float(t) for t in scheduler.timesteps)
    return Trace(times, start, tuple(scales), states, outputs, noise)


def own_noise(scheduler: Any) -> str:
    """The refusal of a scheduler whose noise is not one draw of its generator."""
    return (
        f"{name_of(scheduler)} has a noise source of its own, not one draw of the generator for "
        f"each step; {CURE}"
    )


def on_cpu(scheduler: Any) -> Any:
    """A copy, with its tensors on the CPU."""
    twin = deepcopy(scheduler)
    for name, value in list(vars(twin).items()):
        if isinstance(value, Tensor):
            setattr(twin, name, value.cpu())
    return twin


def advance_of(scheduler: Any, options: Mapping[str, Any]) -> Advance:
    """The scheduler's step as pipelines call it, ``(i, g, t, x, generator) -> next x``."""
    step = scheduler.step if hasattr(scheduler, "step") else scheduler.step_pred
    names = inspect.signature(step).parameters
    times = scheduler.timesteps

    def advance(place: int, g: Tensor, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        more = dict(options)
        if "generator" in names:
            more["generator"] = generator
        if "prev_timestep" in names:
            more["prev_timestep"] = times[place + 1] if place + 1 < len(times) else None
        result = step(g, t, x, **more)
        if place + 1 == len(times):  # pipelines of a score end without the last step's noise
            return getattr(result, "prev_sample_mean", result.prev_sample)
        return result.prev_sample

    return advance


def input_scale(scheduler: Any, x: Tensor, t: Tensor) -> float:
    """Factor s of the network's input s x.

    Raises:
        UserError: if that is not what the network sees.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    scale = float(scheduler.scale_model_input(torch.ones_like(x), t).flatten()[0])
    seen = scheduler.scale_model_input(x.clone(), t).double()
    if not torch.allclose(seen, scale * x, rtol=1e-5, atol=0, equal_nan=True):
        raise UserError(
            f"{name_of(scheduler)} changes the network's input by more than a factor; {CURE}"
        )
    return scale


def drawn(scheduler: Any, before: torch.Generator, after: torch.Generator) -> Tensor | None:
    """The noise that was drawn between two states of the generator.

    Raises:
        UserError: if it was not one standard normal tensor of the sample's shape.
    """
    if torch.equal(before.get_state(), after.get_state()):
        return None
    for dtype in (torch.float64, torch.float32):
        twin = before.clone_state()
        noise = torch.randn(PIXELS, generator=twin, dtype=dtype)
        if torch.equal(twin.get_state(), after.get_state()):
            return noise.double()
    raise UserError(own_noise(scheduler))


def attempt(scheduler: Any, seed: int, options: Mapping[str, Any], scale: float) -> Trace | str:
    """``follow``, or in one line what the scheduler raised.

    Raises:
        UserError: from ``follow``.
    """
    try:
        return follow(scheduler, seed, options, scale)
    except UserError:
        raise
    except Exception as error:  # a scheduler may raise anything
        return one_line(error)
