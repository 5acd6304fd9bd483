"""Alternatives of images: what is drawn anew, and one batch of it by every way from every time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of, share
from bayesdiff.data.module import to_uint8
from bayesdiff.uncertainty.image_scores import IMAGE_SCORES
from bayesdiff.uncertainty.member_scores import CONFIDENCE_SCORES
from bayesdiff.uncertainty.resample import (
    WAYS,
    Origin,
    box_region,
    fresh_noise,
    map_region,
    resample,
)
from bayesdiff.uncertainty.samples import Samples

# Scores that look at the image alone.
SCORES = (
    *(f"image.{name}" for name in IMAGE_SCORES),
    *(f"classifier.{name}" for name in CONFIDENCE_SCORES),
)
# Among which candidates the best is chosen, and the first of their columns.
AMONG = {"draws": 1, "all": 0}


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Which images are drawn anew, from where, how, and how often.

    Args:
        num_images: images 0, 1, ... of the run.
        draws: alternatives of each image, by every way.
        from_time: times in (0, 1); images are left at the solver's first time not before each.
        ways: names of ``resample.WAYS``.
        region: what is drawn anew: None for the whole image, ``map`` for the most uncertain
            pixels of the image's own map, or a box ``[top, left, height, width]``.
        share: of the pixels that ``map`` takes.
        score: chooses the best in table and figures; ``results.json`` has all ``SCORES``.
        bootstrap: samples of the intervals over images.
        seed: of the noise and the weights that are drawn.
    """

    num_images: int = 500
    draws: int = 8
    from_time: Sequence[float] = (0.3, 0.5, 0.7)
    ways: Sequence[str] = tuple(WAYS)
    region: str | Sequence[int] | None = None
    share: float = 0.2
    score: str = "classifier.off_label"
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("repair.num_images", self.num_images)
        at_least("repair.draws", self.draws)
        at_least("repair.bootstrap", self.bootstrap, 2)
        seed_of("repair.seed", self.seed)
        listed("repair.from_time", self.from_time, "[0.3,0.5]")
        listed("repair.ways", self.ways, "[independent,isotropic]")
        for time in self.from_time:
            if share("repair.from_time", time) == 0:
                raise UserError("repair.from_time=0 is the noise itself; give times above 0")
        _known("repair.ways", self.ways, tuple(WAYS))
        _known("repair.score", [self.score], SCORES)
        if share("repair.share", self.share) == 0:
            raise UserError("repair.share=0 draws no pixel anew; give a share above 0")
        self._check_region()

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of the region, None where it is no box."""
        if self.region is None or isinstance(self.region, str):
            return None
        top, left, height, width = self.region
        return top, left, height, width

    def check_size(self, height: int, width: int) -> None:
        """Refuse a box that reaches beyond an image of this size.

        Raises:
            UserError: if it does.
        """
        if self.box is None:
            return
        top, left, tall, wide = self.box
        if top + tall > height or left + wide > width:
            raise UserError(
                f"repair.region={list(self.box)} reaches beyond the {height} x {width} pixels of "
                "an image; it is [top,left,height,width]"
            )

    def _check_region(self) -> None:
        """Refuse what is no region.

        Raises:
            UserError: one line with the three kinds there are.
        """
        given: Any = self.region
        if given is None or given == "map":
            return
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 4:
            raise UserError(
                f"repair.region must be null, map or [top,left,height,width], got {given!r}"
            )
        for name, value, least in zip(("top", "left", "height", "width"), given, (0, 0, 1, 1),
                                      strict=True):  # fmt: skip
            at_least(f"repair.region's {name}", value, least)


def _known(name: str, values: Sequence[Any], there: Sequence[str]) -> None:
    for value in values:
        if value not in there:
            raise UserError(f"unknown {name} {value!r}; choose from {', '.join(there)}")


def redraw(
    origin: Origin, weights: Tensor, wanted: Repair, samples: Samples, numbers: list[int]
) -> dict[str, Tensor]:
    """Images of one batch and their alternatives, by every way from every time.

    Args:
        origin: of the batch.
        weights: of the posterior trajectories.
        wanted: what is drawn.
        samples: of all images, with their variances at the times.
        numbers: of the batch's images in ``samples``.

    Returns:
        ``images (B, C, H, W)``, ``draws (B, T, W, n, C, H, W)``, uint8; ``region (B, 1, H, W)``
        bool; ``power (B, T)``, the variance summed over the region; ``evaluations (B, T, 2)`` of
        the network to that time and from it on.
    """
    assert samples.requested_times is not None and samples.state_variance is not None
    image = origin.image
    if wanted.region is None:
        region = torch.ones_like(image[:, :1], dtype=torch.bool)
    elif wanted.box is None:
        region = map_region(samples.variance[numbers].to(image.device), wanted.share)
    else:
        region = box_region(image, wanted.box)
    places = [origin.place(time) for time in samples.requested_times.tolist()]
    z = fresh_noise(origin.start, wanted.draws, wanted.seed)
    drawn, power = [], []
    members = origin.trajectories(weights, places)
    for number, (place, trajectories) in enumerate(zip(places, members, strict=True)):
        variance = samples.state_variance[number, numbers].to(image.device)
        middle = origin.middle(place, variance, region, trajectories)
        states = (resample(way, middle, z) for way in wanted.ways)
        made = [to_uint8(origin.finish(place, x, region).cpu()) for x in states]
        drawn.append(torch.stack(made).permute(2, 0, 1, 3, 4, 5))
        power.append(middle.power.flatten().cpu())
    counts = torch.tensor([origin.evaluations(place) for place in places])
    return {
        "images": to_uint8(image.cpu()),
        "draws": torch.stack(drawn, 1),
        "region": region.cpu(),
        "power": torch.stack(power, 1),
        "evaluations": counts.expand(len(image), -1, -1),
    }
