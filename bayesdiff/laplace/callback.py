"""Last-layer Laplace as a Lightning callback, after training or on its own."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.block.kinds import KINDS, Beside
from bayesdiff.laplace.block.layers import in_words
from bayesdiff.laplace.block.posterior import LayersPosterior, statistics_of
from bayesdiff.laplace.curvature import check_pass_of, fit_curvature
from bayesdiff.laplace.objective import curved_objective
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.laplace.requirements import require_data, require_module
from bayesdiff.laplace.structures import check_likelihood, check_settings, check_structure
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.machine.ranks import rank
from bayesdiff.models.conditions import values_of
from bayesdiff.options.spelling import near
from bayesdiff.storage.artefacts import Artefact, key_of, weights_key
from bayesdiff.storage.locks import together

log = logging.getLogger(__name__)

_OWN = (
    "path", "structure", "sigma_noise", "prior_precision", "n_eff", "rank", "folder", "context",
)  # fmt: skip
_BESIDE = tuple(field.name for field in fields(Beside))
# Options of fit_curvature, and those that make what there was without them.
_PASS = ("draws", "num_images", "batch_size", "seed", "time_bins", "objective")
_PLAIN = (("time_bins", 1), ("objective", "likelihood"))


class LastLayerLaplace(Callback):
    """Fits the posterior of the head when training ends, and logs what it found.

    Works with any ``GenerativeModel`` whose data module holds ``data.images`` and ``data.labels``,
    or what else its condition reads;
    put it behind the weight-averaging callback, and it sees the averaged weights.

    Args:
        path: new file that keeps the curvature; None keeps it in memory.
        structure: what is kept of the data's part, see ``HeadPosterior.fit``.
        sigma_noise: number, ``mle`` or ``mle_per_time``.
        prior_precision: number or ``evidence``.
        n_eff: images the likelihood counts; None for those of the pass.
        rank: of ``structure="subspace"``.
        folder: in place of ``path``, where the file has a name of its own, see ``file_name``.
        context: what the features depend on beside the weights, plain values; a kept curvature of
            another context is made again.
        options: those of ``fit_curvature``, draws, num_images, batch_size, seed, time_bins and
            objective; and those of ``Beside`` for a posterior of layers beside the head, in
            ``block``, such as ``subset="all"``. What is kept of them lies next to the curvature,
            as ``block-....safetensors``.

    Raises:
        UserError: for an option that there is not, or a value that cannot work.

    Example:
        After the example of ``GenerativeModel``; ``Trainer(callbacks=[laplace])`` does as much:

        >>> from bayesdiff.data.sources import digits
        >>> laplace = LastLayerLaplace(num_images=64)
        >>> posterior = laplace.fit(model, digits())
        >>> features = model.net.features(x_t, t)
        >>> posterior.predictive_variance(features).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        structure: str = "full",
        sigma_noise: float | str = "mle",
        prior_precision: float | str = 1.0,
        n_eff: float | None = None,
        rank: int | None = None,
        folder: Path | None = None,
        context: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        for name in options:
            if name not in (*_PASS, *_BESIDE):
                meant = near(name, (*_OWN, *_PASS, *_BESIDE))
                raise UserError(f"LastLayerLaplace has no option {name!r}{meant}")
        self.beside = Beside(**{k: v for k, v in options.items() if k in _BESIDE})
        curvature = {k: v for k, v in options.items() if k in _PASS}
        self.settings: dict[str, Any] = {
            "structure": structure,
            "sigma_noise": sigma_noise,
            "prior_precision": prior_precision,
            "n_eff": n_eff,
            "rank": rank,
        }
        check_settings(**self.settings, time_bins=curvature.get("time_bins", 1))
        self.beside.check(structure, sigma_noise)
        self.pass_options, self.context = curvature, context
        self.objective = str(curvature.get("objective", "likelihood"))
        self.path = None if path is None else Path(path)
        if folder is not None:
            self.path = folder / self.file_name
        self.posterior: HeadPosterior | None = None
        self.block: LayersPosterior | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what would fail after it.

        Raises:
            UserError: if the images or a usable head are missing, or do not go with the settings,
                or if the file is there already.
        """
        module: Any = pl_module
        require_module(module, "LastLayerLaplace")
        given = () if module.condition is None else (module.condition.field,)
        data = require_data(trainer, "LastLayerLaplace", *given, "fingerprint")
        self.check(module, len(data.images), space_of(data).shape)
        paths = (self.path, self.block_path if self.beside.asked else None)
        for path in paths:
            if path is not None and path.exists():
                raise UserError(
                    f"{path} holds what belongs to the weights before this training; delete it, "
                    "or give LastLayerLaplace another path"
                )

    def check(self, model: Any, images: int, shape: Sequence[int]) -> None:
        """Refuse a head, or images of a number and shape, that the settings do not go with."""
        structure, sigma, rank = (self.settings[k] for k in ("structure", "sigma_noise", "rank"))
        curved = curved_objective(model, self.objective)
        check_likelihood(
            curved.said, curved.scaled, structure, sigma, in_words(self.beside.subset)
        )
        count, size = check_pass_of(model, images, shape, self.pass_options)
        check_structure(structure, rank, size, count)
        if self.beside.asked:
            self.beside.check_network(model.net, count)

    @property
    def file_name(self) -> str:
        """Of the curvature, by the options of its pass: others lie beside it."""
        return f"curvature-{key_of(self._pass)[:8]}.safetensors"

    @property
    def block_path(self) -> Path | None:
        """Where the factors of other layers than the head are kept."""
        name = f"block-{key_of(self._block_pass)[:8]}.safetensors"
        return None if self.path is None else self.path.with_name(name)

    @property
    def _pass(self) -> dict[str, Any]:
        return {k: v for k, v in self.pass_options.items() if (k, v) not in _PLAIN}

    @property
    def _block_pass(self) -> dict[str, Any]:
        apart = [name for name, _ in _PLAIN]
        options = {k: v for k, v in self.pass_options.items() if k not in apart}
        return options | self.beside.options

    def discard_others(self, weights: str) -> None:
        """Remove files beside ``path`` that were made from other weights than these."""
        if self.path is None or rank():
            return
        kinds: list[tuple[str, Any]] = [("curvature", Curvature)]
        kinds += [("block", kind.factors) for kind in KINDS.values()]
        for name, kind in kinds:
            for path in self.path.parent.glob(f"{name}-*.safetensors"):
                with suppress(UserError):  # what cannot be read is refused where it is needed
                    if not kind.load(path).source.startswith(weights):
                        log.info("%s belongs to other weights and is removed", path)
                        path.unlink()

    def check_files(self) -> None:
        """Refuse kept files that cannot be read, before there is any work they could waste."""
        if self.path is not None and self.path.is_file():
            Curvature.load(self.path)
        path = self.block_path if self.beside.asked else None
        if path is not None and path.is_file():
            self.beside.kind.factors.load(path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the posterior of the trained weights."""
        # Lightning has already moved the model to the CPU.
        pl_module.to(trainer.strategy.root_device)
        data = trainer.datamodule.data  # type: ignore[attr-defined]
        self.fit(pl_module, data)
        for logger in trainer.loggers:
            logger.log_metrics(self.statistics() | self.block_statistics(), trainer.global_step)

    def fit(self, model: Any, data: Any) -> HeadPosterior:
        """Posterior for the model's present weights; a kept curvature of the same is reused."""
        with nullcontext() if self.path is None else together(self.path):
            weights = weights_key(model)
            curvature = self._curvature(model, data, self.source(weights, data))
            factors = None
            if self.beside.asked:
                source = self._block_source(weights, data)
                kept = self.block_path, source
                factors = self.beside.kind.once(model, data, *kept, **self._block_pass)
        return self._settled(model, curvature, factors)

    def kept(self, model: Any, data: Any) -> HeadPosterior | None:
        """The posterior where all it needs is kept; None where ``fit`` would pass over data."""
        stored = self.stored(model, data)
        if None in stored.values():
            return None
        return self._settled(model, stored["curvature"], stored.get("block"))

    def stored(self, model: Any, data: Any) -> dict[str, Any]:
        """What ``fit`` keeps for the model's present weights, by stage; None for what is not."""
        weights = weights_key(model)
        found: dict[str, Any] = {"curvature": self._stored(self.source(weights, data))}
        if self.beside.asked:
            source = self._block_source(weights, data)
            found["block"] = self.beside.kind.stored(self.block_path, source)
        return found

    def _curvature(self, model: Any, data: Any, source: str) -> Curvature:
        """What is kept of this source, or a new one."""

        def make() -> Curvature:
            options = self.pass_options | {"encode": space_of(data).encode}
            values = values_of(model.condition, data)
            return fit_curvature(model, data.images, values, source=source, **options)

        if (path := self.path) is None:
            return make()
        file = Artefact(path, source, "curvature")
        return file.once(lambda: self._stored(source), make, lambda new: new.save(path))

    def _settled(self, model: Any, curvature: Curvature, factors: Any) -> HeadPosterior:
        curvature.require_likelihood(likelihood_of(model).name, self.objective)
        self.posterior = HeadPosterior.fit(curvature, **self.settings)
        _remark(self.posterior)
        if factors is not None:
            prior = self.settings["prior_precision"], self.beside.prior_per
            self.block = self.beside.kind.posterior(self.posterior, factors, *prior)
        return self.posterior

    def _block_source(self, weights: str, data: Any) -> str:
        return f"{weights}-{data.fingerprint}-{key_of(self._block_pass, *self.context)}"

    def source(self, weights: str, data: Any) -> str:
        """What the curvature of these weights and data comes from."""
        return f"{weights}-{data.fingerprint}-{key_of(self._pass, *self.context)}"

    def block_statistics(self) -> dict[str, float]:
        """How much the data say of other layers, as flat scalars; none without them."""
        return {} if self.block is None else statistics_of(self.block)

    def statistics(self) -> dict[str, float]:
        """What the fit found, as flat scalars for a logger."""
        if self.posterior is None:
            return {}
        low, high = self.posterior.eigenvalue_range
        evidence = self.posterior.log_evidence() if self.posterior.has_evidence else None
        distance, scaled = self.posterior.distance, self.posterior.curvature.scaled
        return {
            "laplace/eigenvalue_min": low,
            "laplace/eigenvalue_max": high,
            "laplace/effective_parameters": self.posterior.effective_parameters,
            "laplace/parameters": self.posterior.num_parameters,
            **({} if evidence is None else {"laplace/log_evidence": evidence}),
            **({"laplace/sigma_noise": self.posterior.sigma_noise} if scaled else {}),
            "laplace/prior_precision": self.posterior.prior_precision,
            "laplace/n_eff": self.posterior.n_eff,
            **({} if distance is None else {"laplace/distance_from_optimum": distance}),
        }

    def _stored(self, source: str) -> Curvature | None:
        if self.path is None or not self.path.is_file():
            return None
        curvature = Curvature.load(self.path)
        if curvature.source.rpartition("-")[0] != source.rpartition("-")[0]:
            curvature.require_source(source)
        if curvature.source == source and curvature.gradient is None:
            log.info("%s is of an older version and is made again", self.path)
            return None
        # The same weights and data, but another number of draws or images: made anew.
        return curvature if curvature.source == source else None


def _remark(posterior: HeadPosterior) -> None:
    """Say so where directions without data have a prior that the others make look like none."""
    known = posterior.eigenvalues[posterior.eigenvalues > 0]
    free = posterior.num_parameters - posterior.rank if posterior.rank is not None else 0
    if free and len(known) and float(known.min()) > 100 * posterior.prior_precision:
        numbers = free, posterior.num_parameters, posterior.prior_precision, float(known.min())
        log.warning(
            "laplace: %d of %d directions have the prior alone, and prior_precision=%g is far "
            "below the data's %.3g; maps will be mostly those directions, raise it",
            *numbers,
        )
