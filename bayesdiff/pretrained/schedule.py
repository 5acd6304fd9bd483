"""The path that a network was trained on, and what it predicts, as its scheduler says."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.paths import CondOT
from bayesdiff.paths.probability_path import (
    PathCoefficients,
    ProbabilityPath,
    VariancePreserving,
)
from bayesdiff.storage.artefacts import key_of

# Names of diffusers, and ours.
_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}


Arrange = Callable[[Tensor], Tensor]


class SchedulePath(ProbabilityPath):
    """A path that the scheduler of a pipeline tells of.

    Attributes:
        takes: prediction that the path's schedulers take, whichever the network gives; None where
            they take the network's own.
        arrange: puts noise in the order of a pipeline's states, None where it is that already.
    """

    family = "pretrained"
    takes: str | None = None
    arrange: Arrange | None = None

    def initial_state(self, noise: Tensor) -> Tensor:
        """State at t = 0, of noise whose values are in another order than the pipeline's."""
        return super().initial_state(noise if self.arrange is None else self.arrange(noise))

    @abstractmethod
    def schedule_time(self, t: Tensor) -> Tensor:
        """The schedule's time at ours, float64."""

    @abstractmethod
    def our_time(self, time: float) -> float:
        """Our time at one of the schedule."""

    def noise_level(self, t: Tensor) -> Tensor:
        """Noise as schedulers have it in their ``sigmas``, float64."""
        return self.coefficients(t).sigma

    def noise_per_score(self, t: Tensor) -> Tensor:
        """What the score is to be multiplied by to be the noise, float64."""
        return -self.coefficients(t).sigma


class DiscreteVP(SchedulePath, VariancePreserving):
    """The variance-preserving path of a table of squared signal levels, least noise first.

    Args:
        abar: ``(T,)``, the scheduler's ``alphas_cumprod``.
    """

    family = SchedulePath.family

    def __init__(self, abar: Tensor) -> None:
        log_abar = abar.double().cpu().clamp(min=1e-20).log()
        self.num_steps_max = len(abar)
        self.last_time = 1 - 1 / len(abar)
        self.log_abar = torch.cat([log_abar.new_zeros(1), log_abar])

    def schedule_time(self, t: Tensor) -> Tensor:
        """Index of the table at our time, float64; those of float32 are rounded to 2^-10."""
        index = len(self.log_abar[1:]) * (1 - t.double()) - 1
        return index if t.dtype == torch.float64 else (index * 2**10).round() / 2**10

    def noise_level(self, t: Tensor) -> Tensor:
        """Noise relative to signal, as schedulers have it in their ``sigmas``."""
        here = self.coefficients(t)
        return here.sigma / here.alpha

    def our_time(self, time: float) -> float:
        """Our time at an index."""
        return 1 - (time + 1) / len(self.log_abar[1:])

    def training_times(self, uniform: Tensor) -> Tensor:
        """Times of the table's own indices, all alike often, for uniform numbers in [0, 1)."""
        steps = len(self.log_abar) - 1
        return (uniform.double() * steps).floor().clamp(max=steps - 1) / steps


class ScheduledFlow(SchedulePath, CondOT):
    """Straight lines, timed by how much noise there is: the schedule's time is T (1 - t).

    Args:
        timesteps: T of the scheduler.
    """

    family = SchedulePath.family

    def __init__(self, timesteps: int = 1000) -> None:
        self.timesteps = timesteps

    def schedule_time(self, t: Tensor) -> Tensor:
        """T times the share of noise, float64."""
        return self.timesteps * (1 - t.double())

    def our_time(self, time: float) -> float:
        """Our time at one of the schedule."""
        return 1 - time / self.timesteps


class VarianceExploding(SchedulePath):
    """Data with noise on it, x_t = x_1 + sigma x_0, sigma geometric in time (Song et al. 2021).

    The schedule's time is 1 - t, sigma = sigma_min (sigma_max / sigma_min)^(1 - t). Noise of
    sigma_min is left at t = 1. Schedulers of this path take the score.

    Args:
        sigma_min: the least noise.
        sigma_max: the most, at t = 0.
        last: schedule's time of the least noise that the network meets.
    """

    takes = "score"

    def __init__(self, sigma_min: float, sigma_max: float, last: float = 1e-5) -> None:
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)
        self.noise_scale = sigma_max
        self.last_time = 1 - last

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64."""
        sigma = self.sigma_min * (self.log_ratio * (1 - t.double())).exp()
        one = torch.ones_like(sigma)
        return PathCoefficients(one, sigma, 0 * one, -self.log_ratio * sigma)

    def schedule_time(self, t: Tensor) -> Tensor:
        """1 - t, float64."""
        return 1 - t.double()

    def our_time(self, time: float) -> float:
        """Our time at one of the schedule."""
        return 1 - time


def path_and_prediction(scheduler: Any) -> tuple[SchedulePath, str]:
    """What the scheduler of a pipeline says of the training.

    Raises:
        UserError: for one that says neither.
    """
    config, who = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon")
    abar = getattr(scheduler, "alphas_cumprod", None)
    if kind == "flow_prediction" or (abar is None and hasattr(scheduler, "shift")):
        return ScheduledFlow(config.get("num_train_timesteps", 1000)), "flow"
    if abar is None and {"sigma_min", "sigma_max", "sampling_eps"} <= set(config):
        levels = config["sigma_min"], config["sigma_max"]
        return VarianceExploding(*levels, config["sampling_eps"]), "score"
    if "sigma_data" in config:
        raise UserError(
            f"{who} scales the network's input and output by factors of the noise level (EDM's "
            "preconditioning), and bayesdiff follows networks whose output is noise, data, v, a "
            "flow or a score; no other scheduler fits such a network"
        )
    if abar is None:
        raise UserError(
            f"{who} has no alphas_cumprod and is no flow-matching scheduler; give the pipeline "
            "one that has, such as DDIMScheduler with the betas of the training"
        )
    if kind not in _PREDICTIONS:
        raise UserError(
            f"{who} has prediction_type={kind!r}; bayesdiff knows {', '.join(_PREDICTIONS)} and "
            "flow_prediction, set the one that the network was trained with"
        )
    return DiscreteVP(torch.as_tensor(abar)), _PREDICTIONS[kind]


def schedule_key(scheduler: Any) -> str:
    """What changes with the path or the prediction that a scheduler tells of."""
    path, prediction = path_and_prediction(scheduler)
    c = path.coefficients(torch.linspace(0.01, 0.99, 99, dtype=torch.float64))
    told = [[f"{value:.5e}" for value in values.tolist()] for values in (c.alpha, c.sigma)]
    return key_of(prediction, told)
