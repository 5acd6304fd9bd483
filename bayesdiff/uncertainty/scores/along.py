"""The density of a sample from the evaluations that draw it: no second integration.

A step x -> x' of a deterministic solver is a map, and ln p(x') = ln p(x) - ln |det dx'/dx|. The
derivative is followed through the step's coefficients with every output's own derivative J split
into the part k I that it would have if the data were N(0, I), and the rest R = J - k I: all orders
of k are kept, and of R the first, whose trace random probes estimate. Terms of second order in R
cancel up to the order of the solver, as they do in d ln p / dt = -div v; the answer converges to
that of ``likelihood.log_likelihood`` as fast as the images do, and is exact at any number of steps
where R is zero.

The score of the noisy state comes for free: it is affine in the network's output.

Source: Chen et al., "Neural ordinary differential equations" (2018), eq. 8, with the trace of
Grathwohl et al., "FFJORD" (2019), eq. 7.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.networks.forward_mode import jvp
from bayesdiff.paths import Coefficient, convert
from bayesdiff.paths.coefficient import as_coefficient, like
from bayesdiff.paths.prediction import mix
from bayesdiff.solvers import Solver, Step, integrate, plan
from bayesdiff.solvers.step import PREDICTED, Row
from bayesdiff.uncertainty.estimator import Estimator, Training, check_derivative
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.scores.likelihood import Likelihood, Probes, log_prior, random_probes
from bayesdiff.uncertainty.start import Start

# Tells the random signs apart from what else is drawn for the same samples.
_PROBES = 80_021
# A value and its derivative in the state before the step: the part that is a multiple of the
# identity, and the diagonal of the rest ``(B, *shape)``, both as coefficients of an image.
Dual = tuple[Coefficient, Coefficient]


@dataclass(frozen=True)
class Along:
    """What a trajectory says of its own end.

    Attributes:
        likelihood: of the images; ``latents`` are their starting noise.
        score: ``(B, *shape)``, gradient of ln p_t at the last state where noise is left, under the
            model and its guidance.
        time: t of that state.
        probes: directions per image behind the trace.
    """

    likelihood: Likelihood
    score: Tensor
    time: float
    probes: int

    def beside(self, samples: Samples) -> Samples:
        """The samples with their bits and score; their record says of how many directions."""
        word = "probe" if self.probes == 1 else "probes"
        return replace(
            samples,
            bits_per_dim=self.likelihood.bits_per_dim.cpu(),
            score=self.score.cpu(),
            score_time=torch.tensor(self.time),
            estimator=f"{samples.estimator}, likelihood by {self.probes} {word}",
        )


def sample_with_density(start: Start, probes: int | Probes = 1) -> tuple[Tensor, Along]:
    """Images of a batch with their own density and score, in one pass.

        start = starts_of(model, Heun(50), seed=0, shape=(1, 8, 8), device=device)(range(16))
        images, along = sample_with_density(start, probes=4)
        along.likelihood.bits_per_dim, along.score

    Args:
        start: of the batch; its solver must be deterministic.
        probes: random directions per image, or directions that are given.

    Raises:
        UserError: where samples have no density, see ``check_along``.
    """  # noqa: DOC502 - raised one level down
    density = Density(start, probes)
    x_0 = start.initial()
    images = integrate(density, start.steps(), x_0, start.draw, density.observe)
    return images, density.along(x_0)


def check_along(model: GenerativeModel, solver: Solver, asked: str) -> None:
    """Refuse samples that have no density, or none that could be followed.

    Args:
        model: trained or not.
        solver: of the samples.
        asked: for it, for the message.

    Raises:
        UserError: one line with the cure.
    """
    steps = plan(solver, model.path, model.prediction)
    if any(step.stochastic for step in steps):
        raise UserError(
            f"{asked} follows a density along an equation, and solver={solver.name} draws noise "
            "on the way; use a deterministic one, such as euler, heun or ddim"
        )
    if any(PREDICTED in step.times for step in steps):
        raise UserError(
            f"{asked} follows a density, and these samples end with a prediction, which has none; "
            "use solver.denoise=false, or experiment=code_length for a Bayesian flow network"
        )
    check_derivative(model, asked)


def check_run_along(run: Training, solver: Solver, estimator: Estimator) -> None:
    """Refuse, before any work, an estimator's ``likelihood_probes`` that could not be had.

    Raises:
        UserError: one line with the cure.
    """
    if not estimator.likelihood_probes:
        return
    asked = f"uncertainty.likelihood_probes={estimator.likelihood_probes}"
    if not estimator.carries_density:
        raise UserError(
            f"{asked} follows the image's own evaluations, which uncertainty={estimator.name} "
            "mixes with those of its maps; use uncertainty=ensemble"
        )
    space = run.data.data.space
    if space.decoded or not space.pictures:
        raise UserError(
            f"{asked} is in bits of 8-bit pixels, and {run.data.data.name} has none; "
            "leave it at 0, or see bayesdiff.uncertainty.scores.along for nats in Python"
        )
    check_along(run.model, solver, asked)


class Density:
    """The network along a trajectory, in the place of a ``Field``, and what it adds to ln p.

    Attributes:
        field: that it evaluates; a derivative counts as an evaluation for each probe.
    """

    def __init__(self, start: Start, probes: int | Probes = 1) -> None:
        check_along(start.model, start.solver, "a density")
        self.field = start.field()
        self.path, self.prediction = start.path, start.model.prediction
        if not isinstance(probes, Probes):
            probes = random_probes(start.noise.fork(_PROBES), probes)
        vectors = probes.vectors
        self.probes = Probes(vectors.to(next(start.model.parameters())), probes.weight)
        self.gained: Coefficient = 0.0
        self._seen: list[tuple[Coefficient, Tensor]] = []  # k and R of this step's evaluations
        self._memory: list[Dual] = []
        self._last: tuple[Tensor, float, Tensor] | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Prediction for images ``(B, C, H, W)`` at time ``t``."""
        c = self.path.coefficients(torch.tensor(t, dtype=torch.float64))
        r, s = mix(self.prediction, c)
        size = c.alpha**2 + c.sigma**2
        own = like(as_coefficient((r * c.alpha + s * c.sigma) / size), x.double())
        with torch.inference_mode(False), torch.no_grad():
            output, diagonal = self._evaluate(x.clone(), t)
        if not self._seen and bool(c.sigma.all()):  # the first of a step sees the state itself
            self._last = x, t, output
        self._seen.append((own, diagonal - own))
        return output

    def observe(self, step: Step, x: Tensor) -> None:
        """Add what the step does to ln p; for ``integrate``, as its last argument."""
        seen, self._seen = self._seen, []
        before: Dual = 1.0, 0.0
        outputs: list[Dual] = []
        for row, (own, rest) in zip(step.inputs, seen, strict=True):
            linear, first = _combined(row, [before, *outputs])
            outputs.append((own * linear, own * first + linear * rest))
        known = [before, *outputs, *self._memory]
        kept = [_combined(row, known) for row in step.kept]
        linear, first = _combined((*step.output, *step.history), known)
        scale = torch.as_tensor(linear, dtype=torch.float64, device=x.device)
        share = torch.as_tensor(first / scale).to(x.device)
        logs = scale.abs().log() + torch.zeros_like(x, dtype=torch.float64)
        self.gained = self.gained - (logs + share).flatten(1).sum(1)
        # All that is kept is of the new state from here on.
        held = [*kept, *self._memory]
        self._memory = [(a / scale, b / scale - a / scale * share) for a, b in held]

    def along(self, x_0: Tensor) -> Along:
        """What the trajectory from ``x_0`` has found, once it is followed to its end.

        Raises:
            ValueError: before that.
        """
        if self._last is None:
            raise ValueError("nothing has been followed yet; give this to integrate first")
        x, t, output = self._last
        p, q = convert(
            self.prediction, "score", self.path.coefficients(torch.tensor(t, dtype=torch.float64))
        )
        score = p.to(x) * x + q.to(x) * output
        x_0 = x_0.double()
        density = log_prior(self.path, x_0) + self.gained
        found = Likelihood(density, x_0, self.field.evaluations)
        return Along(found, score, t, len(self.probes.vectors))

    def _evaluate(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Output, and the estimated diagonal of its derivative in float64."""
        vectors = self.probes.vectors
        before = self.field.evaluations
        states = x.to(vectors).repeat(len(vectors), *[1] * (x.ndim - 1))
        found: tuple = jvp(lambda y: self.field(y, t), (states,), (vectors.flatten(0, 1),))
        self.field.evaluations += self.field.evaluations - before
        outputs, tangents = (each.unflatten(0, vectors.shape[:2]) for each in found)
        products = vectors.double() * tangents
        return outputs[0].to(x), self.probes.weight * products.sum(0)


def _combined(row: Row, values: Sequence[Dual]) -> Dual:
    """The combination of values and of their derivatives; a row may end before the values do."""
    linear: Coefficient = 0.0
    first: Coefficient = 0.0
    for weight, (a, b) in zip(row, values, strict=False):
        linear, first = linear + weight * a, first + weight * b
    return linear, first
