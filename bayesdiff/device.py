"""What this machine's devices are good at."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes faster in it, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and fast else None
