"""Numbers of round trips: what is lost on the way, how normal latents are, what weights change."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.machine.shared_rows import Rows
from bayesdiff.metrics.agreement import Figures, mean, with_intervals
from bayesdiff.paths import ProbabilityPath

# Coordinates that are correlated with each other, spread evenly over all where there are more.
_CORRELATED = 1024
_GREY = 127.5  # levels in 1 of [-1, 1]
_PEAK = 2.0  # width of [-1, 1]


def round_trip(rows: Rows, pictures: bool, chance: Mapping[str, Any]) -> dict[str, float]:
    """Squared error of what comes back, mean over the values of an image or a point.

    Args:
        rows: ``data`` and ``returned``, ``(N, *shape)``.
        pictures: whether they lie in [-1, 1]; then in grey levels and as PSNR too.
        chance: of the intervals.

    Returns:
        ``round_trip_mse``, mean over images, with ``_low`` and ``_high``; ``_median``; ``_worst``;
        of pictures ``round_trip_grey_mse``, in squares of one of 255 levels, not rounded to
        them, and ``psnr`` of the mean, in dB.
    """
    errors = squared_errors(rows)
    figures: Figures = {"round_trip_mse": (mean, (errors,))}
    if pictures:
        figures["round_trip_grey_mse"] = (mean, (_GREY**2 * errors,))
        figures["psnr"] = (_psnr, (errors,))
    return {
        **with_intervals(figures, **chance),
        "round_trip_median": float(errors.median()),
        "round_trip_worst": float(errors.max()),
    }


def squared_errors(rows: Rows) -> Tensor:
    """Mean squared error of each image or point, ``(N,)`` float64."""
    away = rows["returned"].double() - rows["data"].double()
    return away.flatten(1).square().mean(1)


def _psnr(errors: Tensor) -> Tensor:
    return 10 * torch.log10(_PEAK**2 / errors.mean(-1))


def moments(latents: Tensor) -> dict[str, Tensor]:
    """Mean, variance and excess kurtosis of each coordinate, ``(D,)`` float64, all unbiased.

    The kurtosis is so for normal coordinates; NaN for one that does not vary.

    Args:
        latents: ``(N, D)``, at least 4.
    """
    z, n = latents.double(), len(latents)
    centred = z - z.mean(0)
    second, fourth = centred.square().mean(0), centred.pow(4).mean(0)
    biased = fourth / second.square() - 3
    kurtosis = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * biased + 6)
    return {"mean": z.mean(0), "variance": z.var(0), "kurtosis": kurtosis}


def correlations(latents: Tensor) -> dict[str, float]:
    """Largest and root mean square correlation of two coordinates; NaN for fewer than two.

    Args:
        latents: ``(N, D)``.

    Returns:
        ``correlation_max``, ``correlation_rms`` and ``correlation_by_chance``, the latter's value
        for independent coordinates; ``correlated``, how many coordinates were looked at.
    """
    size = latents.shape[1]
    z = latents.double()
    if size > _CORRELATED:
        z = z[:, torch.linspace(0, size - 1, _CORRELATED).round().long()]
    z = z - z.mean(0)
    z = z[:, z.square().sum(0) > 0]
    z = z / z.norm(dim=0)
    apart = ~torch.eye(z.shape[1], dtype=torch.bool)
    off = (z.T @ z)[apart].abs()
    return {
        "correlation_max": float(off.max()) if len(off) else math.nan,
        "correlation_rms": float(off.square().mean().sqrt()),
        "correlation_by_chance": 1 / math.sqrt(len(z) - 1),
        "correlated": z.shape[1],
    }


def of_latents(latents: Tensor) -> dict[str, Any]:
    """Numbers over all coordinates, and ``coordinates``, lists of them one by one.

    Args:
        latents: ``(N, *shape)``, standard normal where the model is right.
    """
    z = latents.flatten(1)
    each = moments(z)
    return {
        "latent_mean_rms": float(each["mean"].square().mean().sqrt()),
        "latent_variance": float(each["variance"].mean()),
        "latent_kurtosis": float(each["kurtosis"].nanmean()),
        **correlations(z),
        "coordinates": {name: value.tolist() for name, value in each.items()},
    }


def of_weights(rows: Rows, chance: Mapping[str, Any]) -> dict[str, Any]:
    """What the posterior of the head changes, by its draws.

    Returns:
        ``latent_sd`` and ``returned_sd``: root of the variance over flows, mean over images and
        coordinates, with intervals over images; ``weights_share``: of the latents' summed
        variance, that over flows against that over flows and images together;
        ``latent_sd_of_coordinates`` and ``weights_share_of_coordinates``.
    """
    within, between = _within_and_between(rows)
    per_image = {
        "latent_sd": rows["latent_variance"].double().flatten(1).mean(1),
        "returned_sd": rows["returned_variance"].double().flatten(1).mean(1),
    }
    figures: Figures = {name: (_root, (values,)) for name, values in per_image.items()}
    return {
        **with_intervals(figures, **chance),
        "weights_share": float(within.sum() / (within + between).sum()),
        "latent_sd_of_coordinates": within.sqrt().tolist(),
        "weights_share_of_coordinates": (within / (within + between)).tolist(),
    }


def _root(variances: Tensor) -> Tensor:
    return variances.mean(-1).sqrt()


def _within_and_between(rows: Rows) -> tuple[Tensor, Tensor]:
    """Variance of latents over flows, mean over images, and over images; ``(D,)`` each."""
    within = rows["latent_variance"].double().flatten(1).mean(0)
    return within, rows["latents"].double().flatten(1).var(0)


def groups(
    path: ProbabilityPath, coordinates: Mapping[str, Sequence[float]], expected: Tensor
) -> list[dict[str, Any]]:
    """Mean variance of the latents' coordinates, those that a path keeps and compresses apart.

    Args:
        path: of the model.
        coordinates: see ``of_latents``.
        expected: variances of Gaussian data's latents, of a state's shape.

    Returns:
        Rows ``dimensions``, ``count``, ``variance``, ``variance_expected``; of a path whose
        latents have units of their own, ``scaled_variance`` and ``scaled_expected`` in them.
    """
    variance = torch.tensor(coordinates["variance"], dtype=torch.float64)
    scale = scaled_variance(path)
    kept = getattr(path, "dims_to_keep", None)
    parts = {"all": slice(None)}
    if kept is not None:
        parts = {"kept": slice(0, kept), "compressed": slice(kept, None)}
    found = []
    for name, part in parts.items():
        own, ideal = variance[part], expected.flatten()[part]
        row: dict[str, Any] = {"dimensions": name, "count": len(own)}
        row |= {"variance": float(own.mean()), "variance_expected": float(ideal.mean())}
        if scale is not None:
            row["scaled_variance"] = float((own * scale[part]).mean())
            row["scaled_expected"] = float((ideal * scale[part]).mean())
        found.append(row)
    return found


def scaled_variance(path: ProbabilityPath) -> Tensor | None:
    """Variance of latents ``(D,)`` in the path's own units, None where these are the noise's."""
    scale: Tensor | None = getattr(path, "latent_variance", None)
    return None if scale is None else scale.flatten().cpu()
