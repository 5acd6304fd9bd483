"""Are the maps right? A comparison with members that the estimator has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.progress import track
from bayesdiff.machine.ranks import dealt, gather_rows
from bayesdiff.metrics.agreement import mean, pixel_ranks, spearman, with_intervals
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty import Ensemble, Estimator, Starts
from bayesdiff.uncertainty.memory import images_at_once

# Of an image's mean variance: below that, a pixel has no say in the calibration. Where nothing
# varies, as in a black background, rounding alone makes ratios of any size.
FLOOR = 1e-3
# Two-sided 95 % of a normal distribution.
_Z95 = 1.959964


@dataclass(frozen=True)
class Validation:
    """What each image's map and the reference have in common.

    Attributes:
        estimate: ``(N,)`` summed variance of the maps.
        reference: ``(N,)`` the same of the reference.
        pixel_rank: ``(N,)`` Spearman correlation over the pixels of an image.
        z2: ``(N,)`` mean of z^2 = (member - trained image)^2 / variance over members and pixels.
        coverage: ``(N,)`` share of |z| < 1.96.
        pixels: ``(N,)`` share of the pixels that count in the two, see ``FLOOR``.
    """

    estimate: Tensor
    reference: Tensor
    pixel_rank: Tensor
    z2: Tensor
    coverage: Tensor
    pixels: Tensor

    def metrics(self, seed: int, resamples: int = 1000, level: float = 0.95) -> dict[str, float]:
        """Figures named ``validation/...`` with their bootstrap intervals over images.

        Args:
            seed: fixes the resampled images.
            resamples: their number.
            level: share of them inside the intervals ``_low`` to ``_high``.

        Returns:
            ``image_rank`` and ``pixel_rank`` (Spearman), ``log_ratio`` (median over images of the
            natural logarithm of summed variance over that of the reference, 0 if right) and its
            spread ``log_ratio_sd``, ``calibration_z2`` (1 if right) and ``coverage95`` (0.95 if
            right and Gaussian), ``pixels`` (share that counts in these two). Variances estimated
            from M members or draws make E[z^2] = (M - 1) / (M - 3) even where they are right on
            average: 1.15 for 16.
        """
        ratio = self.estimate.log() - self.reference.log()
        ratio = ratio.where(ratio.isfinite(), torch.nan)
        found = with_intervals(
            {
                "image_rank": (spearman, (self.estimate, self.reference)),
                "pixel_rank": (mean, (self.pixel_rank,)),
                "log_ratio": (_median, (ratio,)),
                "calibration_z2": (mean, (self.z2,)),
                "coverage95": (mean, (self.coverage,)),
            },
            seed=seed,
            resamples=resamples,
            level=level,
        )
        good = ratio[ratio.isfinite()]
        found["log_ratio_sd"] = float(good.std()) if len(good) > 1 else float("nan")
        found["pixels"] = float(self.pixels.mean())
        return {f"validation/{name}": value for name, value in found.items()}


# Of the rows of ``compare``.
COLUMNS = tuple(field.name for field in fields(Validation))


def reference_of(estimator: Estimator) -> Ensemble:
    """Members for the comparison, from another seed than the estimator's own draws."""
    return Ensemble(
        members=estimator.validate_members,
        noise_members=0,
        batch_size=estimator.batch_size,
        max_memory=estimator.max_memory,
        seed=estimator.seed + 1,
    )


def reference_at_once(
    estimator: Estimator, solver: Solver, model: GenerativeModel, image_shape: Sequence[int]
) -> int:
    """Images of the reference that fit into memory at once, see ``images_at_once``."""
    cure = "lower uncertainty.validate_members"
    return images_at_once(reference_of(estimator), solver, model, image_shape, cure)


def validate(
    variance: Tensor,
    starts: Starts,
    posterior: HeadPosterior,
    reference: Ensemble,
    batch_size: int,
) -> Validation:
    """Compare maps of samples 0, 1, ... with members that follow the same steps.

    The work is shared by all processes.

    Args:
        variance: maps of images in [-1, 1], ``(N, C, H, W)``.
        starts: gives the start of the samples with these numbers.
        posterior: of the head, the one behind the maps.
        reference: the members.
        batch_size: images at once.
    """
    count = len(variance)
    batches = dealt(torch.arange(count).split(batch_size))
    parts = []
    each = reference.evaluations(starts([0]))
    for numbers in track(batches, "validation", "maps", len, each):
        image, members = reference.images(starts(numbers.tolist()), posterior)
        parts.append(compare(variance[numbers], image.cpu(), members.cpu()))
    rows = torch.cat(parts) if parts else torch.zeros(0, len(COLUMNS), dtype=torch.float64)
    place = torch.cat(batches) if batches else torch.zeros(0, dtype=torch.long)
    return Validation(*gather_rows(rows, place, count).unbind(1))


def compare(variance: Tensor, image: Tensor, members: Tensor) -> Tensor:
    """Rows ``(B, 6)`` with the ``COLUMNS``, float64.

    Args:
        variance: maps under test ``(B, C, H, W)``, in the squared units of the images.
        image: the trained model's images, same shape.
        members: ``(M, B, C, H, W)``.
    """
    variance, image = variance.double().flatten(1), image.double().flatten(1)
    members = members.double().flatten(2)
    reference = members.var(0)
    floor = FLOOR * variance.clamp(min=0).mean(1, keepdim=True)
    counted = (variance > floor) & variance.isfinite()
    z = (members - image) / variance.where(counted, 1).sqrt()
    inside = (z.abs() < _Z95).double().mean(0)
    columns = [
        variance.sum(1),
        reference.sum(1),
        pixel_ranks(variance, reference),
        # 0 / 0 where no pixel counts: NaN, which the means leave out.
        (z.square().mean(0) * counted).sum(1) / counted.sum(1),
        (inside * counted).sum(1) / counted.sum(1),
        counted.double().mean(1),
    ]
    return torch.stack(columns, 1)


def _median(values: Tensor) -> Tensor:
    return values.nanquantile(0.5, dim=-1)
