"""Points in place of images: small data sets on which a whole run takes a minute."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.images import (
    ImageData,
    check_both_labelled,
    check_classes,
    check_labels,
    fingerprint_of,
)
from bayesdiff.data.spaces import Points, Space


@dataclass(frozen=True, eq=False)
class PointData(ImageData):
    """Points in place of images: ``images`` are float32 ``(N, D)``, like ``test_images``.

    Example:
        >>> points = torch.randn(100, 2)
        >>> PointData.of("mine", points[10:], None, points[:10], None).space.shape
        (2,)
    """

    @property
    def space(self) -> Space:
        """The states in which a model trains and samples."""
        return Points(self) if self.states is None else self.states

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
            UserError: for points that are no finite float32 ``(N, D)``, test points of other
                dimensions, and wrong labels.
        """
        where = f"data set {name}"
        check_both_labelled(name, labels is not None, test_labels is not None)
        for part, x, y in (("training", images, labels), ("test", test_images, test_labels)):
            if x.dtype != torch.float32 or x.ndim != 2 or not x.numel():
                raise UserError(
                    f"{where}: {part} points are {x.dtype} of shape {tuple(x.shape)}; "
                    "give float32 of shape (N, D)"
                )
            if not bool(x.isfinite().all()):
                raise UserError(f"{where}: {part} points are not all finite; leave those out")
            if y is not None:
                check_labels(where, part, x, y, len(classes))
        if images.shape[1] != test_images.shape[1]:
            raise UserError(
                f"{where}: training points are of {images.shape[1]} dimensions and test points "
                f"of {test_images.shape[1]}; give both of the same"
            )
        if labels is not None:
            check_classes(where, labels, classes)
        parts = (images, labels, test_images, test_labels)
        return cls(name, *parts, classes=classes, fingerprint=fingerprint_of(parts, classes))
