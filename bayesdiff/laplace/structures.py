"""Structures of the posterior: what each keeps of the data's part of the precision.

With G the Gram matrix of the head's inputs and w = n_eff / num_images the precision of one output
channel is ``w G / sigma^2 + tau I``. A structure replaces ``G / sigma^2`` by something that is
diagonal in the weights' own axes, or in one set of eigenvectors for all channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.laplace.record import Curvature


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the data's part, before ``Structure.weight``.

    Attributes:
        values: ``(P,)``, or ``(C_out, P)`` where output channels differ; never negative.
        vectors: ``(P, P)``, columns in the order of the values; None for the weights' own axes.
            One such matrix for every block of weights where these differ, as ``values``.
        given: the matrix itself where it is at hand, None to make it from the other two.
    """

    values: Tensor
    vectors: Tensor | None = None
    given: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """``(P, P)``, or ``(C_out, P, P)`` where output channels differ."""
        return self.compose(self.values) if self.given is None else self.given

    def compose(self, values: Tensor) -> Tensor:
        """The matrix with these eigenvalues and the same eigenvectors."""
        if self.vectors is None:
            return values.diag_embed()
        return (self.vectors * values[..., None, :]) @ self.vectors.mT


@dataclass(frozen=True)
class Structure:
    """One way to fill the precision.

    Attributes:
        spectrum: of the data's part, from a curvature and a rank.
        factor: on the data's part.
        power: of 1 / sigma_noise in the data's part.
        fewest_images: that make it an estimate at all.
        sees_data: whether an evidence makes sense.
        ranked: whether it takes a rank.
        per_time: whether noise that differs over time has a meaning for it.
        any_likelihood: whether it has a meaning for likelihoods other than the Gaussian.
    """

    spectrum: Callable[[Curvature, int | None], Spectrum]
    factor: float = 1.0
    power: int = 2
    fewest_images: int = 1
    sees_data: bool = True
    ranked: bool = False
    per_time: bool = True
    any_likelihood: bool = True

    def weight(self, images: float, sigma_noise: float) -> float:
        """Factor on the spectrum's values; ``images`` is n_eff / num_images."""
        return self.factor * images / sigma_noise**self.power


def _full(curvature: Curvature, rank: int | None) -> Spectrum:
    return Spectrum(*curvature.eigen, curvature.gram)


def _diag(curvature: Curvature, rank: int | None) -> Spectrum:
    return Spectrum(curvature.gram.diagonal(dim1=-2, dim2=-1))


def _kron(curvature: Curvature, rank: int | None) -> Spectrum:
    """The Kronecker factor of the output is the identity, so only the cross block goes."""
    matrix = curvature.gram.clone()
    if curvature.geometry.bias:
        matrix[-1, :-1] = matrix[:-1, -1] = 0
    return Spectrum(*curvature.eigen_blocks, matrix)


def _prior_only(curvature: Curvature, rank: int | None) -> Spectrum:
    """As many times the identity as gives the mean posterior precision of ``full``."""
    diagonal = curvature.gram.diagonal(dim1=-2, dim2=-1)
    return Spectrum(torch.full_like(diagonal, float(diagonal.mean())))


def _subspace(curvature: Curvature, rank: int | None) -> Spectrum:
    values, vectors = curvature.eigen
    size = values.shape[-1]
    kept = torch.arange(size) >= size - (rank or 0)
    return Spectrum(values * kept, vectors)


def _empirical_fisher(curvature: Curvature, rank: int | None) -> Spectrum:
    if curvature.squared_gradients is None:
        raise UserError(
            "this curvature has no squared gradients, which laplace.structure=empirical_fisher "
            "needs; compute it again with fit_curvature"
        )
    return Spectrum(curvature.blocks(curvature.squared_gradients))


# A mean of squares of fewer images says nothing: its relative sd is sqrt(2 / images) or more.
_HANDFUL = 10

STRUCTURES = {
    # All of it: exact Bayesian regression.
    "full": Structure(_full),
    # The diagonal of G.
    "diag": Structure(_diag),
    # All but what ties weights and bias; without a bias that is full.
    "kron": Structure(_kron, any_likelihood=False),
    # The Fisher of N(f, sigma^2), diagonal: squares of each image's gradient, sum r phi / sigma^2.
    "empirical_fisher": Structure(_empirical_fisher, power=4, fewest_images=_HANDFUL),
    # As last-layer Laplace for diffusion was published: the gradient of r^2 is 2 r phi, half of
    # its square is 2 (r phi)^2, and sigma enters as if that were a Hessian.
    "empirical_fisher_published": Structure(
        _empirical_fisher,
        factor=2.0,
        fewest_images=_HANDFUL,
        per_time=False,
        any_likelihood=False,
    ),
    # Isotropic, with the mean posterior precision of full: only the shape differs from it.
    "prior_only": Structure(_prior_only, sees_data=False),
    # The leading eigen-directions of G as many as the rank says, the prior in all others.
    "subspace": Structure(_subspace, ranked=True),
    # Variance by a refit that rewards an output (arXiv 2403.10671); for a head, which is linear
    # in its weights, that of full.
    "hessian_free": Structure(_full),
}


def structure_of(name: str, rank: int | None = None) -> Structure:
    """The structure of this name.

    Raises:
        UserError: if there is none, or the rank does not go with it.
    """
    if name not in STRUCTURES:
        raise UserError(f"laplace.structure must be one of {', '.join(STRUCTURES)}; got {name!r}")
    structure = STRUCTURES[name]
    if rank is None:
        if structure.ranked:
            raise UserError(f"laplace.structure={name} needs laplace.rank, a whole number >= 0")
    elif not structure.ranked:
        raise UserError(f"laplace.rank={rank} is for laplace.structure=subspace; use null")
    else:
        at_least("laplace.rank", rank, 0)
    return structure


def check_structure(name: str, rank: int | None, size: int, images: int) -> Structure:
    """Refuse a structure that this head or this many images cannot have.

    Args:
        name: of the structure.
        rank: for those that take one.
        size: P, weights of an output channel.
        images: that the curvature is or will be made of.

    Raises:
        UserError: for an unknown name, a rank out of range, or too few images.
    """
    structure = structure_of(name, rank)
    if rank is not None and rank > size:
        raise UserError(
            f"laplace.rank={rank} is more than the {size} weights of an output channel; "
            f"{size} keeps them all"
        )
    if images < structure.fewest_images:
        raise UserError(
            f"laplace.structure={name} needs {structure.fewest_images} images or more, got "
            f"{images}; raise laplace.num_images or use laplace.structure=full"
        )
    return structure


def check_likelihood(
    said: str, scaled: bool, structure: str, sigma_noise: float | str, subset: str = "head"
) -> None:
    """Refuse settings that have a meaning for a Gaussian likelihood alone.

    Args:
        said: how a user asks for the likelihood, or for another objective.
        scaled: whether it has a noise level.
        structure: of the posterior.
        sigma_noise: asked for; without a noise level ``mle`` stands for none, that is 1.
        subset: of the network.

    Raises:
        UserError: if one is set, and the likelihood is another.
    """
    if scaled:
        return
    if sigma_noise not in ("mle", 1):
        raise UserError(
            f"laplace.sigma_noise={sigma_noise} is of a Gaussian, {said} has no "
            "noise level; leave it at mle"
        )
    if subset != "head":
        raise UserError(
            f"laplace.subset={subset} is for a Gaussian likelihood, this is {said}; use "
            "laplace.subset=head"
        )
    if not STRUCTURES[structure].any_likelihood:
        raise UserError(
            f"laplace.structure={structure} is for a Gaussian likelihood, this is "
            f"{said}; use {', '.join(n for n, s in STRUCTURES.items() if s.any_likelihood)}"
        )


def check_invertible(low: float, high: float, size: int, tau: float) -> None:
    """Refuse a precision matrix that cannot be inverted in float64.

    Args:
        low: smallest eigenvalue of the data's part.
        high: its largest one.
        size: of the matrix.
        tau: prior precision.

    Raises:
        UserError: if it is singular.
    """
    low, high = low + tau, high + tau
    if not low > size * torch.finfo(torch.float64).eps * high:
        raise UserError(
            f"the posterior precision is singular in float64 (eigenvalues {low:.3g} to"
            f" {high:.3g}); raise prior_precision={tau:g}"
        )


# Words for a sigma_noise that is read off the residuals.
FITTED = ("mle", "mle_per_time")


def check_settings(
    structure: str,
    sigma_noise: float | str = "mle",
    prior_precision: float | str = 1.0,
    n_eff: float | None = None,
    rank: int | None = None,
    time_bins: int | None = None,
) -> None:
    """Refuse settings that no curvature could make a posterior of, before any work is done.

    Args:
        structure: what is kept of the data's part, see ``HeadPosterior.fit``.
        sigma_noise: number, ``mle`` or ``mle_per_time``.
        prior_precision: number or ``evidence``.
        n_eff: images the likelihood counts; None for those of the pass.
        rank: of ``structure="subspace"``.
        time_bins: intervals of t in the pass; None where the pass itself will tell.

    Raises:
        UserError: if a setting is unusable.
    """
    kind = structure_of(structure, rank)
    if sigma_noise not in FITTED:
        cure = "give a number above 0, mle or mle_per_time"
        positive("laplace.sigma_noise", sigma_noise, cure)  # type: ignore[arg-type]
    if sigma_noise == "mle_per_time" and time_bins == 1:
        raise UserError("laplace.sigma_noise=mle_per_time needs laplace.time_bins >= 2, got 1")
    if sigma_noise == "mle_per_time" and not kind.per_time:
        raise UserError(
            f"laplace.structure={structure} has one sigma_noise for all times; use mle"
        )
    if prior_precision != "evidence":
        positive("laplace.prior_precision", prior_precision, "give a number above 0, or evidence")  # type: ignore[arg-type]
    elif not kind.sees_data:
        raise UserError(
            f"laplace.structure={structure} has no evidence; give laplace.prior_precision a number"
        )
    if n_eff is not None:
        positive("laplace.n_eff", n_eff, "give a number of images above 0, seen or null")
