"""What a guarantee of a filtering asks for: share, level, score, and which images are bad."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, share
from bayesdiff.metrics.selection import checked_score
from bayesdiff.runs.build import Run
from bayesdiff.storage.artefacts import key_of
from bayesdiff.studies.filtering.guarantee import require_enough
from bayesdiff.studies.filtering.labels import read_labels, require_labels
from bayesdiff.studies.filtering.other_trainings import trainings
from bayesdiff.studies.filtering.usable import require_usable

CLASS = "class"
_BESIDE = ("labels", "also")


@dataclass(frozen=True)
class Marked:
    """Images of a pool that are known to be good or bad.

    Attributes:
        numbers: of the images, ``(N,)``.
        scores: of the score that filters, ``(N,)``.
        bad: bool ``(N,)``.
    """

    numbers: Tensor
    scores: Tensor
    bad: Tensor


@dataclass(frozen=True, kw_only=True)
class GuaranteeOptions:
    """A share of good images that is to hold among those that a threshold keeps.

    Args:
        guarantee: that share, in (0, 1); None for none.
        guarantee_level: allowed probability, over calibration pools, that it does not hold.
        guarantee_score: filters; one that reads nothing of other images.
        judge: bad is what the run's own classifier takes for another class than its label
            (``class``), or gives its label (without labels: any class) less than this probability.
        labels: CSV of the images that a user calls bad, in place of the judge: ``read_labels``.
        also: run folders, checkpoints or patterns of other trainings, for the same threshold.
    """

    guarantee: float | None = None
    guarantee_level: float = 0.1
    guarantee_score: str = "members.predictive_entropy"
    judge: str | float = CLASS
    labels: str | None = None
    also: Sequence[str] = ()

    def check_guarantee_values(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UserError: one line with the cure.
        """
        if self.guarantee is None:
            for name in _BESIDE:
                if getattr(self, name):
                    raise UserError(f"filtering.{name} is read for filtering.guarantee=0.9, or so")
            return
        for name in ("guarantee", "guarantee_level"):
            if share(f"filtering.{name}", getattr(self, name)) == 0:
                raise UserError(f"filtering.{name}=0 asks for nothing; give a share above 0")
        if self.judge != CLASS:
            words = isinstance(self.judge, str)
            if words or share("filtering.judge", self.judge) == 0:  # type: ignore[arg-type]
                raise UserError(
                    f"unknown filtering.judge {self.judge!r}; choose class, or a probability "
                    "above 0 such as 0.9"
                )
        if self.labels is not None and not isinstance(self.labels, str):
            raise UserError(f"filtering.labels must be a path, got {self.labels!r}")
        if self.labels is not None and self.also:
            raise UserError(
                "filtering.labels are of this training's images, and filtering.also makes others; "
                "leave one of them out"
            )

    @property
    def allowed(self) -> float:
        """Share of bad images among the kept."""
        assert self.guarantee is not None
        # 1 - 0.9 is a little less than 0.1, and no share of images is meant to feel that.
        return round(1 - self.guarantee, 12)

    def check_guarantee(self, run: Run, estimator: str, seeds: Sequence[int], images: int) -> None:
        """Refuse, before any work, a guarantee that could not be given.

        Args:
            run: with its model.
            estimator: name of the run's own.
            seeds: of the pools.
            images: of each pool.

        Raises:
            UserError: one line with the cure.
        """
        if self.guarantee is None:
            return
        require_usable(self, self.guarantee_score, estimator, labelled(run))
        if len(seeds) < 2:
            raise UserError(
                f"filtering.guarantee calibrates on the first of filtering.seeds={list(seeds)} "
                "and is judged on the others; give 2 or more"
            )
        if self.labels is None and self.judge == CLASS and not labelled(run):
            raise UserError(
                "filtering.judge=class needs classes, which this model is not asked for; give a "
                "probability such as filtering.judge=0.9, or filtering.labels"
            )
        count = images
        if self.labels is not None:
            labels = read_labels(self.labels, seeds, images)
            require_labels(self.labels, labels, seeds)
            count = len(labels[seeds[0]])
        try:
            require_enough(count, self.allowed, self.guarantee_level)
        except UserError as error:
            of = "filtering.num_images" if self.labels is None else "labels"
            raise UserError(f"filtering.guarantee={self.guarantee}: {error} ({of})") from error
        if self.also:
            trainings(self.also).check(run)

    def guarantee_sources(self, run: Run) -> list[Any]:
        """What the guarantee is made from beside the options: labels and other weights."""
        if self.guarantee is None:
            return []
        text = "" if self.labels is None else Path(self.labels).read_text(encoding="utf-8-sig")
        others: list[str] = []
        if self.also:
            others = sorted(trainings(self.also).networks(run.model, run.folder))
        return [key_of(text), *others] if self.labels or others else []

    @cached_property
    def asked(self) -> str:
        """What is bad, in words."""
        if self.labels is not None:
            return f"labelled so in {Path(self.labels).name}"
        if self.judge == CLASS:
            return "taken for another class by the judge"
        return f"given less than {self.judge} by the judge"

    def bad_by_judge(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Which images the judge calls bad, bool ``(N,)``.

        Args:
            logits: of the judge, ``(N, K)``.
            labels: classes that were asked for, ``(N,)``, or None.
        """
        if self.judge == CLASS:
            assert labels is not None
            return logits.argmax(1) != labels
        p = logits.double().softmax(1)
        own = p.amax(1) if labels is None else p.gather(1, labels[:, None]).squeeze(1)
        return own < float(self.judge)

    def mark(
        self,
        score: Tensor,
        logits: Tensor,
        labels: Tensor | None,
        own: Mapping[int, bool] | None = None,
    ) -> Marked:
        """The images of a pool that are known to be good or bad.

        Args:
            score: of all its images, ``(N,)``.
            logits: of the judge.
            labels: classes that were asked for.
            own: the user's labels by number, in place of the judge.
        """
        score = checked_score(score, self.guarantee_score).double()
        if own is None:
            return Marked(torch.arange(len(score)), score, self.bad_by_judge(logits, labels))
        numbers = torch.tensor(sorted(own), dtype=torch.long)
        bad = torch.tensor([own[number] for number in numbers.tolist()], dtype=torch.bool)
        return Marked(numbers, score[numbers], bad)


def labelled(run: Run) -> bool:
    """Whether images are asked for by class."""
    return run.model.num_classes is not None
