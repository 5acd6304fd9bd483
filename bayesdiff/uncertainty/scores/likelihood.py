"""A baseline that looks at no weights: the model's own likelihood of an image.

Along an ordinary differential equation dx/ds = f(x, s) that carries noise to data, the density
changes by d ln p / ds = -div f, so that

    ln p(x_1) = ln N(x_0; 0, I) + (integral of div f ds from data to noise).

Source: Chen et al., "Neural ordinary differential equations" (2018), eq. 8, with the trace of
Grathwohl et al., "FFJORD" (2019), eq. 7; Song et al., "Score-based generative modeling" (2021),
eq. 39, for diffusion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.models import GenerativeModel
from bayesdiff.networks.forward_mode import jvp
from bayesdiff.paths import Coefficient, CondOT, ProbabilityPath, convert
from bayesdiff.paths.coefficient import at_times, is_one, like
from bayesdiff.solvers import RK4, Field, Heun, SampleNoise, Step, integrate, time_grid
from bayesdiff.solvers.snr import log_snr, time_at
from bayesdiff.uncertainty.estimator import check_derivative

# Of every s: its time, and (p, q) with dx/ds = p x + q g for the network's output g.
Rates = dict[float, tuple[float, Coefficient, Coefficient]]

_METHODS = {"rk4": RK4, "heun": Heun}
# Images in [-1, 1] have 255 steps of 2 / 255 = 1 / 127.5.
_LEVELS_PER_UNIT = 127.5


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of images in [-1, 1].

    Attributes:
        log_density: ``(B,)`` float64, nats, with respect to values in [-1, 1].
        latents: ``(B, C, H, W)`` float64, the noise that the images come from.
        nfe: network evaluations per image: two per probe, one of them for its derivative.
    """

    log_density: Tensor
    latents: Tensor
    nfe: int

    @property
    def bits_per_dim(self) -> Tensor:
        """``(B,)``, of images of 8 bits: higher is less likely, so more doubtful.

        An 8-bit value stands for an interval of 1/127.5 in [-1, 1], and its probability is the
        density times that: bits/dim = -ln p / (D ln 2) + log2(127.5), a constant of 6.994. It is
        a bound on the bits of real uint8 images only where these are spread evenly over the values
        that round to them; for generated images, which were never rounded, it is a scale.
        """
        size = self.latents[0].numel()
        return math.log2(_LEVELS_PER_UNIT) - self.log_density / (size * math.log(2))


@dataclass(frozen=True)
class Probes:
    """Directions z whose products z^T J z, times the weight, sum up to the trace of J.

    Attributes:
        vectors: ``(K, B, C, H, W)``.
        weight: of each.
    """

    vectors: Tensor
    weight: float


def random_probes(noise: SampleNoise, count: int = 1) -> Probes:
    """Random signs: unbiased for any J, exact for a diagonal one (Hutchinson's estimator).

    Args:
        noise: of the samples; signs depend on its seed and the sample's number alone.
        count: directions per image.
    """
    at_least("probes", count)
    drawn = torch.stack([noise() for _ in range(count)])
    return Probes(torch.where(drawn > 0, 1.0, -1.0), 1 / count)


@torch.no_grad()
def log_likelihood(
    field: Field,
    images: Tensor,
    probes: Probes,
    num_steps: int = 50,
    solver: str = "rk4",
    grid: str = "quadratic",
) -> Likelihood:
    """Log-density of images under the model's probability-flow equation.

    A path that is smooth in time, as a flow's, is followed in it, from t = 1; where noise is left
    there, the images stand for the mean of that state. A discrete schedule
    is followed in half log-SNR, where the equation is smooth at both ends, in equal steps from
    ``path.last_time``, the least noise that the network was trained with: the density is that of
    data with so little noise, and the images are taken as they are.

    Args:
        field: the trained network at the images' labels; guidance makes a density of its own.
        images: ``(B, C, H, W)`` in [-1, 1].
        probes: kept along the way, see ``random_probes``.
        num_steps: of a fixed step.
        solver: ``rk4`` or ``heun``.
        grid: of a flow's times, a name of ``time_grid``; the default is finer towards data, where
            the flow contracts most.

    Raises:
        UserError: for an unknown solver or grid, no steps, or a prediction that leaves the
            velocity open at an end of a flow.
    """  # noqa: DOC502 - raised one level down
    steps, rates = _plan(field.model, num_steps, solver, grid)
    slope = _Slope(field, probes, rates)
    before = field.evaluations
    images = images.to(slope.vectors.device).double()
    c = field.model.path.coefficients(torch.ones((), dtype=torch.float64))
    alpha = c.alpha.to(images).expand(images.shape[1:])
    state = F.pad((alpha * images).flatten(1), (0, 1))
    state = integrate(slope, steps, state, lambda: state)
    field.evaluations += field.evaluations - before  # a derivative costs about as much again
    latents, gained = state[:, :-1], state[:, -1]
    latents = latents.unflatten(1, images.shape[1:])
    prior = log_prior(field.model.path, latents)
    scaled = alpha.log().sum()  # of d(alpha x) / dx
    return Likelihood(prior + gained + scaled, latents, field.evaluations - before)


def log_prior(path: ProbabilityPath, latents: Tensor) -> Tensor:
    """Log-density ``(B,)`` of states at t = 0."""
    scale = path.noise_scale
    if is_one(scale):
        return -0.5 * (latents.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    scale = torch.as_tensor(scale, dtype=latents.dtype, device=latents.device).expand_as(latents)
    return torch.distributions.Normal(0, scale).log_prob(latents).flatten(1).sum(1)


def check_likelihood(model: GenerativeModel, num_steps: int = 50) -> None:
    """Refuse, before any work, what ``log_likelihood`` would refuse.

    Raises:
        UserError: for no steps, a prediction that leaves the velocity open, or one that is drawn.
    """  # noqa: DOC502 - raised one level down
    if not model.path.ends_in_data:
        raise UserError(
            "likelihood.bits_per_dim follows data from t = 1 on, where a "
            f"{model.path.family} model has a belief; use experiment=code_length"
        )
    check_derivative(model, "likelihood.bits_per_dim")
    _plan(model, num_steps, "rk4", "quadratic")


def _plan(
    model: GenerativeModel, num_steps: int, solver: str, grid: str
) -> tuple[list[Step], Rates]:
    """Steps of dx/ds = f and the rates at their places."""
    if solver not in _METHODS:
        raise UserError(f"unknown likelihood solver {solver!r}; choose from {', '.join(_METHODS)}")
    at_least("num_steps", num_steps)
    path = model.path
    if path.smooth:
        nodes = time_grid(grid, path, num_steps)[::-1]
    else:
        ends = torch.tensor([path.last_time, 0.0], dtype=torch.float64)
        high, low = log_snr(path, ends).tolist()
        nodes = torch.linspace(high, low, num_steps + 1, dtype=torch.float64).tolist()
    # The tableau as steps of dx/ds = f, whatever s is.
    steps = _METHODS[solver](num_steps).steps(CondOT(), "velocity", nodes)
    return steps, _rates(model, [s for step in steps for s in step.times])


class _Slope:
    """d/ds of rows ``(B, D + 1)``: the values of an image, and the integral of div f.

    In double precision but for the network: the integral adds up thousands of small terms.
    """

    def __init__(self, field: Field, probes: Probes, rates: Rates) -> None:
        self.field, self.rates = field, rates
        like = next(field.model.parameters())
        self.vectors, self.weight = probes.vectors.to(like), probes.weight

    def __call__(self, rows: Tensor, s: float) -> Tensor:
        t, p, q = self.rates[s]
        x = rows[:, :-1].unflatten(1, self.vectors.shape[2:])
        # Images repeated, one copy per probe: vmap has no channels-last layout.
        states = x.to(self.vectors).repeat(len(self.vectors), 1, 1, 1)
        directions = self.vectors.flatten(0, 1)
        found: tuple = jvp(lambda y: self.field(y, t), (states,), (directions,))
        outputs, tangents = (values.unflatten(0, self.vectors.shape[:2]) for values in found)
        p, q = like(p, x), like(q, x)
        slope = p * x + q * outputs[0]
        if isinstance(p, Tensor) or isinstance(q, Tensor):
            products = (self.vectors.double() * q * tangents).flatten(2).sum((0, 2))
            total = torch.as_tensor(p, dtype=x.dtype, device=x.device).expand_as(x[0]).sum()
            divergence = total + self.weight * products
        else:
            products = (self.vectors.double() * tangents).flatten(2).sum((0, 2))
            divergence = p * x[0].numel() + q * self.weight * products
        return torch.cat([slope.flatten(1), divergence[:, None]], 1)


def _rates(model: GenerativeModel, places: Sequence[float]) -> Rates:
    """What the network's output means at every s: a flow's time, or ln(alpha / sigma)."""
    s = torch.tensor(places, dtype=torch.float64)
    own_time = model.path.smooth
    t = s if own_time else time_at(model.path, s)
    c = model.path.coefficients(t)
    p, q = convert(model.prediction, "velocity", c)
    speed = torch.ones_like(p) if own_time else c.d_alpha / c.alpha - c.d_sigma / c.sigma  # ds/dt
    finite = (p.isfinite() & q.isfinite()).view(len(s), -1).all(1)
    unknown = t[~finite].tolist()
    if unknown:
        raise UserError(
            f"model.prediction={model.prediction} leaves the velocity at t={unknown[0]:g} open, "
            "which the likelihood needs; use model.prediction=velocity"
        )
    found = zip(t.tolist(), at_times(p / speed), at_times(q / speed), strict=True)
    return dict(zip(places, found, strict=True))
