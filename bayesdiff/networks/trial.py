"""A network of a user's own, run once before anything is trained.

What follows takes three things on trust: that a prediction is ``fold(head(features))``, that the
fold moves values and nothing else, and that the label for "no class" is taken. A network that
breaks one of the first two trains and samples as ever, and its maps are wrong.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, one_line

# What a network raises for tensors of a shape, or an index, that it did not reckon with.
_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def try_network(
    net: Any, shape: Sequence[int], outputs: Sequence[int], y: Sequence[Tensor | None] = (None,)
) -> None:
    """Run the network on two states of noise, without a trace in it or in any random numbers.

    Args:
        net: with ``features``, ``head`` and ``fold``; one that lacks them is left to others.
        shape: of a state.
        outputs: of a prediction.
        y: conditions of two states each, all of which the network must take; the last one is
            looked at closely.

    Raises:
        UserError: for a network that does not run, gives another shape, other values each time or
            not what fold(head(features)) gives, and a fold that does more than move values.
    """  # noqa: DOC502 - raised one level down
    if not all(hasattr(net, name) for name in ("features", "head", "fold")):
        return
    kind = type(net).__name__
    modes = {module: module.training for module in net.modules()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator).to(next(net.parameters()))
    t = torch.tensor([0.25, 0.75], dtype=getattr(net, "time_dtype", torch.float32))
    try:
        net.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for each in (y[-1], *y[:-1]):  # first the usual one, whose faults are of no condition
                _run(net, (x, t, each), f"{kind} does not run on {_in_words(x, each, y)}")
            made = net(x, t, y[-1])
            _check_shape(made, kind, tuple(shape), tuple(outputs))
            _check_parts(net, kind, (x, t, y[-1]), made)
    finally:  # a part that is frozen in its own mode stays so
        for module, training in modes.items():
            module.training = training


def _in_words(x: Tensor, each: Tensor | None, y: Sequence[Tensor | None]) -> str:
    """What a network was given, in words."""
    values = f"states {tuple(x.shape[1:])} with y={each if each is None else each.tolist()}"
    return values if each is y[-1] else f"{values}, which is no condition and needs room too"


def _check_shape(made: Any, kind: str, shape: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    given = tuple(made.shape[1:]) if isinstance(made, Tensor) else f"a {type(made).__name__}"
    if given != outputs:
        raise UserError(
            f"{kind} gives {given} for states {shape}; its output must be a tensor {outputs}"
        )


def _check_parts(net: Any, kind: str, given: tuple[Any, ...], made: Tensor) -> None:
    """Refuse a prediction that is not fold(head(features)), and a fold that changes values."""
    if not torch.equal(made, _run(net, given, kind)):
        raise UserError(
            f"{kind} gives other values each time, in eval() too; draw no random numbers there"
        )
    features = _run(net.features, given, f"{kind}.features does not run")
    values = _run(net.head, (features,), f"{kind}.head does not take what features gives")
    folded = _run(net.fold, (values,), f"{kind}.fold does not take what the head gives")
    if folded.shape != made.shape or not torch.allclose(folded, made, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{kind}.forward gives other values than fold(head(features(x, t, y))), and maps "
            "would be of another network; move what comes after the head before it, or leave it "
            "out"
        )
    normal = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    moved = net.fold(normal)
    squares, negative = net.fold(normal.square()), net.fold(-normal)
    close = partial(torch.allclose, rtol=1e-4, atol=1e-5)
    if not (close(squares, moved.square()) and close(negative, -moved)):
        raise UserError(
            f"{kind}.fold changes values, and may only move them, or maps would be wrong; put "
            "what it does before the head, or leave it out"
        )


def _run(part: Any, given: tuple[Any, ...], failure: str) -> Any:
    try:
        return part(*given)
    except _ERRORS as error:
        raise UserError(f"{failure}: {one_line(error)}") from error
