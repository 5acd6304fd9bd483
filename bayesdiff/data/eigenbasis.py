"""The eigenbasis of the data as a space: states are whitened coordinates along them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least

if TYPE_CHECKING:
    from bayesdiff.data.images import ImageData
    from bayesdiff.data.spaces import Space

_AT_ONCE = 4096  # rows of a statistics pass
# Of the largest variance: what double precision cannot tell from none.
_NOTHING = 1e-12


class Basis(nn.Module):
    """Mean, eigenvectors and variances of data, which take values to whitened coordinates.

    Args:
        mean: ``(D,)``.
        vectors: orthonormal columns ``(D, D)``, by falling variance.
        variances: along them, ``(D,)``, above 0.
        spread: variance of the whitened coordinates, below 1 where a variance was lifted.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor
    spread: Tensor

    def __init__(self, mean: Tensor, vectors: Tensor, variances: Tensor, spread: Tensor) -> None:
        super().__init__()
        parts = {"mean": mean, "vectors": vectors, "variances": variances, "spread": spread}
        for name, values in parts.items():
            self.register_buffer(name, values.double(), persistent=False)

    @classmethod
    def of(cls, rows: list[Tensor], floor: float) -> "Basis":
        """The basis of values.

        Signs are fixed: the largest entry of an eigenvector is above 0. Values that never change
        have unit vectors of their own, behind all others.

        Args:
            rows: parts ``(n, D)`` of the values.
            floor: least variance, as a share of the largest.

        Raises:
            UserError: for variances of 0 and no floor, or values that never change at all.
        """
        count = sum(map(len, rows))
        mean = sum((part.double().sum(0) for part in rows), torch.zeros(())) / count
        centred = (part.double() - mean for part in rows)
        covariance = sum((part.T @ part for part in centred), torch.zeros(())) / (count - 1)
        scale = covariance.diagonal().max()
        moving = covariance.diagonal() > _NOTHING * scale
        if not bool(scale > 0):
            raise UserError("space=eigenbasis: all values of the data are the same; give others")
        values, inner = torch.linalg.eigh(covariance[moving][:, moving])
        places = moving.nonzero().flatten(), (~moving).nonzero().flatten()
        vectors = torch.zeros_like(covariance)
        vectors[places[0], : len(values)] = inner.flip(1)
        still = torch.arange(len(values), len(vectors))
        vectors[places[1], still] = 1.0
        variances = torch.cat([values.flip(0), values.new_zeros(len(still))])
        largest = vectors.abs().argmax(0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()
        singular = int((variances <= _NOTHING * scale).sum())
        if singular and not floor:
            raise UserError(
                f"space=eigenbasis is singular: the data do not vary in {singular} of "
                f"{len(variances)} directions and data.space.floor={floor}; give 1e-3 or so"
            )
        lifted = variances.clamp(min=floor * float(variances[0]))
        return cls(mean, vectors, lifted, variances / lifted)

    def encode(self, values: Tensor) -> Tensor:
        """Values ``(N, *shape)`` to whitened coordinates of that shape, in its precision."""
        rows = (values.flatten(1) - self.mean.to(values)) @ self.vectors.to(values)
        return (rows / self.variances.sqrt().to(values)).reshape(values.shape)

    def decode(self, states: Tensor) -> Tensor:
        """Whitened coordinates ``(N, *shape)`` to values, differentiable."""
        rows = states.flatten(1) * self.variances.sqrt().to(states)
        return (rows @ self.vectors.T.to(states) + self.mean.to(states)).reshape(states.shape)


class Eigenbasis:
    """States are coordinates along the data's eigenvectors, centred, each of variance 1.

    Their places are those of falling variance, laid out in the shape of the data.

    Args:
        data: images or points.
        floor: least variance, as a share of the largest: a pixel that few images use would be far
            out in units of its own variance, and rule the loss.
        rows: training data that the basis is of, a fixed random choice of so many.

    Raises:
        UserError: for a singular basis and no floor, or too few rows.

    Example:
        >>> from bayesdiff.data.toys import sine2
        >>> data = sine2(points=1000)
        >>> space = Eigenbasis(data)
        >>> states = space.encode(data.images)
        >>> torch.allclose(states.T.cov(), torch.eye(2), atol=1e-4)
        True
        >>> torch.allclose(space.decode(states), data.images, atol=1e-5)
        True
    """

    decoded = True
    fitted = True
    fingerprint = ""

    def __init__(self, data: "ImageData", floor: float = 1e-3, rows: int = 20000) -> None:
        number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
        if not number or not 0 <= floor < 1:
            raise UserError(f"data.space.floor must be in [0, 1), got {floor!r}; 1e-3 is usual")
        self.inner: Space = data.space
        self.shape = self.inner.shape
        self.pictures, self.scores = self.inner.pictures, self.inner.scores
        self.figures = self.inner.decoded_figures
        at_least("data.space.rows", rows, 2)
        # Data often come sorted by class.
        mixed = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        parts = data.images[mixed[:rows].sort().values].split(_AT_ONCE)
        self.basis = Basis.of([self.inner.encode(part).flatten(1) for part in parts], floor)

    @property
    def variances(self) -> Tensor:
        """Of the data along its eigenvectors, of a state's shape, float64."""
        return self.basis.variances.view(self.shape)

    @property
    def spread(self) -> Tensor:
        """Variance of the states, of a state's shape, float64; below 1 under the floor."""
        return self.basis.spread.view(self.shape)

    def encode(self, data: Tensor) -> Tensor:
        """Data as it is stored to whitened coordinates, float32."""
        return self._at(data).encode(self.inner.encode(data))

    def values(self, states: Tensor) -> Tensor:
        """What states look like, in the units of the data's own space."""
        return self._at(states).decode(states)

    def decode(self, states: Tensor) -> Tensor:
        """States to data as it is stored."""
        return self.inner.decode(self.values(states))

    def _at(self, like: Tensor) -> Basis:
        return self.basis.to(like.device)
