"""What uncertain weights of the head do to the network evaluations of one step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.solvers import Field, Step
from bayesdiff.solvers.integrate import combine

Features = list[Tensor]
Noise = Callable[[Features], Tensor]


@dataclass(frozen=True)
class UncertainHead:
    """A field whose head has a posterior.

    Attributes:
        field: the trained network.
        posterior: of its head.
        cfg_joint: whether the two features of guidance meet the same weights, so that they can be
            combined beforehand.
        shared: whether all evaluations of a step meet the same weights.
    """

    field: Field
    posterior: HeadPosterior
    cfg_joint: bool = True
    shared: bool = True

    def features(self, x: Tensor, t: float) -> Features:
        """Features ``(N, D, h, w)``, one tensor for each independent draw of weights they meet."""
        if self.cfg_joint:
            return [self.field.features(x, t)]
        guided, free = self.field.guided_features(x, t)
        return [guided] if free is None else [guided, free]

    def output(self, features: Features) -> Tensor:
        """Prediction of the trained head, ``(N, C, H, W)``."""
        parts = [w * f for w, f in zip(self._scales(features), features, strict=True)]
        return self.field.output(features[0] if len(parts) == 1 else sum(parts[1:], parts[0]))

    def _scales(self, features: Features) -> list[float]:
        w = self.field.guidance
        return [1.0] if len(features) == 1 else [w, 1 - w]

    def covariance(self, features: Sequence[Features], rows: Tensor) -> Tensor:
        """Covariance due to the weights of R outputs sum_i rows[r, i] g_i.

        Args:
            features: of each of the E evaluations.
            rows: ``(R, E)``, or ``(R, E, C, H, W)``.

        Returns:
            ``(R, R, N, C, H, W)``.
        """
        if len(features) == 1 or not self.shared:
            single = torch.stack([self._variance([one], [1.0]) for one in features])
            if rows.ndim > 2:
                rows = rows.to(single)
                return torch.einsum("re...,qe...,e...->rq...", rows, rows, single)
            weights = torch.einsum("re,qe->rqe", rows, rows).to(single)
            return torch.einsum("rqe,e...->rq...", weights, single)
        if rows.ndim > 2:
            # Features have no pixels to weigh: the evaluations' own covariance, weighed after.
            own = self.covariance(features, torch.eye(rows.shape[1], dtype=rows.dtype))
            rows = rows.to(own)
            return torch.einsum("re...,qf...,ef...->rq...", rows, rows, own)
        # The same weights everywhere: combine features first. 4 Cov(f, g) = Var(f+g) - Var(f-g).
        pairs = [
            self._variance(features, (r + q).tolist()) - self._variance(features, (r - q).tolist())
            for r in rows
            for q in rows
        ]
        return torch.stack(pairs).unflatten(0, (len(rows), len(rows))) / 4

    def _variance(self, features: Sequence[Features], row: Sequence[float]) -> Tensor:
        """Variance ``(N, C, H, W)`` of sum_i row[i] g_i under the same weights for all i."""
        axis = 1 if self.posterior.curvature.geometry.kernel_size else -1
        total = torch.zeros_like(features[0][0].narrow(axis, 0, 1))
        for source, scale in enumerate(self._scales(features[0])):
            scaled = [scale * b for b in row]
            if any(scaled):
                parts = [b * one[source] for b, one in zip(scaled, features, strict=True) if b]
                combined = sum(parts[1:], parts[0])
                total = total + self.posterior.predictive_variance(combined, ones=sum(scaled))
        shape = list(total.shape)
        shape[axis] = len(self.posterior.curvature.mean)
        return self.field.model.net.fold(total.expand(shape))

    def shared_noise(self, count: int, generator: torch.Generator) -> Noise:
        """What weights drawn once per step add to outputs; draw s of ``count`` has its own."""
        net, posterior = self.field.model.net, self.posterior
        draws: list[Tensor] = []

        def noise(features: Features) -> Tensor:
            while len(draws) < len(features):
                draw = posterior.draw(count, generator)
                draws.append(draw - posterior.curvature.mean.to(draw))
            parts = [
                w * apply_head(net.head, one.unflatten(0, (count, -1)), draw.to(one), change=True)
                for w, one, draw in zip(self._scales(features), features, draws, strict=True)
            ]
            return net.fold(sum(parts[1:], parts[0]).flatten(0, 1)).detach()

        return noise

    def fresh_noise(self, count: int, fresh: Callable[[], Tensor]) -> Noise:
        """What weights drawn anew at every evaluation and, as published, every pixel add."""

        def noise(features: Features) -> Tensor:
            z = torch.cat([fresh() for _ in range(count)]).to(features[0])
            return (self._variance([features], [1.0]).sqrt() * z).detach()

        return noise


@dataclass(frozen=True)
class Evaluations:
    """What the evaluations of a step give.

    Attributes:
        outputs: of the trained head, ``(E, N, C, H, W)``.
        features: of each evaluation.
        noises: what was added to the outputs before later evaluations saw them, of their shape.
    """

    outputs: Tensor
    features: list[Features]
    noises: Tensor


def evaluate(
    head: UncertainHead, step: Step, x: Tensor, noise: Noise | None = None
) -> Evaluations:
    """The E evaluations of a step at N states.

    Args:
        head: network with its posterior.
        step: with its evaluations.
        x: ``(N, C, H, W)``.
        noise: what weights add to the outputs that later evaluations see; None for none.
    """
    outputs: list[Tensor] = []
    noises: list[Tensor] = []
    features: list[Features] = []
    for t, row in zip(step.times, step.inputs, strict=True):
        seen = [g + n for g, n in zip(outputs, noises, strict=True)] if noise else outputs
        features.append(head.features(combine(row, x, seen), t))
        outputs.append(head.output(features[-1]))
        noises.append(noise(features[-1]) if noise else torch.zeros_like(outputs[-1]))
    return Evaluations(torch.stack(outputs), features, torch.stack(noises))
