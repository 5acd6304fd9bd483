"""A coefficient is a number, or a tensor that broadcasts against a sample ``(C, H, W)``.

Numbers stay Python floats from end to end; the functions below are those of ``math`` for them, and
the elementwise ones of torch for tensors.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Coefficient = float | Tensor


def as_coefficient(value: Tensor) -> Coefficient:
    """A float for a tensor of one value; any other stays what it is."""
    return value if value.numel() > 1 else float(value)


def at_times(values: Tensor) -> list[Coefficient]:
    """Values ``(T,)`` or ``(T, C, H, W)`` at T times, one by one."""
    return values.tolist() if values.ndim == 1 else [as_coefficient(value) for value in values]


def like(value: Coefficient, x: Tensor) -> Coefficient:
    """A coefficient ready to meet ``x``: a tensor in its precision and on its device."""
    return value.to(x) if isinstance(value, Tensor) else value


def log(value: Coefficient) -> Coefficient:
    """Natural logarithm, -inf at 0."""
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0 else -math.inf


def expm1(value: Coefficient) -> Coefficient:
    """e^value - 1, precise for small values."""
    return value.expm1() if isinstance(value, Tensor) else math.expm1(value)


def level(value: Coefficient) -> float:
    """One number for all pixels: their mean."""
    return float(value.mean()) if isinstance(value, Tensor) else value


def not_below(value: Coefficient, least: float) -> Coefficient:
    """The value, or ``least`` where it is below that."""
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)


def is_zero(value: Coefficient) -> bool:
    """Whether it is zero everywhere."""
    return not value.any() if isinstance(value, Tensor) else value == 0


def is_one(value: Coefficient) -> bool:
    """Whether it is the number one; a tensor of ones counts as any other tensor."""
    return not isinstance(value, Tensor) and value == 1


def is_finite(value: Coefficient) -> bool:
    """Whether it is finite everywhere."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return math.isfinite(value)


def share_of(part: Coefficient, whole: Coefficient) -> Coefficient:
    """Part / whole, 0 at the pixels where the whole is 0."""
    found = part / whole
    return (
        torch.where(torch.as_tensor(whole) > 0, found, 0) if isinstance(found, Tensor) else found
    )


def as_key(value: Coefficient) -> float | str:
    """The number itself, or what changes with any value of a tensor."""
    if not isinstance(value, Tensor):
        return value
    values = value.double().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(value.shape)).encode() + values).hexdigest()


def have_tensors(values: Iterable[Coefficient]) -> bool:
    """Whether any is a tensor."""
    return any(isinstance(value, Tensor) for value in values)


def matrix(rows: Sequence[Sequence[Coefficient]]) -> Tensor:
    """Rows of coefficients as one tensor, ``(R, K)`` or, with pixels, ``(R, K, C, H, W)``."""
    tensors = [c for row in rows for c in row if isinstance(c, Tensor)]
    if not tensors:
        return torch.tensor(rows, dtype=torch.float64)
    device = tensors[0].device
    every = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.float64, device=device) for row in rows for c in row)
    )
    return torch.stack(every).unflatten(0, (len(rows), -1))
