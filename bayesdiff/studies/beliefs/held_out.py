"""Beliefs that received held-out images, and what the network makes of them: no sampler's doing.

A perfect sampler of a perfect model would meet the same beliefs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.likelihoods import ClassLikelihood
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.paths.bayesian_flow import AccuracyPath
from bayesdiff.solvers import SampleNoise
from bayesdiff.studies.beliefs.predictive import HeadPredictive, entropy

LEVELS = 15  # of confidence, in which it is compared with the share that is right
# Tell the noise of beliefs apart from what samples are drawn from.
_BINS, _GRID = 700_001, 800_001
# Multiples of them spread evenly over the unit interval, for images and for intervals of t.
_ACROSS, _ALONG = 0.6180339887498949, 0.7548776662466927


@dataclass(frozen=True)
class Teacher:
    """A model with the beliefs that images give it.

    Attributes:
        model: with its trained weights, a Bayesian flow network of classes.
        likelihood: its own.
        path: its own.
        predictive: of the head.
        seed: of the transmissions' noise.
        device: where to compute.
    """

    model: Any
    likelihood: ClassLikelihood
    path: AccuracyPath
    predictive: HeadPredictive
    seed: int
    device: torch.device

    @torch.inference_mode()
    def in_bins(self, x_1: Tensor, numbers: Sequence[int], bins: int, pixels: bool) -> Rows:
        """What is measured at one time in each interval of t, another one for each image.

        Args:
            x_1: data values ``(B, C, ...)``.
            numbers: of the images, which decide their times and noise.
            bins: B equal intervals.
            pixels: whether scores are kept of every value, not only their means.

        Returns:
            Each ``(B, bins, ...)``: means ``belief``, ``entropy``, ``aleatoric``, ``epistemic``;
            ``nll``, ``brier`` and ``confidence`` of the trained head and of the average over its
            posterior; with ``pixels`` also ``pixels.<score>`` and ``pixels.wrong``.
        """
        parts = []
        for k in range(bins):
            t = (k + spread(numbers, k)) / bins
            parts.append(self._measured(x_1, t, self._noise(numbers, x_1, _BINS + k), pixels))
        return {name: torch.stack([part[name] for part in parts], 1).cpu() for name in parts[0]}

    @torch.inference_mode()
    def on_grid(self, x_1: Tensor, numbers: Sequence[int], times: Sequence[float]) -> Rows:
        """Mean ``belief`` and ``entropy`` of every image at these times, each ``(B, T)``."""
        rows: dict[str, list[Tensor]] = {"belief": [], "entropy": []}
        for place, time in enumerate(times):
            t = torch.full((len(x_1),), time, dtype=torch.float64)
            z, beta = self._state(x_1, t, self._noise(numbers, x_1, _GRID + place))
            net = self.model.net
            output = net.fold(net.head(net.features(z, t.to(z), self._given(numbers))))
            for name, logits in (
                ("belief", self.likelihood.belief_logits(z, beta)), ("entropy", output),
            ):  # fmt: skip
                rows[name].append(entropy(self._log_p(logits)).flatten(1).mean(1))
        return {name: torch.stack(values, 1).float().cpu() for name, values in rows.items()}

    def _measured(self, x_1: Tensor, t: Tensor, noise: Tensor, pixels: bool) -> Rows:
        z, beta = self._state(x_1, t, noise)
        features = self.model.net.features(z, t.to(z), self._given(range(len(z))))
        log_p = self._log_p(self.model.net.fold(self.model.net.head(features)))
        mean = self.predictive(features)
        belief = self._log_p(self.likelihood.belief_logits(z, beta))
        scores = {
            "belief": entropy(belief), "entropy": entropy(log_p),
            "aleatoric": mean.aleatoric, "epistemic": mean.epistemic,
        }  # fmt: skip
        index = self.likelihood.index(x_1)
        rows = {name: value.flatten(1).mean(1) for name, value in scores.items()}
        for name, values in calibration((log_p, mean.log_p), index).items():
            rows[name] = values
        if pixels:
            kept = {f"pixels.{name}": scores[name] for name in ("belief", "entropy", "epistemic")}
            kept["pixels.wrong"] = log_p.argmax(2) != index
            rows |= {name: value.flatten(1) for name, value in kept.items()}
        return {k: v if v.dtype == torch.bool else v.float() for k, v in rows.items()}

    def _state(self, x_1: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        c = self.path.coefficients(t)
        shape = -1, *[1] * (x_1.ndim - 1)
        alpha, sigma, beta = (
            v.to(x_1).view(shape) for v in (c.alpha, c.sigma, self.path.accuracy(t))
        )
        z = alpha * x_1 + sigma * noise
        return z.to(memory_format=torch.channels_last) if z.ndim == 4 else z, beta

    def _log_p(self, logits: Tensor) -> Tensor:
        return self.likelihood.log_probabilities(logits.double())

    def _noise(self, numbers: Sequence[int], x_1: Tensor, number: int) -> Tensor:
        return SampleNoise(self.seed, numbers, x_1.shape[1:]).fork(number)().to(x_1)

    def _given(self, numbers: Sequence[int]) -> Tensor | None:
        """No class: a belief is to say by itself what it shows."""
        condition = self.model.condition
        if condition is None:
            return None
        empty: Tensor | None = condition.empty(condition.of_samples(numbers).to(self.device))
        return empty


def calibration(predictions: Sequence[Tensor], index: Tensor) -> Rows:
    """How well probabilities hold, of P predictions and in means over the values of an image.

    Args:
        predictions: log-probabilities ``(B, C, K, ...)``.
        index: true classes ``(B, C, ...)``.

    Returns:
        ``nll`` in nats and ``brier``, the squared distance to the true class's vector, each
        ``(B, P)``; ``confidence`` ``(B, P, LEVELS, 3)``: by level of the largest probability, how
        many values, the sum of it, and how many are right.
    """
    found: dict[str, list[Tensor]] = {"nll": [], "brier": [], "confidence": []}
    for log_p in predictions:
        right = log_p.gather(2, index[:, :, None])[:, :, 0]
        p = log_p.exp()
        found["nll"].append(-right.flatten(1).mean(1))
        found["brier"].append((p.square().sum(2) - 2 * right.exp() + 1).flatten(1).mean(1))
        top, guess = p.max(2)
        level = (top * LEVELS).long().clamp(max=LEVELS - 1).flatten(1)
        values = torch.ones_like(top), top, (guess == index).to(top)
        zeros = top.new_zeros(len(top), LEVELS)
        sums = [zeros.scatter_add(1, level, v.flatten(1)) for v in values]
        found["confidence"].append(torch.stack(sums, 2))
    return {name: torch.stack(values, 1) for name, values in found.items()}


def spread(numbers: Sequence[int], row: int) -> Tensor:
    """Places in [0, 1), float64, spread evenly over consecutive numbers."""
    return (torch.tensor(list(numbers), dtype=torch.float64) * _ACROSS + (row + 1) * _ALONG) % 1
