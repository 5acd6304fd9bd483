"""Pictures while a model trains."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.laplace.requirements import require_data, require_module
from bayesdiff.machine.ranks import rank
from bayesdiff.models import GenerativeModel
from bayesdiff.report import figures
from bayesdiff.report.layout import MOST_CLASSES
from bayesdiff.report.loggers import log_picture
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise, integrate, time_grid


class SampleGrid(Callback):
    """Grids of images, class by class, evenly over the training and after the last epoch.

    Always the same starting noise, few steps, and the averaged weights where there are some.

    Args:
        grids: how many over the whole training, so that short epochs are not slowed by pictures.
        num_steps: solver steps; a grid costs ``max_images`` trajectories of them at most.
        rows: images per class.
        max_images: of a grid; where all classes would be more, some are drawn, evenly chosen.
    """

    def __init__(
        self, grids: int = 8, num_steps: int = 10, rows: int = 4, max_images: int = 64
    ) -> None:
        self.grids = at_least("callbacks.samples.grids", grids)
        self.num_steps = at_least("callbacks.samples.num_steps", num_steps)
        self.rows = at_least("callbacks.samples.rows", rows)
        self.max_images = at_least("callbacks.samples.max_images", max_images)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse before training what would fail in it.

        Raises:
            UserError: for a module that cannot be sampled from, or data without classes.
        """  # noqa: DOC502 - raised one level down
        require_module(pl_module, "SampleGrid")
        require_data(trainer, "SampleGrid", "classes")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the grid here, where Lightning has swapped the averaged weights in."""
        epoch, last = trainer.current_epoch + 1, max(trainer.max_epochs or 1, 1)
        due = epoch == last or epoch * self.grids // last > (epoch - 1) * self.grids // last
        if trainer.sanity_checking or not due:
            return
        whole: Any = getattr(pl_module, "whole", lambda: pl_module)
        model = whole()
        if rank():
            return
        data = trainer.datamodule.data  # type: ignore[attr-defined]
        images, labels = self.sample(model, data.images.shape[1:])
        made = f"epoch {epoch}, {self.num_steps} steps"
        drawn = self.classes(model.num_classes)
        if model.num_classes and len(drawn) < model.num_classes:
            made = f"{len(drawn)} of {model.num_classes} classes, {made}"
        columns = self.rows if labels is not None and len(drawn) <= MOST_CLASSES else 10
        figure = figures.sample_grid(images, labels, data.classes, columns, made)
        path = Path(trainer.default_root_dir) / "figures" / "training.png"
        figures.save(figure, path, pdf=False)  # replaced as the training goes on
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("samples", figure, global_step=trainer.global_step)
            else:
                log_picture(logger, "samples", path, trainer.global_step)

    def classes(self, num_classes: int | None) -> list[int]:
        """The classes of which a grid shows images: all, or some at even distances."""
        known = num_classes or 10
        count = grid_size(num_classes, self.rows, self.max_images) // self.rows
        return [i * known // max(count, 1) for i in range(max(count, 1))]

    @torch.inference_mode()
    def sample(
        self, model: GenerativeModel, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Images ``(B, C, H, W)`` in rows of the classes drawn, and their labels.

        Without classes they are as many as of ten.
        """
        count = grid_size(model.num_classes, self.rows, self.max_images)
        drawn = torch.tensor(self.classes(model.num_classes), device=model.device)
        labels = drawn[torch.arange(count, device=model.device) % len(drawn)]
        solver = {"flow": Euler, "diffusion": DDIM}[model.path.family](self.num_steps)
        times = time_grid(solver.grid, model.path, self.num_steps)
        steps = solver.steps(model.path, model.prediction, times)
        given = labels if model.num_classes else None
        noise = SampleNoise(0, range(count), shape)
        field = Field(model, given, count)
        images = integrate(field, steps, noise().to(model.device), noise)
        return images.cpu(), None if given is None else given.cpu()


def grid_size(num_classes: int | None, rows: int = 4, max_images: int = 64) -> int:
    """Images of one grid: ``rows`` of every class, or of as many classes as the bound allows."""
    if rows >= max_images:
        return max_images
    return rows * min(num_classes or 10, max_images // rows)
