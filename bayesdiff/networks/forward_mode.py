"""Forward-mode derivatives of any network, those with fused attention included."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def jvp(function: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """``torch.func.jvp`` with attention written out: fused kernels have no such derivative.

    Args:
        function: of the primals.
        primals: a tuple of tensors.
        tangents: of their shapes.
        has_aux: whether the function returns something beside what is differentiated.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # Of an import inside torch, at the first derivative.
            warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
            return torch.func.jvp(function, primals, tangents, has_aux=has_aux)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
