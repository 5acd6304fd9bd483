"""The last layer of a network that exists, found by running it, and what comes behind it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.networks import Adapter
from bayesdiff.networks.carrying import CarryingConv2d, CarryingLinear
from bayesdiff.pretrained.fold import CarryingAdapter, Fold, put

# An output's number is told in digits of this base: they are exact in half precision, and of the
# second where something is added to them.
_BASE, _SMALL_BASE = 256, 16
# Times at which a network is run, and a share of its output that is none.
TIMES = torch.tensor([0.3, 0.7, 0.5], dtype=torch.float64)
_NOTHING = 1e-6
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Given(nn.Module):
    """Stands where the head is, and says what it is told."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, features: Tensor) -> Tensor:
        return self.output.to(features)


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
    fold, rows, carried = probe.fold(name, who)
    own_head = _rows_of(head, rows, carried is not None)
    if next(own_head.parameters()).dtype != torch.float64:
        own_head = own_head.float()
    if carried is None:
        put(module, name, own_head)
        adapter = Adapter(module, head=name, fold=fold)
    else:
        adapter = CarryingAdapter(module, name, own_head, fold, carried)
    truth, own = probe.truth, probe.once(adapter)
    dtype = next(module.parameters()).dtype
    size = truth.abs().max()
    if float((own - truth).abs().max()) > _TOLERANCE.get(dtype, 2e-2) * float(size):
        raise UserError(
            f"{who} is not followed by something that is the same for all states and times; give "
            "a network whose output is that layer's"
        )
    return adapter


def check_tokens(adapter: Adapter, who: str) -> None:
    """Refuse a last layer whose positions move with the length of a prompt.

    Args:
        adapter: from ``tapped``, of a network that reads a sequence of tokens beside its state.
        who: name of the network.

    Raises:
        UserError: if it runs over these tokens as well.
    """
    if getattr(adapter._fold, "partial", False):
        raise UserError(
            f"the last layer of {who} runs over the tokens of the prompt as well, so that the "
            "image's lie elsewhere for each; bayesdiff follows networks whose last layer sees the "
            "image alone"
        )


def gains(module: nn.Module, shape: Sequence[int], given: Tensor | None = None) -> Tensor:
    """What outputs of the last layer are multiplied by behind it at ``TIMES``, of one of them."""
    probe = _Probe(module.eval(), shape, given)
    name = probe.last_layer()
    ones = torch.ones_like(probe.head_output(name))
    ends = torch.stack([0 * ones[0], ones[0]])
    said = [probe.saying(name, ends, time) for time in range(len(TIMES))]
    return torch.stack([(one - zero).flatten()[0].double().cpu() for zero, one in said])


class _Probe:
    """Runs a network at a few states and times, in ways that show its end."""

    def __init__(self, module: nn.Module, shape: Sequence[int], given: Tensor | None) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = next(module.parameters())
        self.module = module
        self.x = torch.randn(len(TIMES), *shape, generator=generator).to(weight)
        self.t = TIMES.to(weight.device)
        self.y = None if given is None else given.to(weight.device)
        self.truth = self.once(module)

    @torch.no_grad()
    def once(self, net: nn.Module, rows: Sequence[int] = (0, 1)) -> Tensor:
        """Output for these of the states."""
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

    def fold(self, name: str, who: str) -> tuple[Fold, list[int], tuple[int, ...] | None]:
        """Where the head's outputs go, and which of its rows go anywhere.

        Returns:
            Both, and the shape of these rows' outputs where something is added to them; or None.

        Raises:
            UserError: if they are mixed, or something is added that is not one value for each.
        """
        head, output = self.module.get_submodule(name), self.head_output(name)
        shape = output.shape[1:]
        added = bool(self.saying(name, torch.zeros_like(output)).abs().max() > _NOTHING)
        base = _SMALL_BASE if added else _BASE
        numbers = torch.arange(shape.numel())
        planes = torch.stack([0 * numbers, 0 * numbers + 1, *_digits(numbers, base)])
        said = self.saying(name, planes.unflatten(1, shape).to(output))
        said = said - said[:1] if added else said
        rough = 2e-2 if added and output.dtype.itemsize < 4 else 1e-3
        factor = _exact(float(said[1].double().mean()), rough if rough > 1e-3 else 1e-5)
        read = [(digit / factor).round().long().cpu() for digit in said[2:]]
        places = sum((digit * base**k for k, digit in enumerate(read)), torch.zeros_like(read[0]))
        straight = float((said[1] - factor).abs().max()) <= rough * abs(factor)
        if not (
            factor and straight and 0 <= int(places.min()) <= int(places.max()) < len(numbers)
        ):
            raise UserError(f"{who} is followed by a layer that mixes its outputs")
        axis = HeadGeometry.of(head).axis
        channel = numbers.unflatten(0, shape).movedim(axis, 0).flatten(1)
        places, rows = _of_rows(places, channel)
        if not added:
            partial = len(places.flatten().unique()) < channel[rows].numel()
            return Fold(places, factor, partial), rows, None
        if not torch.equal(places.flatten().sort().values, numbers[: channel[rows].numel()]):
            raise UserError(
                f"{who} is not all that the output depends on: something of the state is added "
                "behind it, to outputs that are there several times"
            )
        kept = list(shape)
        kept[axis] = len(rows)
        return Fold(places, factor), rows, tuple(kept)

    def head_output(self, name: str) -> Tensor:
        """What the head gives for the first state."""
        seen: list[Tensor] = []
        head = self.module.get_submodule(name)
        hook = head.register_forward_hook(lambda _m, _i, output: seen.append(output))
        self.once(self.module, [0])
        hook.remove()
        return seen[0]

    def saying(self, name: str, output: Tensor, state: int = 0) -> Tensor:
        """The network's output where the head says this, ``(n, ...)``, all at one state."""
        head = self.module.get_submodule(name)
        put(self.module, name, _Given(output))
        try:
            return self.once(self.module, [state] * len(output))
        finally:
            put(self.module, name, head)


def _exact(factor: float, error: float) -> float:
    """A factor that was measured; 1 or -1 where it is that but for rounding."""
    return math.copysign(1, factor) if abs(abs(factor) - 1) <= error else factor


def _digits(numbers: Tensor, base: int) -> list[Tensor]:
    """Of every number below their count, the lowest first."""
    digits: list[Tensor] = []
    while not digits or base ** len(digits) < len(numbers):
        digits.append((numbers // base ** len(digits)) % base)
    return digits


def _of_rows(places: Tensor, channel: Tensor) -> tuple[Tensor, list[int]]:
    """Places among the outputs of those rows that are used, and these rows.

    Args:
        places: among all outputs of a sample.
        channel: places of every row, ``(rows, positions)``.
    """
    rows_of = torch.empty_like(channel.flatten())
    rows_of[channel] = torch.arange(len(channel))[:, None].expand_as(channel)
    rows = sorted(rows_of[places.flatten()].unique().tolist())
    if len(rows) == len(channel):
        return places, rows
    order = channel[rows].flatten().sort().values
    new = torch.full_like(rows_of, -1)
    new[order] = torch.arange(len(order))
    return new[places], rows


def _rows_of(head: nn.Module, rows: Sequence[int], carrying: bool) -> nn.Module:
    """A layer of its own with these outputs of the head."""
    weight: Tensor = head.weight[list(rows)].detach().clone()  # type: ignore[index]
    bias = None if head.bias is None else head.bias[list(rows)].detach().clone()  # type: ignore
    own: nn.Module
    if isinstance(head, nn.Linear):
        linear = CarryingLinear if carrying else nn.Linear
        own = linear(head.in_features, len(rows), bias is not None)
    else:
        assert isinstance(head, nn.Conv2d)
        convolution = CarryingConv2d if carrying else nn.Conv2d
        own = convolution(
            head.in_channels, len(rows), head.kernel_size, padding=head.padding,  # type: ignore
            bias=bias is not None,
        )  # fmt: skip
    own.weight = nn.Parameter(weight, requires_grad=False)
    own.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return own.to(weight.device)
