"""Mean and variance carried from step to step, with weights drawn afresh at every step."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import DDPM, Solver, Step
from bayesdiff.solvers.integrate import Memory, advance, held_after
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.recorder import Recorder
from bayesdiff.uncertainty.recursion.covariance import COVARIANCES
from bayesdiff.uncertainty.recursion.propagate import (
    OutputMoments,
    effective,
    propagate,
    rows_of,
    without_negative,
)
from bayesdiff.uncertainty.recursion.state_draws import Draws
from bayesdiff.uncertainty.recursion.uncertain_head import Evaluations, UncertainHead, evaluate
from bayesdiff.uncertainty.recursion.value_by_value import ValueByValue
from bayesdiff.uncertainty.samples import Samples, check_skip_interval
from bayesdiff.uncertainty.start import Start


@dataclass(frozen=True)
class Moments(ValueByValue):
    """Per-pixel mean and variance of x' = a x + b g + c z, step by step.

    With mean m and variance V of x, g the trained network's output and gam2 its variance due to
    the head's weights:

        m' = a m + b E[g],
        V' = a^2 V + 2 a b Cov(x, g) + b^2 (gam2 + Var_x(g)) + c^2.

    These are the moments by the law of total variance if x ~ N(m, diag V) and the weights are
    drawn afresh at every step. They are not: a trajectory keeps its weights, so V falls as
    1 / (number of steps) where the variance of an ensemble converges.

    A step of several evaluations is treated as one, by its effective output sum_i b_i g_i. A
    multistep method carries the covariance of x and of what it keeps, per pixel (``propagate``).

    A stochastic solver's c^2 enters the V from which x is drawn, and is accounted for apart: the
    recursion is linear in V at given draws, so both parts are carried by the slopes Cov(x, g) / V
    and Var_x(g) / V of the whole V. That is exact for a linear network that maps pixels one by
    one; otherwise it takes the slopes over the spread of all trajectories for those along one.

    On a skipped step V' = a^2 V + c^2 and m' = a m + b g(x_t) (BayesDiff-Skip).

    Args:
        mc_samples: S, draws of x, that is network evaluations per step that is not skipped and
            has V > 0; ``stein`` takes a derivative at each and counts it as one more.
        skip_interval: every how many steps the variance is really updated.
        covariance: estimator of Cov(x, g): ``uncentred``, ``centred`` by S - 1, ``antithetic``
            in pairs m +- sqrt(V) z, or ``stein``, V E[dg/dx] by derivatives along random signs.
        var_x: whether Var_x(g) is there. It includes what the weights of a step's earlier
            evaluations do to its later ones.
        clamp: whether V < 0, which estimates can give, becomes 0 after every step, and not only
            where draws of x need it.
        gam2_at: where gam2 is taken, at the ``realised`` sample x_t or as its mean over the
            ``draws`` of x.
        ddpm_fix: False has two defects of the official code for DDPM (of a noise predictor): m
            stays at the starting noise, and the factor of V is a instead of a^2.
        cfg_joint: whether guidance combines features before gam2 is taken. False adds the
            variances, w^2 gam2_c + (1 - w)^2 gam2_u, as if each had weights of its own.
        shared: whether all evaluations of a step meet the same weights. False draws them apart,
            every pixel's too, and lets later evaluations of the draws see them.
    """

    mc_samples: int = 10
    skip_interval: int = 1
    covariance: str = "centred"
    var_x: bool = True
    clamp: bool = True
    gam2_at: str = "draws"
    ddpm_fix: bool = True
    cfg_joint: bool = True
    shared: bool = True

    name: ClassVar[str] = "moments"

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("uncertainty.covariance", self.covariance, COVARIANCES)
        _choice("uncertainty.gam2_at", self.gam2_at, ("realised", "draws"))
        for option in ("var_x", "clamp", "ddpm_fix", "cfg_joint", "shared"):
            if not isinstance(getattr(self, option), bool):
                got = getattr(self, option)
                raise UserError(f"uncertainty.{option} must be true or false, got {got!r}")
        self._check_draws()

    def _check_draws(self) -> None:
        """Refuse too few draws for the estimators."""
        size = at_least("uncertainty.mc_samples", self.mc_samples)
        paired = self.covariance == "antithetic"
        least = (1 + (self.var_x or self.covariance == "centred")) * (1 + paired)
        least = least if self.var_x or not paired else 2
        if size < least or paired and size % 2:
            allowed = f"{'an even number' if paired else 'a whole number'} >= {least}"
            raise UserError(
                f"uncertainty.mc_samples must be {allowed} for covariance={self.covariance} and "
                f"var_x={str(self.var_x).lower()}, got {size}"
            )

    def check(self, solver: Solver) -> None:
        """Refuse settings that do not fit the solver.

        Raises:
            UserError: for a skip interval beyond its steps, or DDPM's defects without DDPM.
        """
        check_skip_interval(self.skip_interval, solver)
        if not self.ddpm_fix and not isinstance(solver, DDPM):
            raise UserError(
                "uncertainty.ddpm_fix=false is about solver=ddpm alone, got "
                f"solver={solver.name}; use uncertainty.ddpm_fix=true"
            )

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a network whose prediction is not linear in the head's weights.

        Raises:
            UserError: for such a likelihood.
        """
        likelihood = likelihood_of(model)
        if not likelihood.linear:
            others = "linearised or ensemble" if likelihood.differentiable else "ensemble"
            raise UserError(
                f"uncertainty={self.name} needs a prediction linear in the head's weights, which "
                f"likelihood={likelihood.name} has not; use uncertainty={others}"
            )

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once: the draws, their derivatives, and the image."""
        return self.mc_samples * (1 + (self.covariance == "stein")) + 1

    @torch.inference_mode()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with the variance of the recursion."""
        self._check_prediction(start.model.prediction)
        field = start.field()
        head = UncertainHead(field, posterior, self.cfg_joint, self.shared)
        draws = self._draws(start, head)
        memory: Memory = ()
        x = start.initial()
        steps = [step.like(x) for step in start.steps()]
        stochastic = any(step.stochastic for step in steps)
        # Of x and all that earlier steps kept and is held; two parts if the solver has noise.
        mean = x[None]
        covariance = x.new_zeros(1, 1, 1 + stochastic, *x.shape)
        recorder = Recorder(len(steps), self.times)
        for number, (step, held) in enumerate(zip(steps, held_after(steps), strict=True)):
            here = evaluate(head, step, x)
            noise = step.noise * start.draw() if step.stochastic else torch.zeros_like(x)
            if number % self.skip_interval:
                moments = OutputMoments.at_point(effective(step, here.outputs))
            else:
                whole = covariance[0, 0].sum(0)
                moments = self._moments(draws, step, here, mean[0], whole)
            mean, covariance = self._advance(step, mean, covariance, moments, held)
            x, memory = advance(step, x, list(here.outputs), memory, held)
            x = x + noise
            recorder(step.end, x, covariance[0, 0, 0])
        epistemic, *of_noise = covariance[0, 0]
        return recorder.samples(
            x, epistemic, start.labels, field.evaluations, self.describe(), *of_noise
        )

    def _draws(self, start: Start, head: UncertainHead) -> Draws:
        """The estimates of one batch; all images meet the same weights, however batched."""
        fresh, weights = start.noise.fork(self.seed), torch.Generator().manual_seed(self.seed)
        return Draws(head, self.mc_samples, self.covariance, self.var_x, fresh, weights)

    def _moments(
        self, draws: Draws, step: Step, here: Evaluations, mean: Tensor, variance: Tensor
    ) -> OutputMoments:
        """Moments of a step's outputs for x ~ N(mean, variance), both ``(B, C, H, W)``."""
        vague = bool(variance.any())
        if vague and self.gam2_at == "draws":
            return draws.moments(step, mean, variance)
        gam2 = draws.head.covariance(here.features, rows_of(step))
        # Without variance of x all draws would be x itself, but for earlier evaluations' weights.
        if not vague and not (self.var_x and len(step.times) > 1 and gam2.any()):
            return OutputMoments.at_point(effective(step, here.outputs), gam2)
        return draws.moments(step, mean, variance, gam2 if self.gam2_at == "realised" else None)

    def _advance(
        self,
        step: Step,
        mean: Tensor,
        covariance: Tensor,
        moments: OutputMoments,
        held: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance after the step."""
        new_mean, new = propagate(step, mean, covariance, moments, held)
        if not self.ddpm_fix:
            a = step.output[0]
            new_mean, new = mean, new + (a - a**2) * covariance
        return new_mean, without_negative(new) if self.clamp else new

    def _check_prediction(self, prediction: str) -> None:
        """Refuse DDPM's defects where they are not defined."""
        if not self.ddpm_fix and prediction != "noise":
            raise UserError(
                "uncertainty.ddpm_fix=false needs a noise predictor, got "
                f"model.prediction={prediction}; use uncertainty.ddpm_fix=true"
            )

    def describe(self) -> str:
        """Name and settings; of the switches those that differ from the class's defaults."""
        text = f"{self.name.replace('_', ' ')}, S = {self.mc_samples}, skip {self.skip_interval}"
        named = {"mc_samples", "skip_interval", *(field.name for field in fields(Estimator))}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in named and value != field.default:
                text += f", {field.name} {str(value).lower()}"
        return text


@dataclass(frozen=True)
class Published(Moments):
    """BayesDiff's moments (Kou et al. 2024), kept as the named baseline.

    As published: no Var_x(g), the uncentred covariance mean (x_i - m) g(x_i), gam2 at the realised
    sample, no clamp at the end (so maps can be negative). The switches of ``Moments`` turn each of
    these into its cure, or add the defects of the official code that its formulas do not have.

    Not kept: gam2 in closed form instead of 100 draws, and x_t is the model's own sample without
    the injected noise, because the shown image must not depend on the estimate. V < 0 on the way
    counts as 0 in the draws alone and is carried on, where the official code sets it to 0 before
    it draws. The official DPM-Solver-2 is ``shared=False`` for a noise predictor; the paper has no
    multistep method.

    Example:
        After the example of ``starts_of``:

        >>> samples = Published(mc_samples=10).mapped(starts, [0, 1], posterior)
        >>> samples.estimator, samples.nfe
        ('published, S = 10, skip 1', 34)
    """

    covariance: str = "uncentred"
    var_x: bool = False
    clamp: bool = False
    gam2_at: str = "realised"

    name: ClassVar[str] = "published"


@dataclass(frozen=True)
class TotalVariance(Moments):
    """The law of total variance in full, still with weights drawn afresh at every step.

    What the published recursion becomes when its estimators are mended: Var_x(g), centred
    covariance, the mean of gam2 over the draws, no negative variance. What remains is the
    approximation itself, so the difference to an ensemble is the price of fresh weights.

    Example:
        After the example of ``starts_of``:

        >>> one, other = (
        ...     TotalVariance(mc_samples=10, skip_interval=k).mapped(starts, [0, 1], posterior)
        ...     for k in (1, 2)
        ... )
        >>> one.nfe, other.nfe, bool((one.variance >= 0).all())
        (34, 14, True)
    """

    name: ClassVar[str] = "total_variance"


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown word."""
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(known)}")
