"""What comes behind a head, and networks that add something to its outputs there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.networks import Adapter


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Another part in the place of the one that has this name."""
    where, _, last = name.rpartition(".")
    setattr(module.get_submodule(where), last, part)


class Fold:
    """Moves the head's outputs to where they lie in a prediction; linear, without weights.

    Args:
        places: of every value of a prediction among the head's outputs of a sample, int64 of the
            prediction's shape.
        factor: of all of them.
        partial: whether some of the head's positions are in no prediction.
    """

    def __init__(self, places: Tensor, factor: float, partial: bool = False) -> None:
        self.places, self.factor, self.partial = places, factor, partial
        self.straight = bool((places.flatten() == torch.arange(places.numel())).all())

    def __call__(self, output: Tensor) -> Tensor:
        """``(B, ...)`` as the head gives it to ``(B, *shape)``."""
        flat = output.flatten(1)
        if not self.straight:
            flat = flat[:, self.places.flatten().to(output.device)]
        moved = flat.unflatten(1, self.places.shape)
        return moved if self.factor == 1 else self.factor * moved

    def back(self, prediction: Tensor, shape: Sequence[int]) -> Tensor:
        """``(B, *shape)`` as the head gives it, of which this is the prediction."""
        flat = prediction.flatten(1)
        if not self.straight:
            flat = flat[:, self.places.flatten().argsort().to(prediction.device)]
        return flat.unflatten(1, tuple(shape)) / self.factor


class _SilentTap(nn.Module):
    """Stands where a head was: says 0, and keeps what it was given until that is taken."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.axis, self.rows = HeadGeometry.of(head).axis, len(head.weight)  # type: ignore
        self.kept: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.kept.append(features)
        # Made of the features: under vmap others are added to it in place.
        zero = 0 * features.narrow(self.axis, 0, 1)
        return torch.cat([zero] * self.rows, self.axis)


class CarryingAdapter(Adapter):
    """An adapter whose features carry what the module adds to its head's outputs behind it.

    The module runs to its end with a head that says 0, so that its output is what is added.

    Args:
        module: with its own head.
        head: its name.
        own: the head that becomes Bayesian, with some rows of the module's.
        fold: see ``Adapter``.
        shape: of the outputs of ``own``.
    """

    def __init__(
        self, module: nn.Module, head: str, own: nn.Module, fold: Fold, shape: Sequence[int]
    ) -> None:
        tap = _SilentTap(module.get_submodule(head))
        put(module, head, own)
        super().__init__(module, head=head, fold=fold)
        self._tap, self._shape, self._own_fold = tap, tuple(shape), fold
        put(module, head, tap)

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head with what is carried, ``(B, D + C_out, h, w)``, in one run."""
        try:
            output = self.module(x, t, *self._condition(t, y))
            features = self._wide(self._tap.kept[-1])
        finally:
            self._tap.kept.clear()
        offset = self._own_fold.back(output, self._shape)
        return torch.cat([features, offset.to(features)], self._tap.axis)
