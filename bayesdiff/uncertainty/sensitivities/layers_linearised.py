"""Sensitivities to the head and to other layers at once, for a posterior wider than the head."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from bayesdiff.checks import UserError
from bayesdiff.laplace.block.layers import layer_tensors
from bayesdiff.laplace.block.posterior import LayersPosterior
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.sensitivities.linearised import (
    ROWS,
    Linearised,
    directions,
    follow_rows,
)
from bayesdiff.uncertainty.sensitivities.weights import (
    RESPONSES,
    Directions,
    WeightTangentField,
)
from bayesdiff.uncertainty.start import Start, Starts

_SALT = 5_000_011


@dataclass(frozen=True, kw_only=True)
class LayersLinearised(Linearised):
    """First-order variance under the posterior of the head and of other layers.

    What ``uncertainty=linearised`` is under a ``laplace.subset`` beyond the head: with S the
    derivative of the state in all these weights, ``S' = (a I + b J_x) S + b J_w`` along ``draws``
    directions of the posterior; one derivative along (state, weights) gives both terms. It stays
    where the GGN describes the network, however wide the posterior is (Immer et al. 2021,
    "Improving predictions of Bayesian neural nets via local linearization", eq. 8).

    Args:
        block: posterior of the layers beside the head.
    """

    block: LayersPosterior

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws == "all" or self.skip_interval > 1 or self.derivative not in RESPONSES:
            raise UserError(
                f"uncertainty.draws={self.draws}, skip_interval={self.skip_interval}, "
                f"derivative={self.derivative} are for laplace.subset=head in part; a wider one "
                f"takes a number of draws, skip_interval=1 and {' or '.join(RESPONSES)}"
            )

    def evaluations(self, start: Start) -> float:
        """Of image and products, at every evaluation; the weights move the first one as well."""
        stochastic = any(step.stochastic for step in start.steps())
        rows = int(self.draws) + (self.noise_draws if stochastic else 0)
        turns = -(-int(self.draws) // ROWS)
        again = 0 if self.derivative == "difference" else turns
        # Rows of the solver's own noise are products of the state alone; they repeat the image.
        again += int(self.derivative != "difference" and stochastic and self.noise_draws > 0)
        return start.nfe * (turns + rows + again)

    def sources(self, run: Training) -> list[Any]:
        """The posterior of the layers, and how directions are drawn."""
        return [*super().sources(run), *self.block.settings]

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """Nothing to make ready; layers of other weights are refused."""
        self.block.factors.require_source(weights_key(starts([0]).model))
        return self

    @torch.no_grad()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their first-order variance."""
        count = int(self.draws)
        along = self.directions(start.model, posterior)
        noise, found = start.noise.copy(), None
        for first in range(0, count, ROWS):
            turn = {name: each[first : first + ROWS] for name, each in along.items()}
            again = replace(start, noise=noise.copy())
            extra = 0 if first else self.noise_draws
            tangent = WeightTangentField(again.field(), turn, self.derivative)
            more = follow_rows(again, tangent, tangent.count, 1 / count, extra, self.seed)
            found = more if found is None else found.with_more(more)
        assert found is not None
        label = f"linearised, {count} draws, {self.derivative}, {self.block.described}"
        return found.samples(start, label, self.times)

    def directions(self, model: GenerativeModel, posterior: HeadPosterior) -> Directions:
        """Draws minus the trained weights, by the names of the network's parameters.

        The head's are those that ``Linearised`` follows under the same seed.
        """
        net: Any = model.net
        names = {id(module): name for name, module in net.named_modules()}
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        drawn = self.block.deviations(int(self.draws), generator)
        drawn[names[id(net.head)]] = directions(posterior, int(self.draws), self.seed)
        device = next(model.parameters()).device
        return {
            f"{name}.{part}": values.to(device)
            for name, matrices in drawn.items()
            for part, values in layer_tensors(net.get_submodule(name), matrices).items()
        }
