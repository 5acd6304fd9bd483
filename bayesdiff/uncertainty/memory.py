"""How many images an estimator may take at once within its memory."""

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Solver, plan
from bayesdiff.solvers.integrate import held_after
from bayesdiff.uncertainty.estimator import Estimator

GIB = 2**30
# Tensors of an image's size per network input: states, outputs, noise, and what adds them up.
_STATES = 8


def images_at_once(
    estimator: Estimator,
    solver: Solver,
    model: GenerativeModel,
    image_shape: Sequence[int],
    cure: str = "use fewer members or draws",
) -> int:
    """Images of a batch that fit into ``estimator.max_memory``, at most its ``batch_size``.

    Bounded are the network's activations for all inputs that one image needs at once, and its
    record: states and variances of every step. Weights, posterior and finished maps come on top.

    Args:
        estimator: says how many network inputs an image needs at once.
        solver: of the images.
        model: gives the network, in the precision it samples in.
        image_shape: ``(C, H, W)``.
        cure: what the user can do instead of allowing for more memory.

    Raises:
        UserError: if one image is too many.
    """
    image = 4 * prod(image_shape)
    states = _STATES + max(0, _reach(solver, model) - 1)
    held = estimator.copies(solver) * (activation_bytes(model, image_shape) + states * image)
    record = 2 * (solver.num_steps + len(estimator.times)) * image
    count = int(estimator.max_memory * GIB // (held + record))
    if count < 1:
        raise UserError(
            f"uncertainty.max_memory={estimator.max_memory} GiB is too little: one image needs "
            f"{(held + record) / GIB:.2g} GiB with uncertainty={estimator.name}; raise it, or "
            f"{cure}"
        )
    return min(count, estimator.batch_size)


def _reach(solver: Solver, model: GenerativeModel) -> int:
    """Combinations that the solver holds for later steps."""
    return max(held_after(plan(solver, model.path, model.prediction)), default=0)


@torch.inference_mode()
def activation_bytes(model: GenerativeModel, image_shape: Sequence[int]) -> int:
    """Bytes of the outputs of all leaf modules in one forward pass of one image.

    More than is ever held at once, as most are freed on the way; that leaves room for what
    convolutions need beside their outputs.
    """
    net = cast(nn.Module, model.net)
    total = 0

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    leaves = [module for module in net.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(add) for module in leaves]
    training, parameter = net.training, next(net.parameters())
    given = None if model.condition is None else model.condition.of_samples([0])
    x = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        net.eval()(x, x.new_zeros(1), None if given is None else given.to(x.device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return total
