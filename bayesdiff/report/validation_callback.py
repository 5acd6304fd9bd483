"""Are the maps of a freshly trained model right? A callback for a Trainer of one's own."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.requirements import require_data, require_module
from bayesdiff.machine.ranks import rank
from bayesdiff.metrics.validation import Validation, reference_at_once, reference_of, validate
from bayesdiff.report import figures
from bayesdiff.report.loggers import log_figure
from bayesdiff.solvers import Solver
from bayesdiff.solvers.step import check_solver
from bayesdiff.uncertainty import Estimator, Samples, starts_of
from bayesdiff.uncertainty.memory import images_at_once


class ValidateUncertainty(Callback):
    """Compares an estimator's maps with a reference ensemble when training ends, and logs it.

    Needs a ``LastLayerLaplace`` before it in the list of callbacks. How many images and members
    there are, the estimator says: ``validate_images`` and ``validate_members``.

    Example::

        laplace = LastLayerLaplace()
        check = ValidateUncertainty(Published(validate_images=8), Euler(20))
        Trainer(callbacks=[laplace, check]).fit(model, datamodule=data)
        check.metrics["validation/image_rank"]

    Args:
        estimator: whose maps are compared.
        solver: of the samples.
        seed: of the samples' noise.
    """

    def __init__(self, estimator: Estimator, solver: Solver, seed: int = 0) -> None:
        estimator.check(solver)
        self.estimator = estimator
        self.solver = solver
        self.seed = seed
        self.validation: Validation | None = None
        self.metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what would fail after it.

        Raises:
            UserError: if there will be no posterior, the solver does not fit, or memory is short.
        """
        model: Any = pl_module
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        if not any(isinstance(callback, LastLayerLaplace) for callback in before):
            raise UserError(
                "ValidateUncertainty needs a posterior; "
                "put LastLayerLaplace() before it in the Trainer's callbacks"
            )
        require_module(model, "ValidateUncertainty", "class_dropout")
        require_data(trainer, "ValidateUncertainty")
        conditional = model.condition is not None and model.class_dropout > 0
        check_solver(self.solver, model.path, conditional)
        for size_of in (images_at_once, reference_at_once):
            size_of(self.estimator, self.solver, model, self._shape(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the maps, the reference and the comparison for the trained weights."""
        model: Any = pl_module
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        laplace = next(c for c in callbacks if isinstance(c, LastLayerLaplace))
        posterior: Any = laplace.posterior
        device, shape = trainer.strategy.root_device, self._shape(trainer)
        training = model.training
        model.to(device).eval()
        space = space_of(trainer.datamodule.data)  # type: ignore[attr-defined]
        decoder = space.values if space.decoded else None
        starts = starts_of(model, self.solver, self.seed, shape, device, decoder)
        estimator = self.estimator.fit(starts, posterior)
        size = images_at_once(estimator, self.solver, model, shape)
        batches = torch.arange(estimator.validate_images).split(size)
        parts = [estimator(starts(numbers.tolist()), posterior) for numbers in batches]
        samples = Samples.join(parts)
        size = reference_at_once(estimator, self.solver, model, shape)
        reference = reference_of(estimator)
        self.validation = validate(samples.variance, starts, posterior, reference, size)
        self.metrics = self.validation.metrics(self.seed)
        model.train(training)
        if rank() == 0:
            self._log(trainer, samples)

    def _log(self, trainer: L.Trainer, samples: Samples) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=trainer.global_step)
        if self.validation is not None:
            made = f"estimator {samples.estimator}, NFE {samples.nfe}"
            figure = figures.validation_scatter(self.validation, made, self.metrics)
            log_figure(trainer, "uncertainty/validation", figure)

    @staticmethod
    def _shape(trainer: L.Trainer) -> tuple[int, ...]:
        return space_of(trainer.datamodule.data).shape  # type: ignore[attr-defined]
