"""Any affine scheduler of diffusers as a list of steps, from what its own loop does.

Schedulers act on every pixel alike. Pixels with random states, outputs and noise are therefore
equations for the coefficients of a step: least squares over them finds the coefficients, and its
residual tells how far the step reaches back. Nothing here knows a scheduler's name or formulas.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.pretrained.doctor import affinity_findings, zero_signal
from bayesdiff.pretrained.loop import (
    CURE,
    Trace,
    attempt,
    check_ready,
    name_of,
    own_noise,
    setting,
)
from bayesdiff.pretrained.relations import alternatives, assembled
from bayesdiff.solvers.integrate import held_after, integrate
from bayesdiff.solvers.step import Step

# Residual of a step, rounding of a coefficient and error of a whole loop, relative to the
# states: of schedulers that compute in double precision, and of those that cast to single.
_DOUBLE = (1e-11, 1e-12, 1e-9)
_SINGLE = (1e-6, 1e-7, 1e-4)
_SEEDS = (20, 40)
_NOT_AFFINE = "is not affine in its states, outputs and noise"


def probed_steps(
    scheduler: Any,
    times_of: Callable[[float], float],
    prediction_output_sign: float = 1.0,
    step_kwargs: Mapping[str, Any] | None = None,
) -> list[Step]:
    """One step for every network evaluation of a scheduler's loop.

    ``integrate`` on them, from standard normal noise that is not yet multiplied by
    ``init_noise_sigma``, does what

        x = init_noise_sigma * noise
        for t in scheduler.timesteps:
            g = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(g, t, x).prev_sample

    does. The states in between are the network's inputs, the last is the sample; where the last
    step also gives its mean without noise, ``prev_sample_mean``, that is the sample.

    Args:
        scheduler: of diffusers, after ``set_timesteps``; left as it is.
        times_of: our time in [0, 1] for one of its time steps.
        prediction_output_sign: what the field's output is multiplied by to be the scheduler's;
            -1 where the field is our velocity and the scheduler takes noise - data.
        step_kwargs: further arguments of the scheduler's ``step``, such as ``eta``.

    Raises:
        UserError: if the scheduler is not affine, or not ready.
    """
    options = dict(step_kwargs or {})
    check_ready(scheduler, options)
    if prediction_output_sign not in {1, -1}:
        raise UserError(f"prediction_output_sign must be 1 or -1, got {prediction_output_sign!r}")
    trace, proof = (
        _finite(scheduler, attempt(scheduler, seed, options, scale), options)
        for seed, scale in zip(_SEEDS, (1.0, 3.0), strict=True)
    )
    times = [*(_time(times_of, t) for t in trace.times), 1.0]
    for residual, rounding, error in (_DOUBLE, _SINGLE):
        ways = [
            assembled(trace, relations, times, prediction_output_sign, rounding)
            for relations in alternatives(trace, residual)
        ]
        right = [w for w in ways if _deviation(w, proof, prediction_output_sign) <= error]
        if right:
            return min(right, key=lambda steps: sum(held_after(steps)))
    raise UserError(_refusal(scheduler, options))


def _time(times_of: Callable[[float], float], t: float) -> float:
    time = float(times_of(t))
    if not 0 <= time <= 1:
        raise UserError(f"times_of({t:g}) is {time:g}; it must give a time in [0, 1], 1 for data")
    return time


def _finite(scheduler: Any, trace: Trace | str, options: Mapping[str, Any]) -> Trace:
    """The trace itself, if it is one of finite numbers.

    Raises:
        UserError: if it is not.
    """
    if isinstance(trace, str):
        raise UserError(_refusal(scheduler, options, f"raised {trace!r}"))
    for place, state in enumerate(trace.states[1:]):
        if not state.isfinite().all():
            why = f"has no finite step at time step {trace.times[place]:g}"
            if setting(scheduler, "final_sigmas_type") == "zero":
                why += "; try final_sigmas_type=sigma_min"
            raise UserError(_refusal(scheduler, options, why))
    return trace


def _deviation(steps: list[Step], proof: Trace, sign: float) -> float:
    """Largest error of the steps on another trace, relative to its states."""
    outputs = iter(proof.outputs)
    noise = iter(
        z for z, step in zip(proof.noise, steps, strict=True) if z is not None and step.stochastic
    )
    sizes = [*proof.scales[1:], 1.0]
    states = [x * size for x, size in zip(proof.states[1:], sizes, strict=True)]
    errors: list[float] = []
    largest = 0.0

    def field(x: Tensor, t: float) -> Tensor:
        return next(outputs) / sign

    def compare(step: Step, x: Tensor) -> None:
        nonlocal largest
        expected = states[len(errors)]
        largest = max(largest, float(expected.abs().max()))
        errors.append(float((x - expected).abs().max()) / max(largest, 1e-30))

    integrate(field, steps, proof.states[0] / proof.start, lambda: next(noise), compare)
    return max(errors)


def _refusal(scheduler: Any, options: Mapping[str, Any], why: str = _NOT_AFFINE) -> str:
    """One line with the cause and the cure."""
    for finding in (*zero_signal(scheduler), *affinity_findings(scheduler)):
        return f"{name_of(scheduler)}: {finding.what}: {finding.why}; {finding.cure}"
    still = attempt(scheduler, _SEEDS[0], options, 0.0)
    if isinstance(still, Trace) and all(z is None for z in still.noise):
        if torch.stack(still.states).nan_to_num().any():
            return own_noise(scheduler)
    return f"{name_of(scheduler)} {why}; {CURE}"
