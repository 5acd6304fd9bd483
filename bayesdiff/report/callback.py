"""Pictures while a model trains."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.distributed import rank
from bayesdiff.models import GenerativeModel
from bayesdiff.report import figures
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise, integrate, time_grid


class SampleGrid(Callback):
    """Grids of images, class by class, evenly over the training and after the last epoch.

    Always the same starting noise, few steps, and the averaged weights where there are some.

    Args:
        grids: how many over the whole training, so that short epochs are not slowed by pictures.
        num_steps: solver steps; a grid costs ``rows * classes`` trajectories of them.
        rows: images per class.
    """

    def __init__(self, grids: int = 8, num_steps: int = 10, rows: int = 4) -> None:
        self.grids = at_least("callbacks.samples.grids", grids)
        self.num_steps = at_least("callbacks.samples.num_steps", num_steps)
        self.rows = at_least("callbacks.samples.rows", rows)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the grid here, where Lightning has swapped the averaged weights in."""
        epoch, last = trainer.current_epoch + 1, max(trainer.max_epochs or 1, 1)
        due = epoch == last or epoch * self.grids // last > (epoch - 1) * self.grids // last
        if trainer.sanity_checking or not due:
            return
        model = pl_module.whole()  # type: ignore[operator]
        if rank():
            return
        data = trainer.datamodule.data  # type: ignore[attr-defined]
        images, labels = self.sample(model, data.images.shape[1:])
        columns = len(data.classes) if labels is not None and len(data.classes) <= 12 else 10
        figure = figures.sample_grid(
            images, labels, data.classes, columns, f"epoch {epoch}, {self.num_steps} steps"
        )
        figures.save(figure, Path(trainer.default_root_dir) / "figures" / "training.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("samples", figure, global_step=trainer.global_step)

    @torch.inference_mode()
    def sample(
        self, model: GenerativeModel, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Images ``(rows * classes, C, H, W)`` in rows of all classes, and their labels."""
        classes = model.num_classes or 10
        count = self.rows * classes
        labels = torch.arange(count, device=model.device) % classes
        solver = {"flow": Euler, "diffusion": DDIM}[model.path.family](self.num_steps)
        times = time_grid(solver.grid, model.path, self.num_steps)
        steps = solver.steps(model.path, model.prediction, times)
        given = labels if model.num_classes else None
        noise = SampleNoise(0, range(count), shape)
        field = Field(model, given, count)
        images = integrate(field, steps, noise().to(model.device), noise)
        return images.cpu(), None if given is None else given.cpu()
