"""A threshold of a score below which at most a given share of what is kept is bad.

The share of bad images among the kept ones is a ratio, and may rise and fall with the threshold:
conformal risk control, which needs a monotone loss, does not apply. Thresholds are tested one
after the other instead, from strict to loose, each by its exact binomial tail ("Learn then test",
Angelopoulos et al. 2021; the kept share as in "Selective classification for deep neural networks",
Geifman and El-Yaniv 2017). The level is spent at the strict end, in the middle and at the loose
end, and goes on from a threshold that passed to the next one (the fallback procedure, Wiens 2003:
fixed-sequence testing with several starts), so that bad luck with the few images of the strict end
does not end all. The thresholds come from scores of images that are not tested: given them, the
bad among the n kept images are binomial whatever the scores are worth, tied or not. So with
probability 1 - level over the calibration images the risk on new ones is below what is allowed,
for any number of these images.

Images of every class in fixed numbers, as pools have them, only narrow what is binomial.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta, binom
from torch import Tensor

from bayesdiff.checks import UserError

# Share that the first threshold keeps: a stricter one would rest on few images, where one bad
# image among them ends all.
START = 0.2
# Shares of the level at the first threshold, in the middle, and at the last one.
_SPENT = (0.5, 0.25, 0.25)
# Images whose scores are the thresholds: a tenth of all, but not fewer while that is below half.
_PROPOSING = 50


@dataclass(frozen=True)
class Risk:
    """What a threshold keeps of a pool, and how much of it is bad.

    Attributes:
        images: of the pool.
        kept: of these.
        bad: of the kept ones.
        low: end of the Clopper-Pearson interval of the risk; NaN where nothing is kept.
        high: its other end.
    """

    images: int
    kept: int
    bad: int
    low: float
    high: float

    @property
    def share_kept(self) -> float:
        """Kept over all."""
        return self.kept / self.images if self.images else math.nan

    @property
    def risk(self) -> float:
        """Bad over kept; NaN where nothing is kept."""
        return self.bad / self.kept if self.kept else math.nan


def proposing(count: int) -> int:
    """How many of so many images propose the thresholds; the others test them."""
    return min(max(count // 10, _PROPOSING), count // 2)


def fewest_images(allowed: float, level: float) -> int:
    """Images, all of them good, that show a risk below ``allowed`` at this level."""
    return math.ceil(math.log(level) / math.log1p(-allowed))


def thresholds(scores: Tensor, start: float = START) -> Tensor:
    """Thresholds to test, strict to loose, ``(T,)`` float64; the last, infinity, keeps every one.

    Args:
        scores: ``(N,)`` of images that are not tested; the higher, the sooner discarded.
        start: share of them that the first threshold keeps.
    """
    values = scores.double()
    values = values[~values.isnan()].sort().values
    first = min(max(math.ceil(start * len(values)) - 1, 0), len(values))
    every = values.new_full((1,), torch.inf)
    return torch.cat([values[first:], every]).unique()


def p_values(scores: Tensor, bad: Tensor, at: Tensor, allowed: float) -> Tensor:
    """Probability of so few bad images among the kept ones, were the risk ``allowed``.

    Args:
        scores: ``(N,)``; NaN is never kept.
        bad: bool ``(N,)``.
        at: thresholds ``(T,)``: kept is what scores at most that.
        allowed: share of bad images among the kept.

    Returns:
        ``(T,)`` float64, 1 where nothing is kept.
    """
    kept, wrong = _counts(scores, bad, at)
    tails = binom.cdf(wrong.numpy(), kept.numpy(), allowed)
    return torch.from_numpy(np.asarray(tails, dtype=np.float64))


def loosest(
    scores: Tensor,
    bad: Tensor,
    at: Tensor,
    allowed: float,
    level: float,
    spent: Sequence[float] = (1.0,),
) -> float | None:
    """The loosest threshold that passes its test.

    For the same thresholds it is the looser, the higher ``level`` and ``allowed`` are.

    Args:
        scores: see ``p_values``; of no image that proposed the thresholds.
        bad: see ``p_values``.
        at: thresholds, strict to loose.
        allowed: share of bad images among the kept.
        level: allowed probability that the risk is not below this.
        spent: shares of the level, 1 together, at evenly spaced thresholds from the first to the
            last; by default all of it at the first, where the first test that fails is the last.

    Returns:
        The threshold, infinity where every image may be kept; None where none holds.
    """
    share = [0.0] * len(at)
    for place, part in zip(np.linspace(0, len(at) - 1, len(spent)), spent, strict=True):
        share[round(place)] += part
    found, carried = None, 0.0
    tails = p_values(scores, bad, at, allowed).tolist()
    for value, p, own in zip(at.tolist(), tails, share, strict=True):
        carried += own
        if p <= carried * level and carried:
            found = value
        else:
            carried = 0.0
    return found


def guaranteed(scores: Tensor, bad: Tensor, allowed: float, level: float) -> float | None:
    """The loosest threshold of a calibration pool whose first images propose the thresholds.

    Args:
        scores: ``(N,)`` of independent images, the higher, the sooner discarded.
        bad: bool ``(N,)``.
        allowed: share of bad images among the kept, in (0, 1).
        level: allowed probability that the risk on new images is not below this.

    Returns:
        See ``loosest``.

    Raises:
        UserError: if so few images could show nothing, however good they are.
    """  # noqa: DOC502 - raised one level down
    first = proposing(len(scores))
    tested = len(scores) - first
    least = require_enough(len(scores), allowed, level)
    # At least so loose that one bad image does not end all.
    at = thresholds(scores[:first], min(max(START, 2 * least / tested), 1.0))
    return loosest(scores[first:], bad[first:], at, allowed, level, _SPENT)


def require_enough(count: int, allowed: float, level: float) -> int:
    """``fewest_images`` of the first test, if so many calibration images leave that many.

    Raises:
        UserError: if they do not.
    """
    least = fewest_images(allowed, _SPENT[0] * level)
    tested = count - proposing(count)
    if tested < least:
        raise UserError(
            f"{count} calibration images test {tested}, and a share of good images of "
            f"{1 - allowed:g} at level {level:g} takes {least} good ones; give more images, or "
            "ask for less"
        )
    return least


def risk(scores: Tensor, bad: Tensor, threshold: float | None, level: float = 0.95) -> Risk:
    """What a threshold keeps, and the share of bad images in it.

    Args:
        scores: see ``p_values``.
        bad: see ``p_values``.
        threshold: None keeps nothing.
        level: of the interval.
    """
    kept = wrong = 0
    if threshold is not None:
        kept, wrong = map(
            int, _counts(scores, bad, torch.tensor([threshold], dtype=torch.float64))
        )
    low, high = interval(wrong, kept, level)
    return Risk(len(scores), kept, wrong, low, high)


def interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share by Clopper and Pearson; NaN for none of none."""
    if not count:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = beta.ppf(tail, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)


def _counts(scores: Tensor, bad: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Images that each threshold keeps, and bad ones among them, each ``(T,)``."""
    values, order = scores.double().sort()  # NaN comes last
    kept = torch.searchsorted(values[: int((~values.isnan()).sum())], at, right=True)
    wrong = torch.cat([torch.zeros(1, dtype=torch.long), bad.long()[order].cumsum(0)])
    return kept, wrong[kept]
