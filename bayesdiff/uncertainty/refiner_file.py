"""Refiners on disk: whose they are, and which other posteriors they may serve."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bayesdiff.artefacts import key_of, write_atomic
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.uncertainty.refiner import Refiner
from bayesdiff.uncertainty.response import Rule

log = logging.getLogger(__name__)

# Change of the variance in any direction, beside a common factor, that a refiner may be used with.
_TOLERANCE = 0.1


def moved(posterior: HeadPosterior, other: tuple[float, float, float]) -> tuple[float, float]:
    """How far a posterior is from another one of the same curvature.

    Args:
        posterior: this one.
        other: (sigma_noise, prior_precision, n_eff) of the other one.

    Returns:
        Mean log-ratio of the variances, this over the other, and the largest departure from it
        over all directions.
    """
    sigma, prior, n_eff = other
    twin = replace(posterior, sigma_noise=sigma, prior_precision=prior, n_eff=n_eff)
    ratio = (twin.eigenvalues + prior).log()
    ratio = ratio - (posterior.eigenvalues + posterior.prior_precision).log()
    return float(ratio.mean()), float((ratio - ratio.mean()).abs().max())


def numbers_of(posterior: HeadPosterior) -> tuple[float, float, float]:
    """(sigma_noise, prior_precision, n_eff)."""
    return posterior.sigma_noise, posterior.prior_precision, posterior.n_eff


def nearest(
    folder: Path, key: str, posterior: HeadPosterior
) -> tuple[Rule, Refiner, float] | None:
    """The refiner of this key whose posterior is nearest, if one is near enough."""
    best: tuple[float, Rule, Refiner, float] | None = None
    for path in sorted(folder.glob(f"refiner-{key[:8]}-*.safetensors")):
        loaded = load(path, key)
        if loaded is None:
            continue
        shift, far = moved(posterior, loaded[0])
        if far <= _TOLERANCE and (best is None or far < best[0]):
            best = (far, loaded[1], loaded[2], shift)
    return None if best is None else best[1:]


def save(folder: Path, key: str, posterior: HeadPosterior, rule: Rule, refiner: Refiner) -> None:
    """Write rule and refiner with their key and their posterior's numbers."""
    tensors = {f"refiner.{k}": v.cpu().contiguous() for k, v in refiner.state_dict().items()}
    tensors |= {"rule.coefficients": rule.coefficients, "rule.correction": rule.correction}
    tensors |= {"rule.nodes": torch.tensor(sorted(rule.nodes), dtype=torch.long)}
    numbers = numbers_of(posterior)
    tensors |= {"posterior": torch.tensor(numbers, dtype=torch.float64)}
    metadata = {"key": key, **shape(refiner)}
    path = folder / f"refiner-{key[:8]}-{key_of(numbers)[:8]}.safetensors"
    write_atomic(path, lambda file: save_file(tensors, file, metadata=metadata))


def shape(refiner: Refiner) -> dict[str, str]:
    """What a refiner is built from, as safetensors metadata."""
    pixels = refiner.out.out_channels // 2
    numbers = {
        "channels": pixels // refiner.patch**2,
        "features": refiner.read_features.in_channels,
        "patch": refiner.patch,
    }
    return {name: str(number) for name, number in numbers.items()}


def load(path: Path, key: str) -> tuple[tuple[float, float, float], Rule, Refiner] | None:
    """Posterior's numbers, rule and refiner; None for another key or a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = dict(file.metadata() or {})
            if found.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        refiner = Refiner(*(int(found[name]) for name in ("channels", "features", "patch")))
        prefix = "refiner."
        refiner.load_state_dict(
            {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        )
        nodes = frozenset(tensors["rule.nodes"].tolist())
        rule = Rule(nodes, tensors["rule.coefficients"], tensors["rule.correction"])
        sigma, prior, n_eff = tensors["posterior"].tolist()
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        log.warning("%s is damaged (%s) and is made again", path.name, type(error).__name__)
        return None
    return (sigma, prior, n_eff), rule, refiner.eval()
