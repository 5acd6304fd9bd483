"""Pictures while a model trains."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.requirements import require_data, require_module
from bayesdiff.machine.ranks import rank
from bayesdiff.models import GenerativeModel, whole_of
from bayesdiff.report import figures
from bayesdiff.report.layout import MOST_CLASSES
from bayesdiff.report.loggers import log_picture
from bayesdiff.report.pictures import figures_of
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise, Step, integrate, plan
from bayesdiff.solvers.step import check_finite, check_solver


class SampleGrid(Callback):
    """Grids of images, class by class, evenly over the training and after its last step.

    Grids are drawn at validations, and after a last step that none follows. Always the same
    starting noise, few steps, and the averaged weights where there are some.

    Args:
        grids: how many over the whole training, so that short epochs are not slowed by pictures.
        num_steps: solver steps; a grid costs ``max_images`` trajectories of them at most.
        rows: images per class.
        max_images: of a grid; where all classes would be more, some are drawn, evenly chosen.

    Example:
        >>> grid = SampleGrid(rows=4, max_images=64)
        >>> grid.size(10), grid.size(100)  # images of 10 and of 100 classes
        (40, 64)
        >>> grid.classes(100)[:5]  # as many as there is room for
        [0, 6, 12, 18, 25]
    """

    def __init__(
        self, grids: int = 8, num_steps: int = 10, rows: int = 4, max_images: int = 64
    ) -> None:
        self.grids = at_least("callbacks.samples.grids", grids)
        self.num_steps = at_least("callbacks.samples.num_steps", num_steps)
        self.rows = at_least("callbacks.samples.rows", rows)
        self.max_images = at_least("callbacks.samples.max_images", max_images)
        self.passed = 0  # of as many equal parts of the training as there are grids

    def state_dict(self) -> dict[str, Any]:
        """How far the training was at the last grid, so that a resumed one draws the same."""
        return {"passed": self.passed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that grid."""
        self.passed = state_dict["passed"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin with no grid drawn, before Lightning loads a checkpoint."""
        self.passed = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what would fail in it.

        Raises:
            UserError: for a module or a path that cannot be sampled from, or data without classes.
        """
        require_module(pl_module, "SampleGrid")
        require_data(trainer, "SampleGrid", "classes")
        module: Any = pl_module
        try:
            self._steps(module)
        except UserError as error:
            raise UserError(f"{error}; or leave grids out, callbacks.samples=null") from None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw here, where Lightning has swapped the averaged weights in."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._draw_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last grid where no validation has come after the last step."""
        if trainer.global_step >= trainer.estimated_stepping_batches:
            self._draw_if_due(trainer, pl_module)

    def _draw_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, if another part of the training has passed since the last grid."""
        passed = int(trainer.global_step * self.grids // trainer.estimated_stepping_batches)
        if passed <= self.passed:
            return
        self.passed = passed
        model = whole_of(pl_module)
        if not rank():
            self._draw(trainer, model)

    def _draw(self, trainer: L.Trainer, model: GenerativeModel) -> None:
        data = trainer.datamodule.data  # type: ignore[attr-defined]
        space = space_of(data)
        states, labels = self.sample(model, space.shape)
        made = f"step {trainer.global_step}, {self.num_steps} solver steps"
        drawn = self.classes(model.num_classes)
        if model.num_classes and len(drawn) < model.num_classes:
            made = f"{len(drawn)} of {model.num_classes} classes, {made}"
        if labels is not None and 1 < len(drawn) <= MOST_CLASSES:
            columns = self.rows
        else:  # a square holds all of them
            columns = max(10, math.ceil(len(states) ** 0.5))
        shown = space.values(states)
        figure = figures_of(space).grid(shown, labels, data.classes, columns, made)
        path = Path(trainer.default_root_dir) / "figures" / "training.png"
        figures.save(figure, path, pdf=False)  # replaced as the training goes on
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("samples", figure, global_step=trainer.global_step)
            else:
                log_picture(logger, "samples", path, trainer.global_step)

    def size(self, num_classes: int | None) -> int:
        """Images of one grid: ``rows`` of every class, or of as many as the bound allows.

        Without classes they are as many as of ten.
        """
        if self.rows >= self.max_images:
            return self.max_images
        return self.rows * min(num_classes or 10, self.max_images // self.rows)

    def classes(self, num_classes: int | None) -> list[int]:
        """The classes of which a grid shows images: all, or some at even distances."""
        known = num_classes or 10
        count = max(self.size(num_classes) // self.rows, 1)
        return [i * known // count for i in range(count)]

    def _steps(self, model: GenerativeModel) -> list[Step]:
        """Of the deterministic method of first order that suits the path."""
        solver = (DDIM if model.path.variance_preserving else Euler)(self.num_steps)
        check_solver(solver, model.path, bool(model.num_classes))
        steps = plan(solver, model.path, model.prediction)
        check_finite(solver, model.prediction, steps)
        return steps

    @torch.inference_mode()
    def sample(
        self, model: GenerativeModel, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Images ``(B, C, H, W)`` in rows of the classes drawn, and their labels."""
        count = self.size(model.num_classes)
        drawn = torch.tensor(self.classes(model.num_classes), device=model.device)
        labels = drawn[torch.arange(count, device=model.device) % len(drawn)]
        given = labels if model.num_classes else None
        condition = given
        if model.condition is not None and not model.num_classes:
            condition = model.condition.of_samples(range(count)).to(model.device)
        noise = SampleNoise(0, range(count), shape)
        field = Field(model, condition, count, noise=noise)
        training = model.training
        model.eval()  # it trains where no validation is
        x_0 = model.path.initial_state(noise().to(model.device))
        images = integrate(field, self._steps(model), x_0, noise)
        model.train(training)
        return images.cpu(), None if given is None else given.cpu()
