"""Where a batch of samples starts: what every estimator and every solver is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.solvers import Field, SampleNoise, Solver, Step, plan
from bayesdiff.uncertainty.decoded import Decoder


@dataclass(frozen=True)
class Start:
    """What is needed to start one batch: the estimators share it.

    Attributes:
        model: with its trained weights.
        solver: coefficients and guidance.
        condition: values ``(B, ...)`` that the network is given, or None.
        noise: random inputs of the batch; its first draw is the starting noise.
        device: where to compute.
        decoder: of states, None where they are their own values.

    Example:
        After the example of ``starts_of``:

        >>> start = starts([0, 1, 2])
        >>> start.nfe, start.initial().shape  # evaluations of four steps of Euler's method
        (4, torch.Size([3, 1, 8, 8]))
        >>> [step.end for step in start.steps()]
        [0.25, 0.5, 0.75, 1.0]
    """

    model: GenerativeModel
    solver: Solver
    condition: Tensor | None
    noise: SampleNoise
    device: torch.device
    decoder: Decoder | None = None

    @property
    def path(self) -> ProbabilityPath:
        """The model's path."""
        return self.model.path

    @property
    def labels(self) -> Tensor | None:
        """Classes that the samples are to show, ``(B,)``; None where there are none."""
        if self.condition is None or self.model.condition is None:
            return None
        return self.model.condition.labels(self.condition, self.noise.indices)

    def field(self) -> Field:
        """The trained network at this batch's condition, with its own count of evaluations."""
        given = self.condition, len(self.noise.generators), self.solver.guidance, self.noise
        return Field(self.model, *given)

    def steps(self, skip_interval: int = 1) -> list[Step]:
        """Steps on every k-th time of the image's own grid."""
        return plan(self.solver, self.path, self.model.prediction, skip_interval)

    @property
    def nfe(self) -> int:
        """Network evaluations of an image without its uncertainty."""
        return self.evaluations(self.steps())

    def evaluations(self, steps: Sequence[Step]) -> int:
        """Network evaluations per image of these steps."""
        guided = self.solver.guidance != 1 and self.condition is not None
        return (2 if guided else 1) * sum(len(step.times) for step in steps)

    def initial(self) -> Tensor:
        """The state at t = 0, ``(B, C, H, W)``, of the first noise of the batch."""
        return self.path.initial_state(self.draw())

    def draw(self) -> Tensor:
        """The next noise of the batch, ``(B, C, H, W)``."""
        return self.noise().to(self.device)


Starts = Callable[[Sequence[int]], Start]


def starts_of(
    model: GenerativeModel,
    solver: Solver,
    seed: int,
    shape: Sequence[int],
    device: torch.device,
    decoder: Decoder | None = None,
) -> Starts:
    """Gives the start of samples by their numbers: condition from number, noise from seed too.

    Args:
        model: with its trained weights.
        solver: of the samples.
        seed: of their noise.
        shape: of one state, ``(C, H, W)`` of an image.
        device: where to compute.
        decoder: of states, None where they are their own values.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> from bayesdiff.laplace.callback import LastLayerLaplace
        >>> from bayesdiff.networks import UNet
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import Euler
        >>> net = UNet(in_channels=1, image_size=8, channels=(8,), blocks=1)  # untrained here
        >>> model = GenerativeModel(net, CondOT(), "velocity", torch.optim.Adam).eval()
        >>> posterior = LastLayerLaplace(num_images=64).fit(model, digits())
        >>> starts = starts_of(model, Euler(num_steps=4), 0, (1, 8, 8), torch.device("cpu"))
        >>> torch.equal(starts([3]).initial()[0], starts([1, 2, 3]).initial()[2])  # of sample 3
        True
    """

    def start(numbers: Sequence[int]) -> Start:
        noise = SampleNoise(seed, numbers, shape)
        given = model.condition.of_samples(numbers).to(device) if model.condition else None
        return Start(model, solver, given, noise, device, decoder)

    return start
