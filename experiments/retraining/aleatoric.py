"""What a state on the way leaves open of the data, in the place of a variance of the weights."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Solver, Step, integrate
from bayesdiff.uncertainty import Estimator, Samples, Start
from bayesdiff.uncertainty.data_variance import with_data_variance
from bayesdiff.uncertainty.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class AleatoricTrace(Estimator):
    """Images with the variance of the data given their own state on the way.

    See ``data_variance``: the diagonal by ``probes`` random directions, at the first time with as
    much data as noise. Its sum is the trace that the flow's divergence gives. Estimates can be
    negative.
    """

    probes: int = 16

    name = "aleatoric_trace"
    of_posterior = False

    def check(self, solver: Solver) -> None:
        """Every solver with a state on the way."""

    def copies(self, solver: Solver) -> int:
        """The image and a few directions."""
        return 9

    @torch.no_grad()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch."""
        again = replace(start, noise=start.noise.copy())
        steps, field = start.steps(), start.field()
        recorder = Recorder(len(steps))

        def observe(step: Step, x: Tensor) -> None:
            recorder(step.end, x, torch.zeros_like(x))

        x = integrate(field, steps, start.initial(), start.draw, observe)
        images = recorder.samples(
            x, torch.zeros_like(x), start.labels, field.evaluations, self.name
        )
        found = with_data_variance(images, again, self.probes, None, self.seed)
        assert found.aleatoric is not None
        return replace(found, variance=found.aleatoric)
