"""How the network answers a sensitivity between the few times it is really asked.

The data that a network predicts, x_1hat = p x + q g, moves smoothly along a trajectory, and so
does its answer r = p d + q J d to a sensitivity d. Between two products r is predicted by

    r = sum_k (a_k + b_k (1 - x_1hat^2)) l_k,

with l the last two answers, the surprise of the last one, d itself and what the weights add now.
The scalars a_k, b_k are the same for all images and pixels; a regression on a few pilot images,
followed with every product, gives them once for each evaluation of the solver.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Which evaluations get a product, and how the others are predicted.

    Attributes:
        nodes: numbers of the network evaluations with a product.
        coefficients: ``(N, 2, 5)`` float64: a and b of the five regressors, for each evaluation.
        correction: ``(S,)`` float64, exact over predicted total variance of the pilot after each
            step.
    """

    nodes: frozenset[int]
    coefficients: Tensor
    correction: Tensor

    def __len__(self) -> int:
        """Network evaluations of the solver."""
        return len(self.coefficients)


def spread_nodes(evaluations: int, products: int) -> frozenset[int]:
    """Evenly spaced numbers of evaluations, a little late: the first answer to d = 0 is free."""
    last = evaluations - 1
    spaced = (round((k + 1) / (products + 0.5) * evaluations) for k in range(products))
    return frozenset(min(max(n, 1), last) for n in spaced)


class Memory:
    """What earlier products left: the last two answers and the surprise of the last."""

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.previous: Tensor | None = None
        self.surprise: Tensor | None = None

    def regressors(self, d: Tensor, forced: Tensor) -> list[Tensor | None]:
        """The five l_k, None for what is not known yet."""
        return [self.held, self.previous, self.surprise, d, forced]

    def predict(self, coefficients: Tensor, d: Tensor, forced: Tensor, gate: Tensor) -> Tensor:
        """Answer r, ``(M, B, C, H, W)``, for a ``gate`` ``(B, C, H, W)``."""
        total = torch.zeros_like(d)
        known = self.regressors(d, forced)
        for (a, b), regressor in zip(coefficients.T.tolist(), known, strict=True):
            if regressor is not None and (a or b):
                total.addcmul_(a + b * gate, regressor)
        return total

    def learn(self, answer: Tensor, guess: Tensor) -> None:
        """Keep what a product has shown."""
        self.previous, self.held, self.surprise = self.held, answer, answer - guess

    def fit(self, target: Tensor, d: Tensor, forced: Tensor, gate: Tensor) -> Tensor:
        """Least-squares coefficients ``(2, 5)`` of an exact answer, zero for the unknown."""
        known = self.regressors(d, forced)
        place = [k for k, regressor in enumerate(known) if regressor is not None]
        columns = [regressor for regressor in known if regressor is not None]
        design = torch.stack(
            [c.flatten() for c in columns] + [(gate * c).flatten() for c in columns], 1
        ).double()
        # Columns of unit size; the ridge only decides between columns that say the same. One that
        # is nothing beside the target, as the surprise of a linear network, must not be blown up.
        least = 1e-6 * float(target.double().norm())
        size = design.norm(dim=0).clamp(min=max(least, torch.finfo(design.dtype).tiny))
        design /= size
        normal = design.T @ design
        normal += 1e-6 * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
        solution = torch.linalg.solve(normal, design.T @ target.flatten().double()) / size
        coefficients = torch.zeros(2, 5, dtype=torch.float64)
        coefficients[:, place] = solution.unflatten(0, (2, -1)).cpu()
        return coefficients
