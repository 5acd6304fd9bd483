"""Images with their uncertainty: what every estimator takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.solvers import Solver

# model: images in [-1, 1], as the model sees them; unit: in [0, 1].
UNITS = ("model", "unit")


@dataclass(frozen=True)
class Samples:
    """Images and the variance that the posterior of the weights gives each of their pixels.

    Attributes:
        images: ``(B, C, H, W)``, the trained model's own samples, never perturbed; data lies in
            [-1, 1], samples are not clipped to it.
        variance: ``(B, C, H, W)`` in squared units of the images; epistemic (the weights' doing,
            the sampler's noise held fixed), and >= 0 except where a published recursion is kept
            unclamped; of ``VarianceHead``, that of the training target carried along.
        labels: ``(B,)``, None for an unconditional model.
        times: ``(S,)`` solver times at which ``summed`` was recorded.
        summed: ``(S, B)`` variance summed over channels and pixels.
        frames: ``(F, K, C, H, W)`` states of the first K images on the way.
        frame_variance: their variance, of the same shape.
        frame_times: ``(F,)``.
        nfe: network evaluations per image, for image and uncertainty together.
        estimator: which estimator made the variance, with its settings.
        sampler_noise: ``(B, C, H, W)``, variance due to a stochastic solver's noise under fixed
            weights; None for a deterministic solver, or where it was not asked for.
        requested_times: ``(T,)``, the solver's first times not before those asked for; None where
            none were.
        states: ``(T, B, C, H, W)`` states of all images at these times.
        state_variance: their variance, of the same shape.
        units: ``model`` for images in [-1, 1], ``unit`` for [0, 1].
        numbers: ``(B,)``, of the samples; None for 0, 1, ...
        spatial: ``(S, B)`` variance over channels and pixels of the map at ``times``, or None.
        latents: ``(B, *shape)``, the states that the images are decoded from; None where states
            are images. All that is recorded on the way is of states.
        latent_variance: their variance, of the same shape.
        aleatoric: ``(B, C, H, W)``, variance of the data given the sample's own state at
            ``aleatoric_time``, an estimate that can be negative, see ``data_variance``; None
            where it was not asked for.
        aleatoric_time: ``()``, at which the state was.
        bits_per_dim: ``(B,)``, minus the model's own log-likelihood of the images, in bits per
            dimension of 8-bit images, followed along their trajectories; None where not asked for.
        score: ``(B, C, H, W)``, gradient of ln p_t at the last state of each trajectory that has
            noise left, with the bits.
        score_time: its t, a tensor without axes.

    Example:
        After the example of ``starts_of``:

        >>> from bayesdiff.uncertainty import Ensemble
        >>> samples = Ensemble(members=4).mapped(starts, [0, 1], posterior)
        >>> samples.over_time["summed"].shape  # after each of four steps
        torch.Size([4, 2])
        >>> unit = samples.in_unit_range()  # images in [0, 1] in place of [-1, 1]
        >>> torch.allclose(unit.variance, samples.variance / 4)
        True
    """

    images: Tensor
    variance: Tensor
    labels: Tensor | None
    times: Tensor
    summed: Tensor
    frames: Tensor
    frame_variance: Tensor
    frame_times: Tensor
    nfe: int
    estimator: str
    sampler_noise: Tensor | None = None
    requested_times: Tensor | None = None
    states: Tensor | None = None
    state_variance: Tensor | None = None
    units: str = "model"
    numbers: Tensor | None = None
    spatial: Tensor | None = None
    latents: Tensor | None = None
    latent_variance: Tensor | None = None
    aleatoric: Tensor | None = None
    aleatoric_time: Tensor | None = None
    bits_per_dim: Tensor | None = None
    score: Tensor | None = None
    score_time: Tensor | None = None

    @property
    def total(self) -> Tensor | None:
        """Epistemic and aleatoric variance added up, ``(B, C, H, W)``; None without the latter."""
        return None if self.aleatoric is None else self.variance + self.aleatoric

    @property
    def over_time(self) -> dict[str, Tensor]:
        """Statistics of the maps at ``times``, each ``(S, B)``.

        ``summed`` and ``mean`` over channels and pixels; ``increment``, by how much ``summed`` has
        grown in the step that ends there, from 0 at the noise; and ``spatial``, the variance of
        the map's own values, where it was recorded.
        """
        found = {
            "summed": self.summed,
            "mean": self.summed
            / (self.images if self.latents is None else self.latents)[0].numel(),
            "increment": self.summed.diff(dim=0, prepend=torch.zeros_like(self.summed[:1])),
        }
        return found if self.spatial is None else found | {"spatial": self.spatial}

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        """Batches put together; frames are kept from the first one."""
        batched = {"images": 0, "variance": 0, "labels": 0, "summed": 1, "sampler_noise": 0}
        batched |= {"states": 1, "state_variance": 1, "numbers": 0, "spatial": 1}
        batched |= {"latents": 0, "latent_variance": 0, "aleatoric": 0}
        batched |= {"bits_per_dim": 0, "score": 0}
        values = {f.name: getattr(parts[0], f.name) for f in fields(cls)}
        for name, dim in batched.items():
            own = [getattr(part, name) for part in parts]
            values[name] = None if any(each is None for each in own) else torch.cat(own, dim)
        return cls(**values)

    def in_unit_range(self) -> Self:
        """These samples with images in [0, 1], and variances in the square of these units."""
        return self._in("unit", lambda x: (x + 1) / 2, 1 / 4)

    def in_model_range(self) -> Self:
        """These samples with images in [-1, 1], and variances in the square of these units."""
        return self._in("model", lambda x: 2 * x - 1, 4)

    def _in(self, units: str, convert: Callable[[Tensor], Tensor], scale: float) -> Self:
        if self.units == units:
            return self
        images, squares = ["images"], ["variance", "sampler_noise", "aleatoric"]
        if self.latents is None:  # else what is recorded on the way has units of its own
            images += ["frames", "states"]
            squares += ["summed", "frame_variance", "state_variance"]
        own = {n: v for n in [*images, *squares] if (v := getattr(self, n)) is not None}
        changed: dict[str, Any] = {
            name: convert(v) if name in images else scale * v for name, v in own.items()
        }
        if self.spatial is not None and self.latents is None:
            changed["spatial"] = scale**2 * self.spatial
        if self.score is not None:  # a derivative in these units
            changed["score"] = self.score / scale**0.5
        return replace(self, units=units, **changed)


def check_skip_interval(skip_interval: int, solver: Solver) -> None:
    """Refuse a skip interval that skips everything.

    Raises:
        UserError: if it is not a whole number between 1 and the solver's steps.
    """
    at_least("uncertainty.skip_interval", skip_interval)
    if skip_interval > solver.num_steps:
        raise UserError(
            f"uncertainty.skip_interval={skip_interval} is more than "
            f"solver.num_steps={solver.num_steps}; choose a smaller interval or more steps"
        )
