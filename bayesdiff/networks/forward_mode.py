"""Forward-mode derivatives of any network, those with fused attention included."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def jvp(function: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """``torch.func.jvp`` with attention written out: fused kernels have no such derivative.

    Args:
        function: of the primals.
        primals: a tuple of tensors.
        tangents: of their shapes.
        has_aux: whether the function returns something beside what is differentiated.
    """
    _load()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(function, primals, tangents, has_aux=has_aux)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@cache
def _load() -> None:
    """Let torch load what forward mode needs, whose own imports are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.inference_mode(False), forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
