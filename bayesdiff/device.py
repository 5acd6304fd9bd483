"""What this machine's devices are good at."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes faster in it, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # Without these instructions bfloat16 is emulated, and slower than float32.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and fast else None
