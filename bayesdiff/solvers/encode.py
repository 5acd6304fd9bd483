"""Both ways along a deterministic sampler: data to noise, and noise to data."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.paths.coefficient import is_one
from bayesdiff.solvers.integrate import Field, integrate
from bayesdiff.solvers.step import Solver, Step, check_finite, coefficients, plan
from bayesdiff.solvers.step_checks import check_steps


@torch.inference_mode()
def encode(
    model: GenerativeModel, solver: Solver, images: Tensor, condition: Tensor | None = None
) -> Tensor:
    """The states at t = 0 that images come from: the solver's steps from data to noise.

        latents = encode(model, Heun(50), images, labels)
        again = decode(model, Heun(50), latents, labels)

    ``decode`` finds the images again up to the solver's error, which falls with its order.

    Args:
        model: trained; dropout is off whatever its mode.
        solver: deterministic.
        images: ``(B, C, H, W)`` in [-1, 1].
        condition: values ``(B, ...)`` that the network is given, such as labels; None for none.

    Returns:
        ``(B, C, H, W)``.

    Raises:
        UserError: for a solver that draws noise, or that the model's prediction leaves open at
            data.

    Example:
        >>> from bayesdiff.models.exact import exact_model
        >>> from bayesdiff.paths import VariancePreserving
        >>> from bayesdiff.solvers import DDIM
        >>> images = torch.rand(2, 1, 4, 4) * 2 - 1
        >>> model = exact_model(VariancePreserving(), "noise", images)
        >>> latents = encode(model, DDIM(num_steps=100), images)
        >>> torch.allclose(decode(model, DDIM(num_steps=100), latents), images, atol=0.01)
        True
    """  # noqa: DOC502 - raised one level down
    steps = backward(solver, model.path, model.prediction)
    return _follow(model, solver, steps, images, condition)


@torch.inference_mode()
def decode(
    model: GenerativeModel,
    solver: Solver,
    latents: Tensor,
    condition: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Images of states at t = 0: the solver's steps from noise to data.

    Args:
        model: trained; dropout is off whatever its mode.
        solver: any; one that draws noise takes it from ``noise``.
        latents: ``(B, C, H, W)``, as of ``encode``.
        condition: values ``(B, ...)`` that the network is given, such as labels; None for none.
        noise: fresh standard noise for each step that draws some, such as a ``SampleNoise``.

    Returns:
        ``(B, C, H, W)``, not clipped to [-1, 1].

    Raises:
        UserError: for a solver that draws noise, and no noise.

    Example:
        >>> from bayesdiff.models.exact import exact_model
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import Euler
        >>> image = torch.rand(1, 1, 4, 4)
        >>> model = exact_model(CondOT(), "velocity", image)  # knows this one image
        >>> decoded = decode(model, Euler(num_steps=4), torch.randn(3, 1, 4, 4))
        >>> torch.allclose(decoded, image.expand(3, 1, 4, 4), atol=1e-6)
        True
    """
    if noise is None and solver.stochastic:
        raise UserError(
            f"solver={solver.name} draws noise on the way; give decode its noise, or use "
            "solver=ddim, or another without noise"
        )
    steps = plan(solver, model.path, model.prediction)
    return _follow(model, solver, steps, latents, condition, noise)


def backward(solver: Solver, path: ProbabilityPath, prediction: str) -> list[Step]:
    """The steps of a deterministic solver from data to noise.

    They visit its times in the other order. Data takes the place of the state at
    ``path.last_time``, the least noise that the network has learnt, where that is before t = 1;
    on a path with noise left at t = 1, of the mean of the state there.

    Raises:
        UserError: for a solver that draws noise, or that the prediction leaves open at data.
    """  # noqa: DOC502 - one of them is raised one level down
    if solver.stochastic:
        raise UserError(
            f"solver={solver.name} draws noise and cannot go from data to noise; use solver=ddim, "
            "or another without noise"
        )
    solver.check(path)
    times = [t for t in reversed(solver.times(path)) if t < path.last_time]
    times = [path.last_time, *times]
    steps = solver.steps(path, prediction, times)
    check_steps(solver, times, steps)
    check_finite(solver, prediction, steps)
    alpha = coefficients(path, [1.0])[0][0]
    if is_one(alpha) or not path.ends_in_data:
        return steps
    return [steps[0].from_data(alpha), *steps[1:]]


def _follow(
    model: GenerativeModel,
    solver: Solver,
    steps: list[Step],
    x: Tensor,
    condition: Tensor | None,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    training = model.training
    field = Field(model, condition, len(x), solver.guidance)

    def fresh() -> Tensor:
        assert noise is not None  # a deterministic solver asks for none
        return noise().to(x)

    try:
        model.eval()
        return integrate(field, steps, x, fresh)
    finally:
        model.train(training)
