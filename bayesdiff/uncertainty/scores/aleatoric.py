"""A baseline that looks at no weights: how much the network's answer moves with fresh noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.paths import convert
from bayesdiff.paths.coefficient import as_coefficient, like
from bayesdiff.solvers import Field, Step, integrate
from bayesdiff.uncertainty.start import Start

# Tells this noise apart from what else is drawn for the same samples.
_FORK = 70_001


@dataclass(frozen=True)
class Aleatoric:
    """Images with how much the network's answer moves under fresh noise, per pixel.

    Attributes:
        images: ``(B, C, H, W)``, the samples themselves.
        centred: ``(B, C, H, W)``, mean squared distance from the answer at the sample's own state.
        variance: ``(B, C, H, W)``, unbiased variance of the answers; both summed over the steps.
        times: at which the network was asked.
        nfe: network evaluations per image, for image and scores together.
    """

    images: Tensor
    centred: Tensor
    variance: Tensor
    times: tuple[float, ...]
    nfe: int

    @property
    def scores(self) -> dict[str, Tensor]:
        """``aleatoric_centred`` and ``aleatoric_variance``, each ``(B,)``; higher is worse."""
        forms = {"aleatoric_centred": self.centred, "aleatoric_variance": self.variance}
        return {name: maps.double().flatten(1).sum(1) for name, maps in forms.items()}


@torch.inference_mode()
def aleatoric(
    start: Start,
    draws: int = 5,
    window: tuple[float, float] = (0.8, 1.0),
    seed: int = 0,
    rounds: int = 1,
) -> Aleatoric:
    """Sample a batch and measure its aleatoric uncertainty over a part of the steps.

    Source: De Vita and Belagiannis, "Diffusion model guided sampling with pixel-wise aleatoric
    uncertainty estimation" (2025), whose code has the centred form. The published window is the
    last ten of 50 DDIM steps, at which the data is almost clean.

    Args:
        start: of the batch.
        draws: M, fresh noises per step and image, at least 2.
        window: which of the steps, as shares of their number.
        seed: of the fresh noise, which depends on it and on the sample's number alone.
        rounds: answers in a row behind every draw, see ``answer_spread``; their "zigzag" has 3.

    Fewer than 2 draws, no round, or a window without a step, are a ``UserError``.
    """
    at_least("draws", draws, 2)
    at_least("rounds", rounds)
    steps = start.steps()
    chosen = _chosen(window, len(steps))
    fresh = start.noise.fork(_FORK + seed)
    field, x_0 = start.field(), start.initial()
    states = {0: x_0} if 0 in chosen else {}
    count = iter(range(1, len(steps) + 1))

    def keep(step: Step, x: Tensor) -> None:
        if (number := next(count)) in chosen:
            states[number] = x

    images = integrate(field, steps, x_0, start.draw, keep)
    times = tuple(steps[number].times[0] for number in chosen)
    centred, variance = torch.zeros_like(images), torch.zeros_like(images)
    for number, t in zip(chosen, times, strict=True):
        noise = torch.stack([fresh() for _ in range(rounds * draws)]).to(images)
        noise = noise.unflatten(0, (rounds, draws))
        found = answer_spread(field, states[number], t, noise)
        centred, variance = centred + found[0], variance + found[1]
    return Aleatoric(images, centred, variance, times, field.evaluations)


def answer_spread(field: Field, x: Tensor, t: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Spread of the network's answer over states that predict the same data.

    The data x_1hat predicted at x meets fresh noise z, x~ = alpha x_1hat + sigma z, and the
    network answers again: with its noise prediction on a path that preserves variance, with its
    velocity on any other. For a noise prediction kap x, the centred form is on average
    kap^2 sigma^2 (1 + prediction^2) and contains the prediction itself; the variance is
    kap^2 sigma^2.

    With several rounds ("zigzag") the data is predicted again from x~ and meets fresh noise again;
    the last answer counts. With rho = 1 - sigma kap and R rounds, the variance above is then
    kap^2 sigma^2 (1 + rho^2 + ... + rho^(2R - 2)), and the centred form is larger by
    prediction^2 (1 - rho^R)^2.

    Args:
        field: the trained network at this batch's labels.
        x: states ``(B, C, H, W)``.
        t: their time.
        noise: standard noise ``(M, B, C, H, W)``, or ``(R, M, B, C, H, W)`` for R rounds.

    Returns:
        Mean squared distance from the answer at x, and unbiased variance over the M draws, each
        ``(B, C, H, W)``.
    """
    path = field.model.path
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    sigma, p, q = (
        like(as_coefficient(each), x)
        for each in (c.sigma, *convert(field.model.prediction, "noise", c))
    )
    output = field(x, t)
    states, outputs = x, output
    for fresh in noise if noise.ndim > x.ndim + 1 else noise[None]:
        # alpha x_1hat is x without its predicted noise; so written, it is finite at alpha = 0.
        states = states - sigma * (p * states + q * outputs) + sigma * fresh
        outputs = field(states.flatten(0, 1), t).unflatten(0, fresh.shape[:2])
    if not path.variance_preserving:
        pair = convert(field.model.prediction, "velocity", c)
        p, q = (like(as_coefficient(each), x) for each in pair)
    answers = p * states + q * outputs
    return (answers - (p * x + q * output)).square().mean(0), answers.var(0)


def _chosen(window: tuple[float, float], count: int) -> range:
    """Numbers of the steps from the window's first share of all to its last."""
    first, last = window
    chosen = range(round(first * count), round(last * count)) if 0 <= first < last <= 1 else ()
    if not isinstance(chosen, range) or not len(chosen):
        raise UserError(
            f"window={tuple(window)} holds none of the {count} steps; "
            "give two shares from 0 to 1, such as (0.8, 1.0)"
        )
    return chosen
