"""What networks predict of the data, on their own trajectories and on noised data."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath, convert
from bayesdiff.paths.coefficient import as_coefficient, is_finite, like
from bayesdiff.solvers import Field, Solver, integrate


def known_times(solver: Solver, path: ProbabilityPath, prediction: str) -> list[float]:
    """Times of the solver at which a network's output and the exact prediction give the data.

    Those without noise are left out, where the exact prediction has no value, and those at which
    the output does not determine the data, such as noise predicted from noise alone.
    """

    def is_known(t: float) -> bool:
        sigma = path.coefficients(torch.tensor(t, dtype=torch.float64)).sigma
        return bool(sigma.all()) and all(map(is_finite, _weights(path, prediction, t)))

    return [t for t in solver.times(path) if is_known(t)]


def predicted(model: GenerativeModel, x: Tensor, t: float) -> Tensor:
    """The data that a model predicts from states ``(B, *shape)`` at ``t``, in float64."""
    p, q = (like(weight, x.double()) for weight in _weights(model.path, model.prediction, t))
    return p * x.double() + q * Field(model, None, len(x))(x, t).double()


def trajectory(
    model: GenerativeModel, solver: Solver, x: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """States at the solver's times, from noise to data.

    Args:
        model: unconditional.
        solver: deterministic.
        x: states at t = 0, ``(B, *shape)``.

    Yields:
        Time and states; those at t = 1 as they are, with the noise that the path leaves there.
    """
    times = solver.times(model.path)
    states = [x]
    steps = solver.steps(model.path, model.prediction, times)
    field = Field(model, None, len(x))
    integrate(field, steps, x, x.new_zeros, lambda _, state: states.append(state))
    yield from zip(times, states, strict=True)


def trajectory_errors(
    model: GenerativeModel,
    solver: Solver,
    exact: tuple[GenerativeModel, GenerativeModel],
    starts: Tensor,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Errors of what a model predicts on its own trajectories, and those of a second exact one.

    Args:
        model: unconditional.
        solver: deterministic.
        exact: the exact model, and one of other references.
        starts: states at t = 0, ``(N, *shape)``.
        batch_size: points at once.

    Returns:
        The model's predictions of data less the exact ones, and the second exact model's less the
        first's, both float32 ``(T, N, *shape)`` at the T ``known_times``.
    """
    known = set(known_times(solver, model.path, model.prediction))
    found: list[list[Tensor]] = [[], []]
    for part in starts.split(batch_size):
        errors: list[list[Tensor]] = [[], []]
        for t, x in trajectory(model, solver, part):
            if t not in known:
                continue
            truth = predicted(exact[0], x.double(), t)
            errors[0].append((predicted(model, x, t) - truth).float().cpu())
            errors[1].append((predicted(exact[1], x.double(), t) - truth).float().cpu())
        for whole, own in zip(found, errors, strict=True):
            whole.append(torch.stack(own))
    return torch.cat(found[0], 1), torch.cat(found[1], 1)


def published_residuals(
    model: GenerativeModel,
    exact: GenerativeModel,
    times: list[float],
    clean: Tensor,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Prediction less the clean data, with independent noise at every time.

    Source: de Albuquerque and Pearson, "Inflationary Flows" (2024), who read from their small
    correlation over times that errors of the score act like noise.

    Args:
        model: unconditional.
        exact: in its place.
        times: at which there is noise.
        clean: states of data ``(N, *shape)``, the same at all times.
        batch_size: points at once.
        seed: of the noise.

    Returns:
        Of the model and of the exact one, float32 ``(T, N, *shape)`` each.
    """
    generator = torch.Generator().manual_seed(seed)
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for t in times:
        c = model.path.coefficients(torch.tensor(t, dtype=torch.float64))
        alpha, sigma = c.alpha.to(clean), c.sigma.to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        pairs = [
            (predicted(model, x, t) - y, predicted(exact, x.double(), t) - y)
            for x, y in zip(
                (alpha * clean + sigma * noise).split(batch_size),
                clean.split(batch_size),
                strict=True,
            )
        ]
        for whole, own in zip(found, zip(*pairs, strict=True), strict=True):
            whole.append(torch.cat(own).float().cpu())
    return torch.stack(found[0]), torch.stack(found[1])


def _weights(path: ProbabilityPath, prediction: str, t: float) -> tuple:
    """(p, q) with data = p x + q prediction at ``t``."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    p, q = convert(prediction, "data", c)
    return as_coefficient(p), as_coefficient(q)
