"""Members that differ in their weights alone: followed with the same noise, and their variance."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.models import GenerativeModel
from bayesdiff.paths.coefficient import like, share_of
from bayesdiff.solvers import Field, SampleNoise, Solver, Step, integrate
from bayesdiff.solvers.integrate import Observe
from bayesdiff.uncertainty.decoded import decoded
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.recorder import Recorder
from bayesdiff.uncertainty.samples import Samples, check_skip_interval
from bayesdiff.uncertainty.scores.along import Density
from bayesdiff.uncertainty.start import Start

# States ``(m, B, C, H, W)``, m = 1 or M, and a time, to outputs ``(M, B, C, H, W)``.
Outputs = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Members(Estimator):
    """Variance over members, each followed through the whole solver.

    Members share starting noise and sampler noise, so their spread is the weights' doing alone;
    the variance over them is unbiased.

    With a skip interval k, members take one step where the image takes k: where weights are kept
    along the way, their spread converges as steps get finer, and a coarse grid estimates the same
    number. The image itself is never coarsened.

    A stochastic solver's own noise is told apart: further trajectories of the trained weights take
    the same starting noise and each its own noise on the way.

    Args:
        skip_interval: steps of the image per step of a member.
        noise_members: trajectories for the variance of a stochastic solver's noise, at least 2,
            or 0 for none; a deterministic solver needs none.
    """

    skip_interval: int = 1
    noise_members: int = 8

    carries_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if at_least("uncertainty.noise_members", self.noise_members, 0) == 1:
            raise UserError("uncertainty.noise_members=1 has no variance; give 2 or more, or 0")

    @property
    @abstractmethod
    def count(self) -> int:
        """M, the members that are followed."""

    @abstractmethod
    def outputs(self, field: Field, start: Start, posterior: HeadPosterior) -> Outputs:
        """The members' networks; what they evaluate is added to the field's count."""

    def check(self, solver: Solver) -> None:
        """Refuse a skip interval beyond the solver's steps."""
        check_skip_interval(self.skip_interval, solver)
        if self.skip_interval > 1 and not solver.skips:
            raise UserError(
                f"uncertainty.skip_interval={self.skip_interval} leaves out steps, and those of "
                f"solver={solver.name} belong together; use uncertainty.skip_interval=1"
            )

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once."""
        return max(self.count, self.noise_members) + 1

    def evaluations(self, start: Start) -> float:
        """Of image, members, and those for a stochastic solver's own noise."""
        steps, coarse = start.steps(), start.steps(self.skip_interval)
        share = sum(len(step.times) for step in coarse) / sum(len(step.times) for step in steps)
        noise = self.noise_members if any(step.stochastic for step in steps) else 0
        return start.nfe * (1 + self.count * share + noise)

    @property
    def described(self) -> str:
        """Which members they are, for the record."""
        return f"{self.name}, {self.count} members, skip {self.skip_interval}"

    @torch.inference_mode()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance over the members."""
        steps = start.steps(self.skip_interval)
        recorder = Recorder(len(steps), self.times)
        recorded = recorder.recorded([step.end for step in steps])
        states: dict[float, Tensor] = {}

        def keep(step: Step, x: Tensor) -> None:
            if step.end in recorded:
                states[step.end] = x[recorded[step.end]].clone()

        def observe(step: Step, x: Tensor) -> None:
            recorder(step.end, states.get(step.end), x.var(0))

        density = Density(start, self.likelihood_probes) if self.likelihood_probes else None
        field, x_0 = density.field if density else start.field(), start.initial()
        noise = start.noise.copy()

        def seen(step: Step, x: Tensor) -> None:
            keep(step, x)
            if density is not None:
                density.observe(step, x)

        image = integrate(density or field, start.steps(), x_0, start.draw, seen)
        members = self._members(field, start, posterior, x_0, noise, observe)
        of_noise = self._sampler_noise(field, start, x_0)
        decoder = start.decoder
        samples = recorder.samples(
            decoded(decoder, image),
            decoded(decoder, members, rows=True).var(0),
            start.labels,
            field.evaluations,
            self.described,
            of_noise,
            None if decoder is None else (image, members.var(0)),
        )
        return samples if density is None else density.along(x_0).beside(samples)

    @torch.inference_mode()
    def images(self, start: Start, posterior: HeadPosterior) -> tuple[Tensor, Tensor]:
        """The trained model's images ``(B, C, H, W)`` and the members' ``(M, B, C, H, W)``."""
        field, x_0 = start.field(), start.initial()
        noise = start.noise.copy()
        image = integrate(field, start.steps(), x_0, start.draw)
        members = self._members(field, start, posterior, x_0, noise)
        decoder = start.decoder
        return decoded(decoder, image), decoded(decoder, members, rows=True)

    def _members(
        self,
        field: Field,
        start: Start,
        posterior: HeadPosterior,
        x_0: Tensor,
        noise: SampleNoise,
        observe: Observe | None = None,
    ) -> Tensor:
        """Last states of the members; ``noise`` is where the image's own began after x_0."""
        fresh = _of_coarse_steps(noise, start.steps(), self.skip_interval)
        return integrate(
            self.outputs(field, start, posterior),
            start.steps(self.skip_interval),
            x_0[None],
            lambda: next(fresh).to(start.device),
            observe,
        )

    def _sampler_noise(self, field: Field, start: Start, x_0: Tensor) -> Tensor | None:
        """Variance over the solver's noise from the same x_0, under the trained weights."""
        steps, count = start.steps(), self.noise_members
        if not count or not any(step.stochastic for step in steps):
            return None
        fresh = start.noise.fork(self.seed)
        # What a likelihood draws on the way is noise of the sampler as well.
        own = [replaced(field, start.noise.fork(self.seed + 1 + m)) for m in range(count)]

        def outputs(x: Tensor, t: float) -> Tensor:
            if not field.likelihood.draws:
                return field(x.flatten(0, 1), t).unflatten(0, (len(x), -1))
            output = field.output(field.features(x.flatten(0, 1), t)).unflatten(0, (len(x), -1))
            every = output.expand(count, *output.shape[1:])
            return torch.stack([one.emit(each, t) for one, each in zip(own, every, strict=True)])

        def noise() -> Tensor:
            return torch.stack([fresh() for _ in range(count)]).to(x_0)

        states = integrate(outputs, steps, x_0[None], noise)
        return decoded(start.decoder, states, rows=True).var(0)


@dataclass(frozen=True, kw_only=True)
class NetworkMembers(Members):
    """Members that are whole networks, evaluated one after the other at all images of a batch.

    Args:
        networks: made by ``fit``.
    """

    networks: tuple[GenerativeModel, ...] = ()

    of_posterior: ClassVar[bool] = False

    @property
    def count(self) -> int:
        """M; before ``fit``, as many as the settings ask for."""
        return len(self.networks) or self.planned

    @property
    @abstractmethod
    def planned(self) -> int:
        """Members that ``fit`` will probably find."""

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a model without a run folder to find members in.

        Raises:
            UserError: before ``fit``.
        """
        if not self.networks:
            raise UserError(
                f"uncertainty={self.name} finds its members in the folder of a training, and "
                "there is none here; use uncertainty=ensemble"
            )

    def outputs(self, field: Field, start: Start, posterior: HeadPosterior) -> Outputs:
        """Every member's network at the batch's condition and guidance.

        Raises:
            UserError: before ``fit``.
        """
        if not self.networks:
            raise UserError(f"uncertainty={self.name} has no members yet; call its fit first")
        return NetworkField(field, self.networks)


class NetworkField:
    """M networks at the condition and guidance of a field, for states ``(m, B, C, H, W)``."""

    def __init__(self, field: Field, networks: Sequence[GenerativeModel]) -> None:
        self.field = field
        given = field.condition, field.batch, field.guidance, field.noise
        self.fields = [Field(network, *given) for network in networks]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Outputs ``(M, B, C, H, W)``; m = 1 is the same state for all."""
        states = x.expand(len(self.fields), *x.shape[1:])
        before = sum(field.evaluations for field in self.fields)
        outputs = [field(own, t) for field, own in zip(self.fields, states, strict=True)]
        self.field.evaluations += sum(field.evaluations for field in self.fields) - before
        return torch.stack(outputs)


def replaced(field: Field, noise: SampleNoise) -> Field:
    """The field with other noise for what its likelihood draws."""
    return Field(field.model, field.condition, field.batch, field.guidance, noise)


def twin(model: GenerativeModel) -> GenerativeModel:
    """Another model of the same kind as this one, with weights of its own."""
    net = cast(nn.Module, deepcopy(model.net))
    never = torch.optim.SGD  # no member is ever trained
    kind = model.path, model.prediction, never
    law = likelihood_of(model)
    return GenerativeModel(net, *kind, condition=model.condition, likelihood=law).eval()


def _of_coarse_steps(
    noise: Callable[[], Tensor], fine: list[Step], skip_interval: int
) -> Iterator[Tensor]:
    """The image's noise once more; a coarse step gets the sum of what its fine steps had.

    Yields:
        Noise of the coarse steps that need it, ``(B, C, H, W)``, of unit variance.
    """
    for first in range(0, len(fine), skip_interval):
        steps = (step for step in fine[first : first + skip_interval] if step.stochastic)
        drawn = [(step.noise, noise()) for step in steps]
        if len(drawn) == 1:
            yield drawn[0][1]
        elif drawn:
            size = sum(c**2 for c, _ in drawn) ** 0.5
            yield torch.stack([like(share_of(c, size), z) * z for c, z in drawn]).sum(0)
