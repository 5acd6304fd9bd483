"""The size of maps: one factor that gives them the size of what retraining changes.

With m_i the summed variance of the map of image i, and r_i the unbiased variance of the same image
over K networks that were trained apart, the model is E[r_i] = c m_i. With two networks r_i has one
degree of freedom for each direction in which they differ: it is skewed, so that a median of r_i /
m_i is too small by up to a half, whereas every weighted mean of them is unbiased if its weights
know m_i alone. Here

    c = sum_i r_i / (m_i + m) / sum_i m_i / (m_i + m),    m the median of the m_i:

no large map outvotes the others, as in a ratio of sums, and no map near zero does, as in a mean of
ratios.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.uncertainty.samples import Samples

HELD_OUT = "held_out"
# Images that a factor with an interval needs.
FEWEST = 8
_CURE = "give 1 or 2 (further trainings), held_out, or a list of run folders of other seeds"
# Times closer than this are the same; records keep them in single precision.
_SAME = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What the variance of maps is multiplied by, and where that is from.

    Attributes:
        factor: of the images' variance.
        low: lower end of its 95 % bootstrap interval, see ``interval``.
        high: upper end.
        trainings: networks behind the reference, the run's own among them.
        images: behind it.
        times: in (0, 1), increasing, with a factor of their own.
        factors: at ``times``.
    """

    factor: float
    low: float
    high: float
    trainings: int
    images: int
    times: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Calibration":
        """Back from ``record``."""
        given = {name: record[name] for name in cls.__dataclass_fields__}
        return cls(**given | {n: tuple(given[n]) for n in ("times", "factors")})

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Flat scalars, ``calibration/...``."""
        names = {"": self.factor, "_low": self.low, "_high": self.high}
        found: dict[str, float] = {f"calibration/factor{end}": v for end, v in names.items()}
        found |= {"calibration/trainings": self.trainings, "calibration/images": self.images}
        times = zip(self.times, self.factors, strict=True)
        return found | {f"calibration/factor_at_{time:.3g}": value for time, value in times}

    @property
    def said(self) -> str:
        """For the record of the maps, and so for every caption."""
        by = f"{self.trainings} trainings" if self.trainings > 1 else "held-out error"
        own = ", a factor per time" if self.times else ""
        numbers = f"{self.factor:.3g} [{self.low:.3g}, {self.high:.3g}]"
        return f"variance times {numbers} by {by} on {self.images} images{own}"

    def at(self, times: Tensor) -> Tensor:
        """Factors ``(T,)`` at times ``(T,)``: between known ones linear in their logarithm.

        Before the first known time it is that one's; at t = 1, and without times, the images'.
        """
        if not self.times:
            return torch.full_like(times, self.factor, dtype=torch.float64)
        known = torch.tensor([*self.times, 1.0], dtype=torch.float64)
        logs = torch.tensor([*self.factors, self.factor], dtype=torch.float64).log()
        asked = times.double().clamp(float(known[0]), 1.0)
        right = torch.searchsorted(known, asked).clamp(1, len(known) - 1)
        left = right - 1
        share = (asked - known[left]) / (known[right] - known[left])
        return torch.lerp(logs[left], logs[right], share).exp()

    def applied(self, samples: Samples) -> Samples:
        """The samples with their variances in the calibrated size, which their record says.

        A stochastic solver's own noise is not the weights' doing and stays.
        """
        scaled: dict[str, Any] = {"variance": self.factor * samples.variance}
        if samples.latent_variance is not None:
            scaled["latent_variance"] = self.factor * samples.latent_variance
        over = self.at(samples.times).to(samples.summed)[:, None]
        scaled["summed"] = over * samples.summed
        if samples.spatial is not None:
            scaled["spatial"] = over.square() * samples.spatial
        scaled["frame_variance"] = self._over(samples.frame_times, samples.frame_variance)
        if samples.state_variance is not None and samples.requested_times is not None:
            own = self._over(samples.requested_times, samples.state_variance)
            scaled["state_variance"] = own
        return replace(samples, estimator=f"{samples.estimator}, {self.said}", **scaled)

    def _over(self, times: Tensor, variance: Tensor) -> Tensor:
        factors = self.at(times).to(variance)
        return factors.view(-1, *[1] * (variance.ndim - 1)) * variance


def check_calibrate(
    given: Any, images: int, per_time: bool, times: Sequence[float], validate: bool = False
) -> None:
    """Refuse values of ``uncertainty.calibrate`` and its options that say nothing.

    Raises:
        UserError: one line with the value and the cure.
    """
    at_least("uncertainty.calibrate_images", images, FEWEST)
    if not isinstance(per_time, bool):
        raise UserError(f"uncertainty.calibrate_per_time must be true or false, got {per_time!r}")
    if per_time and given in (None, HELD_OUT):
        raise UserError(
            "uncertainty.calibrate_per_time=true compares states with those of other trainings; "
            "give uncertainty.calibrate=1 or a list of run folders, or leave it at false"
        )
    if per_time and not times:
        raise UserError(
            "uncertainty.calibrate_per_time=true gives each of uncertainty.times a factor, and "
            "there are none; give them, as in uncertainty.times=[0.5,0.9]"
        )
    if validate and given is not None:
        raise UserError(
            "uncertainty.validate=true compares maps with draws of the posterior, whose size "
            f"uncertainty.calibrate={given} leaves; use validate=false, or validate with "
            "calibrate=null: both share their maps"
        )
    if given is None or given == HELD_OUT:
        return
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise UserError(f"uncertainty.calibrate={given} trains nothing; {_CURE}, or null")
        return
    texts = not isinstance(given, str) and isinstance(given, Sequence)
    if not texts or not given or not all(isinstance(one, str) for one in given):
        raise UserError(f"unknown uncertainty.calibrate {given!r}; {_CURE}, or null for none")


def pair_sizes(states: Tensor) -> Tensor:
    """Half the summed squared difference of every pair of networks, ``(K, B, ...) -> (P, B)``.

    Their mean over the pairs is the summed unbiased variance over the networks.
    """
    rows = states.double().flatten(2)
    pairs = combinations(range(len(rows)), 2)
    return torch.stack([(rows[a] - rows[b]).square().sum(1) / 2 for a, b in pairs])


def size_factor(maps: Tensor, reference: Tensor) -> Tensor:
    """The c of above from summed variances ``(..., N)`` of maps and reference, ``(...)``.

    An image whose map has no size, or none that is finite, has no say.
    """
    counted = (maps > 0) & maps.isfinite() & reference.isfinite()
    maps = maps.where(counted, torch.nan)
    weight = 1 / (maps + maps.nanmedian(-1, keepdim=True).values)
    return (weight * reference.where(counted, torch.nan)).nansum(-1) / (weight * maps).nansum(-1)


def fitted(
    maps: Tensor, pairs: Tensor, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """The factor with its bootstrap interval over images and networks.

    Of three networks or more both are drawn anew, pairs of a network with itself left out. Two
    cannot be drawn anew: their interval is over images alone, and does not know how another pair
    would differ.

    Args:
        maps: summed variances of the maps ``(N,)``.
        pairs: of ``pair_sizes``, ``(P, N)``.
        seed: fixes what is drawn.
        resamples: their number.
        level: share of them inside the interval.

    Raises:
        UserError: if too few maps have a size.
    """
    maps, pairs = maps.double().cpu(), pairs.double().cpu()
    kept = (maps > 0) & maps.isfinite() & pairs.isfinite().all(0)
    if int(kept.sum()) < FEWEST:
        raise UserError(
            f"only {int(kept.sum())} of {len(kept)} maps have a variance above zero, and "
            f"uncertainty.calibrate needs {FEWEST}; use another estimator, or calibrate=null"
        )
    maps, pairs = maps[kept], pairs[:, kept]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(len(maps), (resamples, len(maps)), generator=generator)
    reference = _pair_weights(len(pairs), resamples, generator) @ pairs
    found = size_factor(maps[images], reference.gather(1, images))
    return float(size_factor(maps, pairs.mean(0))), *_ends(found, level)


def _pair_weights(pairs: int, resamples: int, generator: torch.Generator) -> Tensor:
    """What every pair counts in networks drawn anew, ``(R, P)``, rows of sum 1 or nan."""
    count = round((1 + (1 + 8 * pairs) ** 0.5) / 2)
    if count == 2:
        return torch.ones(resamples, 1, dtype=torch.float64)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    often = torch.nn.functional.one_hot(drawn, count).sum(1).double()
    one, other = zip(*combinations(range(count), 2), strict=True)
    weights = often[:, list(one)] * often[:, list(other)]
    return weights / weights.sum(1, keepdim=True)


def held_out_factor(
    gaps: Tensor, variance: Tensor, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """The factor from the held-out error, with its bootstrap interval over images.

    In the linear Gaussian model y = Phi w + noise of N rows and d weights, least squares has the
    expected mean squared error sigma^2 (1 - d / N) where it was fitted, and sigma^2 (1 + d / N) at
    fresh noise. Half the gap, sigma^2 d / N, is the mean over rows of phi^T Sigma phi with Sigma =
    sigma^2 (Phi^T Phi)^-1: the predictive variance.

    Args:
        gaps: squared errors of held-out images less those of training images at the same noise
            and times, ``(N,)``.
        variance: predictive variance at these draws, ``(N,)``.
        seed: fixes the resampled images.
        resamples: their number.
        level: share of them inside the interval.

    Raises:
        UserError: if the gap is not positive beyond its standard error.
    """
    gaps, variance = gaps.double().cpu(), variance.double().cpu()
    gap, error = float(gaps.mean()), float(gaps.std()) / len(gaps) ** 0.5
    if not gap > error:
        raise UserError(
            f"uncertainty.calibrate=held_out needs a held-out error above the training error, and "
            f"the gap is {gap:.3g} with a standard error of {error:.2g}: this training has not "
            "begun to learn single images; use uncertainty.calibrate=1, or train for longer"
        )
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(len(gaps), (resamples, len(gaps)), generator=generator)
    found = gaps[images].mean(1) / (2 * variance[images].mean(1))
    return gap / (2 * float(variance.mean())), *_ends(found, level)


def _ends(values: Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = values.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def same_time(one: float, other: float) -> bool:
    """Whether two times are one, as records keep them."""
    return abs(one - other) < _SAME
