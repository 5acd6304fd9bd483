"""The variance of the state, carried by its recursion with weights that stay the same."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, Solver, Step, integrate
from bayesdiff.solvers.integrate import Memory, advance, held_after
from bayesdiff.uncertainty.members.ensemble import MemberField
from bayesdiff.uncertainty.recorder import Recorder
from bayesdiff.uncertainty.recursion.propagate import (
    carried,
    effective,
    linear_part,
    product,
    rows_of,
    without_negative,
)
from bayesdiff.uncertainty.recursion.value_by_value import ValueByValue
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.start import Start


@dataclass(frozen=True, kw_only=True)
class CrossCovariance(ValueByValue):
    """Per-pixel variance of x' = a x + b g + c z, step by step, under one draw of weights for all.

        V' = a^2 V + 2 a b Cov(x, g) + b^2 Var(g),    V = 0 at first, z shared,

    which for the log-odds l of a belief and p, how likely the network says white is, reads
    Var(l') = Var(l) + 16 a^2 Var(p) + 8 a Cov(l, p) with a the accuracy of the transmission.

    A few weight draws with states of their own give the cross-covariances. With h the prediction
    of the trained head at such a state, and d what the draw adds to it,

        Var(g) = Var(h) + 2 Cov(h, d) + Var(d),

    and Var(d) is that of many more heads at the same features, which takes no evaluation of the
    network. To first order d follows from the weights alone, and V is the variance of an
    ensemble, less noisy than that of the few.

    Args:
        members: weight draws whose states are followed, at least 2.
        head_draws: weight draws for Var(d), at least 2.

    Example:
        After the example of ``starts_of``:

        >>> samples = CrossCovariance(members=4).mapped(starts, [0, 1], posterior)
        >>> samples.variance.shape, bool((samples.variance >= 0).all())
        (torch.Size([2, 1, 8, 8]), True)
    """

    members: int = 4
    head_draws: int = 64

    name: ClassVar[str] = "cross_covariance"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)
        at_least("uncertainty.head_draws", self.head_draws, 2)

    def check(self, solver: Solver) -> None:
        """Refuse a solver of several evaluations per step.

        Raises:
            UserError: for such a solver.
        """
        if solver.stages > 1:
            raise UserError(
                f"uncertainty={self.name} follows steps of one evaluation, those of "
                f"solver={solver.name} have {solver.stages}; use uncertainty=ensemble"
            )

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once."""
        return self.members + 1

    def evaluations(self, start: Start) -> float:
        """Of image and members."""
        return start.nfe * (1 + self.members)

    @torch.inference_mode()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with the variance of the recursion."""
        field, x_0, noise = start.field(), start.initial(), start.noise.copy()
        images: list[Tensor] = []
        image = integrate(field, start.steps(), x_0, start.draw, lambda _, x: images.append(x))
        heads = Heads.drawn(self, field, posterior, start)
        x, covariance = x_0[None], x_0.new_zeros(1, 1, *x_0.shape)
        memory: Memory = ()
        steps = [step.like(x_0) for step in start.steps()]
        recorder = Recorder(len(steps), self.times)
        for step, held, state in zip(steps, held_after(steps), images, strict=True):
            outputs, variance = heads(step, x)
            covariance = self._advance(step, x, memory, covariance, outputs, variance, held)
            x, memory = advance(step, x, [outputs], memory, held)
            if step.stochastic:
                x = x + step.noise * noise().to(x)
            recorder(step.end, state, covariance[0, 0])
        label = f"cross covariance, {self.members} members, {self.head_draws} head draws"
        return recorder.samples(image, covariance[0, 0], start.labels, field.evaluations, label)

    def _advance(
        self,
        step: Step,
        x: Tensor,
        memory: Memory,
        covariance: Tensor,
        outputs: Tensor,
        variance: Tensor,
        held: int,
    ) -> Tensor:
        """Covariance of the state and what is held after the step."""
        before = torch.stack([v.expand_as(outputs) for v in (x, *memory)])
        linear = linear_part(step, len(before), held).to(x)
        rows = rows_of(step).to(x)
        cross = torch.stack([effective(step, covary(v, outputs)[None]) for v in before])
        among = product("qe", "er...->qr...", rows, effective(step, variance[None])[None])
        return without_negative(carried(linear, covariance, cross, among))


@dataclass(frozen=True)
class Heads:
    """Outputs of the members, and their variance.

    Attributes:
        members: those whose states are followed.
        trained: the trained head, once for every member.
        others: many more.
    """

    members: MemberField
    trained: MemberField
    others: MemberField

    @classmethod
    def drawn(
        cls, estimator: CrossCovariance, field: Field, posterior: HeadPosterior, start: Start
    ) -> "Heads":
        """From the posterior, by the estimator's seed."""
        generator = torch.Generator().manual_seed(estimator.seed)
        drawn = [posterior.draw(n, generator) for n in (estimator.members, estimator.head_draws)]
        trained = posterior.curvature.mean.expand_as(drawn[0])
        fields = (MemberField(field, w.to(start.device)) for w in (drawn[0], trained, drawn[1]))
        return cls(*fields)

    def __call__(self, step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(M, B, C, H, W)`` of a step at states x, m = 1 or M, and their variance."""
        (t,), ((scale,),) = step.times, step.inputs
        features = self.members.features(scale * x, t)
        outputs = self.members.emitted(features, t)
        trained = self.trained.emitted(features, t)
        added = [self.others.emitted(one[None], t).var(0) for one in features]
        of_states = trained.var(0) + 2 * covary(trained, outputs - trained)
        return outputs, (of_states + torch.stack(added).mean(0)).clamp(min=0)


def covary(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased covariance over the members, ``(M, ...), (M, ...) -> (...)``."""
    return ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(first) - 1)
