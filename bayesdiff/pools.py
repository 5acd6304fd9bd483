"""Many images of one seed with all that scores read of them; every part is made once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bayesdiff.artefacts import key_of, read_arrays, write_arrays
from bayesdiff.build import Run
from bayesdiff.data.module import to_uint8
from bayesdiff.distributed import barrier, gather_rows, rank, world_size
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.progress import track
from bayesdiff.solvers import Solver
from bayesdiff.stages import make_maps, starts
from bayesdiff.uncertainty import Ensemble, Estimator, Samples
from bayesdiff.uncertainty.aleatoric import aleatoric
from bayesdiff.uncertainty.memory import images_at_once

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class ImagePool:
    """Samples 0 ... count - 1 of a seed.

    Attributes:
        run: with its trained model.
        solver: of the samples.
        posterior: of the head.
        count: images.
        seed: of their noise.
        folder: where the parts are kept.
        made_from: key of the network, the solver and the posterior.
    """

    run: Run
    solver: Solver
    posterior: HeadPosterior
    count: int
    seed: int
    folder: Path
    made_from: str

    def maps(self, estimator: Estimator) -> Samples:
        """Images with their maps under an estimator."""
        ready = replace(estimator, num_images=self.count)
        key = self._key(repr(ready), *estimator.sources(self.run))
        path = self._path(estimator.name, key)
        return make_maps(self.run, self.solver, ready, self.posterior, path, key, self.seed)

    def members(self, count: int) -> Tensor:
        """Images of posterior trajectories from the pool's noise, uint8 ``(N, M, C, H, W)``."""
        ensemble = Ensemble(members=count, noise_members=0)

        def batch(numbers: list[int]) -> Rows:
            start = starts(self.run, self.solver, self.seed)(numbers)
            images = ensemble.images(start, self.posterior)[1]
            return {"members": to_uint8(images.cpu()).transpose(0, 1).contiguous()}

        return self._rows("members", repr(ensemble), self._at_once(ensemble), batch)["members"]

    def aleatoric(self, draws: int) -> Rows:
        """The aleatoric scores, each ``(N,)``."""

        def batch(numbers: list[int]) -> Rows:
            start = starts(self.run, self.solver, self.seed)(numbers)
            found = aleatoric(start, draws).scores
            return {name.removeprefix("aleatoric_"): score.cpu() for name, score in found.items()}

        like = Ensemble(members=max(draws, 2), noise_members=0)
        return self._rows("aleatoric", f"aleatoric {draws}", self._at_once(like), batch)

    def _at_once(self, estimator: Estimator) -> int:
        shape = self.run.data.data.images.shape[1:]
        return images_at_once(estimator, self.solver, self.run.model, shape)

    def _rows(self, name: str, what: str, size: int, batch: Callable[[list[int]], Rows]) -> Rows:
        """Rows of all images, batches shared by all processes."""
        key = self._key(what)
        path = self._path(name, key)
        stored = read_arrays(path, key)
        barrier()  # nobody writes before everybody has looked
        if stored is not None:
            return stored
        batches = torch.arange(self.count).split(size)
        mine = list(batches[rank() :: world_size()])
        parts = [batch(each.tolist()) for each in track(mine, f"{name}, seed {self.seed}")]
        if not parts:
            parts = [{key: value[:0] for key, value in batch([0]).items()}]
        place = torch.cat(mine) if mine else torch.zeros(0, dtype=torch.long)
        rows = {
            each: gather_rows(torch.cat([part[each] for part in parts]), place, self.count)
            for each in parts[0]
        }
        if rank() == 0:
            write_arrays(path, key, rows)
        return rows

    def _key(self, *parts: object) -> str:
        return key_of(self.made_from, self.seed, self.count, *parts)

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-seed{self.seed}-{key[:8]}.npz"
