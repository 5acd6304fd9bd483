"""Directions of weights that share nothing."""

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
