"""Sensitivities of the image to the weights of the head, carried through the solver."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Solver, Step, integrate
from bayesdiff.uncertainty.decoded import decoded, decoded_sensitivities
from bayesdiff.uncertainty.estimator import Estimator, Training
from bayesdiff.uncertainty.recorder import Recorder
from bayesdiff.uncertainty.samples import Samples, check_skip_interval
from bayesdiff.uncertainty.sensitivities.pilot_images import DRAWS, Pilot
from bayesdiff.uncertainty.sensitivities.predicted_products import Rule, spread_nodes
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS, Product, Rows, TangentField
from bayesdiff.uncertainty.start import Start, Starts

DIRECTIONS = "at right angles"  # of the weights, part of the key of maps
ROWS = 64  # sensitivities of one image followed at once


@dataclass(frozen=True, kw_only=True)
class Linearised(Estimator):
    """First-order variance under weights that stay the same along the whole trajectory.

    With S the derivative of the state in the head's weights and Sigma their covariance,

        S' = (a I + b J) S + b Phi,    V = diag(S Sigma S^T),

    followed for ``draws`` directions delta ~ N(0, Sigma), orthogonal in its units: V is the mean
    of (S delta)^2, with a relative sd of sqrt(2 / draws) per pixel at most. ``draws=all`` follows
    the P columns of Sigma^(1/2) of every output channel instead, and V is exact to first order.

    With a skip interval k one in k evaluations of the network gets its product J (S delta), evenly
    spread, and the others are predicted by a regression that a pilot of 32 other images has
    fitted; nothing is held constant or left out. On a small network of digits that keeps the
    total within 10 % for k = 3 and 25 % for k = 5, and the order of the images above 0.97.

    Args:
        draws: weight directions, or ``all``.
        skip_interval: network evaluations per product.
        derivative: ``exact`` is forward-mode differentiation; ``difference`` is a forward
            difference, cheaper by a factor 2 to 3 and right to about 1e-3; ``bfloat16`` is one in
            half precision, another factor 1.5 where the device gains from it, right to about 0.1.
        noise_draws: directions of a stochastic solver's own noise; 0 leaves them out.
        rule: predicts left-out products; made by ``fit``.

    Example:
        After the example of ``starts_of``:

        >>> exact = Linearised(draws="all").mapped(starts, [0, 1], posterior).variance
        >>> estimate = Linearised(draws=32).mapped(starts, [0, 1], posterior).variance
        >>> abs(float(estimate.sum() / exact.sum()) - 1) < 0.25
        True
    """

    draws: int | str = 32
    skip_interval: int = 1
    derivative: str = "exact"
    noise_draws: int = 8
    rule: Rule | None = None

    name: ClassVar[str] = "linearised"
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws != "all":
            if isinstance(self.draws, str):
                raise UserError(
                    f"uncertainty.draws must be a whole number or all, got {self.draws!r}"
                )
            at_least("uncertainty.draws", self.draws)
        if self.derivative not in list(PRODUCTS):
            raise UserError(
                f"unknown uncertainty.derivative {self.derivative!r}; "
                f"choose from {', '.join(PRODUCTS)}"
            )
        at_least("uncertainty.noise_draws", self.noise_draws, 0)

    def check(self, solver: Solver) -> None:
        """Refuse a skip interval beyond the solver's steps."""
        check_skip_interval(self.skip_interval, solver)

    @property
    def restarts(self) -> bool:
        """A rule for left-out products is fitted to whole trajectories."""
        return self.skip_interval == 1

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once."""
        noise = self.noise_draws if solver.stochastic else 0
        return 1 + noise + (ROWS if self.draws == "all" else min(int(self.draws), ROWS))

    def evaluations(self, start: Start) -> float | None:
        """Of image and products, at all evaluations but the first; unknown where some are skipped.

        Products but differences repeat the image's own evaluation, and so do further turns.
        """
        if self.skip_interval > 1 or self.draws == "all":
            return None
        stochastic = any(step.stochastic for step in start.steps())
        rows = int(self.draws) + (self.noise_draws if stochastic else 0)
        turns, count = -(-int(self.draws) // ROWS), evaluations(start)
        again = 0 if self.derivative == "difference" else turns
        each = start.nfe / count
        return each * (turns * count + (count - 1) * (rows + again))

    def sources(self, run: Training) -> list[Any]:
        """How directions are drawn: those of other versions made other maps."""
        return [DIRECTIONS]

    @torch.no_grad()
    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With the rule for left-out products, where there are any."""
        if self.skip_interval == 1:
            return self
        count = evaluations(starts([0]))
        nodes = spread_nodes(count, count // self.skip_interval)
        product = PRODUCTS[self.derivative]
        # Answers depend on the direction: the pilot follows those of the maps, as far as it can.
        deltas = directions(posterior, DRAWS, self.seed + 1)
        if self.draws != "all":
            own = directions(posterior, int(self.draws), self.seed)
            deltas = torch.cat([own, deltas])[:DRAWS]
        pilot = Pilot.follow(starts, deltas, product)
        return replace(self, rule=pilot.rule(nodes, product))

    @torch.no_grad()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their first-order variance."""
        if self.skip_interval > 1 and self.rule is None:
            raise ValueError("a skip interval needs fit(...) before the first batch")
        if self.draws == "all":
            deltas, weight = posterior.columns(), 1.0
        else:
            deltas = directions(posterior, int(self.draws), self.seed)
            weight = 1 / len(deltas)
        product = PRODUCTS[self.derivative]
        count = self.noise_draws
        # Many directions go in turns; the image is followed again with each.
        turns, noise = deltas.split(ROWS), start.noise.copy()
        followed = follow(start, turns[0], weight, product, self.rule, count, self.seed)
        for turn in turns[1:]:
            again = replace(start, noise=noise.copy())
            more = follow(again, turn, weight, product, self.rule, 0, self.seed)
            followed = followed.with_more(more)
        label = f"linearised, {self.draws} draws, {self.derivative}, skip {self.skip_interval}"
        return followed.samples(start, label, self.times)


def evaluations(start: Start) -> int:
    """Network evaluations of the solver along one trajectory."""
    return sum(len(step.times) for step in start.steps())


def directions(posterior: HeadPosterior, count: int, seed: int) -> Tensor:
    """Weight directions ``(count, C_out, P)``, orthogonal in units of N(0, Sigma)."""
    drawn = posterior.draw(count, torch.Generator().manual_seed(seed), orthogonal=True)
    return drawn - posterior.curvature.mean


@dataclass(frozen=True)
class Followed:
    """One batch with its sensitivities.

    Attributes:
        states: image after every step, ``(S, B, C, H, W)``.
        variance: epistemic, same shape.
        sensitivities: at the end, ``(M, B, C, H, W)``.
        sampler_noise: ``(B, C, H, W)``, None where it was not asked for.
        features: of the evaluations where the rule has a product, and of the last one.
        ends: times of the states.
        nfe: network evaluations per image.
        shown: variance of the last states' values, None where they are the states.
    """

    states: Tensor
    variance: Tensor
    sensitivities: Tensor
    sampler_noise: Tensor | None
    features: list[Tensor]
    ends: list[float]
    nfe: int
    shown: Tensor | None = None

    def with_more(self, other: "Followed") -> "Followed":
        """The same images with the variance of further directions added."""
        shown = None if self.shown is None or other.shown is None else self.shown + other.shown
        variance, nfe = self.variance + other.variance, self.nfe + other.nfe
        return replace(self, variance=variance, nfe=nfe, shown=shown)

    def samples(self, start: Start, estimator: str, times: Sequence[float]) -> Samples:
        """The record that every estimator returns."""
        recorder = Recorder(len(self.ends), times)
        for time, state, variance in zip(self.ends, self.states, self.variance, strict=True):
            recorder(time, state, variance)
        state, variance = self.states[-1], self.variance[-1]
        return recorder.samples(
            decoded(start.decoder, state),
            variance if self.shown is None else self.shown,
            start.labels,
            self.nfe,
            estimator,
            self.sampler_noise,
            None if self.shown is None else (state, variance),
        )


@torch.no_grad()
def follow(
    start: Start,
    deltas: Tensor,
    weight: float,
    product: Product,
    rule: Rule | None = None,
    noise_draws: int = 0,
    seed: int = 0,
) -> Followed:
    """Image and sensitivities through all steps.

    Args:
        start: the batch.
        deltas: ``(M, C_out, P)`` weight directions.
        weight: of each squared sensitivity in the variance.
        product: how J d is computed.
        rule: predicts left-out products; None leaves none out.
        noise_draws: directions of the sampler's own noise, for a stochastic solver.
        seed: of these.
    """
    field = start.field()
    tangent = TangentField(field, deltas.to(start.device), product, rule)
    return follow_rows(start, tangent, len(deltas), weight, noise_draws, seed, rule)


@torch.no_grad()
def follow_rows(
    start: Start,
    tangent: Rows,
    count: int,
    weight: float,
    noise_draws: int = 0,
    seed: int = 0,
    rule: Rule | None = None,
) -> Followed:
    """Image and sensitivities through all steps, whatever the sensitivities are to.

    Args:
        start: the batch.
        tangent: outputs of an image and of its sensitivities; further rows see no weights.
        count: M, sensitivities.
        weight: of each squared sensitivity in the variance.
        noise_draws: directions of the sampler's own noise, for a stochastic solver.
        seed: of these.
        rule: its correction of the variance; None for none.
    """
    steps, x_0 = start.steps(), start.initial()
    extra = noise_draws if any(step.stochastic for step in steps) else 0
    fork = start.noise.fork(seed)
    states: list[Tensor] = []
    variance: list[Tensor] = []

    def noise() -> Tensor:
        own = [fork().to(x_0) for _ in range(extra)]
        return torch.stack([start.draw(), *[torch.zeros_like(x_0)] * count, *own])

    def observe(step: Step, rows: Tensor) -> None:
        scale = weight if rule is None else weight * float(rule.correction[len(states)])
        states.append(rows[0].clone())
        variance.append(scale * rows[1 : 1 + count].square().sum(0))

    rows = torch.cat([x_0[None], x_0.new_zeros(count + extra, *x_0.shape)])
    end = integrate(tangent, steps, rows, noise, observe)
    decoder, shown, own = start.decoder, None, end[1 + count :]
    if decoder is not None:
        last = weight if rule is None else weight * float(rule.correction[-1])
        shown = last * decoded_sensitivities(decoder, end[0], end[1 : 1 + count]).square().sum(0)
        own = decoded_sensitivities(decoder, end[0], own) if extra else own
    return Followed(
        states=torch.stack(states),
        variance=torch.stack(variance),
        sensitivities=end[1 : 1 + count],
        sampler_noise=own.square().mean(0) if extra else None,
        features=list(tangent.features.values()),
        ends=[step.end for step in steps],
        nfe=tangent.field.evaluations,
        shown=shown,
    )
