"""The one loop over steps, and the two random inputs of a trajectory."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.machine.progress import evaluated
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import repeated
from bayesdiff.paths.coefficient import is_one, is_zero
from bayesdiff.solvers.step import PREDICTED, Row, Step

Observe = Callable[[Step, Tensor], None]
Memory = tuple[Tensor, ...]  # what earlier steps kept, the latest first
CACHEFUL = 64  # inputs of a network at once, on a CPU
# Tells the noise of a sampled emission apart from what else is drawn for the same samples.
_EMISSION = 900_001


class Field:
    """The model at a fixed condition and guidance: features and outputs for images at a time.

    Guidance combines features, not outputs: head(w phi_c + (1 - w) phi_u) equals
    w g_c + (1 - w) g_u because the head is affine and the weights sum to one; a posterior of the
    head then sees the one feature vector that its weights really meet.

    Attributes:
        likelihood: what it makes of an output is the prediction.
        evaluations: network evaluations so far, per image of the batch.
        layout: memory format that inputs are brought to; vmap knows ``preserve_format`` alone.

    Example:
        >>> from bayesdiff.networks import UNet
        >>> from bayesdiff.paths import CondOT
        >>> net = UNet(in_channels=1, image_size=8, channels=(8,), blocks=1)
        >>> model = GenerativeModel(net, CondOT(), "velocity", torch.optim.Adam)
        >>> field = Field(model, condition=None, batch=2)
        >>> field(torch.randn(2, 1, 8, 8), 0.5).shape, field.evaluations
        (torch.Size([2, 1, 8, 8]), 1)
    """

    def __init__(
        self,
        model: GenerativeModel,
        condition: Tensor | None,
        batch: int,
        guidance: float = 1.0,
        noise: "SampleNoise | None" = None,
    ) -> None:
        self.model = model
        self.likelihood = likelihood_of(model)
        self.noise = noise
        self.condition = condition
        self.batch = batch
        self.guidance = guidance
        self.evaluations = 0
        self.layout = torch.channels_last

    def features(self, x: Tensor, t: float) -> Tensor:
        """Input of the head for n copies of the batch, ``(n B, C, H, W) -> (n B, D, h, w)``."""
        guided, free = self.guided_features(x, t)
        if free is None:
            return guided
        return self.guidance * guided + (1 - self.guidance) * free

    def guided_features(self, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        """Features with the condition and without it, the latter None where nothing is guided."""
        copies = len(x) // self.batch
        dtype = getattr(self.model.net, "time_dtype", torch.float32)
        times = torch.full((len(x),), t, device=x.device, dtype=dtype)
        given = None if self.condition is None else repeated(self.condition, copies)
        x = x.to(memory_format=self.layout) if x.dim() == 4 else x
        guided = self._evaluate(x, times, given)
        self.evaluations += copies
        condition = self.model.condition
        if self.guidance == 1 or given is None or condition is None:
            return guided, None
        self.evaluations += copies
        return guided, self._evaluate(x, times, condition.empty(given))

    def _evaluate(self, x: Tensor, times: Tensor, given: Tensor | None) -> Tensor:
        """Features, on a CPU for a cacheful of images at a time: a quarter faster than at once."""
        evaluated(len(x))
        if x.device.type != "cpu" or len(x) <= CACHEFUL:
            return self.model.net.features(x, times, given)
        parts = [values.split(CACHEFUL) for values in (x, times)]
        parts.append([None] * len(parts[0]) if given is None else given.split(CACHEFUL))
        return torch.cat([self.model.net.features(*part) for part in zip(*parts, strict=True)])

    def output(self, features: Tensor) -> Tensor:
        """Output of the trained head, ``(B, D, h, w) -> (B, C K, H, W)``."""
        return self.model.net.fold(self.model.net.head(features))

    def emit(self, output: Tensor, t: float) -> Tensor:
        """Prediction that n copies of the batch's outputs stand for, ``(n B, C, H, W)``.

        A sampled one depends on the samples and the time alone: whoever follows them meets the
        same draws.

        Raises:
            UserError: where a likelihood draws and the field has no noise.
        """
        last = t == PREDICTED
        if not self.likelihood.draws:
            return self.likelihood.emit(output, last=last)
        if self.noise is None:
            raise UserError(
                "these samples have no noise for what model.likelihood draws; use "
                "model.likelihood.sampled=false and model.likelihood.final=mean"
            )
        noise = self.noise.fork(_EMISSION + round(t * 2**20))()
        copies = len(output) // len(noise)
        noise = noise.repeat(copies, *[1] * (noise.ndim - 1)).to(output)
        return self.likelihood.emit(output, noise, last)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Prediction for images ``(B, C, H, W)`` at time ``t``."""
        return self.emit(self.output(self.features(x, t)), t)


def integrate(
    field: Callable[[Tensor, float], Tensor],
    steps: Iterable[Step],
    x: Tensor,
    noise: Callable[[], Tensor],
    observe: Observe | None = None,
) -> Tensor:
    """Follow the steps from ``x`` and return the last state, of the field's output shape.

    Args:
        field: network output for a state at a time.
        steps: a solver's coefficients.
        x: starting noise ``(..., B, C, H, W)``.
        noise: fresh standard noise for a step that needs it.
        observe: called with every step and the state after it.

    Example:
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import Euler, Heun, plan
        >>> for solver in Euler(num_steps=10), Heun(num_steps=10):  # dx/dt = -x ends at 0.3679
        ...     steps = plan(solver, CondOT(), "velocity")
        ...     integrate(lambda x, t: -x, steps, torch.ones(1), torch.randn)
        tensor([0.3487])
        tensor([0.3685])
    """
    steps = [step.like(x) for step in steps]
    memory: Memory = ()
    for step, held in zip(steps, held_after(steps), strict=True):
        outputs = evaluate(field, step, x)
        x, memory = advance(step, x, outputs, memory, held)
        if step.stochastic:
            x = x + step.noise * noise()
        if observe is not None:
            observe(step, x)
    return x


def evaluate(field: Callable[[Tensor, float], Tensor], step: Step, x: Tensor) -> list[Tensor]:
    """Network outputs g_i of one step."""
    outputs: list[Tensor] = []
    for t, row in zip(step.times, step.inputs, strict=True):
        outputs.append(field(combine(row, x, outputs), t))
    return outputs


def held_after(steps: Sequence[Step]) -> list[int]:
    """Kept combinations that are held after each step: its own, and all needed later."""
    found, needed = [], 0
    for step in reversed(steps):
        own = len(step.kept)
        found.append(max(own, needed))
        needed = max(step.reach, needed - own)
    return found[::-1]


def advance(
    step: Step, x: Tensor, outputs: Sequence[Tensor], memory: Memory, held: int
) -> tuple[Tensor, Memory]:
    """New state before its fresh noise, and what is kept for later steps.

    Args:
        step: with coefficients for this x.
        x: state before the step.
        outputs: network outputs of the step.
        memory: what earlier steps kept, the latest first.
        held: how many combinations are held after this one, see ``held_after``.
    """
    new = recall(combine(step.output, x, outputs), step.history, memory)
    count = 1 + len(outputs)
    kept = (recall(combine(row[:count], x, outputs), row[count:], memory) for row in step.kept)
    return new, (*kept, *memory)[:held]


def combine(row: Row, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """row[0] x + sum_j row[1 + j] outputs[j]."""
    total = x if is_one(row[0]) else row[0] * x
    for weight, output in zip(row[1:], outputs, strict=True):
        total = total + weight * output
    return total


def recall(total: Tensor, row: Row, memory: Memory) -> Tensor:
    """Total + sum_j row[j] memory[j]; what was never kept must have no weight.

    Raises:
        ValueError: if it has.
    """
    for place, weight in enumerate(row):
        if is_zero(weight):
            continue
        if place >= len(memory):
            raise ValueError(f"a step reads k_{place}, and only {len(memory)} were kept before it")
        total = total + weight * memory[place]
    return total


class SampleNoise:
    """Standard noise of sample number i that depends on (seed, i) alone.

    One CPU generator per sample: the same images for any batch size, device or device count.

    Example:
        >>> alone = SampleNoise(seed=0, indices=[3], shape=(1, 4, 4))()
        >>> together = SampleNoise(seed=0, indices=[1, 2, 3], shape=(1, 4, 4))()
        >>> together.shape, torch.equal(alone[0], together[2])  # sample 3 in any batch
        (torch.Size([3, 1, 4, 4]), True)
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]) -> None:
        self.seed, self.indices = seed, list(indices)
        # Mersenne twister seeds are 32 bits wide; mixing keeps (seed, index) pairs apart.
        self.generators = [
            torch.Generator().manual_seed((seed * 2_654_435_761 + index * 40_503 + 17) % 2**32)
            for index in indices
        ]
        self.shape = tuple(shape)

    def fork(self, number: int) -> "SampleNoise":
        """Further noise of the same samples, for another purpose; ``number`` tells them apart."""
        return SampleNoise(self.seed + 1_000_003 * (number + 1), self.indices, self.shape)

    def copy(self) -> "SampleNoise":
        """The same noise from here on, to be drawn once more."""
        twin = copy(self)
        twin.generators = [generator.clone_state() for generator in self.generators]
        return twin

    def __call__(self) -> Tensor:
        """The next standard normal tensor ``(B, C, H, W)``."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
