"""Does the head's posterior see that a class has few images? One network, three data sets."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.paths import CondOT
from bayesdiff.runs.build import Run

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def seen_by_the_head(
    run: Run, whole: HeadPosterior, cut: ImageData, number: int
) -> dict[str, Any]:
    """Predictive variance of the head on a class, with all, few and none of its images counted.

    The network is the same, trained on clean data, so that only the posterior can tell them apart.
    It counts what the pass saw: fewer images are a wider posterior for every class, so the answer
    is the class's growth over that of the others.

    Args:
        run: with the network.
        whole: its posterior from the clean data.
        cut: the same data with few images of the class.
        number: of the class.

    Returns:
        ``few`` and ``none``: growth of the class's variance over that of the others; ``share``:
        the class's variance over that of the others, with all images counted.
    """
    labels = cut.labels
    assert labels is not None
    other = labels != number
    none = replace(cut, images=cut.images[other], labels=labels[other], fingerprint="none")
    before = on_test_images(run, whole)
    clean = run.data.data.test_labels
    assert clean is not None
    own = clean == number
    found = {"share": float(before[own].mean() / before[~own].mean())}
    for name, data in (("few", cut), ("none", none)):
        pass_only = LastLayerLaplace(sigma_noise=whole.sigma_noise)
        growth = on_test_images(run, pass_only.fit(run.model, data)) / before
        found[name] = float(growth[own].mean() / growth[~own].mean())
    return found


@torch.inference_mode()
def on_test_images(run: Run, posterior: HeadPosterior) -> Tensor:
    """Mean over pixels and times of the head's variance at noisy test images, float64 (N,)."""
    data = run.data.data
    assert data.test_labels is not None
    x_1 = to_model_range(data.test_images)
    noise = torch.randn(x_1.shape, generator=torch.Generator().manual_seed(0))
    assert isinstance(run.model.path, CondOT)
    found = torch.zeros(len(x_1), dtype=torch.float64)
    for time in TIMES:
        t = torch.full((len(x_1),), time)
        features = run.model.net.features((1 - time) * noise + time * x_1, t, data.test_labels)
        found += posterior.predictive_variance(features).double().flatten(1).mean(1)
    return found / len(TIMES)
