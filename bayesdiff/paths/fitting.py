"""A path made ready for the states of one space."""

from typing import Any

import torch

from bayesdiff.checks import UserError
from bayesdiff.paths.probability_path import ProbabilityPath


def fitted_path(path: ProbabilityPath, space: Any) -> ProbabilityPath:
    """The path made ready for the states of this space.

    Raises:
        UserError: if its coefficients do not broadcast against them.
    """
    path, shape = path.for_space(space), space.shape
    alpha = path.coefficients(torch.tensor(0.5, dtype=torch.float64)).alpha
    sizes = tuple(alpha.shape)
    fits = len(sizes) in (0, len(shape)) and all(
        own in (1, whole) for own, whole in zip(sizes, shape, strict=False)
    )
    if not fits:
        raise UserError(
            f"the path's coefficients have the shape {sizes} and samples {tuple(shape)}; give "
            "numbers, or one value for every pixel of a sample"
        )
    return path
