"""Many images of one seed with all that scores read of them; every part is made once."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdiff.data.spaces import to_uint8
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.runs.build import Run
from bayesdiff.runs.setup import Setup, starts
from bayesdiff.runs.stages import made_rows, make_maps
from bayesdiff.storage.artefacts import Artefact, key_of
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Ensemble, Estimator, Samples, Start
from bayesdiff.uncertainty.estimator import AS_BEFORE, WITHOUT_EFFECT
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.scores.aleatoric import aleatoric
from bayesdiff.uncertainty.scores.likelihood import log_likelihood, random_probes

log = logging.getLogger(__name__)

# Images of one file: an interrupted pool loses at most these, and a larger pool adds to them.
BLOCK = 500
# Tells the likelihood's random signs apart from what else is drawn for the same samples.
_PROBES = 80_021


@dataclass(frozen=True)
class ImagePool:
    """Samples 0 ... count - 1 of a seed.

    Attributes:
        at: what they are made with; its estimator is not among it.
        count: images.
        seed: of their noise.

    Example:
        >>> pool = ImagePool(None, count=1200, seed=0)
        >>> [len(block) for block in pool.blocks]  # images of one file
        [500, 500, 200]
    """

    at: Setup
    count: int
    seed: int

    @property
    def run(self) -> Run:
        """With its trained model."""
        return self.at.run

    @property
    def posterior(self) -> HeadPosterior:
        """Of the head."""
        return self.at.posterior

    @property
    def folder(self) -> Path:
        """Where the parts are kept, for all studies of a run."""
        return self.at.run.folder / "pools"

    def maps(self, estimator: Estimator) -> Samples:
        """Images with their maps under an estimator."""
        return Samples.join([self._block_of_maps(estimator, block) for block in self.blocks])

    @property
    def blocks(self) -> list[range]:
        """Numbers of the images that share a file."""
        return [
            range(first, min(first + BLOCK, self.count)) for first in range(0, self.count, BLOCK)
        ]

    def start(self, numbers: Sequence[int]) -> Start:
        """The samples with these numbers, at their noise."""
        return starts(self.run, self.at.solver, self.seed)(numbers)

    def _block_of_maps(self, estimator: Estimator, block: range) -> Samples:
        made_by = _settings(estimator), _code(estimator), estimator.sources(self.run)
        key = self._key(block, estimator.name, *made_by)
        path = self._path(estimator.name, block, key)
        log.info("pool: seed %d, images %d to %d", self.seed, block[0], block[-1])
        at = replace(self.at, estimator=estimator)
        return make_maps(at, Artefact(path, key), self.seed, block)

    def members(self, count: int) -> Tensor:
        """Images of posterior trajectories from the pool's noise, uint8 ``(N, M, C, H, W)``."""
        ensemble = Ensemble(members=count, noise_members=0)

        def batch(numbers: list[int]) -> Rows:
            images = ensemble.images(self.start(numbers), self.posterior)[1]
            return {"members": to_uint8(images.cpu()).transpose(0, 1).contiguous()}

        return self._rows("members", f"members {count}", self._at_once(ensemble), batch)["members"]

    def aleatoric(self, draws: int) -> Rows:
        """The aleatoric scores, each ``(N,)``, and their NFE."""

        def batch(numbers: list[int]) -> Rows:
            found = aleatoric(self.start(numbers), draws)
            rows = {
                name.removeprefix("aleatoric_"): score.cpu()
                for name, score in found.scores.items()
            }
            return rows | {"nfe": torch.full((len(numbers),), found.nfe)}

        like = Ensemble(members=max(draws, 2), noise_members=0)
        return self._rows("aleatoric", f"aleatoric {draws}", self._at_once(like), batch)

    def zigzag(self, draws: int, rounds: int) -> Rows:
        """The aleatoric scores behind several answers in a row, each ``(N,)``, and their NFE."""

        def batch(numbers: list[int]) -> Rows:
            start = self.start(numbers)
            found = aleatoric(start, draws, rounds=rounds)
            rows = {
                name.replace("aleatoric", "zigzag"): score.cpu()
                for name, score in found.scores.items()
            }
            return rows | {"nfe": torch.full((len(numbers),), found.nfe)}

        like = Ensemble(members=max(draws, 2), noise_members=0)
        return self._rows("zigzag", f"zigzag {draws} {rounds}", self._at_once(like), batch)

    def likelihood(self, images: Tensor, num_steps: int) -> Rows:
        """Bits per dimension of the pool's images under the model itself, ``(N,)``, and their NFE.

        Args:
            images: ``(N, C, H, W)`` in [-1, 1], those of ``maps``.
            num_steps: of the probability-flow equation, four evaluations and derivatives each.
        """

        def batch(numbers: list[int]) -> Rows:
            start = self.start(numbers)
            probes = random_probes(start.noise.fork(_PROBES))
            found = log_likelihood(start.field(), images[numbers], probes, num_steps)
            nfe = torch.full((len(numbers),), found.nfe)
            return {"bits_per_dim": found.bits_per_dim.cpu(), "nfe": nfe}

        # An evaluation with its derivative holds about as much as two.
        like = Ensemble(members=2, noise_members=0)
        return self._rows("likelihood", f"likelihood {num_steps}", self._at_once(like), batch)

    def _at_once(self, estimator: Estimator) -> int:
        shape = self.run.data.space.shape
        return images_at_once(estimator, self.at.solver, self.run.model, shape)

    def _rows(self, name: str, what: str, size: int, batch: Callable[[list[int]], Rows]) -> Rows:
        """Rows of all images, block after block."""
        parts = [self._block(name, what, size, batch, block) for block in self.blocks]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _block(
        self, name: str, what: str, size: int, batch: Callable[[list[int]], Rows], block: range
    ) -> Rows:
        """Rows of one block."""
        key = self._key(block, what)
        path = self._path(name, block, key)
        what = f"{name}, seed {self.seed}, from {block.start}"
        return made_rows(Artefact(path, key), block, size, batch, what)

    def _key(self, block: range, *parts: object) -> str:
        return key_of(self.at.made_from, self.seed, block.start, block.stop, *parts)

    def _path(self, name: str, block: range, key: str) -> Path:
        return self.folder / f"{name}-seed{self.seed}-from{block.start}-{key[:8]}.npz"


def _settings(estimator: Estimator) -> dict[str, object]:
    """Those that change a map; which samples get one is the pool's own business."""
    values = {field.name: getattr(estimator, field.name) for field in fields(estimator)}
    values = {k: v for k, v in values.items() if (k, v) not in AS_BEFORE}
    return {k: v for k, v in values.items() if k not in (*WITHOUT_EFFECT, "num_images")}


def _code(estimator: Estimator) -> dict[str, str]:
    """The user's own files behind an estimator and what it holds."""
    parts: list[Any] = [
        estimator,
        *(getattr(estimator, field.name) for field in fields(estimator)),
    ]
    kinds = {part if inspect.isroutine(part) else type(part) for part in parts}
    names = [f"{k.__module__}.{k.__qualname__}" for k in kinds if k.__module__ != "builtins"]
    return code_of([{"_target_": name} for name in names])
