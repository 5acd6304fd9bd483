"""Directions of weights: some that share nothing, and those of a covariance's root."""

import torch
from torch import Tensor


def orthogonal_rows(noise: Tensor) -> Tensor:
    """Standard normal rows ``(n, ...)`` of D numbers made orthogonal, each of length sqrt(D).

    They are uniformly distributed (Mezzadri 2007), so that outer products of rows average the
    identity; beyond D rows the next D begin anew.
    """
    flat, found = noise.flatten(1), []
    for part in flat.split(flat.shape[1]):
        basis, triangle = torch.linalg.qr(part.T)
        found.append((basis * triangle.diagonal().sign()).T)
    return (torch.cat(found) * flat.shape[1] ** 0.5).view_as(noise)


def rotated(weights: Tensor, vectors: Tensor) -> Tensor:
    """Weights ``(n, C_out, P)`` times vectors ``(P, P)``, or ``(C_out, P, P)``, each its own."""
    if vectors.ndim == 2:
        return weights @ vectors
    return torch.einsum("ncp,cpq->ncq", weights, vectors)


def by_root(noise: Tensor, vectors: Tensor | None, scale: Tensor) -> Tensor:
    """Noise ``(n, C_out, P)`` times the symmetric root of a covariance.

    Args:
        noise: standard normal.
        vectors: eigenvectors ``(P, P)`` or ``(C_out, P, P)``; None for independent weights.
        scale: standard deviations along them, ``(P,)`` or ``(C_out, P)``.
    """
    if vectors is None:
        return noise * scale
    vectors = vectors.to(noise.device)
    return rotated(rotated(noise, vectors) * scale, vectors.mT)


def columns_of(vectors: Tensor | None, scale: Tensor) -> Tensor:
    """Directions ``(C_out P, C_out, P)`` whose outer products sum to a covariance.

    Args:
        vectors: as of ``by_root``.
        scale: standard deviations ``(C_out, P)``.
    """
    size = scale.shape[1]
    root = torch.eye(size, dtype=torch.float64) if vectors is None else vectors
    roots = root.expand(len(scale), -1, -1)
    blocks = [(each * own).T for each, own in zip(roots, scale, strict=True)]
    return torch.block_diag(*blocks).unflatten(1, scale.shape)
