"""What this machine's devices are good at."""

import os
import platform
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

# Values of an image below which a second thread gains less than waiting for it costs. Milliseconds
# of a training step on 2 quiet cores, with one thread, two, and two that sleep while they wait:
# 8x8 digits 30-34, 24-34 and 51-60; 28x28 in bfloat16 1214-1233, 626-663 and 678-713.
_SMALL = 16 * 16

_all: int | None = None  # threads of this process, while it has fewer


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes faster in it, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # Without these instructions bfloat16 is emulated, and slower than float32.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and fast else None


def device_name(device: torch.device) -> str:
    """Which kind of device it is: of two with one name, one is as fast as the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def settle_threads(device: torch.device, values: int) -> None:
    """One thread for small images on a CPU, and all again for larger ones, of the next cell.

    Only in a command whose user has not set their number: in a program of one's own they are as
    they were.

    Args:
        device: that computes.
        values: of one image, C H W.
    """
    global _all
    if "OMP_NUM_THREADS" in os.environ or not HydraConfig.initialized():
        return
    if device.type == "cpu" and values < _SMALL:
        if _all is None:
            _all = torch.get_num_threads()
        torch.set_num_threads(1)
    elif _all is not None:
        torch.set_num_threads(_all)
        _all = None


@contextmanager
def all_threads(needed: bool = True) -> Generator[None, None, None]:
    """All threads for a while, for what looks at larger images than those of the run."""
    few = torch.get_num_threads()
    if needed and _all is not None:
        torch.set_num_threads(_all)
    try:
        yield
    finally:
        torch.set_num_threads(few)
