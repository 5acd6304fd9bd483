"""States in the middle of a trajectory resampled, and finished by the trained sampler.

With x_c the state of an image at time c, V_c the variance that the posterior gives it there, x_1
the finished image and z ~ N(0, I), one alternative of x_c is

- ``independent``: x_c + sqrt(max(V_c, 0)) z, every pixel for itself, as BayesDiff (Kou et al.
  2024) draws it;
- ``coherent``: the state at c of a posterior trajectory, one weight draw along the whole of it;
- ``isotropic``: x_c + sqrt(mean V_c) z, a control with the same power and no map;
- ``renoise``: alpha_c x_1 + sigma_c z, the path's own state at c of the finished image; a control
  without a posterior;
- ``renoise_matched``: the same turned only so far that its power is that of V_c.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

import torch
from torch import Tensor

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.paths import Coefficient
from bayesdiff.paths.coefficient import level, like
from bayesdiff.solvers import SampleNoise, Step, integrate
from bayesdiff.solvers.integrate import Memory, advance, evaluate, held_after
from bayesdiff.solvers.step import coefficients
from bayesdiff.uncertainty.members.ensemble import MemberField
from bayesdiff.uncertainty.restart import Restart
from bayesdiff.uncertainty.start import Start

# Other noise than aleatoric scores and estimators take, and other weights than ensembles have:
# a variance must not know the draws that are made from it.
_FORK = 90_001
_SALT = 2_000_003
# Requested times are kept in single precision.
_SAME = 1e-6


@dataclass(frozen=True)
class Middle:
    """Where trajectories of a batch are left, and what an alternative state is made from.

    Attributes:
        state: x_c, ``(B, C, H, W)``.
        variance: V_c, of the same shape; negative values count as 0.
        image: x_1, of the same shape.
        trajectories: states of posterior trajectories at c, ``(n, B, C, H, W)``.
        region: ``(B, 1, H, W)`` bool, the pixels that are resampled.
        alpha: of the path at c.
        sigma: of the path at c, above 0.
    """

    state: Tensor
    variance: Tensor
    image: Tensor
    trajectories: Tensor
    region: Tensor
    alpha: Coefficient
    sigma: Coefficient

    @property
    def level(self) -> tuple[Coefficient, Coefficient]:
        """Mean square of sigma over the pixels, and the square of each over it."""
        mean = level(self.sigma**2)
        return mean, self.sigma**2 / mean if isinstance(self.sigma, Tensor) else 1.0

    @property
    def power(self) -> Tensor:
        """Variance summed over channels and pixels of the region, ``(B, 1, 1, 1)``."""
        return self.inside(self.variance.clamp(min=0))

    @property
    def size(self) -> Tensor:
        """Values of the region, ``(B, 1, 1, 1)``."""
        return self.inside(torch.ones_like(self.state))

    def inside(self, values: Tensor) -> Tensor:
        """Sum over the region, ``(B, C, H, W) -> (B, 1, 1, 1)``."""
        return (values * self.region).sum((1, 2, 3), keepdim=True)


Way = Callable[[Middle, Tensor], Tensor]


def independent(middle: Middle, z: Tensor) -> Tensor:
    """x_c + sqrt(max(V_c, 0)) z."""
    return middle.state + middle.variance.clamp(min=0).sqrt() * z


def coherent(middle: Middle, z: Tensor) -> Tensor:
    """States of posterior trajectories."""
    return middle.trajectories


def isotropic(middle: Middle, z: Tensor) -> Tensor:
    """x_c + sqrt(v) z, v the mean of V_c over the region: the power that ``independent`` has."""
    return middle.state + (middle.power / middle.size).sqrt() * z


def renoise(middle: Middle, z: Tensor) -> Tensor:
    """alpha_c x_1 + sigma_c z."""
    return middle.alpha * middle.image + middle.sigma * z


def renoise_matched(middle: Middle, z: Tensor) -> Tensor:
    """alpha_c x_1 + sigma_c ((1 - u) e + sqrt(u (2 - u)) z), e the noise that x_c has.

    With E = |e|^2, D values and T = power of V_c / sigma_c^2, the expected squared distance from
    x_c is sigma_c^2 (E u^2 + D u (2 - u)); it is the power of V_c for the smaller root of
    (E - D) u^2 + 2 D u = T. Beyond u = 1 there is only fresh noise. Where every pixel has a sigma
    of its own, its square over the mean of all weighs it in E and D.
    """
    own = (middle.state - middle.alpha * middle.image) / middle.sigma
    mean, weight = middle.level
    aim = middle.power / mean
    size = middle.inside(weight * torch.ones_like(middle.state))
    root = (size**2 + (middle.inside(weight * own.square()) - size) * aim).clamp(min=0).sqrt()
    u = (aim / (size + root)).clamp(max=1)
    return middle.alpha * middle.image + middle.sigma * ((1 - u) * own + (u * (2 - u)).sqrt() * z)


WAYS: dict[str, Way] = {
    "independent": independent,
    "coherent": coherent,
    "isotropic": isotropic,
    "renoise": renoise,
    "renoise_matched": renoise_matched,
}
# Those that read the posterior; isotropic and renoise_matched know its power alone.
OF_POSTERIOR = ("independent", "coherent")


def resample(way: str, middle: Middle, z: Tensor) -> Tensor:
    """Alternatives of x_c inside the region, x_c itself outside, ``(n, B, C, H, W)``.

    Args:
        way: name of one of ``WAYS``.
        middle: where the trajectories are left.
        z: standard noise of the alternatives, ``(n, B, C, H, W)``.
    """
    return torch.where(middle.region, WAYS[way](middle, z), middle.state)


def fresh_noise(start: Start, count: int, seed: int) -> Tensor:
    """Standard noise of ``count`` alternatives, ``(n, B, C, H, W)``.

    The same for all ways and times; it depends on the sample's number, ``seed`` and the
    alternative's number alone.
    """
    fork = start.noise.fork(_FORK + seed)
    return torch.stack([fork() for _ in range(count)]).to(start.device)


def weight_draws(posterior: HeadPosterior, count: int, seed: int) -> Tensor:
    """Weights of ``count`` posterior trajectories, ``(n, C_out, P)``; all images meet the same."""
    return posterior.draw(count, torch.Generator().manual_seed(seed + _SALT))


def box_region(images: Tensor, box: Sequence[int]) -> Tensor:
    """``(B, 1, H, W)`` bool, true inside [top, left, height, width]."""
    top, left, height, width = box
    region = torch.zeros_like(images[:, :1], dtype=torch.bool)
    region[:, :, top : top + height, left : left + width] = True
    return region


def map_region(variance: Tensor, part: float) -> Tensor:
    """``(B, 1, H, W)`` bool, true for the most uncertain pixels of every map.

    Args:
        variance: of the finished images, ``(B, C, H, W)``; its channel mean ranks the pixels.
        part: which share of the pixels, rounded up to whole ones.
    """
    values = variance.mean(1, keepdim=True).flatten(1)
    chosen = values.topk(ceil(part * values.shape[1] - 1e-9), 1).indices
    region = torch.zeros_like(values, dtype=torch.bool).scatter(1, chosen, True)
    return region.view(len(variance), 1, *variance.shape[2:])


@dataclass(frozen=True)
class Origin:
    """The trained model's own trajectories of one batch, which can be left at any step.

    Attributes:
        start: of the batch.
        x_0: its starting noise, ``(B, C, H, W)``.
        noise: the samples' own noise as it stood after x_0.
        steps: of the solver.
        states: after every step, ``(S, B, C, H, W)``.
    """

    start: Start
    x_0: Tensor
    noise: SampleNoise
    steps: list[Step]
    states: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, start: Start) -> Self:
        """Follow the trained model from the start of a batch."""
        steps, x_0 = start.steps(), start.initial()
        noise, states = start.noise.copy(), []
        integrate(start.field(), steps, x_0, start.draw, lambda _, x: states.append(x.clone()))
        return cls(start, x_0, noise, steps, torch.stack(states))

    @property
    def image(self) -> Tensor:
        """x_1."""
        return self.states[-1]

    def place(self, time: float) -> int:
        """Number of the first step that does not end before a time."""
        return next(k for k, step in enumerate(self.steps) if step.end >= time - _SAME)

    @torch.inference_mode()
    def trajectories(self, weights: Tensor, places: Sequence[int]) -> list[Tensor]:
        """States ``(n, B, C, H, W)`` after the steps with these numbers under heads of their own.

        Args:
            weights: of the heads, ``(n, C_out, P)``.
            places: numbers of the steps.
        """
        found: dict[float, Tensor] = {}
        aim = {self.steps[place].end for place in places}

        def keep(step: Step, x: Tensor) -> None:
            if step.end in aim:
                found[step.end] = x.clone()

        field = MemberField(self.start.field(), weights.to(self.start.device))
        fresh = self._later_noise(-1)
        steps = self.steps[: max(places) + 1]
        integrate(field, steps, self.x_0[None], lambda: next(fresh), keep)
        return [found[self.steps[place].end] for place in places]

    def middle(self, place: int, variance: Tensor, region: Tensor, trajectories: Tensor) -> Middle:
        """What alternatives of the state after a step are made from; see ``Middle``."""
        [pair], state = coefficients(self.start.path, [self.steps[place].end]), self.states[place]
        alpha, sigma = (like(value, state) for value in pair)
        return Middle(state, variance, self.image, trajectories, region, alpha, sigma)

    @torch.inference_mode()
    def finish(self, place: int, x: Tensor, region: Tensor | None = None) -> Tensor:
        """Images ``(n, B, C, H, W)`` that the trained sampler makes of states after a step.

        Outside the region the state is the original one after every later step, so that the
        images equal the original exactly there. A stochastic solver takes the sample's own later
        noise. A multistep solver starts anew, with the first-order step that it begins every
        trajectory with: what it kept belongs to another state. The state x_c itself then gives
        the original image for every single-step solver, and for ``dpmpp_2m`` one that differs
        by the error of that one step.

        Args:
            place: number of the step.
            x: states ``(n, B, C, H, W)``.
            region: ``(B, 1, H, W)`` bool, None for the whole image.
        """
        field, fresh = self.start.field(), self._later_noise(place)

        def outputs(x: Tensor, t: float) -> Tensor:
            return field(x.flatten(0, 1), t).unflatten(0, (len(x), -1))

        memory: Memory = ()
        steps, states = self.restart(place, x).steps(), self.states[place + 1 :]
        steps = [step.like(x) for step in steps]
        for step, held, own in zip(steps, held_after(steps), states, strict=True):
            x, memory = advance(step, x, evaluate(outputs, step, x), memory, held)
            if step.stochastic:
                x = x + step.noise * next(fresh)
            x = x if region is None else torch.where(region, x, own)
        return x

    def restart(self, place: int, state: Tensor) -> Restart:
        """What follows a state ``(B, C, H, W)`` after a step, with the samples' own noise."""
        later = self.noise.copy()
        for _ in filter(lambda step: step.stochastic, self.steps[: place + 1]):
            later()
        times = [step.end for step in self.steps[place:]]
        return Restart.of(self.start, times, state, later)

    def evaluations(self, place: int) -> tuple[int, int]:
        """Network evaluations per image up to and with a step, and after it."""
        before, after = self.steps[: place + 1], self.steps[place + 1 :]
        return self.start.evaluations(before), self.start.evaluations(after)

    def _later_noise(self, place: int) -> Iterator[Tensor]:
        """The samples' own noise of the steps after one, ``(B, C, H, W)`` each.

        Yields:
            Noise for each step that needs it.
        """
        again = self.noise.copy()
        for number, step in enumerate(self.steps):
            if step.stochastic:
                drawn = again()
                if number > place:
                    yield drawn.to(self.start.device)
