"""Points in the plane: small data sets on which a whole run takes seconds."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.data.images import (
    ImageData,
    check_both_labelled,
    check_classes,
    check_labels,
    fingerprint_of,
)
from bayesdiff.data.spaces import Plane, Space


@dataclass(frozen=True, eq=False)
class PointData(ImageData):
    """Points in place of images: ``images`` are float32 ``(N, 2)``, like ``test_images``."""

    @property
    def space(self) -> Space:
        """The states in which a model trains and samples."""
        return Plane(self) if self.states is None else self.states

    @classmethod
    def of(
        cls,
        name: str,
        images: Tensor,
        labels: Tensor | None,
        test_images: Tensor,
        test_labels: Tensor | None,
        classes: tuple[str, ...] = (),
    ) -> Self:
        """Check everything a later stage relies on, and hash it.

        Raises:
            UserError: for points that are no finite float32 ``(N, 2)``, and wrong labels.
        """
        where = f"data set {name}"
        check_both_labelled(name, labels is not None, test_labels is not None)
        for part, x, y in (("training", images, labels), ("test", test_images, test_labels)):
            if x.dtype != torch.float32 or x.shape[1:] != (2,) or not x.numel():
                raise UserError(
                    f"{where}: {part} points are {x.dtype} of shape {tuple(x.shape)}; "
                    "give float32 of shape (N, 2)"
                )
            if not bool(x.isfinite().all()):
                raise UserError(f"{where}: {part} points are not all finite; leave those out")
            if y is not None:
                check_labels(where, part, x, y, len(classes))
        if labels is not None:
            check_classes(where, labels, classes)
        parts = (images, labels, test_images, test_labels)
        return cls(name, *parts, classes=classes, fingerprint=fingerprint_of(parts, classes))


def moons(
    name: str = "moons",
    points: int = 8000,
    test_points: int = 2000,
    noise: float = 0.08,
    labels: bool = False,
    seed: int = 0,
) -> PointData:
    """Two moons, made by scikit-learn and standardised: mean 0 and variance 1 per coordinate.

    Args:
        name: short name of the data set.
        points: for training.
        test_points: held out.
        noise: standard deviation of the points around the moons of radius 1.
        labels: whether the two moons are two classes.
        seed: of the points.

    Raises:
        UserError: for counts or a noise that no set has.
    """  # noqa: DOC502 - raised one level down
    from sklearn.datasets import make_moons

    count = at_least("data.source.points", points, 2)
    total = count + at_least("data.source.test_points", test_points, 2)
    positive("data.source.noise", noise)
    drawn, upper = make_moons(total, noise=noise, random_state=seed_of("data.source.seed", seed))
    drawn = (drawn - drawn.mean(0)) / drawn.std(0)
    states = torch.from_numpy(drawn.astype(np.float32))
    if not labels:
        return PointData.of(name, states[:count], None, states[count:], None)
    which = torch.from_numpy(upper).long()
    parts = states[:count], which[:count], states[count:], which[count:]
    return PointData.of(name, *parts, classes=("upper", "lower"))
