"""The last layer of a network that exists, found by running it, and what comes behind it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.networks import Adapter

# An output's number is told in digits of this base: they are exact in half precision.
_BASE = 256
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Given(nn.Module):
    """Stands where the head is, and says what it is told."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, features: Tensor) -> Tensor:
        return self.output.to(features)


class Fold:
    """Moves the head's outputs to where they lie in a prediction; linear, without weights.

    Args:
        places: of every value of a prediction among the head's outputs of a sample, int64 of the
            prediction's shape.
        factor: of all of them.
    """

    def __init__(self, places: Tensor, factor: float) -> None:
        self.places, self.factor = places, factor
        self.straight = bool((places.flatten() == torch.arange(places.numel())).all())

    def __call__(self, output: Tensor) -> Tensor:
        """``(B, ...)`` as the head gives it to ``(B, *shape)``."""
        flat = output.flatten(1)
        if not self.straight:
            flat = flat[:, self.places.flatten().to(output.device)]
        moved = flat.unflatten(1, self.places.shape)
        return moved if self.factor == 1 else self.factor * moved


def tapped(module: nn.Module, shape: Sequence[int], given: Tensor | None = None) -> Adapter:
    """The network as fold(head(features)), its head in float32.

    Args:
        module: ``forward(x, t, y)``; its last layer is taken out of it.
        shape: of a state.
        given: one condition ``(1, ...)`` that it can be run with, or None.

    Raises:
        UserError: if the last layer is not one that becomes Bayesian, or the network does more
            behind it than moving its outputs.
    """
    probe = _Probe(module.eval(), shape, given)
    name = probe.last_layer()
    head = module.get_submodule(name)
    who = f"the last layer of {type(getattr(module, 'module', module)).__name__}, {name},"
    try:
        HeadGeometry.of(head)
    except UserError as error:
        raise UserError(f"{who} is no head for last-layer Laplace: {error}") from error
    fold, rows = probe.fold(name, who)
    own_head = _rows_of(head, rows)
    if next(own_head.parameters()).dtype != torch.float64:
        own_head = own_head.float()
    _put(module, name, own_head)
    adapter = Adapter(module, head=name, fold=fold)
    truth, own = probe.truth, probe.once(adapter)
    dtype = next(module.parameters()).dtype
    size = truth.abs().max()
    if float((own - truth).abs().max()) > _TOLERANCE.get(dtype, 2e-2) * float(size):
        raise UserError(
            f"{who} is not followed by something that is the same for all states and times; give "
            "a network whose output is that layer's"
        )
    return adapter


class _Probe:
    """Runs a network at two states and times, in ways that show its end."""

    def __init__(self, module: nn.Module, shape: Sequence[int], given: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = next(module.parameters())
        self.module = module
        self.x = torch.randn(2, *shape, generator=generator).to(weight)
        self.t = torch.tensor([0.3, 0.7], dtype=torch.float64, device=weight.device)
        self.y = None if given is None else given.to(weight.device)
        self.truth = self.once(module)

    @torch.no_grad()
    def once(self, net: nn.Module, rows: Sequence[int] = (0, 1)) -> Tensor:
        """Output for these of the two states."""
        chosen = list(rows)
        y = None if self.y is None else self.y.expand(len(chosen), *self.y.shape[1:])
        output: Tensor = net(self.x[chosen], self.t[chosen], y)
        return output.float()

    def last_layer(self) -> str:
        """Name of the last module with weights of its own that runs."""
        ran: list[str] = []
        names = [name for name, part in self.module.named_modules() if part._parameters]

        def note(name: str) -> Any:
            return lambda *_: ran.append(name)

        hooks = [
            self.module.get_submodule(n).register_forward_pre_hook(note(n)) for n in names if n
        ]
        try:
            self.once(self.module)
        finally:
            for hook in hooks:
                hook.remove()
        if not ran:
            raise UserError(f"{type(self.module).__name__} runs no layer with weights")
        return ran[-1]

    def fold(self, name: str, who: str) -> tuple[Fold, list[int]]:
        """Where the head's outputs go, and which of its rows go anywhere.

        Raises:
            UserError: if something is added to them, or they are mixed.
        """
        head = self.module.get_submodule(name)
        seen: list[Tensor] = []
        hook = head.register_forward_hook(lambda _m, _i, output: seen.append(output))
        self.once(self.module, [0])
        hook.remove()
        shape = seen[0].shape[1:]
        numbers = torch.arange(shape.numel())
        digits: list[Tensor] = []
        while not digits or _BASE ** len(digits) < shape.numel():
            digits.append((numbers // _BASE ** len(digits)) % _BASE)
        planes = torch.stack([torch.zeros_like(numbers), torch.ones_like(numbers), *digits])
        said = self._with(name, planes.unflatten(1, shape).to(seen[0]))
        if float(said[0].abs().max()) > 1e-6:
            raise UserError(
                f"{who} is not all that the output depends on: something of the state is added "
                "behind it"
            )
        factor = float(said[1].flatten()[0])
        if not factor or float((said[1] - factor).abs().max()) > 1e-3 * abs(factor):
            raise UserError(f"{who} is followed by a layer that mixes its outputs")
        read = [(digit / factor).round().long() for digit in said[2:]]
        places = sum((digit * _BASE**k for k, digit in enumerate(read)), torch.zeros_like(read[0]))
        axis = -1 if isinstance(head, nn.Linear) else 0
        channel = numbers.unflatten(0, shape).movedim(axis, 0).flatten(1)
        rows_of = torch.empty_like(numbers)
        rows_of[channel] = torch.arange(len(channel))[:, None].expand_as(channel)
        rows = sorted(rows_of[places.flatten()].unique().tolist())
        if len(rows) < len(channel):  # places among the rows that are kept
            order = channel[rows].flatten().sort().values
            new = torch.full_like(numbers, -1)
            new[order] = torch.arange(len(order))
            places = new[places]
        return Fold(places.cpu(), factor), rows

    def _with(self, name: str, output: Tensor) -> Tensor:
        """The network's output where the head says this, ``(n, ...)``, all at the first state."""
        head = self.module.get_submodule(name)
        _put(self.module, name, _Given(output))
        try:
            return self.once(self.module, [0] * len(output))
        finally:
            _put(self.module, name, head)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    where, _, last = name.rpartition(".")
    setattr(module.get_submodule(where), last, part)


def _rows_of(head: nn.Module, rows: Sequence[int]) -> nn.Module:
    """A layer of its own with these outputs of the head."""
    weight: Tensor = head.weight[list(rows)].detach().clone()  # type: ignore[index]
    bias = None if head.bias is None else head.bias[list(rows)].detach().clone()  # type: ignore
    own: nn.Module
    if isinstance(head, nn.Linear):
        own = nn.Linear(head.in_features, len(rows), bias is not None)
    else:
        assert isinstance(head, nn.Conv2d)
        own = nn.Conv2d(
            head.in_channels, len(rows), head.kernel_size, padding=head.padding,  # type: ignore
            bias=bias is not None,
        )  # fmt: skip
    own.weight = nn.Parameter(weight, requires_grad=False)
    own.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return own.to(weight.device)
