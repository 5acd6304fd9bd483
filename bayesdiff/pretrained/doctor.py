"""What is wrong with a scheduler of diffusers, each with the line that cures it.

Nothing here knows a scheduler's name: settings are read, time steps and noise levels compared.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.pretrained.loop import advance_of, input_scale, on_cpu, setting

# Time steps are rounded to whole ones: a step may be one off, and of second order a little more.
_ROUNDING, _SHARE = 1.5, 0.03
_EPSILON = 1e-6
# Growth of an error in the first prediction of the noise, above which it drowns the image.
_GROWTH = 100


@dataclass(frozen=True)
class Finding:
    """A setting that spoils the samples or their uncertainty.

    Attributes:
        what: the setting, or what it was seen to do.
        why: what that spoils.
        cure: what to do instead.
    """

    what: str
    why: str
    cure: str


def diagnose(scheduler: Any) -> tuple[Finding, ...]:
    """All that is wrong with a scheduler.

    Args:
        scheduler: of diffusers, after ``set_timesteps``; left as it is.
    """
    found = (
        affinity_findings, zero_signal, faint_signal, landing, shifted_twice, repeated_times,
    )  # fmt: skip
    return tuple(finding for each in found for finding in each(scheduler))


def affinity_findings(scheduler: Any) -> Iterator[Finding]:
    """Settings that keep a step from being affine in the network's output.

    Args:
        scheduler: of diffusers.

    Yields:
        Clipping, thresholding and a variance that the network predicts.
    """
    for name in ("clip_sample", "clip_denoised"):
        if setting(scheduler, name):
            yield Finding(
                f"{name}=True clips the predicted images",
                "a clipped step is not affine in the network's output",
                f"use {name}=False, as in from_config(scheduler.config, {name}=False)",
            )
    if setting(scheduler, "thresholding"):
        yield Finding(
            "thresholding=True divides by a quantile of the predicted image",
            "such a step is not affine in the network's output",
            "use thresholding=False, as in from_config(scheduler.config, thresholding=False)",
        )
    kind = str(setting(scheduler, "variance_type", ""))
    # Solvers without a variance of their own leave out the network's channels for it.
    if kind.startswith("learned") and hasattr(scheduler, "_get_variance"):
        yield Finding(
            f"variance_type={kind} takes the noise's variance from the network",
            "the noise then depends on the output",
            "use variance_type=fixed_small (of UnCLIP fixed_small_log), and the outputs of the "
            "mean alone",
        )


def zero_signal(scheduler: Any) -> Iterator[Finding]:
    """A noise predictor that starts where there is nothing but noise.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Yields:
        The finding, where the first time step has no signal.
    """
    alphas = _alphas(scheduler)
    rescaled = setting(scheduler, "rescale_betas_zero_snr")
    if alphas is None or not rescaled or setting(scheduler, "prediction_type") != "epsilon":
        return
    first = float(scheduler.timesteps[0])
    if float(_at(alphas, first)) ** 2 < 1e-6:
        yield Finding(
            f"the first time step {first:g} has no signal (rescale_betas_zero_snr) and the "
            "network predicts noise",
            "its prediction of the image divides by zero",
            "use rescale_betas_zero_snr=False, or a network with prediction_type=v_prediction",
        )


def faint_signal(scheduler: Any) -> Iterator[Finding]:
    """A noise predictor whose first step is so long that its errors drown the image.

    From a signal alpha to a signal alpha', a step makes of an error e in the predicted noise one
    of up to (alpha' / alpha) e in the next state.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Yields:
        The finding; none where there is no signal at all, which ``zero_signal`` tells.
    """
    alphas, times = _alphas(scheduler), scheduler.timesteps.tolist()
    if alphas is None or setting(scheduler, "prediction_type") != "epsilon":
        return
    first = float(_at(alphas, times[0]))
    following = float(_at(alphas, times[1])) if len(times) > 1 else 1.0
    if setting(scheduler, "rescale_betas_zero_snr") or following <= _GROWTH * first:
        return
    growth = f"{following / first:,.0f}" if first else "infinitely many"
    yield Finding(
        f"the first step, from time step {times[0]:g}, where the signal is {first:.1e}, makes of "
        f"an error in the predicted noise one {growth} times as large",
        "images come out as noise beyond all bounds, and maps are of that noise",
        "begin later, as with timestep_spacing=leading, or use more steps",
    )


def landing(scheduler: Any) -> Iterator[Finding]:
    """Steps that end at another noise level than the one the network is told next.

    A network that knows the image exactly makes every consistent scheduler follow
    alpha(t) x_1; where the signal differs, the step has landed elsewhere.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Yields:
        The first such step.
    """
    alphas = _alphas(scheduler)
    if alphas is None:
        return
    signals = _signals(scheduler, alphas)
    if signals is None:
        return
    times = scheduler.timesteps.tolist()
    for start, t, signal in zip(times[:-1], times[1:], signals, strict=True):
        landed, right = _time_of(alphas, signal), float(_at(alphas, t))
        # A scheduler's own single precision, of which little is left where there is little noise.
        if abs(signal - right) * (1 - right**2) < _EPSILON:
            continue
        if abs(landed - t) > max(_ROUNDING, _SHARE * abs(start - t)):
            spacing = setting(scheduler, "timestep_spacing", "custom")
            yield Finding(
                f"a step lands on time step {landed:.0f} while the loop visits {t:g} next "
                f"(timestep_spacing={spacing})",
                "the network is told a wrong noise level at every step",
                "use timestep_spacing=trailing, as in from_config(scheduler.config, "
                "timestep_spacing='trailing'), and set_timesteps again",
            )
            return


def shifted_twice(scheduler: Any) -> Iterator[Finding]:
    """Noise levels of a flow whose ``shift`` was applied to the last one twice.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Yields:
        The finding.
    """
    shift, sigmas = setting(scheduler, "shift"), getattr(scheduler, "sigmas", None)
    count = setting(scheduler, "num_train_timesteps", 0)
    if not shift or shift == 1 or sigmas is None or setting(scheduler, "use_dynamic_shifting"):
        return

    def once(s: float) -> float:
        return shift * s / (1 + (shift - 1) * s)

    last = float(sigmas[sigmas > 0].min())
    takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if abs(last / once(once(1 / count)) - 1) < 1e-4:
        yield Finding(
            f"shift={shift:g} is applied twice, so that the last noise level is {last:.4f} "
            f"and not {once(1 / count):.4f}",
            "all noise levels are off those that the network was trained for",
            f"call scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / {count}, steps))"
            if takes
            else "use shift=1, or FlowMatchEulerDiscreteScheduler, which can be given sigmas",
        )


def repeated_times(scheduler: Any) -> Iterator[Finding]:
    """A time step that stands for several noise levels.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Yields:
        The first such time step.
    """
    sigmas, times = getattr(scheduler, "sigmas", None), scheduler.timesteps
    if not isinstance(sigmas, Tensor) or len(sigmas) != len(times) + 1:
        return
    levels: dict[float, float] = {}
    for t, sigma in zip(times.tolist(), sigmas.tolist()[:-1], strict=True):
        level = levels.setdefault(t, sigma)
        if abs(sigma - level) > 1e-6 * level:
            yield Finding(
                f"time step {t:g} is visited at the noise levels {level:.4g} and {sigma:.4g}",
                "the network cannot tell them apart",
                "use use_karras_sigmas=False, or fewer steps",
            )
            return


def _alphas(scheduler: Any) -> Tensor | None:
    """Factors alpha of the image at all time steps, of a path that preserves variance."""
    table = getattr(scheduler, "alphas_cumprod", None)
    known = setting(scheduler, "prediction_type") in ("epsilon", "sample", "v_prediction")
    if not isinstance(table, Tensor) or not known or setting(scheduler, "use_flow_sigmas"):
        return None
    return table.double().cpu().sqrt()


def _at(alphas: Tensor, t: float) -> Tensor:
    """Alpha at a time step, which may lie between two."""
    low = min(max(int(t), 0), len(alphas) - 2)
    return torch.lerp(alphas[low], alphas[low + 1], torch.tensor(t - low).double())


def _time_of(alphas: Tensor, signal: float) -> float:
    """The time step with an alpha."""
    low = int((alphas > signal).sum()) - 1
    low = min(max(low, 0), len(alphas) - 2)
    return low + float((alphas[low] - signal) / (alphas[low] - alphas[low + 1]))


def _signals(scheduler: Any, alphas: Tensor) -> list[float] | None:
    """How much of the image is in the network's inputs after each step but the last.

    Every step starts from as much as its time step has, so that each is judged on its own.
    None where a step is not finite, or not possible at all.
    """
    runs = [_landings(scheduler, alphas, image) for image in (1.0, 0.0)]
    if runs[0] is None or runs[1] is None:
        return None
    # What is left is the image's share: both runs drew the same noise.
    difference = (runs[0] - runs[1])[1:]
    return difference.tolist() if bool(difference.isfinite().all()) else None


def _landings(scheduler: Any, alphas: Tensor, image: float) -> Tensor | None:
    """The network's inputs of a run whose network knows that the pixel is ``image``."""
    kind = setting(scheduler, "prediction_type")
    twin = on_cpu(scheduler)
    if hasattr(twin, "register_to_config"):
        twin.register_to_config(clip_sample=False, thresholding=False)
    advance, generator = advance_of(twin, {}), torch.Generator().manual_seed(0)
    x = torch.zeros((1, 1, 1, 1), dtype=torch.float64)
    inputs = []
    for place, t in enumerate(twin.timesteps):
        alpha = float(_at(alphas, float(t)))
        scale = input_scale(twin, x, t)
        inputs.append(float(x) * scale)
        x = torch.full_like(x, image * alpha / scale)
        output = {"epsilon": 0.0, "sample": image}.get(kind, -image * math.sqrt(1 - alpha**2))
        try:
            x = advance(place, torch.full_like(x, output), t, x, generator).double()
        except Exception:  # a scheduler may raise anything; probing tells what
            return None
    return torch.tensor(inputs)
