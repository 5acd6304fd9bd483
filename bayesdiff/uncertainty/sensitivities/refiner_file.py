"""Refiners on disk: which posteriors share one, and the file."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.costs import making
from bayesdiff.machine.ranks import barrier, rank
from bayesdiff.storage.checked_file import load_checked, save_checked
from bayesdiff.storage.locks import together
from bayesdiff.uncertainty.sensitivities.predicted_products import Rule
from bayesdiff.uncertainty.sensitivities.refiner import Refiner

log = logging.getLogger(__name__)

_KIND = "bayesdiff-refiner-1"
# Change of the variance in any direction, beside a common factor, that a refiner may be used with.
TOLERANCE = 0.1
_STEP = 0.02  # between the logarithms of priors that are looked at
# Priors from where the data no longer matter down to where float64 ends, over the largest
# eigenvalue.
_TOP, _BOTTOM = 1e3, 1e-16


def representative(posterior: HeadPosterior) -> tuple[HeadPosterior, float]:
    """The posterior that a refiner is trained for in the place of all those near it.

    Maps scale with a common factor of all variances, so that posteriors of one curvature differ by
    the prior alone, in units of the likelihood. Its axis is cut where the way that the variances
    have gone in any direction has grown by twice the tolerance, and the middle of each piece
    stands for the piece: which one a posterior belongs to depends on nothing but itself.

    Returns:
        That posterior, at a noise of 1 and the images of the pass, and the mean logarithm of the
        variances of the given one over its own.
    """
    plain = replace(posterior, sigma_noise=1.0, n_eff=float(posterior.curvature.num_images))
    values, own = plain.eigenvalues.flatten(), posterior.eigenvalues.flatten()
    largest = float(values.max())
    if largest <= 0:  # nothing of the data: all priors are alike
        near = replace(plain, prior_precision=1.0)
    else:
        precision = posterior.prior_precision * largest / float(own.max())
        near = replace(plain, prior_precision=_middle(values, precision))
    ratio = (values + near.prior_precision).log() - (own + posterior.prior_precision).log()
    return near, float(ratio.mean())


def _middle(values: Tensor, precision: float) -> float:
    """The prior in the middle of the piece that this one is in."""
    top = _TOP * float(values.max())
    count = math.ceil(math.log(_TOP / _BOTTOM) / _STEP)
    priors = top * torch.exp(-_STEP * torch.arange(count, dtype=torch.float64))
    logs = (values[:, None] + priors).log()
    steps = logs.diff(dim=1)
    way = (steps - steps.mean(0)).abs().amax(0).cumsum(0)
    way = torch.cat([way.new_zeros(1), way])
    piece = 2 * (TOLERANCE - _STEP)
    place = min(max(round(math.log(top / precision) / _STEP), 0), count - 1)
    number = int(way[place] / piece)
    return float(priors[(way - (number + 0.5) * piece).abs().argmin()])


def signature(posterior: HeadPosterior) -> list[str]:
    """Six digits of the spectrum: tells what is seen of the data, and not the last bits."""
    values = posterior.eigenvalues
    return [f"{float(each):.6g}" for each in (values.sum(), values.square().sum())]


def path_of(folder: Path, key: str) -> Path:
    """Where the refiner with this key is, in a run folder."""
    return folder / f"refiner-{key}.safetensors"


def once(
    folder: Path, key: str, train: Callable[[], tuple[Rule, Refiner]]
) -> tuple[Rule, Refiner]:
    """Rule and refiner with this key, trained by the first process where there are none.

    Raises:
        UserError: if another process's refiner is not there.
    """
    path = path_of(folder, key)
    with together(path):
        found = load(path, key)
        barrier()  # nobody writes before everybody has looked
        if found is None and rank() == 0:
            with making("refiner"):
                found = train()
            save(path, key, *found)
        barrier()
        found = found or load(path, key)  # what the first process has trained
    if found is None:
        raise UserError(f"{path} vanished; run the same command again")
    return found


def save(path: Path, key: str, rule: Rule, refiner: Refiner) -> None:
    """Write rule and refiner with their key and a checksum."""
    tensors = {f"refiner.{k}": v for k, v in refiner.state_dict().items()}
    tensors |= {"rule.coefficients": rule.coefficients, "rule.correction": rule.correction}
    tensors |= {"rule.nodes": torch.tensor(sorted(rule.nodes), dtype=torch.long)}
    pixels = refiner.out.out_channels // 2
    shape = [pixels // refiner.patch**2, refiner.read_features.in_channels, refiner.patch]
    save_checked(path, _KIND, tensors, {"key": key, "shape": shape})


def load(path: Path, key: str) -> tuple[Rule, Refiner] | None:
    """Rule and refiner; None where there are none, of another key, or damaged, with a warning."""

    def build(
        kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]
    ) -> tuple[Rule, Refiner] | None:
        if facts["key"] != key:
            return None
        refiner = Refiner(*facts["shape"])
        prefix = "refiner."
        refiner.load_state_dict(
            {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        )
        nodes = frozenset(tensors["rule.nodes"].tolist())
        return Rule(
            nodes, tensors["rule.coefficients"], tensors["rule.correction"]
        ), refiner.eval()

    if not path.is_file():
        return None
    try:
        return load_checked(path, [_KIND], "a refiner", "it is made again", build)
    except UserError as error:
        log.warning("%s", error)
        return None


def check_features(head: nn.Module) -> None:
    """Refuse what a refiner, kept or new, could not read.

    Raises:
        UserError: for a linear head, whose features are tokens.
    """
    if not HeadGeometry.of(head).kernel_size:
        raise UserError(
            "uncertainty=refined needs features like images, and this network's head is linear, "
            "on tokens; use uncertainty=linearised, or ensemble"
        )
