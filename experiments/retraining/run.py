"""Which map predicts what training again would change? Rank, size and cover of every method.

    python experiments/retraining/run.py [DATA_MODEL ...] [seed=K ...] [method=NAME ...]

Networks are those of networks.py, trained if they do not exist; maps are kept under
outputs/retraining, so that an interrupted study goes on where it was. Settings and methods of
earlier calls stay in results.json.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from aleatoric import AleatoricTrace
from bench import Bench, Maps, images_of
from networks import EXTRA, REFERENCE, SETTINGS, UNDER_TEST, WITH_DROPOUT
from torch import Tensor

from bayesdiff.laplace.block.posterior import BlockPosterior
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.metrics.agreement import agreement, image_rank, pixel_rank
from bayesdiff.runs.training import images_seen
from bayesdiff.storage.artefacts import read_json, write_json
from bayesdiff.studies.script import Asked
from bayesdiff.uncertainty import (
    Checkpoints,
    Ensemble,
    Linearised,
    MCDropout,
    Published,
    Subnetwork,
    Swag,
    VarianceHead,
)
from bayesdiff.uncertainty.calibration import pair_sizes, size_factor

HERE = Path(__file__).parent
MEMBERS = 32
# What needs one training and has seen no other, fixed before any setting but the digits flow.
BEST = "all"
Z = 1.96
STATISTICS = ("image_rank", "pixel_rank", "size", "mean_size", "coverage")


def linearised() -> Linearised:
    """First-order maps along as many directions as ensembles have members."""
    return Linearised(draws=MEMBERS, derivative="difference", noise_draws=0, seed=1)


def sampled() -> Ensemble:
    """Members, each with weights of its own."""
    return Ensemble(members=MEMBERS, noise_members=0, seed=1)


def wide(
    bench: Bench, name: str, subset: Any, estimator: Any, per: str = "layer", seen: bool = True
) -> Maps:
    """Under the posterior of more layers, priors by their own evidence."""
    n_eff = float(images_seen(bench.run)) if seen else bench.head.n_eff
    head = HeadPosterior.fit(bench.head.curvature, prior_precision="evidence", n_eff=n_eff)
    block = BlockPosterior.beside(head, bench.factors(subset), "evidence", per)
    return bench.maps(name, estimator, head, block)


def not_negative(maps: Maps) -> Maps:
    """Estimates below 0, which a trace from few probes has, count as 0, so that sums are sizes."""
    return replace(maps, variance=maps.variance.clamp(min=0))


METHODS: dict[str, Callable[[Bench], Maps]] = {
    "head": lambda b: b.maps("head", sampled()),
    "head_linearised": lambda b: b.maps("head_linearised", linearised()),
    "last_block": lambda b: wide(b, "last_block", "last_block", linearised(), seen=False),
    "last_block_sampled": lambda b: wide(
        b, "last_block_sampled", "last_block", sampled(), seen=False
    ),
    "all": lambda b: wide(b, "all", "all", linearised()),
    "all_one_prior": lambda b: wide(b, "all_one_prior", "all", linearised(), per="subset"),
    "all_sampled": lambda b: wide(b, "all_sampled", "all", sampled()),
    "all_seen_once": lambda b: wide(b, "all_seen_once", "all", linearised(), seen=False),
    "checkpoints": lambda b: b.maps("checkpoints", Checkpoints()),
    "swag": lambda b: b.maps("swag", Swag(members=MEMBERS, seed=1)),
    "mc_dropout_head": lambda b: b.maps("mc_dropout_head", MCDropout(members=MEMBERS, seed=1)),
    "subnetwork": lambda b: b.maps("subnetwork", Subnetwork(members=MEMBERS, seed=1)),
    "subnetwork_1_percent": lambda b: b.maps(
        "subnetwork_1_percent", Subnetwork(members=MEMBERS, share=0.01, seed=1)
    ),
    "published": lambda b: b.maps("published", Published()),
    # Of the training target and of the data: no variance of the weights, there for comparison.
    "variance_head": lambda b: b.maps("variance_head", VarianceHead()),
    "variance_head_marginal": lambda b: b.maps(
        "variance_head_marginal", VarianceHead(target="marginal")
    ),
    "aleatoric_trace": lambda b: not_negative(b.maps("aleatoric_trace", AleatoricTrace())),
}
# Variants that are compared on the digits flow alone.
OF_DIGITS = (
    *("head_linearised", "last_block_sampled", "all_sampled", "all_seen_once", "subnetwork"),
)
# Of a network that was trained with dropout, against the same retrainings.
DROPPED: dict[str, Callable[[Bench], Maps]] = {
    "mc_dropout_network": lambda b: b.maps(
        "mc_dropout_network", MCDropout(members=MEMBERS, where="network", seed=1)
    ),
}


def compared(maps: Maps, reference: Tensor, apart: Tensor) -> dict[str, float]:
    """Ranks, size and cover of one method on one network.

    Args:
        maps: of the method.
        reference: variance of the retrained images, ``(N, C, H, W)``.
        apart: squared distances of retrained images from the shown ones, ``(M, N, C, H, W)``.
    """
    found = agreement(maps.variance, reference, seed=0)
    named = {key.replace("spread_ratio", "size"): value for key, value in found.items()}
    inside = apart <= Z**2 * maps.variance.clamp(min=0)
    return named | {
        "mean_size": float(maps.variance.sum() / reference.sum()),
        "coverage": float(inside.double().mean()),
        "nfe": maps.nfe,
        "seconds": maps.seconds,
    }


def calibrated(variance: Tensor, own: Tensor, extra: Sequence[Tensor]) -> Tensor:
    """Maps of the second half of the images, their size fitted to extra trainings on the first."""
    half = len(variance) // 2
    spread = pair_sizes(torch.stack([own, *extra])[:, :half]).mean(0)
    factor = float(size_factor(variance[:half].double().flatten(1).sum(1), spread))
    return factor * variance[half:]


def of_network(setting: str, seed: int, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """All methods on one network under test."""
    bench = Bench(setting, seed)
    images = images_of(bench, [*REFERENCE, *EXTRA])
    own, others = images[seed], [images[k] for k in REFERENCE if k != seed]
    reference = torch.stack(others).var(0)
    apart = (torch.stack(others) - own).square()
    found = {}
    for name in names:
        if setting == "digits_flow" or name not in OF_DIGITS:
            maps = METHODS[name](bench)
            found[name] = compared(maps, reference, apart)
            print(setting, seed, name, {k: round(found[name][k], 3) for k in STATISTICS})
    if seed in WITH_DROPOUT:
        found |= of_dropped(setting, seed, reference, others)
    if BEST in names:
        maps, half = METHODS[BEST](bench), bench.count // 2
        fitted = calibrated(maps.variance, own, [images[k] for k in EXTRA])
        there = replace(maps, variance=fitted)
        found[f"{BEST}_calibrated"] = compared(there, reference[half:], apart[:, half:])
    pair = Maps(torch.stack([own, *(images[k] for k in EXTRA)]).var(0), 20, float("nan"))
    found["two_trainings"] = compared(pair, reference, apart)
    found["retraining"] = reliability(others) | {
        "coverage": float((apart <= Z**2 * reference).double().mean()),
        "summed_variance": float(reference.flatten(1).sum(1).mean()),
    }
    return found


def of_dropped(
    setting: str, seed: int, reference: Tensor, others: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """Methods on the network that was trained with dropout: its images are its own."""
    bench, found = Bench(setting, seed, dropout=True), {}
    for name, method in DROPPED.items():
        maps = method(bench)
        assert maps.images is not None
        apart = (torch.stack(list(others)) - maps.images).square()
        found[name] = compared(maps, reference, apart)
    return found


def reliability(others: Sequence[Tensor]) -> dict[str, float]:
    """How well the ranks of the reference repeat: halves of it, Spearman-Brown, all splits."""
    from itertools import combinations

    count, found = len(others), {"image_rank": [], "pixel_rank": []}
    for first in combinations(range(count), count // 2):
        halves = [
            torch.stack([others[k] for k in part]).var(0)
            for part in (first, [k for k in range(count) if k not in first])
        ]
        found["image_rank"].append(image_rank(*halves))
        found["pixel_rank"].append(pixel_rank(*halves))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {name: 2 * r / (1 + r) for name, r in means.items()}


def main(words: Sequence[str]) -> None:
    """Compare, and add to the results."""
    asked = Asked.of(words, SETTINGS, "seed", "method")
    names = asked.options["method"] or [*METHODS]
    seeds = [int(seed) for seed in asked.options["seed"]] or [*UNDER_TEST]
    for setting in asked.names or SETTINGS:
        for seed in seeds:
            results = read_json(HERE / "networks.json") or {}
            mine = results.setdefault(setting, {}).setdefault(str(seed), {})
            mine |= of_network(setting, seed, names)
            write_json(HERE / "networks.json", results)


if __name__ == "__main__":
    main(sys.argv[1:])
