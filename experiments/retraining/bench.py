"""One network under test: its maps by every method, and what its retrainings make of the noise."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from networks import STORE, prepared
from torch import Tensor

from bayesdiff.laplace.block.posterior import BlockPosterior
from bayesdiff.laplace.block.record import BlockFactors
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.options.values import plain
from bayesdiff.pipeline import settings_of
from bayesdiff.solvers import integrate
from bayesdiff.storage.artefacts import key_of, read_arrays, weights_key, write_arrays
from bayesdiff.uncertainty import Estimator, Starts, starts_of
from bayesdiff.uncertainty.wider import with_block

IMAGES = {"digits": 128, "mnist": 64, "fashion": 64}  # with a map
BATCH = 32


@dataclass(frozen=True)
class Maps:
    """Of one method.

    Attributes:
        variance: ``(N, C, H, W)``.
        nfe: network evaluations per image, the image's own among them.
        seconds: processor time per image.
    """

    variance: Tensor
    nfe: float
    seconds: float
    images: Tensor | None = None


class Bench:
    """A network of a setting, with its posterior."""

    def __init__(self, setting: str, seed: int, dropout: bool = False) -> None:
        self.setting, self.seed = setting, seed
        self.count = IMAGES[setting.split("_")[0]]
        self.run, self.solver, self.laplace = prepared(setting, seed, dropout=dropout)
        self.head = self.laplace.fit(self.run.model, self.run.data.data)
        self.place = STORE / "maps" / setting / self.run.folder.name

    @cached_property
    def starts(self) -> Starts:
        """The same noise for all networks of a setting."""
        run = self.run
        return starts_of(run.model, self.solver, 0, run.data.space.shape, run.device, None)

    def maps(
        self,
        name: str,
        estimator: Estimator,
        head: HeadPosterior | None = None,
        block: BlockPosterior | None = None,
    ) -> Maps:
        """Made once."""
        head = head or self.head
        made_from = key_of(
            repr(estimator), settings_of(head), block and block.settings, self.count, self.run.key
        )
        path = self.place / f"{name}.npz"
        stored = read_arrays(path, made_from)
        if stored is None:
            fitted = with_block(estimator, block).for_run(self.run)
            ready = fitted.fit(self.starts, head, self.run.folder)
            begun, parts = time.process_time(), []
            for part in torch.arange(self.count).split(BATCH):
                parts.append(ready(self.starts(part.tolist()), head))
            spent = (time.process_time() - begun) / self.count
            stored = {
                "variance": torch.cat([each.variance for each in parts]),
                "images": torch.cat([each.images for each in parts]),
                "cost": torch.tensor([float(parts[0].nfe), spent], dtype=torch.float64),
            }
            write_arrays(path, made_from, stored)
        nfe, seconds = stored["cost"].tolist()
        return Maps(stored["variance"], nfe, seconds, stored.get("images"))

    def factors(self, subset: Any) -> BlockFactors:
        """Kronecker factors of the layers of a subset, made once."""
        run, options = self.run, plain(self.run.cfg.laplace)
        own = {"folder": run.folder, "context": self.laplace.context}
        mine = LastLayerLaplace(**options | {"subset": subset}, **own)
        mine.fit(run.model, run.data.data)
        assert isinstance(mine.block, BlockPosterior)
        return mine.block.factors


def images_of(bench: Bench, seeds: Any) -> dict[int, Tensor]:
    """What networks of other seeds make of the same noise, ``(N, C, H, W)`` each."""
    found = {}
    for seed in seeds:
        model = bench.run.model if seed == bench.seed else prepared(bench.setting, seed)[0].model
        path = STORE / "images" / bench.setting / f"seed-{seed}.npz"
        key = key_of(weights_key(model), bench.count, repr(bench.solver))
        stored = read_arrays(path, key)
        if stored is None:
            starts = starts_of(
                model, bench.solver, 0, bench.run.data.space.shape, bench.run.device, None
            )
            parts = []
            torch.set_grad_enabled(False)
            for part in torch.arange(bench.count).split(BATCH):
                start = starts(part.tolist())
                parts.append(integrate(start.field(), start.steps(), start.initial(), start.draw))
            torch.set_grad_enabled(True)
            stored = {"images": torch.cat(parts)}
            write_arrays(path, key, stored)
        found[seed] = stored["images"]
    return found
