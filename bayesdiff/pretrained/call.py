"""How a network is called: which argument is the state, which the time, and what else it gets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdiff.pretrained.listening import Key, unflat

if TYPE_CHECKING:
    from bayesdiff.pretrained.convention import Convention

Row = dict[Key, Tensor]  # arguments of one sample, each ``(1, ...)``


@dataclass(frozen=True)
class Call:
    """The arguments of a network.

    Attributes:
        sample: that takes the state.
        time: that takes the time.
        scale: of the network's own time, = scale * the schedule's + shift.
        shift: see there.
        follows: what of the schedule the time is told in: ``timesteps``, or ``sigmas``.
        constants: arguments that are always the same.
        channels: of the output that are the prediction, the first ones; None for all. What
            comes behind them predicts a variance, and samplers leave it out.
        sign: of the output on its way to the scheduler.
    """

    sample: Key
    time: Key
    scale: float = 1.0
    shift: float = 0.0
    follows: str = "timesteps"
    constants: Mapping[Key, Any] = field(default_factory=dict)
    channels: int | None = None
    sign: float = 1.0


@dataclass
class Table:
    """What the network gets with a sample beside state and time, by number.

    Attributes:
        given: with the condition.
        nothing: without, for guidance; as many, or none where nothing is guided.
    """

    given: list[Row] = field(default_factory=list)
    nothing: list[Row] = field(default_factory=list)

    def rows(self, numbers: Sequence[int]) -> Row:
        """Arguments of a batch; number -1 - k is "nothing" in the place of k."""
        rows = [self.given[k] if k >= 0 else self.nothing[-1 - k] for k in numbers]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


class Called(nn.Module):
    """A network as ``forward(x, t, y)``: state, time in [0, 1], number of a condition.

    Args:
        module: called as ``call`` says.
        call: its arguments.
        clock: from our times, noise at 0 and data at 1, to the schedule's, in float64.
        table: what samples get beside; shared, it may grow.

    Attributes:
        gain: of our times; outputs are multiplied by it. None for outputs as they are.
    """

    time_dtype = torch.float64  # times of schedules are spread finer than float32 tells apart

    def __init__(
        self, module: nn.Module, call: Call, clock: Callable[[Tensor], Tensor], table: Table
    ) -> None:
        super().__init__()
        self.module, self.call, self.clock, self.table = module, call, clock, table
        self.gain: Callable[[Tensor], Tensor] | None = None
        self.dtype = next(module.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction ``(B, C, ...)``."""
        args, kwargs = self.arguments(x, t, y)
        output: Any = self.module(*args, **kwargs)
        return self.finished(output if isinstance(output, Tensor) else output[0], t)

    def finished(self, output: Tensor, t: Tensor) -> Tensor:
        """The prediction that the network's output stands for."""
        if self.call.channels is not None:
            output = output[:, : self.call.channels]
        if self.call.sign != 1:
            output = self.call.sign * output
        if self.gain is None:
            return output
        # Rounded as the time is that the network gets: factors of it cancel.
        gain = self.gain(t).float().view(-1, *[1] * (output.dim() - 1))
        return output * gain.to(torch.promote_types(gain.dtype, output.dtype))

    def arguments(
        self, x: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """The network's own arguments."""
        call = self.call
        time = (call.scale * self.clock(t) + call.shift).float()
        time = time.to(torch.promote_types(time.dtype, self.dtype))
        given = {**call.constants, call.sample: x.to(self.dtype), call.time: time}
        if self.table.given:
            numbers = [0] * len(x) if y is None else y.tolist()
            for key, value in self.table.rows(numbers).items():
                value = value.to(x.device)
                given[key] = value.to(self.dtype) if value.is_floating_point() else value
        return unflat(given)


class Prompts:
    """Numbers of a ``Table``: the condition of a network that was listened to.

    Args:
        table: of the network; shared.
        num_classes: where the conditions are those of the data's classes, one each.
    """

    field = "labels"

    def __init__(self, table: Table, num_classes: int | None = None) -> None:
        self.table, self.num_classes = table, num_classes
        self.chosen = list(range(num_classes or 1))

    def show(self, known: "Sequence[Convention]", num_classes: int | None = None) -> None:
        """Put what runs of a pipeline told into the table, and sample these in turn.

        Args:
            known: one run for each condition.
            num_classes: see the class.
        """
        self.table.given = [own.given for own in known]
        self.table.nothing = [own.nothing for own in known if own.nothing is not None]
        self.chosen, self.num_classes = list(range(len(known))), num_classes

    def options(self) -> dict[str, Any]:
        """None: the network has the table."""
        return {}

    def hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Numbers ``(B,)`` with "nothing" in the hidden places."""
        return torch.where(hidden, -1 - values, values)

    def empty(self, values: Tensor) -> Tensor:
        """The numbers of "nothing", ``(B,)``."""
        return -1 - values

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """The chosen conditions in turn, int64 ``(B,)``."""
        return torch.tensor([self.chosen[n % len(self.chosen)] for n in numbers])

    def labels(self, values: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """The values, where they are classes; a prompt is none."""
        return values if self.num_classes else None
