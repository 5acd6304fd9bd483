"""The variance of the training target, predicted by a second head and carried to the images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import values_of
from bayesdiff.solvers import Field, Solver, Step, integrate
from bayesdiff.solvers.integrate import Memory, SampleNoise, advance, combine, held_after
from bayesdiff.storage.artefacts import Artefact, key_of, weights_key
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.recorder import Recorder
from bayesdiff.uncertainty.recursion.log_variance import (
    TARGETS,
    LogVarianceHead,
    check_fold,
    fit_log_variance,
)
from bayesdiff.uncertainty.recursion.propagate import (
    OutputMoments,
    effective,
    propagate,
    without_negative,
)
from bayesdiff.uncertainty.recursion.value_by_value import ValueByValue
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.sensitivities.products import derivatives
from bayesdiff.uncertainty.start import Start, Starts

PROPAGATIONS = ("diagonal", "linearised", "independent")


@dataclass(frozen=True, kw_only=True)
class VarianceHead(ValueByValue):
    """Variance of the training target, predicted by a second head and carried along the sampler.

    A baseline after UA-Flow (Han, Lao Beyer and Karaman, "Flow Matching with Uncertainty
    Quantification and Guidance", 2026, arXiv 2602.10326). The network says g(x, t), and a linear
    head beside its own, on the same features, says how far training targets u lie from that:

        u | x, t ~ N(g, s^2),    s^2 = exp(W phi(x, t) + b),

    by maximum likelihood. With J the network's derivative and V = 0 at the noise, each step
    x' = a x + b g + c z of a deterministic solver (c = 0) then has, for every value alone,

        V' = a^2 V + 2 a b Cov(x, g) + b^2 s^2,    Cov(x, g) = V diag(J),

    at the image's own state, which is the mean of the linearised step. The variance of g over the
    states, b^2 J V J^T, is of second order in the step and left out, as in ``Published``.

    What it is not: s^2 is what is open about a training target when the state is known, mostly
    which image the state belongs to. It is aleatoric: large at all times on a flow, there with any
    number of training images, and no posterior variance. Each step moreover takes its error for a
    new one, so that V falls as steps get finer. A map need have neither the size nor the meaning
    of what training again would change.

    Departures from the paper. There both heads are trained together, all weights with them; here
    the second one is fitted to a network that stays as it is. ``target=marginal`` has the aim of
    the paper's correction, which takes the spread of targets around their mean out of the loss and
    leaves the network's own error.

    Args:
        propagation: ``diagonal``, as above; ``linearised``, V the diagonal of the whole covariance
            P' = (a I + b J) P (a I + b J)^T + b^2 diag(s^2), nothing left out, from random
            directions; or ``independent``, without Cov(x, g).
        probes: random directions, a derivative each at every step that has V > 0: signs for
            diag(J), Hutchinson's estimator, whose noise can make V < 0, which counts as 0; of
            ``linearised`` the draws whose mean square is V, of relative error sqrt(2 / probes).
        target: ``conditional``, the network's own training target, or ``marginal``, its mean over
            which of the images of the fit (of the same condition) a state came from. Where only
            one can have, as of large images at all but early times, both are the same.
        fit_images: training images of the fit, one draw of time and noise each; None for all.
        fit_rows: positions of the head's input that enter the fit, at most, or one per image.
        training: the run, see ``for_run``.
        head: of the variance, see ``fit``.

    Example:
        After the example of ``starts_of``, with s^2 = exp(-1) everywhere in place of a fit:

        >>> bias, wide = torch.tensor([-1.0]), torch.tensor([9.0])
        >>> head = LogVarianceHead(torch.zeros(1, 72), bias, -wide, wide)
        >>> estimator = VarianceHead(head=head, propagation="independent")
        >>> samples = estimator.mapped(starts, [0, 1], posterior)
        >>> samples.variance[0, 0, 0, 0]  # of four steps (1/4)^2 exp(-1) each
        tensor(0.0920)
    """

    propagation: str = "diagonal"
    probes: int = 8
    target: str = "conditional"
    fit_images: int | None = 2048
    fit_rows: int = 32_768
    training: Training | None = None
    head: LogVarianceHead | None = None

    name: ClassVar[str] = "variance_head"
    of_posterior: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, choices in (("propagation", PROPAGATIONS), ("target", TARGETS)):
            if (value := getattr(self, option)) not in choices:
                raise UserError(
                    f"unknown uncertainty.{option} {value!r}; choose from {', '.join(choices)}"
                )
        at_least("uncertainty.probes", self.probes)
        at_least("uncertainty.fit_rows", self.fit_rows)
        if self.fit_images is not None:
            at_least("uncertainty.fit_images", self.fit_images)

    def check(self, solver: Solver) -> None:
        """Refuse a solver without one plain output per step.

        Raises:
            UserError: for noise on the way, several evaluations per step, or guidance.
        """
        wrong = (
            (solver.stochastic, "draws noise on the way", "solver=euler or ddim"),
            (solver.stages > 1, "has several evaluations per step", "solver=euler or ddim"),
            (solver.guidance != 1, "is guided", "solver.guidance=1"),
        )
        for is_so, what, cure in wrong:
            if is_so:
                raise UserError(
                    f"uncertainty={self.name} carries the variance of one output per step, and "
                    f"solver={solver.name} {what}; use {cure}, or uncertainty=ensemble"
                )

    def check_run(self, run: Training) -> None:
        """Refuse a likelihood without squared residuals, and a network that mixes outputs."""
        likelihood = run.model.likelihood
        if not (likelihood.scaled and likelihood.linear):
            raise UserError(
                f"uncertainty={self.name} is for a Gaussian likelihood, and this is "
                f"{likelihood.name}; use uncertainty=ensemble"
            )
        check_fold(run.model, run.data.space.shape)

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a model without the data it was trained on.

        Raises:
            UserError: before ``fit``.
        """
        if self.head is None:
            raise UserError(
                f"uncertainty={self.name} is fitted to the data of a training, and there are none "
                "here; use uncertainty=ensemble"
            )

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once: a derivative counts as one more."""
        return 1 + (0 if self.propagation == "independent" else 2 * self.probes)

    def for_run(self, run: Training) -> Self:
        """With the run's data."""
        return replace(self, training=run)

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With the second head, which stays in the run folder."""
        run, model = self.training, starts([0]).model
        if run is None:
            raise UserError(
                f"uncertainty={self.name} has no data to be fitted to; call for_run first"
            )
        data = run.data.data
        chosen = {"target": self.target, "num_images": self.fit_images, "rows": self.fit_rows}
        options = key_of(chosen, self.seed)
        source = f"{weights_key(model)}-{data.fingerprint}-{options}"

        def make() -> LogVarianceHead:
            given = values_of(model.condition, data)
            own: dict[str, Any] = {**chosen, "seed": self.seed, "encode": space_of(data).encode}
            return fit_log_variance(model, data.images, given, source=source, **own)

        if folder is None:
            return replace(self, head=make(), training=None)
        path = folder / f"variance-head-{options[:8]}.safetensors"
        head = Artefact(path, source).once(
            lambda: LogVarianceHead.stored(path, source), make, lambda new: new.save(path)
        )
        return replace(self, head=head, training=None)

    @torch.no_grad()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with the variance that the second head gives them."""
        self.check_model(start.model)
        assert self.head is not None
        field, x = start.field(), start.initial()
        signs, steps = start.noise.fork(self.seed), [step.like(x) for step in start.steps()]
        recorder = Recorder(len(steps), self.times)
        follow = self._rows if self.propagation == "linearised" else self._moments
        x, variance = follow(field, self.head, steps, x, signs, recorder)
        count = "" if self.propagation == "independent" else f", {self.probes} probes"
        label = f"variance head, {self.propagation}{count}, {self.target} target"
        return recorder.samples(x, variance, start.labels, field.evaluations, label)

    def _moments(
        self,
        field: Field,
        head: LogVarianceHead,
        steps: list[Step],
        x: Tensor,
        fresh: SampleNoise,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        """Image and variance, value by value; the latter with that of what earlier steps kept."""
        memory: Memory = ()
        mean, covariance = x[None], x.new_zeros(1, 1, 1, *x.shape)
        for step, held in zip(steps, held_after(steps), strict=True):
            state, t = combine(step.inputs[0], x, ()), step.times[0]
            features = field.features(state, t)
            output = field.output(features)
            variance = covariance[0, 0, 0]
            with_x = torch.zeros_like(x)
            if self.propagation == "diagonal" and variance.any():
                z = torch.stack([torch.sign(fresh()) for _ in range(self.probes)]).to(x)
                slope = (z * derivatives(field, state, output, step.inputs[0][0] * z, t)).mean(0)
                with_x = variance * slope
            spread = effective(step, head(field.model.net, features).sqrt()[None])
            moments = OutputMoments(
                effective(step, output[None]),
                effective(step, with_x[None]),
                torch.zeros_like(spread[:, None] * spread),
                spread[:, None] * spread,
            )
            mean, covariance = propagate(step, mean, covariance, moments, held)
            covariance = without_negative(covariance)
            x, memory = advance(step, x, [output], memory, held)
            recorder(step.end, x, covariance[0, 0, 0])
        return x, covariance[0, 0, 0]

    def _rows(
        self,
        field: Field,
        head: LogVarianceHead,
        steps: list[Step],
        x: Tensor,
        fresh: SampleNoise,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        """Image and variance from rows d' = (a I + b J) d + b s o xi, xi new at every step."""

        def outputs(rows: Tensor, t: float) -> Tensor:
            state, moved = rows[0], rows[1:]
            features = field.features(state, t)
            output = field.output(features)
            xi = torch.stack([fresh() for _ in moved]).to(state)
            change = head(field.model.net, features).sqrt() * xi
            if moved.any():
                change = change + derivatives(field, state, output, moved, t)
            return torch.cat([output[None], change])

        def observe(step: Step, rows: Tensor) -> None:
            recorder(step.end, rows[0], rows[1:].square().mean(0))

        rows = torch.cat([x[None], x.new_zeros(self.probes, *x.shape)])
        rows = integrate(outputs, steps, rows, fresh, observe)
        return rows[0], rows[1:].square().mean(0)
