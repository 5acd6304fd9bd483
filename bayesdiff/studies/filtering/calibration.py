"""A guarantee carried out: pools as they are made, the threshold of the first, what it keeps."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.runs.setup import Setup
from bayesdiff.studies.filtering.guarantee import guaranteed, risk
from bayesdiff.studies.filtering.guaranteed import GuaranteeOptions, Marked
from bayesdiff.studies.filtering.labels import Labels, read_labels
from bayesdiff.studies.filtering.other_trainings import scored_otherwise, trained_otherwise
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.uncertainty import Estimator, Samples

log = logging.getLogger(__name__)

Row = dict[str, Any]
# Columns of the table.
LINE = ("pool", "images", "kept", "bad", "risk", "risk_low", "risk_high", "risk_of_all")


@dataclass
class Calibration:
    """Pools of a guarantee, as they are made.

    Attributes:
        options: what is asked.
        labels: the user's; None where the judge says what is bad.
        pools: marked images by seed.
        shown: the last pool with marked images.
    """

    options: GuaranteeOptions
    labels: Labels | None = None
    pools: dict[int, Marked] = field(default_factory=dict)
    shown: tuple[Samples, Marked] | None = None

    @classmethod
    def of(cls, options: GuaranteeOptions, seeds: Sequence[int], images: int) -> "Calibration":
        """Without any pool yet."""
        path = options.labels
        return cls(options, None if path is None else read_labels(path, seeds, images))

    def add(
        self, seed: int, samples: Samples, scores: Mapping[str, Tensor], logits: Tensor
    ) -> None:
        """One more pool; nothing without a guarantee.

        Args:
            seed: of the pool.
            samples: its images.
            scores: of these, by name.
            logits: of the judge.
        """
        if self.options.guarantee is None:
            return
        own = None if self.labels is None else self.labels.get(seed, {})
        score = scores[self.options.guarantee_score]
        self.pools[seed] = self.options.mark(score, logits, samples.labels, own)
        if len(self.pools[seed].bad):
            self.shown = samples, self.pools[seed]


def marked_otherwise(
    study: Any, at: Setup, maps: Mapping[str, Estimator]
) -> dict[str, dict[int, Marked]]:
    """Marked images of other trainings, from the noise of every pool that did not calibrate.

    Args:
        study: the filtering, with all its options.
        at: with this training's weights.
        maps: all estimators by name.

    Returns:
        By training and seed, empty but on the first process.
    """
    found: dict[str, dict[int, Marked]] = {}
    for path, there in trained_otherwise(at, study.also):
        for seed in study.seeds[1:]:
            made = ImagePool(there, study.num_images, seed)
            read = scored_otherwise(study, there, maps, study.guarantee_score, made)
            if read is not None:
                found.setdefault(path, {})[seed] = study.mark(*read)
    return found


def guarantee_results(
    options: GuaranteeOptions,
    pools: Mapping[int, Marked],
    others: Mapping[str, Mapping[int, Marked]] | None = None,
) -> dict[str, Any]:
    """The threshold of the first pool, and what it keeps there and elsewhere.

    Args:
        options: what is asked.
        pools: marked images by the pool's seed, those that calibrate first; a pool without any is
            left out of the judgement.
        others: the same of other trainings, by their paths.

    Returns:
        ``holds``; ``threshold``, None where it keeps nothing or, if it holds, every image; rows of
        ``calibration``, ``seeds``, ``new_noise`` (these together) and ``also``.
    """
    first, *rest = pools
    own = pools[first]
    threshold = guaranteed(own.scores, own.bad, options.allowed, options.guarantee_level)
    name = f"filtering.guarantee={options.guarantee}"
    if threshold is None:
        log.warning(
            "%s: no threshold of %s holds at level %g; nothing is kept (of all images %.3g are "
            "bad)", name, options.guarantee_score, options.guarantee_level,
            float(own.bad.double().mean()),
        )  # fmt: skip
    else:
        log.info("%s: %s up to %.4g is kept", name, options.guarantee_score, threshold)
    new = [pools[seed] for seed in rest if len(pools[seed].bad)]
    return {
        "asked": options.guarantee,
        "level": options.guarantee_level,
        "score": options.guarantee_score,
        "bad": options.asked,
        "holds": threshold is not None,
        "threshold": threshold,
        "calibration": {"seed": first, **row_of([own], threshold)},
        "seeds": [{"seed": s, **row_of([pools[s]], threshold)} for s in rest if len(pools[s].bad)],
        "new_noise": row_of(new, threshold) if new else None,
        "also": [
            {"training": path, "seed": seed, **row_of([marked], threshold)}
            for path, by_seed in (others or {}).items()
            for seed, marked in by_seed.items()
        ],
    }


def lines_of(found: Mapping[str, Any]) -> list[Row]:
    """Lines of the table: calibration, every other seed, all of these, other trainings."""
    lines = [{"pool": f"calibration, seed {found['calibration']['seed']}"} | found["calibration"]]
    lines += [{"pool": f"new noise, seed {row['seed']}"} | row for row in found["seeds"]]
    if found["new_noise"]:
        lines.append({"pool": "all new noise"} | found["new_noise"])
    lines += [
        {"pool": f"{Path(row['training']).name}, seed {row['seed']}"} | row
        for row in found["also"]
    ]
    return lines


def guarantee_headlines(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Kept share and risk on new noise, with what was asked in their names."""
    new = found["new_noise"] or {}
    names = {"kept": "share_kept", "risk": "risk"}
    return {f"guarantee/{k}@{found['asked']:g}": new.get(name) for k, name in names.items()}


def row_of(pools: Sequence[Marked], threshold: float | None) -> Row:
    """What a threshold keeps of these pools together."""
    scores = torch.cat([marked.scores for marked in pools])
    bad = torch.cat([marked.bad for marked in pools])
    found = risk(scores, bad, threshold)
    return {
        "images": found.images,
        "kept": found.kept,
        "share_kept": found.share_kept,
        "bad": found.bad,
        "risk": found.risk,
        "risk_low": found.low,
        "risk_high": found.high,
        "risk_of_all": float(bad.double().mean()),
    }
