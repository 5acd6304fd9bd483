"""How many nats a Bayesian flow network takes to say an image, by the number of transmissions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.models import GenerativeModel
from bayesdiff.models.objectives import BayesianFlowLoss
from bayesdiff.solvers import SampleNoise

# Tells the times of an image apart from its noise.
_TIMES = 700_001


@torch.inference_mode()
def nats_of(
    model: GenerativeModel,
    x_1: Tensor,
    condition: Tensor | None,
    numbers: Sequence[int],
    n_steps: Sequence[int | None],
    *,
    draws: int,
    seed: int,
    spread: float,
) -> dict[str, Tensor]:
    """Nats of every image, ``(B,)`` float64: ``final``, and by the number of transmissions.

    ``final`` is what remains to be said once all transmissions are over; ``n=10`` what 10 of them
    take, ``n=inf`` those of continuous time. The sum of both bounds -ln p(x). Where there are no
    more transmissions than draws, all are taken; else times are spread evenly over them, at a
    place of its own for every image. Noise and times depend on (seed, number) alone; draws of a
    divergence without closed form on the batch as well.

    Args:
        model: with its trained weights, and the objective of a Bayesian flow network.
        x_1: states of the images, ``(B, C, H, W)``.
        condition: of the images, or None.
        numbers: of the images.
        n_steps: numbers of transmissions, None for continuous time.
        draws: network evaluations for each of them.
        seed: of noise and times.
        spread: see ``Likelihood.code_length``.
    """
    own = model.path, model.likelihood, model.prediction  # whatever bound it was trained on
    x_1 = model.likelihood.values(x_1)
    noise = SampleNoise(seed, numbers, x_1.shape[1:])
    places = SampleNoise(seed, numbers, (1,)).fork(_TIMES)
    transmitted = torch.Generator().manual_seed(seed + (numbers[0] if numbers else 0))

    clock = getattr(model.net, "time_dtype", torch.float32)

    def output(t: Tensor) -> tuple[Tensor, Tensor]:
        x_t, _ = model.corrupt(x_1, noise().to(x_1), t)
        return model(x_t, t.to(clock), condition), x_t

    found = {}
    for n in n_steps:
        objective = BayesianFlowLoss(*own, n_steps=n)
        count = draws if n is None else min(n, draws)
        # Whole steps where all are taken: a shift would leave one out.
        shift = torch.special.ndtr(places()[:, 0].double())
        shift = shift if n is None or n > draws else torch.zeros_like(shift)
        total = x_1.new_zeros(len(x_1), dtype=torch.float64)
        for draw in range(count):
            t = ((shift + draw) / count).to(x_1.device)
            t = t if n is None else (t * n + 1e-9).floor() / n
            out, x_t = output(t)
            total += objective.per_image(out.double(), x_t.double(), x_1.double(), t, transmitted)
        found[f"n={n or 'inf'}"] = total / count
    end = torch.ones(len(x_1), dtype=torch.float64, device=x_1.device)
    out, x_t = output(end)
    data = BayesianFlowLoss(*own).in_data(out.double(), x_t.double(), end)
    left = model.likelihood.code_length(data, x_1.double(), spread)
    found["final"] = left.flatten(1).sum(1)
    return found


def independent_pixels(images: Tensor, tests: Tensor) -> float:
    """Nats per test image under the mean of every training pixel, of black and white images."""
    count = len(images)
    white = (images > 127).double().sum(0)
    p = (white + 0.5) / (count + 1)
    seen = (tests > 127).double()
    nats = -(seen * p.log() + (1 - seen) * (1 - p).log())
    return float(nats.flatten(1).sum(1).mean())
