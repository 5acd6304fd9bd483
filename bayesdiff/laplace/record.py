"""What one pass over the data leaves, and its file."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.objective import said_of
from bayesdiff.storage.checked_file import load_checked, save_checked

_FORMAT = "bayesdiff-curvature-5"
# Of a likelihood alone, the only objective that there was.
_OF_LIKELIHOOD = "bayesdiff-curvature-4"
# Of a Gaussian likelihood, the only one there was.
_GAUSSIAN = "bayesdiff-curvature-3"
# Without sums that came later; read to be recognised, not to be used.
_OLDER = ("bayesdiff-curvature-1", "bayesdiff-curvature-2")
_BINS = "bins."


@dataclass(frozen=True)
class TimeBins:
    """The sums of the pass, apart for B equal intervals of t.

    Attributes:
        gram: ``(B, P, P)`` float64.
        squared_error: ``(B,)`` float64.
        num_outputs: ``(B,)`` float64, residuals per draw.
        squared_gradients: ``(B, C_out, P)`` float64.
        gradient: ``(B, C_out, P)`` float64.
    """

    gram: Tensor
    squared_error: Tensor
    num_outputs: Tensor
    squared_gradients: Tensor
    gradient: Tensor

    @property
    def sigma_mle(self) -> Tensor:
        """Root mean squared residual of each interval, ``(B,)``; nan where no time fell."""
        return (self.squared_error / self.num_outputs).sqrt()


@dataclass(frozen=True)
class Curvature:
    """What one pass over the data leaves: enough for every structure and every number.

    Attributes:
        gram: ``(P, P)`` float64, sum over images and pixels, divided by ``draws``; with
            ``groups`` the GGN itself, ``(G, K P, K P)``, see ``coupled``.
        num_images: N, images in the pass, each counted once whatever ``draws`` is.
        draws: (t, noise) draws per image.
        squared_error: sum of squared residuals over all outputs, divided by ``draws``; of a
            likelihood other than the Gaussian its deviance, minus twice the log-likelihood.
        num_outputs: data values per draw, images * pixels * channels.
        mean: ``(C_out, P)`` float64, the trained weights of the head.
        source: hash of the checkpoint and data this came from.
        geometry: how the head reads its features.
        squared_gradients: ``(C_out, P)`` float64, the sum over images of the squared gradient of
            half an image's squared error or deviance, divided by ``draws``; None where it was not
            computed.
        gradient: ``(C_out, P)`` float64, the gradient of half of that sum at the mean, divided by
            ``draws``; None where it was not computed.
        bins: the same sums apart for intervals of t, None where they were not asked for.
        likelihood: its name.
        objective: ``likelihood``, or ``elbo`` where all this is of a bound, see ``objective``.
        groups: ``(G, K)``, channels of the head that say one value together, and have a matrix of
            their own; None where all channels are alike and apart, as under a Gaussian.

    Example:
        After the example of ``starts_of``:

        >>> curvature = posterior.curvature
        >>> curvature.num_images, curvature.gram.shape, curvature.mean.shape  # P = 8 * 3 * 3 + 1
        (64, torch.Size([73, 73]), torch.Size([1, 73]))
    """

    gram: Tensor
    num_images: int
    draws: int
    squared_error: float
    num_outputs: int
    mean: Tensor
    source: str
    geometry: HeadGeometry
    squared_gradients: Tensor | None = None
    gradient: Tensor | None = None
    bins: TimeBins | None = None
    likelihood: str = "gaussian"
    objective: str = "likelihood"
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        size, (channels, width) = self.geometry.size, self.mean.shape
        matrix: tuple[int, ...] = (size, size)
        if self.groups is not None:
            matrix = (len(self.groups), *2 * [self.groups.shape[1] * size])
        if self.gram.shape != matrix or width != size:
            raise UserError(
                f"a curvature of {channels} outputs needs a {' x '.join(map(str, matrix))} Gram"
                f" matrix and {size} weights each, got {tuple(self.gram.shape)} and {width}"
            )
        given = ("squared gradients", self.squared_gradients), ("gradients", self.gradient)
        sums = {name: value for name, value in given if value is not None}
        if not all(bool(t.isfinite().all()) for t in (self.gram, self.mean, *sums.values())):
            raise UserError(
                "the features or the head hold values that are not finite; train again"
            )
        for name, value in sums.items():
            if value.shape != self.mean.shape:
                raise UserError(
                    f"a curvature of {channels} outputs with {size} weights each needs as many"
                    f" {name}, got {tuple(value.shape)}"
                )

    @property
    def scaled(self) -> bool:
        """Whether sigma_noise scales the likelihood, as it does a Gaussian one."""
        return self.groups is None

    @property
    def said(self) -> str:
        """How a user asks for what this is of."""
        return said_of(self.likelihood, self.objective)

    @property
    def shape(self) -> tuple[int, int]:
        """Weights by blocks that are independent of each other: ``(C_out, P)`` or ``(G, K P)``."""
        size = self.gram.shape[-1]
        return self.mean.numel() // size, size

    def blocks(self, weights: Tensor) -> Tensor:
        """Weights ``(..., C_out, P)`` of the head by blocks, ``(..., G, K P)``."""
        if self.groups is None:
            return weights
        return weights[..., self.groups.flatten(), :].unflatten(-2, self.groups.shape).flatten(-2)

    def channels(self, blocks: Tensor) -> Tensor:
        """The inverse of ``blocks``."""
        if self.groups is None:
            return blocks
        rows = blocks.unflatten(-1, (self.groups.shape[1], -1)).flatten(-3, -2)
        return rows[..., self.groups.flatten().argsort(), :]

    @property
    def sigma_mle(self) -> float:
        """The noise level that maximises the likelihood: root mean squared residual.

        1 for a likelihood that has none.
        """
        if not self.scaled:
            return 1.0
        return math.sqrt(self.squared_error / self.num_outputs)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ascending eigenvalues ``(P,)``, never negative, and eigenvectors ``(P, P)`` of G.

        Of every matrix, where there are several.
        """
        return _eigh(self.gram)

    @cached_property
    def eigen_blocks(self) -> tuple[Tensor, Tensor]:
        """As ``eigen``, of G without what ties weights and bias; that of the bias comes last."""
        if not self.geometry.bias:
            return self.eigen
        values, vectors = _eigh(self.gram[:-1, :-1])
        one = torch.ones(1, 1, dtype=vectors.dtype)
        return torch.cat([values, self.gram[-1, -1:]]), torch.block_diag(vectors, one)

    def per_time(self) -> "Curvature":
        """This curvature with every interval of t weighted by its own noise, 1 / sigma_b^2.

        Sums are scaled to the geometric mean of the noise levels over all outputs: with that as
        sigma_noise, likelihood and evidence are those of the heteroscedastic Gaussian.

        Raises:
            UserError: if the pass had one interval only, or fitted one of them without error.
        """
        if self.bins is None:
            raise UserError(
                "sigma_noise=mle_per_time needs a curvature by time; set laplace.time_bins=10"
            )
        seen = self.bins.num_outputs > 0
        sigma, outputs = self.bins.sigma_mle[seen], self.bins.num_outputs[seen]
        if not bool((sigma > 0).all()):
            raise UserError("the residuals of a time bin are all zero; give sigma_noise a number")
        level = ((outputs * sigma.log()).sum() / outputs.sum()).exp()
        weights = (level / sigma).square()
        return replace(
            self,
            gram=torch.einsum("b,bpq->pq", weights, self.bins.gram[seen]),
            squared_error=float(weights @ self.bins.squared_error[seen]),
            squared_gradients=torch.einsum(
                "b,bcp->cp", weights.square(), self.bins.squared_gradients[seen]
            ),
            gradient=torch.einsum("b,bcp->cp", weights, self.bins.gradient[seen]),
            source=self.source.removesuffix("-per_time") + "-per_time",
        )

    def require_source(self, source: str) -> None:
        """Refuse to pair this curvature with another checkpoint.

        Raises:
            UserError: if ``source`` is not the one this curvature was computed from.
        """
        if source != self.source:
            raise UserError(
                f"the curvature was computed from {self.source}, not from {source}; delete"
                " the file to compute it again, or give another run_dir"
            )

    def require_likelihood(self, name: str, objective: str = "likelihood") -> None:
        """Refuse to pair this curvature with a model of another likelihood, or another objective.

        Raises:
            UserError: if one is not its own.
        """
        if self.objective != objective:
            raise UserError(
                f"the curvature is of laplace.objective={self.objective}, not of {objective}; "
                "delete the file to compute it again, or give another run_dir"
            )
        if self.likelihood != name:
            raise UserError(
                f"the curvature is of a {self.likelihood} likelihood and the model has a {name} "
                "one; delete the file to compute it again, or give another run_dir"
            )

    def save(self, path: str | Path) -> None:
        """Write the record as safetensors; a crash leaves the old file or none, never half."""
        tensors = {"gram": self.gram, "mean": self.mean}
        for name in ("squared_gradients", "gradient", "groups"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        if self.bins is not None:
            tensors |= {_BINS + name: value for name, value in vars(self.bins).items()}
        facts = {
            "num_images": self.num_images,
            "draws": self.draws,
            "squared_error": self.squared_error,
            "num_outputs": self.num_outputs,
            "source": self.source,
            "likelihood": self.likelihood,
            "objective": self.objective,
            "geometry": asdict(self.geometry),
        }
        save_checked(path, _FORMAT, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "Curvature":
        """Read what ``save`` wrote; nothing in the file is ever run.

        A file of an older version is of a Gaussian likelihood; the oldest are without bins and
        ``gradient``.

        Raises:
            UserError: if the file is missing, truncated, changed, or something else.
        """
        if not Path(path).is_file():
            raise UserError(f"no curvature at {path}; run the curvature stage first")
        cure = "delete it and compute the curvature again"
        kinds = [_FORMAT, _OF_LIKELIHOOD, _GAUSSIAN, *_OLDER]
        return load_checked(path, kinds, "a curvature", cure, cls._of)

    @classmethod
    def _of(cls, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Curvature":
        geometry = HeadGeometry(**facts.pop("geometry"))
        sums = {k.removeprefix(_BINS): tensors.pop(k) for k in list(tensors) if _BINS in k}
        bins = TimeBins(**sums) if sums and kind not in _OLDER else None
        values: dict[str, Any] = {**tensors, **facts}
        return cls(**values, geometry=geometry, bins=bins)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    # A Gram matrix is a sum of squares; a negative value is rounding.
    return values.clamp(min=0), vectors
