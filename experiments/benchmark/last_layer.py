"""Last-layer Laplace against laplace-torch, side by side on the same features.

Every comparison runs both sides in turn, after a warm-up, and takes medians; the ratio is theirs
over ours. Memory is the peak of live tensors above the start, from torch's profiler: scratch
space inside MKL and oneDNN is not seen, on either side. laplace-torch is used as published:
``nn.Sequential(head, nn.Flatten())`` with its own backends, 100 draws for a variance.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from laplace import DiagLaplace, FullLaplace
from laplace.curvature import BackPackEF
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from bayesdiff.laplace.backend import HeadGGN
from bayesdiff.laplace.gram import gram, gram_diagonal
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature

SIZES = tuple((features, k) for k in (1, 3) for features in (32, 64, 128))
BATCH, PIXELS, DRAWS = 64, 28, 100
# The GLM predictive differentiates every output of the batch: its memory and its time per image
# grow with the batch, and 64 images need more than 20 GB. Fewer images flatter it.
GLM_IMAGES = 32

Side = Callable[[], Any]


def measure(repeats: int = 5, sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Compare at every (features, kernel size).

    Returns:
        ``ratios``: the worst over sizes for each comparison; ``table``: one row per comparison
        and size with both times in seconds, their ratio and both peaks in MiB; ``threads``.
    """
    warnings.filterwarnings("ignore")
    table = [
        row(name, features, k, images, ours, theirs, repeats)
        for features, k in sizes
        for name, (images, ours, theirs) in comparisons(features, k).items()
    ]
    names = dict.fromkeys(line["name"] for line in table)
    ratios = {name: min(line["ratio"] for line in table if line["name"] == name) for name in names}
    return {"ratios": ratios, "table": table, "threads": torch.get_num_threads()}


def comparisons(features: int, k: int) -> dict[str, tuple[int, Side, Side]]:
    """Images, our side and theirs, for each name.

    ``full_gram`` and ``diag`` compare laplace-torch's ``fit`` with what our pass computes from the
    same features (Gram matrix or its diagonal, and the residuals), the rest a map per pixel.
    """
    torch.manual_seed(0)
    head = nn.Conv2d(features, 1, k, padding=k // 2)
    # Smooth and correlated like the features of a trained network, not white.
    mix = torch.randn(features, features) / features**0.5
    latent = torch.randn(BATCH, features, PIXELS + 2, PIXELS + 2)
    inputs = nn.functional.avg_pool2d(torch.einsum("ij,bjhw->bihw", mix, latent), 3, stride=1)
    inputs = nn.functional.silu(3 * inputs)
    with torch.no_grad():
        target = head(inputs).flatten(1)
        target = target + 0.1 * torch.randn_like(target)
    loader = DataLoader(TensorDataset(inputs, target), batch_size=BATCH)
    model = nn.Sequential(head, nn.Flatten())
    full = FullLaplace(model, "regression")
    # BackPACK leaves hooks on the layers it has seen.
    fisher = DiagLaplace(copy.deepcopy(model), "regression", backend=BackPackEF)
    exact = DiagLaplace(model, "regression", backend=HeadGGN)
    full.fit(loader)
    # The library's own diagonal GGN builds dense Jacobians: 20 GB for these 64 images.
    exact.fit(loader)
    closed = {s: posterior(head, inputs, target, s) for s in ("full", "diag")}
    few = inputs[:GLM_IMAGES]
    return {
        "full_gram_vs_full_laplace": (
            BATCH,
            lambda: (gram(head, inputs), squared_error(head, inputs, target)),
            lambda: full.fit(loader),
        ),
        "diag_vs_backpack_ef": (
            BATCH,
            lambda: (gram_diagonal(head, inputs), squared_error(head, inputs, target)),
            lambda: fisher.fit(loader),
        ),
        "variance_vs_100_draws": (
            BATCH,
            lambda: closed["full"].predictive_variance(inputs),
            lambda: drawn_variance(full, inputs),
        ),
        "diag_variance_vs_100_draws": (
            BATCH,
            lambda: closed["diag"].predictive_variance(inputs),
            lambda: drawn_variance(exact, inputs),
        ),
        "variance_vs_glm": (
            GLM_IMAGES,
            lambda: closed["full"].predictive_variance(few),
            lambda: full(few, pred_type="glm", diagonal_output=True),
        ),
    }


def posterior(head: nn.Module, inputs: Tensor, target: Tensor, structure: str) -> HeadPosterior:
    """Ours, with the settings laplace-torch has by default."""
    curvature = Curvature(
        gram=gram(head, inputs),
        num_images=len(inputs),
        draws=1,
        squared_error=squared_error(head, inputs, target),
        num_outputs=target.numel(),
        mean=head_matrix(head),
        source="benchmark",
        geometry=HeadGeometry.of(head),
    )
    return HeadPosterior.fit(curvature, structure=structure, sigma_noise=1.0, prior_precision=1.0)


@torch.no_grad()
def squared_error(head: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """Sum of squared residuals over everything."""
    return float((head(inputs).flatten(1) - target).square().sum())


@torch.no_grad()
def drawn_variance(laplace: FullLaplace | DiagLaplace, inputs: Tensor) -> Tensor:
    """The published way: the sample variance over 100 draws of the head."""
    return laplace.predictive_samples(inputs, pred_type="nn", n_samples=DRAWS).var(0)


def row(
    name: str, features: int, k: int, images: int, ours: Side, theirs: Side, repeats: int
) -> dict[str, Any]:
    """Median seconds and peak memory of both sides of one comparison."""
    memory = peak_mib(ours), peak_mib(theirs)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, times in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
    fast, slow = (statistics.median(times) for times in seconds)
    return {
        "name": name,
        "features": features,
        "kernel_size": k,
        "images": images,
        "ours_seconds": fast,
        "theirs_seconds": slow,
        "ratio": slow / fast,
        "ours_peak_mib": memory[0],
        "theirs_peak_mib": memory[1],
    }


def peak_mib(side: Side) -> float:
    """Largest sum of live tensor bytes allocated by one call; the call is also the warm-up."""
    side()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        side()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak / 2**20
