"""Alternatives of images: what is resampled, and one batch of it by every way from every time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, seed_of, share
from bayesdiff.data.spaces import to_uint8
from bayesdiff.studies.own_scores import OwnScore, own_scores
from bayesdiff.studies.repair.alternatives import WAYS, Origin, fresh_noise, resample
from bayesdiff.studies.repair.regions import Region, boxes_of, mask_of, region_of
from bayesdiff.uncertainty.restart import fresh_start
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.scores.of_maps_and_images import IMAGE_SCORES, MAP_SCORES
from bayesdiff.uncertainty.scores.of_members import CONFIDENCE_SCORES
from bayesdiff.uncertainty.start import Start

# Scores that look at the image alone.
SCORES = (
    *(f"image.{name}" for name in IMAGE_SCORES),
    *(f"classifier.{name}" for name in CONFIDENCE_SCORES),
)
# Scores of maps; every candidate then has a map of its own.
OF_MAPS = tuple(f"map.{name}" for name in MAP_SCORES)
# Among which candidates the best is chosen, and the first of their columns.
AMONG = {"draws": 1, "all": 0}
# Plain rejection sampling: other samples of the same class, from their own noise.
FRESH = "fresh"
# Image and map of a batch from its start on.
Mapper = Callable[[Start], Samples]


@dataclass(frozen=True, kw_only=True)
class RedrawOptions:
    """Which images are resampled, from where, how, and how often.

    Args:
        num_images: images 0, 1, ... of the run.
        images: numbers of the run's images, in place of the first ``num_images``; None for those,
            or for the images that ``region`` names.
        draws: alternatives of each image, by every way.
        from_time: times in (0, 1); images are left at the solver's first time not before each.
        ways: names of ``resample.WAYS``, and ``fresh`` for other whole samples of the same class,
            of which nothing is held.
        region: what is resampled: None for the whole image, ``map`` for the most uncertain
            pixels of the image's own map, a box ``[top, left, height, width]`` for all images, or
            a mapping of image numbers to boxes, itself or as the path of a YAML or JSON file.
        share: of the pixels that ``map`` takes.
        score: chooses the best in table and figures; ``results.json`` has all ``SCORES``. One of
            maps gives every candidate a map by the run's estimator, and ``results.json``
            all of these too: of whole trajectories for ``fresh``, of the rest of the trajectory
            from the state it was left at for the other ways, for the image itself as well.
        own_scores: see ``studies.own_scores``; those that read members are left out.
        bootstrap: samples of the intervals over images.
        seed: of the noise and the weights that are drawn.
    """

    num_images: int = 500
    images: Sequence[int] | None = None
    draws: int = 8
    from_time: Sequence[float] = (0.3, 0.5, 0.7)
    ways: Sequence[str] = tuple(WAYS)
    region: Region = None
    share: float = 0.2
    score: str = "classifier.off_label"
    own_scores: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
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
                raise UserError(
                    "repair.from_time=0 is the noise itself; give times above 0, or "
                    "repair.ways=[fresh] for whole samples"
                )
        _known("repair.ways", self.ways, (*WAYS, FRESH))
        _known("repair.score", [self.score], (*SCORES, *self.of_maps, *self.own_of_images))
        if share("repair.share", self.share) == 0:
            raise UserError("repair.share=0 draws no pixel anew; give a share above 0")
        object.__setattr__(self, "region", region_of(self.region))
        self._check_images()

    def _check_images(self) -> None:
        """Refuse numbers that are none, or that have no box."""
        if self.images is None:
            return
        for number in listed("repair.images", self.images, "[3,17,42]"):
            at_least("repair.images", number, 0)
            if isinstance(self.region, Mapping) and number not in self.region:
                raise UserError(
                    f"repair.region has no box for image {number} of repair.images; give it one"
                )

    @property
    def numbers(self) -> list[int] | None:
        """Chosen images; None for the first ``num_images``."""
        if self.images is None and isinstance(self.region, Mapping):
            return sorted(self.region)
        return None if self.images is None else list(self.images)

    @property
    def count(self) -> int:
        """Images that are resampled."""
        return self.num_images if self.numbers is None else len(self.numbers)

    @property
    def rewinding(self) -> list[str]:
        """Ways that leave an image in the middle of its trajectory."""
        return [way for way in self.ways if way != FRESH]

    @property
    def times(self) -> list[float]:
        """Where they leave it; none without such a way."""
        return sorted(self.from_time) if self.rewinding else []

    @property
    def reads_maps(self) -> bool:
        """Whether every candidate has a map."""
        return self.score in self.of_maps

    @property
    def of_maps(self) -> tuple[str, ...]:
        """Names of the scores of maps, in the order of ``map_scores``."""
        return (*OF_MAPS, *self.own_of_maps)

    @cached_property
    def own_of_maps(self) -> dict[str, OwnScore]:
        """The user's own that read maps, with images and labels alone."""
        own, known = own_scores(self.own_scores), {"variance", "images", "labels"}
        return {k: v for k, v in own.items() if v.of_map and v.reads <= known}

    @cached_property
    def own_of_images(self) -> dict[str, OwnScore]:
        """The user's own of images and what a classifier says of them."""
        own = own_scores(self.own_scores).items()
        return {k: v for k, v in own if not v.of_posterior}

    def map_scores(self, variance: Tensor, images: Tensor, labels: Tensor | None) -> Tensor:
        """All scores of maps, ``(B, K)`` float64; the higher, the more uncertain."""
        given = {"variance": variance, "images": images, "labels": labels}
        shipped = [score(variance, images) for score in MAP_SCORES.values()]
        return torch.stack([*shipped, *(own(given) for own in self.own_of_maps.values())], 1)

    def check_size(self, height: int, width: int) -> None:
        """Refuse a box that reaches beyond an image of this size.

        Raises:
            UserError: if it does.
        """
        for top, left, tall, wide in boxes_of(self.region):
            if top + tall > height or left + wide > width:
                raise UserError(
                    f"repair.region={[top, left, tall, wide]} reaches beyond the {height} x "
                    f"{width} pixels of an image; it is [top,left,height,width]"
                )


def _known(name: str, values: Sequence[Any], there: Sequence[str]) -> None:
    for value in values:
        if value not in there:
            raise UserError(f"unknown {name} {value!r}; choose from {', '.join(there)}")


def redraw(
    origin: Origin,
    weights: Tensor,
    options: RedrawOptions,
    samples: Samples,
    places: list[int],
    mapper: Mapper,
) -> dict[str, Tensor]:
    """Images of one batch and their alternatives, by every way from every time.

    Args:
        origin: of the batch.
        weights: of the posterior trajectories.
        options: what is drawn.
        samples: of all images, with their variances at the times.
        places: of the batch's images in ``samples``.
        mapper: the run's estimator with its posterior.

    Returns:
        ``images (B, C, H, W)`` uint8 and what ``rewound`` and ``fresh`` give, as far as asked for.
    """
    image = origin.image
    found = {"images": to_uint8(image.cpu())}
    if options.rewinding:
        found |= rewound(origin, weights, options, samples, places, mapper)
    if FRESH in options.ways:
        found |= fresh(origin.start, options, mapper)
        if options.reads_maps:
            labels = None if samples.labels is None else samples.labels[places]
            own = options.map_scores(samples.variance[places], image.cpu(), labels)
            found["fresh_scores"] = torch.cat([own[:, None], found["fresh_scores"]], 1)
    return found


def rewound(
    origin: Origin,
    weights: Tensor,
    options: RedrawOptions,
    samples: Samples,
    places: list[int],
    mapper: Mapper,
) -> dict[str, Tensor]:
    """Alternatives from the middle of the trajectories; for the arguments see ``redraw``.

    Returns:
        ``draws (B, T, W, n, C, H, W)`` uint8; ``region (B, 1, H, W)`` bool; ``power (B, T)``, the
        variance summed over the region; ``evaluations (B, T, 2)`` of the network to that time, and
        for an alternative from it on, its map included; where maps are read
        ``scores (B, T, W, 1 + n, K)`` by the scores of maps, of the image's own state first.
    """
    assert samples.requested_times is not None and samples.state_variance is not None
    image, numbers = origin.image, [(options.numbers or range(options.count))[p] for p in places]
    variance = samples.variance[places].to(image.device)
    region = mask_of(options.region, options.share, variance, numbers)
    steps = [origin.place(time) for time in samples.requested_times.tolist()]
    z = fresh_noise(origin.start, options.draws, options.seed)
    drawn, power, scores, counts = [], [], [], []
    members = origin.trajectories(weights, steps)
    for number, (step, trajectories) in enumerate(zip(steps, members, strict=True)):
        variance = samples.state_variance[number, places].to(image.device)
        middle = origin.middle(step, variance, region, trajectories)
        states = [resample(way, middle, z) for way in options.rewinding]
        made = [to_uint8(origin.finish(step, x, region).cpu()) for x in states]
        drawn.append(torch.stack(made).permute(2, 0, 1, 3, 4, 5))
        power.append(middle.power.flatten().cpu())
        before, after = origin.evaluations(step)
        if options.reads_maps:
            read, of_map = _of_states(origin, step, states, options, mapper)
            scores.append(read)
            after += of_map
        counts.append([before, after])
    found = {
        "draws": torch.stack(drawn, 1),
        "region": region.cpu(),
        "power": torch.stack(power, 1),
        "evaluations": torch.tensor(counts).expand(len(image), -1, -1),
    }
    return found | ({"scores": torch.stack(scores, 1)} if scores else {})


def _of_states(
    origin: Origin, step: int, states: Sequence[Tensor], options: RedrawOptions, mapper: Mapper
) -> tuple[Tensor, int]:
    """Scores of the maps from states of W ways on, and what a map takes.

    Args:
        origin: of the batch.
        step: that the states are left after.
        states: of every way, ``(n, B, C, H, W)``.
        options: gives the scores.
        mapper: the run's estimator with its posterior.

    Returns:
        ``(B, W, 1 + n, K)``, and network evaluations per map.
    """

    def read(state: Tensor) -> Samples:
        return mapper(origin.restart(step, state))

    own = read(origin.states[step])
    ways = [[own, *map(read, each)] for each in states]
    score = options.map_scores
    scores = [[score(made.variance, made.images, made.labels) for made in way] for way in ways]
    return torch.stack([torch.stack(way, 1) for way in scores], 1), own.nfe


def fresh(start: Start, options: RedrawOptions, mapper: Mapper) -> dict[str, Tensor]:
    """Other samples of the same classes.

    Returns:
        ``fresh (B, n, C, H, W)`` uint8; ``fresh_evaluations (B,)`` of the network for one of them,
        its map included; where maps are read ``fresh_scores (B, n, K)``.
    """
    images, scores, count = [], [], start.nfe
    for number in range(options.draws):
        begun = fresh_start(start, number, options.seed)
        if options.reads_maps:
            samples = mapper(begun)
            scores.append(options.map_scores(samples.variance, samples.images, samples.labels))
            images.append(to_uint8(samples.images))
            count = samples.nfe
        else:
            images.append(to_uint8(Origin.of(begun).image.cpu()))
    made = torch.stack(images, 1)
    found = {"fresh": made, "fresh_evaluations": torch.full((len(made),), count)}
    return found | ({"fresh_scores": torch.stack(scores, 1)} if scores else {})
