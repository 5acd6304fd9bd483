"""Every score of a pool of images, by name; a higher number means to discard first."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bayesdiff.build import Run
from bayesdiff.data.module import to_uint8
from bayesdiff.metrics.neighbours import neighbours
from bayesdiff.stages import judge
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.image_scores import IMAGE_SCORES, MAP_SCORES
from bayesdiff.uncertainty.member_scores import CONFIDENCE_SCORES, MEMBER_SCORES

Doubts = dict[str, Tensor]


def doubts_of(
    run: Run,
    maps: Mapping[str, Samples],
    members: Tensor | None,
    noise: Mapping[str, Tensor],
    seed: int,
) -> Doubts:
    """Scores ``(N,)`` of one pool; negative variances count as 0.

    The classifier that is read here is trained from another seed than the run's own, which judges.

    Args:
        run: gives the data and the classifier.
        maps: the same images under several estimators.
        members: uint8 ``(N, M, C, H, W)``, or None.
        noise: scores that are known already, the aleatoric ones.
        seed: of the random score.
    """
    from bayesdiff.metrics.features import extract

    size = run.cfg.metrics.batch_size
    samples = next(iter(maps.values())).in_model_range()
    images = to_uint8(samples.images)
    generator = torch.Generator().manual_seed(seed)
    doubts: Doubts = {"random": torch.rand(len(images), generator=generator)}
    for name, made in maps.items():
        variance = made.in_model_range().variance
        found = {k: of(variance, samples.images) for k, of in MAP_SCORES.items()}
        doubts |= {f"{name}.{k}": value for k, value in found.items()}
    doubts |= {f"image.{k}": of(images) for k, of in IMAGE_SCORES.items()}
    doubts |= {f"aleatoric.{k}": value for k, value in noise.items()}
    scorer, known = judge(run, run.cfg.metrics.seed + 1)
    read = extract(scorer, images, size)
    for name, confidence in CONFIDENCE_SCORES.items():
        if samples.labels is not None or name != "off_label":
            doubts[f"classifier.{name}"] = confidence(read.logits, samples.labels)
    near = neighbours(read.features, torch.from_numpy(known.subset))
    doubts |= {"real.realism": -near.realism, "real.rarity": near.rarity.nan_to_num(torch.inf)}
    if members is not None:
        of_members = extract(scorer, members.flatten(0, 1), size)
        given = {
            "images": members.float() / 127.5 - 1,
            "features": of_members.features.unflatten(0, members.shape[:2]),
            "logits": of_members.logits.unflatten(0, members.shape[:2]),
        }
        doubts |= {f"members.{k}": each.of(given[each.reads]) for k, each in MEMBER_SCORES.items()}
    return doubts
