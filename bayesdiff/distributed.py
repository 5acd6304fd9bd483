"""Several processes, one result: who does which part, and sums over all of them."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, 0 without others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum of the tensor over all processes, on every one of them."""
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        moved = value.to(device, copy=True)
        dist.all_reduce(moved)
        return moved.to(value.device)
    return value


def gather_rows(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """Put together rows ``(n, ...)`` that belong at ``indices (n,)`` of ``count`` rows in all.

    Every row comes from exactly one process; the sum of zero-filled tables is the whole table.
    """
    table = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    table[indices] = rows
    return total(table)


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
