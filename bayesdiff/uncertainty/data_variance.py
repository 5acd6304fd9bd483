"""Variance of the data given a state on the way: aleatoric, from the network's own derivative."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.paths.coefficient import as_coefficient, level, like
from bayesdiff.solvers import Field, Step, integrate
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.sensitivities.products import data_coefficients, derivatives
from bayesdiff.uncertainty.start import Start

Probes = int | str  # their number, or ``all``
# Tells the probes apart from what else is drawn for the same samples.
_FORK = 7_000_003
# Directions of one image followed at once.
_AT_ONCE = 4


def check_probes(probes: Probes, time: float | None) -> None:
    """Refuse what is no number of probes, or no time on the way.

    Raises:
        UserError: one line with the cure.
    """
    if probes != "all":
        if isinstance(probes, str):
            raise UserError(
                f"uncertainty.aleatoric must be a number of probes or all, got {probes!r}; 0 is "
                "none"
            )
        at_least("uncertainty.aleatoric", probes, 0)
    number = isinstance(time, (int, float)) and not isinstance(time, bool)
    if time is not None and not (number and 0 < time < 1):
        raise UserError(
            f"uncertainty.aleatoric_time must lie between 0 and 1, got {time!r}; at 1 the data "
            "are certain, and null is where data and noise weigh the same"
        )


def step_at(start: Start, time: float | None) -> int:
    """Number of the step whose end is the time of the map.

    It is the first end not before ``time``, or the last one with noise. None stands for where the
    path's data weigh as much as its noise, alpha >= sigma in the mean over dimensions: early
    enough that the image is open, late enough that the state says which one it will be. At t = 0
    the variance is that of all data, and at t = 1 none.

    Raises:
        UserError: for a solver that has no state between noise and data.
    """
    ends = [step.end for step in start.steps()]
    path, found = start.path, -1
    for number, end in enumerate(ends):
        if not 0 < end < 1:
            continue
        c = path.coefficients(torch.tensor(end, dtype=torch.float64))
        alpha, sigma = (level(as_coefficient(each)) for each in (c.alpha, c.sigma))
        if not (bool((c.alpha > 0).all()) and sigma > 0):
            continue
        found = number
        if alpha >= sigma if time is None else end >= time - 1e-9:
            break
    if found < 0:
        raise UserError(
            f"uncertainty.aleatoric needs a state between noise and data, and "
            f"solver.num_steps={start.solver.num_steps} has none; take more steps"
        )
    return found


def data_variance(field: Field, x: Tensor, t: float, z: Tensor) -> Tensor:
    """Estimates of the variance of the data given a state, one for each probe.

    Tweedie's identity of second order: on x_t = alpha x_1 + sigma x_0 the data given the state are
    an exponential family with natural parameter alpha x_t / sigma^2, so that

        Cov(x_1 | x_t) = (d E[x_1 | x_t] / d x_t) diag(sigma^2 / alpha),

    for numbers and for coefficients of every dimension. The network says E[x_1 | x_t] =
    p x_t + q g(x_t); on the straight path that makes (1 - t)^2 / t (I + (1 - t) J_v), as in
    Xing et al., "Divergence is Uncertainty" (2026, arXiv 2605.00941). Its diagonal is the mean of
    z o J z over z with independent signs (Hutchinson 1990).

    Exact for the data's own prediction. A network's answer need not be one, and a guided one is
    not: estimates can then be negative even on average, as those of few probes are by chance.

    Args:
        field: the trained network at this batch's labels.
        x: states ``(B, ...)``.
        t: their time, with noise and data in them.
        z: ``(M, B, ...)`` of signs; or of unit vectors, whose estimates are to be added up.

    Returns:
        ``(M, B, ...)``.
    """
    c = field.model.path.coefficients(torch.tensor(t, dtype=torch.float64))
    p, q = data_coefficients(field, t, x)
    scale = like(as_coefficient(c.sigma**2 / c.alpha), x)
    return scale * z * (p * z + q * derivatives(field, x, x, z, t))


@torch.no_grad()
def with_data_variance(
    samples: Samples, start: Start, probes: Probes, time: float | None, seed: int
) -> Samples:
    """The samples with the variance of the data given their own state at a time on the way.

    Args:
        samples: of the batch.
        start: of the batch once more; its trajectory is followed to that time again.
        probes: number of directions, or ``all`` for every dimension in turn: exact.
        time: see ``step_at``.
        seed: of the probes, which depend on it and on the sample's number alone.
    """
    steps: list[Step] = start.steps()[: step_at(start, time) + 1]
    field, t = start.field(), steps[-1].end
    signs = start.noise.fork(_FORK + seed)
    x = integrate(field, steps, start.initial(), start.draw)
    total, count = torch.zeros_like(x), x[0].numel() if probes == "all" else int(probes)
    for rows in torch.arange(count).split(_AT_ONCE):
        if probes == "all":
            z = _units(x, rows)
        else:
            z = torch.stack([torch.where(signs() < 0, -1.0, 1.0) for _ in rows]).to(x)
        total += data_variance(field, x, t, z).sum(0)
    return replace(
        samples,
        aleatoric=(total if probes == "all" else total / count).cpu(),
        aleatoric_time=torch.tensor(t, dtype=torch.float64),
        nfe=samples.nfe + field.evaluations,
        estimator=f"{samples.estimator}, aleatoric at t={t:.3g} with {probes} probes",
    )


def data_variance_scores(maps: Iterable[Samples]) -> dict[str, Tensor]:
    """Scores ``(N,)`` of the first samples that have such variances; none where no samples do.

    ``aleatoric.data_variance`` is their sum, negative estimates and all, so that it is unbiased;
    ``total.sum`` adds that of the map, whose negative values count as 0.
    """
    for samples in maps:
        if (found := samples.in_model_range()).aleatoric is None:
            continue
        trace = found.aleatoric.double().flatten(1).sum(1)
        epistemic = found.variance.double().clamp(min=0).flatten(1).sum(1)
        return {"aleatoric.data_variance": trace, "total.sum": epistemic + trace}
    return {}


def _units(x: Tensor, numbers: Sequence[int] | Tensor) -> Tensor:
    """Unit vectors of these dimensions for every image, ``(M, B, ...)``."""
    units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)[numbers]
    return units.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape).contiguous()
