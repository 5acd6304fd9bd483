"""The recursion of BayesDiff, kept as the named baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, SampleNoise, Solver, Step
from bayesdiff.solvers.integrate import advance, combine, evaluate
from bayesdiff.uncertainty.samples import Recorder, Samples, Trajectory, check_skip_interval


@dataclass(frozen=True)
class Published:
    """BayesDiff's moments (Kou et al. 2024): fresh weights at every step.

    For x' = a x + b g + c z, with mean m, variance V and the realised sample x_t:

        V' = a^2 V + 2 a b Cov(x, g) + b^2 gam2(x_t) + c^2,    m' = a m + b E[g].

    Cov and E[g] come from ``mc_samples`` draws x_i ~ N(m, max(V, 0)) with the uncentred estimator
    mean (x_i - m) g(x_i); gam2 is the predictive variance of the head. On a skipped step
    V' = a^2 V + c^2 and m' = a m + b g(x_t) (BayesDiff-Skip).

    Kept as published: the missing Var(g) term, weights drawn afresh at every step, no clamp at the
    end (so maps can be negative). Not kept: gam2 in closed form instead of 100 draws, and x_t is
    the model's own sample without the injected noise, because the shown image must not depend on
    the estimate. A step of several evaluations uses its effective output sum_i b_i g_i and the
    features combined in the same way, which the paper does not define.

    Args:
        mc_samples: S, network evaluations for Cov and E[g].
        skip_interval: every how many steps the variance is really updated.
        num_images: images that get a map (read by the pipeline).
        batch_size: images at once; the S draws come on top.
        seed: of the draws.
    """

    mc_samples: int = 10
    skip_interval: int = 1
    num_images: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("uncertainty.mc_samples", self.mc_samples)
        at_least("uncertainty.num_images", self.num_images)
        at_least("uncertainty.batch_size", self.batch_size)
        at_least("uncertainty.seed", self.seed, 0)

    def check(self, solver: Solver) -> None:
        """Refuse a skip interval beyond the solver's steps."""
        check_skip_interval(self.skip_interval, solver)

    @torch.inference_mode()
    def __call__(self, start: Trajectory, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their published variance."""
        field = start.field()
        fresh = start.noise.fork(self.seed)
        x = mean = start.draw()
        variance = torch.zeros_like(x)
        steps = start.steps()
        recorder = Recorder(len(steps))
        for number, step in enumerate(steps):
            outputs, gam2 = _with_variance(field, step, x, posterior)
            noise = step.noise * start.draw() if step.noise else torch.zeros_like(x)
            scaled = step.output[0] ** 2 * variance + step.noise**2
            expected = _effective(step, outputs)
            if number % self.skip_interval:
                variance = scaled
            else:
                covariance = torch.zeros_like(x)
                if variance.any():  # else all draws would be x itself
                    expected, covariance = self._moments(field, step, mean, variance, fresh)
                variance = scaled + 2 * step.output[0] * covariance + gam2
            mean = combine((step.output[0], 1.0), mean, [expected])
            x = advance(step, x, outputs, None)[0] + noise
            recorder(step.end, x, variance)
        name = f"published, S = {self.mc_samples}, skip {self.skip_interval}"
        return recorder.samples(x, variance, start.labels, field.evaluations, name)

    def _moments(
        self,
        field: Field,
        step: Step,
        mean: Tensor,
        variance: Tensor,
        fresh: SampleNoise,
    ) -> tuple[Tensor, Tensor]:
        """E[g] and Cov(x, g) for g = sum_i b_i g_i, each ``(B, C, H, W)``."""
        z = torch.stack([fresh() for _ in range(self.mc_samples)]).to(mean.device)
        shifted = (variance.clamp(min=0).sqrt() * z).flatten(0, 1)
        draws = mean.repeat(self.mc_samples, 1, 1, 1) + shifted
        outputs = _effective(step, evaluate(field, step, draws))
        covariance = (shifted * outputs).unflatten(0, (self.mc_samples, -1)).mean(0)
        return outputs.unflatten(0, (self.mc_samples, -1)).mean(0), covariance


def _effective(step: Step, outputs: list[Tensor]) -> Tensor:
    """sum_i b_i g_i, so that x' = a x + effective output."""
    return combine((0.0, *step.output[1:]), torch.zeros_like(outputs[0]), outputs)


def _with_variance(
    field: Field, step: Step, x: Tensor, posterior: HeadPosterior
) -> tuple[list[Tensor], Tensor]:
    """Outputs g_i at the realised sample, and the head's variance of sum_i b_i g_i.

    All evaluations of a step meet the same weights, so their features are combined with the
    weights b_i, and the trailing 1 of the bias with them, before the variance is taken.
    """
    outputs: list[Tensor] = []
    weighted: list[Tensor] = []
    for t, row, b in zip(step.times, step.inputs, step.output[1:], strict=True):
        features = field.features(combine(row, x, outputs), t)
        outputs.append(field.output(features))
        weighted.append(b * features)
    ones = sum(step.output[1:])
    gam2 = posterior.predictive_variance(torch.stack(weighted).sum(0), ones=ones)
    channels = x[0].numel() // gam2[0].numel()
    return outputs, field.model.net.fold(gam2.expand(-1, channels, -1, -1))
