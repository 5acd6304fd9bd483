"""Data to latents and back along a trained flow, and along the flows of other heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.data.spaces import Space
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.paths.coefficient import Coefficient, is_zero, like
from bayesdiff.solvers import Field, Solver, Step, integrate, plan
from bayesdiff.solvers.encode import backward
from bayesdiff.solvers.step import coefficients
from bayesdiff.uncertainty.decoded import Decoder, decoded
from bayesdiff.uncertainty.members.ensemble import MemberField


@dataclass(frozen=True)
class RoundTrip:
    """One deterministic solver's steps from data to noise, and from there to data.

    Attributes:
        model: with its trained weights.
        solver: deterministic.
        space: of the states.
        heads: weights ``(M, C_out, P)`` of further flows, each the trained one but for its head;
            None for none.
        frames: states that are kept along each way, 0 for none.
    """

    model: GenerativeModel
    solver: Solver
    space: Space
    heads: Tensor | None = None
    frames: int = 0

    @property
    def there(self) -> list[Step]:
        """From data to noise."""
        return backward(self.solver, self.model.path, self.model.prediction)

    @property
    def back(self) -> list[Step]:
        """From noise to data; a last prediction without the noise left there is no way back."""
        flow = replace(self.solver, denoise=False)
        return plan(flow, self.model.path, self.model.prediction)

    @property
    def nfe(self) -> int:
        """Network evaluations of both ways together, of one flow."""
        guided = self.solver.guidance != 1 and self.model.condition is not None
        return (2 if guided else 1) * sum(len(s.times) for s in (*self.there, *self.back))

    @property
    def times(self) -> tuple[list[float], list[float]]:
        """Of the frames there and back."""
        there, back = self.there, self.back
        ways = [there[0].times[0], *(s.end for s in there)], [0.0, *(s.end for s in back)]
        first, second = ([way[k] for k in evenly(len(way), self.frames)] for way in ways)
        return first, second

    @torch.inference_mode()
    def __call__(self, x_1: Tensor, condition: Tensor | None = None) -> Rows:
        """Both ways of a batch.

        Args:
            x_1: states of data ``(B, *shape)``.
            condition: of each, or None.

        Returns:
            ``data`` and ``returned``, values of the states that were started from and come back
            to; ``latents``, states at t = 0; with frames ``there`` and ``back (B, F, *shape)``,
            states at ``times``; with heads ``latent_variance``, over the latents that each flow
            finds, and ``returned_variance``, over the values that each reaches from ``latents``.
        """
        field = Field(self.model, condition, len(x_1), self.solver.guidance)
        latents, there = self._follow(field, self.there, x_1)
        end, back = self._follow(field, self.back, latents)
        found = {"data": self._values(x_1), "returned": self._values(end), "latents": latents}
        if self.frames:
            alpha = coefficients(self.model.path, [1.0])[0][0]  # data are the state over it
            at_data = like(alpha, x_1)
            there[:, 0], back[:, -1] = there[:, 0] * at_data, back[:, -1] * at_data
            found |= {"there": there, "back": back}
        if self.heads is not None:
            members = MemberField(field, self.heads.to(x_1.device))
            ends = [
                integrate(members, steps, begun[None], _none)
                for steps, begun in ((self.there, x_1), (self.back, latents))
            ]
            values = decoded(self._decoder, ends[1], rows=True)
            found |= {"latent_variance": ends[0].var(0), "returned_variance": values.var(0)}
        return {name: value.cpu() for name, value in found.items()}

    def _follow(self, field: Field, steps: list[Step], x: Tensor) -> tuple[Tensor, Tensor]:
        """Last state, and the frames ``(B, F, *shape)``."""
        states, kept = [x], set(evenly(1 + len(steps), self.frames))

        def observe(step: Step, state: Tensor) -> None:
            states.append(state if len(states) in kept else state[:0])

        end = integrate(field, steps, x, _none, observe)
        frames = [state for k, state in enumerate(states) if k in kept]
        return end, torch.stack(frames, 1) if frames else x[:, None][:, :0]

    def _values(self, states: Tensor) -> Tensor:
        return decoded(self._decoder, states)

    @property
    def _decoder(self) -> Decoder | None:
        return self.space.values if self.space.decoded else None


def evenly(count: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers 0 ... count - 1, evenly spread, from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / max(most - 1, 1)) for k in range(most)]


def left_noise(path: ProbabilityPath) -> Coefficient | None:
    """Standard deviation of the noise at t = 1 over the data's factor there; None for none."""
    alpha, sigma = coefficients(path, [1.0])[0]
    return None if is_zero(sigma) else sigma / alpha


def expected_variance(
    path: ProbabilityPath, noised: bool, shape: Sequence[int], spread: Tensor | float = 1.0
) -> Tensor:
    """Variance of latents ``shape`` float64 of Gaussian data, exactly followed.

    With the noise that the path has at t = 1 it is 1, but for what alpha leaves at t = 0 of data
    whose variance is not; data without that noise lack its share.

    Args:
        path: of the model.
        noised: whether data have that noise.
        shape: of a state.
        spread: variance of the data's states.
    """
    spread = torch.ones(tuple(shape), dtype=torch.float64) * spread
    (alpha_0, sigma_0), (alpha, sigma) = coefficients(path, [0.0, 1.0])
    latent = alpha_0**2 * spread + sigma_0**2
    latent = latent / torch.as_tensor(path.noise_scale, dtype=torch.float64) ** 2
    if noised:
        return latent
    signal = alpha**2 * spread
    return latent * signal / (signal + sigma**2)


def _none() -> Tensor:
    raise AssertionError("a deterministic solver draws no noise")
