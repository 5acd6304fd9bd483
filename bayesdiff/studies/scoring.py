"""Every score of a pool of images, by name; a higher number means to discard first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.spaces import to_model_range, to_uint8
from bayesdiff.metrics.agreement import ranks_within
from bayesdiff.metrics.neighbours import neighbours
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import judge
from bayesdiff.studies.image_pool import ImagePool, Rows
from bayesdiff.studies.member_encoders import check_encoders, encoder
from bayesdiff.studies.own_scores import (
    OF_MEMBERS,
    OwnScore,
    inputs_of,
    own_scores,
    try_scores,
)
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.data_variance import data_variance_scores
from bayesdiff.uncertainty.scores.likelihood import check_likelihood
from bayesdiff.uncertainty.scores.of_maps_and_images import (
    IMAGE_SCORES,
    MAP_SCORES,
    foreground_mean,
    segmented,
)
from bayesdiff.uncertainty.scores.of_members import CONFIDENCE_SCORES, MEMBER_SCORES

if TYPE_CHECKING:  # torch-fidelity costs seconds
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

# Scores of members that ``members.joint`` puts together.
JOINT = ("predictive_entropy", "log_det")

ScoreTable = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What scores look at beside maps and images, and what that takes.

    Args:
        members: posterior trajectories of every image for the scores of members; 0 for none.
        aleatoric_draws: noise draws for the aleatoric scores; 0 for none.
        aleatoric_zigzag: answers in a row behind each of these draws for scores of their own, 3
            as published; 0 for none.
        likelihood: whether the model's own likelihood is a score; it takes derivatives.
        likelihood_steps: of its probability-flow equation.
        segmentation: callable that gives images in [-1, 1] masks of their foreground; None for
            masks from the images themselves.
        encoders: beside the trained classifier, of the members' features: names of
            ``named_encoders``, each with its weights file or None, or any name with a callable.
        own_scores: of the user's own, by name, see ``studies.own_scores``.
    """

    members: int = 5
    aleatoric_draws: int = 5
    aleatoric_zigzag: int = 0
    likelihood: bool = False
    likelihood_steps: int = 20
    segmentation: Callable[[Tensor], Tensor] | None = None
    encoders: Mapping[str, Any] = field(default_factory=dict)
    own_scores: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse scores that could not be computed.

        Raises:
            UserError: one line with the cure.
        """
        for name in ("members", "aleatoric_draws"):
            if at_least(f"filtering.{name}", getattr(self, name), 0) == 1:
                raise UserError(f"filtering.{name}=1 has no spread; give 2 or more, or 0")
        if at_least("filtering.aleatoric_zigzag", self.aleatoric_zigzag, 0) == 1:
            raise UserError("filtering.aleatoric_zigzag=1 is the plain form; give 2 or more, or 0")
        if self.aleatoric_zigzag and not self.aleatoric_draws:
            raise UserError(
                f"filtering.aleatoric_zigzag={self.aleatoric_zigzag} needs "
                "filtering.aleatoric_draws of 2 or more"
            )
        if not isinstance(self.likelihood, bool):
            raise UserError(f"filtering.likelihood must be true or false, got {self.likelihood!r}")
        at_least("filtering.likelihood_steps", self.likelihood_steps)
        if self.segmentation is not None and not callable(self.segmentation):
            raise UserError(
                f"filtering.segmentation must be a callable with its _target_, got "
                f"{self.segmentation!r}; null takes masks from the images themselves"
            )
        if not isinstance(self.encoders, Mapping):
            raise UserError(
                f"filtering.encoders must name weights files, got {self.encoders!r}; "
                "such as filtering.encoders.clip=path/to/ViT-B-32.pt"
            )
        if self.encoders and not self.members:
            raise UserError("filtering.encoders reads members; give filtering.members, 2 or more")
        for name, own in self.own.items():
            if own.reads & OF_MEMBERS and not self.members:
                raise UserError(f"{name} reads members; give filtering.members, 2 or more")

    @cached_property
    def own(self) -> dict[str, OwnScore]:
        """Scores of the user's own."""
        return own_scores(self.own_scores)


@dataclass(frozen=True)
class Seen:
    """What scores look at beside maps.

    Attributes:
        members: uint8 ``(N, M, C, H, W)``, or None.
        known: scores ``(N,)`` that are known already, by their whole names.
        segmentation: gives images ``(N, C, H, W)`` a mask of the foreground, see ``segmented``;
            None for one from the image itself.
        encoders: see ``ScoreOptions``.
        own: scores of the user's own, by their whole names.
    """

    members: Tensor | None = None
    known: Mapping[str, Tensor] = field(default_factory=dict)
    segmentation: Callable[[Tensor], Tensor] | None = None
    encoders: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, OwnScore] = field(default_factory=dict)


def check_scores(options: ScoreOptions, run: Run) -> None:
    """Try once what the further scores need: files, masks, a velocity everywhere.

    Raises:
        UserError: where one of them is missing.
    """  # noqa: DOC502 - raised one level down
    if options.likelihood:
        check_likelihood(run.model, options.likelihood_steps)
    check_encoders(options.encoders, run)
    try_scores(options.own.values(), run)
    if options.segmentation is not None:
        # On the CPU, before any device is taken.
        segmented(options.segmentation, to_model_range(run.data.data.images[:2]))


def seen_of(made: ImagePool, options: ScoreOptions, images: Tensor) -> tuple[Seen, dict[str, int]]:
    """What scores look at beside maps, and network evaluations behind the costlier ones."""
    members = made.members(options.members) if options.members else None
    parts: dict[str, Rows] = {}
    if options.aleatoric_draws:
        parts["aleatoric"] = made.aleatoric(options.aleatoric_draws)
    if options.aleatoric_zigzag:
        zigzag = made.zigzag(options.aleatoric_draws, options.aleatoric_zigzag)
        parts["aleatoric"] |= {k: v for k, v in zigzag.items() if k != "nfe"}
        parts["zigzag"] = {"nfe": zigzag["nfe"]}
    if options.likelihood:
        parts["likelihood"] = made.likelihood(images, options.likelihood_steps)
    spent = {name: int(rows["nfe"][0]) for name, rows in parts.items() if "nfe" in rows}
    if options.members:
        spent["members"] = options.members * made.start([0]).nfe
    known = {
        f"{name}.{key}": value
        for name, rows in parts.items()
        for key, value in rows.items()
        if key != "nfe"
    }
    return Seen(members, known, options.segmentation, options.encoders, options.own), spent


def score_table(run: Run, maps: Mapping[str, Samples], seen: Seen, seed: int) -> ScoreTable:
    """Scores ``(N,)`` of one pool; negative variances count as 0.

    The classifier that is read here is trained from another seed than the run's own, which judges.

    Args:
        run: gives the data and the classifier.
        maps: the same images under several estimators.
        seen: everything else.
        seed: of the random score.
    """
    samples = next(iter(maps.values())).in_model_range()
    generator = torch.Generator().manual_seed(seed)
    scores: ScoreTable = {"random": torch.rand(len(samples.images), generator=generator)}
    mask = _mask(run, seen.segmentation, samples.images)
    for name, made in maps.items():
        variance = made.in_model_range().variance
        found = {k: of(variance, samples.images) for k, of in MAP_SCORES.items()}
        if mask is not None:
            found["foreground_mean"] = foreground_mean(variance, samples.images, mask)
        scores |= {f"{name}.{k}": value for k, value in found.items()}
    noise = next((m.sampler_noise for m in map(Samples.in_model_range, maps.values())
                  if m.sampler_noise is not None), None)  # fmt: skip
    if noise is not None:  # a stochastic solver's own, of which the posterior knows nothing
        scores["sampler_noise.sum"] = MAP_SCORES["sum"](noise, samples.images)
    scores |= {**data_variance_scores(maps.values()), **seen.known}
    scores |= {f"image.{k}": of(samples.images) for k, of in IMAGE_SCORES.items()}
    return scores | judged(run, samples, seen) | _of_own(run, maps, seen)


def _of_own(run: Run, maps: Mapping[str, Samples], seen: Seen) -> ScoreTable:
    """Scores of the user's own, those of maps for every estimator."""
    found: ScoreTable = {}
    for place, (name, made) in enumerate(maps.items()):
        asked = [own for own in seen.own.values() if own.of_map or not place]
        given = inputs_of(asked, run, made.in_model_range(), seen.members)
        found |= {own.of_estimator(name) if own.of_map else own.name: own(given) for own in asked}
    return found


def judged(
    run: Run,
    samples: Samples,
    seen: Seen,
    kinds: Sequence[str] = ("classifier", "real", "members"),
) -> ScoreTable:
    """Scores ``(N,)`` of these kinds, by a classifier of another seed than the run's own."""
    from bayesdiff.metrics.features import extract

    scorer, known = judge(run, run.cfg.metrics.seed + 1)
    scores: ScoreTable = {}
    if {"classifier", "real"} & {*kinds}:
        read = extract(scorer, to_uint8(samples.images), run.cfg.metrics.batch_size)
        if "classifier" in kinds:
            scores |= _of_classes(read.logits, samples.labels)
        if "real" in kinds:
            near = neighbours(read.features, torch.from_numpy(known.subset))
            rarity = near.rarity.nan_to_num(torch.inf)
            scores |= {"real.realism": -near.realism, "real.rarity": rarity}
    if seen.members is not None and "members" in kinds:
        scores |= _of_members(run, seen.members, scorer)
        scores["members.joint"] = joint(scores, samples.labels)
        for name, source in seen.encoders.items():
            extractor = encoder(run, name, source)
            found = _of_members(run, seen.members, extractor, ("features",))
            scores |= {f"{k}_{name}": value for k, value in found.items()}
    return scores


def scores_of_images(images: Tensor, logits: Tensor, labels: Tensor | None) -> ScoreTable:
    """Scores ``(N,)`` that read nothing but the image.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1].
        logits: ``(N, K)`` of a classifier for them.
        labels: ``(N,)`` that were asked for, or None.
    """
    scores = {f"image.{name}": of(images) for name, of in IMAGE_SCORES.items()}
    return scores | _of_classes(logits, labels)


def _of_classes(logits: Tensor, labels: Tensor | None) -> ScoreTable:
    """Scores of the classes that a classifier sees; ``off_label`` where one was asked for."""
    return {
        f"classifier.{name}": confidence(logits, labels)
        for name, confidence in CONFIDENCE_SCORES.items()
        if labels is not None or name != "off_label"
    }


def joint(scores: ScoreTable, labels: Tensor | None) -> Tensor:
    """What is uncertain by its class and by its pixels: the sum of an image's two ranks ``(N,)``.

    The entropy of the members' classes misses odd strokes of a clear class, that of their pixels
    misses images between two classes. Their units cannot be compared; ranks among the images of
    the same label can.
    """
    both = torch.stack([scores[f"members.{name}"].double() for name in JOINT])
    groups = torch.zeros(both.shape[1], dtype=torch.long) if labels is None else labels
    return ranks_within(both, groups).sum(0)


def _of_members(
    run: Run,
    members: Tensor,
    extractor: "FeatureExtractorBase",
    reads: Sequence[str] = ("images", "features", "logits"),
) -> ScoreTable:
    """Scores of the members that read any of these."""
    from bayesdiff.metrics.features import extract

    read = extract(extractor, members.flatten(0, 1), run.cfg.metrics.batch_size)
    given = {
        "images": members.float() / 127.5 - 1,
        "features": read.features.unflatten(0, members.shape[:2]),
        "logits": read.logits.unflatten(0, members.shape[:2]),
    }
    used = {k: each for k, each in MEMBER_SCORES.items() if each.reads in reads}
    return {f"members.{k}": each.of(given[each.reads]) for k, each in used.items()}


def _mask(run: Run, network: Callable[[Tensor], Tensor] | None, images: Tensor) -> Tensor | None:
    """Masks by the user's own network, on the CPU; None where there is none."""
    if network is None:
        return None
    if isinstance(network, nn.Module):
        network.to(run.device)
    return segmented(network, images.to(run.device), run.cfg.metrics.batch_size).cpu()
