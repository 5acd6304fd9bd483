"""Beliefs along the sampler: entropies over time, maps of where and when a sample is unsure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdiff.data.spaces import Space
from bayesdiff.likelihoods import ClassLikelihood
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.paths.bayesian_flow import AccuracyPath
from bayesdiff.solvers import integrate
from bayesdiff.studies.beliefs.predictive import HeadPredictive, entropy, largest_entropy
from bayesdiff.uncertainty import Start

COMMITTED = 0.1  # of ln K: a value of less entropy is decided


@dataclass
class Trace:
    """What is recorded at every evaluation of the network.

    Attributes:
        frames: places, among the evaluations, of what is shown.
        rows: lists over evaluations: means per image, and what the frames show.
        maps: lists over evaluations of entropy and epistemic part, ``(B, C, ...)`` float32.
    """

    frames: Sequence[int]
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    maps: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """One more row."""
        self.rows.setdefault(name, []).append(values.float())

    def add_map(self, name: str, values: Tensor) -> None:
        """One more map, and its mean per image as a row."""
        self.add(name, values.flatten(1).mean(1))
        self.maps.setdefault(name, []).append(values.float())

    @property
    def place(self) -> int:
        """Of the evaluation whose maps are added next."""
        return len(self.maps.get("entropy", ()))


@torch.inference_mode()
def follow(
    start: Start,
    likelihood: ClassLikelihood,
    predictive: HeadPredictive,
    space: Space,
    times: Sequence[float],
    frames: Sequence[int],
) -> Rows:
    """Samples with their beliefs and outputs on the way, and one more prediction at t = 1.

    Args:
        start: of the batch.
        likelihood: of the model.
        predictive: of the head.
        space: of the states.
        times: n + 1 times of the evaluations, the last one of the sample itself.
        frames: which of them are shown.

    Returns:
        ``images`` uint8; over all times ``(B, n + 1)``: mean ``belief``, ``entropy`` and
        ``epistemic``; maps ``(B, C, ...)``: ``accumulated``, ``weighted``, ``commit``,
        ``accumulated_epistemic``; in the frames ``(B, T, C, ...)``: ``frames.belief`` and
        ``frames.output`` as mean values, ``frames.entropy``.
    """
    path, given, trace = start.path, start.field(), Trace(frames)
    assert isinstance(path, AccuracyPath)

    def watched(x: Tensor, t: float) -> Tensor:
        features = given.features(x, t)
        output = given.output(features)
        beta = path.accuracy(torch.tensor(min(t, 1.0))).to(x).view(*[1] * x.ndim)
        belief = likelihood.belief_logits(x, beta)
        if trace.place in trace.frames:
            trace.add("frames.belief", space.values(likelihood.mean(belief)))
            trace.add("frames.output", space.values(likelihood.mean(output)))
        of_belief = entropy(likelihood.log_probabilities(belief.double()))
        trace.add("belief", of_belief.flatten(1).mean(1))
        trace.add_map("epistemic", predictive(features).epistemic)
        trace.add_map("entropy", entropy(likelihood.log_probabilities(output.double())))
        return given.emit(output, t)

    end = integrate(watched, start.steps(), start.initial(), start.draw)
    rows = {name: torch.stack(values, 1) for name, values in trace.rows.items()}
    entropies = torch.stack(trace.maps["entropy"])
    accuracy = path.accuracy(torch.tensor(list(times), dtype=torch.float64))
    rows |= maps_of(entropies, times, (accuracy.diff() / accuracy[-1]).to(entropies))
    rows["commit"] = commit_times(entropies, times, COMMITTED * largest_entropy(likelihood))
    rows["accumulated_epistemic"] = torch.stack(trace.maps["epistemic"][:-1]).mean(0)
    rows["frames.entropy"] = entropies[list(frames)].transpose(0, 1)
    rows["images"] = space.decode(end)
    return {name: values.cpu() for name, values in rows.items()}


def maps_of(entropies: Tensor, times: Sequence[float], shares: Tensor) -> Rows:
    """Entropy accumulated over the n transmissions; what is left at t = 1 is none of them.

    Args:
        entropies: ``(n + 1, ...)``.
        times: of these.
        shares: of the accuracy, by transmission, ``(n,)``.

    Returns:
        ``accumulated``, the mean, and ``weighted``, by the accuracy that each evaluation decides.
    """
    before = entropies[: len(times) - 1]
    weighted = (shares.view(-1, *[1] * (before.ndim - 1)) * before).sum(0)
    return {"accumulated": before.mean(0), "weighted": weighted}


def commit_times(entropies: Tensor, times: Sequence[float], most: float) -> Tensor:
    """Smallest time from which on the entropy stays below; infinite where it ends above.

    Args:
        entropies: ``(n + 1, ...)``.
        times: of these.
        most: nats.
    """
    found = torch.full_like(entropies[0], torch.inf)
    for time, values in zip(times, entropies, strict=True):
        below = values < most
        found = torch.where(below, found.clamp(max=time), torch.inf)
    return found
