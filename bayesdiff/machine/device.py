"""What this machine's devices are good at."""

import os

import torch

# Values of an image below which a second thread gains less than waiting for it costs: 8x8 digits
# train at 32 ms a step with one thread, 25 with two, 51 with two that sleep while they wait.
_SMALL = 16 * 16


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes faster in it, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # Without these instructions bfloat16 is emulated, and slower than float32.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and fast else None


def settle_threads(device: torch.device, values: int) -> None:
    """One thread for small images on a CPU, unless the user has set their number.

    Args:
        device: that computes.
        values: of one image, C H W.
    """
    if device.type == "cpu" and values < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
