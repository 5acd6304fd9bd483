"""Whole data sets as one tensor; batches are index operations on it."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.corruption import RarelyVisited, images_per_epoch
from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import Space

Batch = tuple[Tensor, Tensor | None]


class ImageDataModule(L.LightningDataModule):
    """Serves the images of one ``ImageData`` from memory, on the device that trains.

    Args:
        data: the images.
        batch_size: images per optimiser step over all devices together, so that a run means the
            same on one device and on many.
        flip: mirror half of the training images.
        seed: fixes the order of the images in every epoch.
        given: what comes with the images, ``labels`` or another field of the data.

    Raises:
        UserError: for a batch size that is no positive whole number, or larger than the data.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> module = ImageDataModule(digits(), batch_size=128)
        >>> module.batches  # of an epoch, of 1,497 images
        11
        >>> images, labels = next(iter(module.val_dataloader()))
        >>> images.shape, float(images.min()), float(images.max())
        (torch.Size([128, 1, 8, 8]), -1.0, 1.0)
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int = 128,
        flip: bool = False,
        seed: int = 0,
        given: str = "labels",
    ):
        super().__init__()
        at_least("batch_size", batch_size)
        if batch_size > (most := images_per_epoch(data)):
            raise UserError(
                f"data.batch_size={batch_size} is larger than the {most} training images of "
                f"{data.name}; give {most} or fewer"
            )
        if flip and not data.space.pictures:
            raise UserError(
                f"data.flip=true mirrors images, {data.name} has none; leave data.flip out"
            )
        self.data = data
        self.batch_size = batch_size
        self.flip = flip
        self.seed = seed
        self.given = given

    @property
    def batches(self) -> int:
        """Of an epoch without limit."""
        return images_per_epoch(self.data) // self.batch_size

    @property
    def space(self) -> Space:
        """The states that the batches are of."""
        return self.data.space

    def train_dataloader(self) -> "TrainingBatches":
        """Shuffled batches of this process, a new order in every epoch.

        Raises:
            UserError: if the processes cannot share the batch evenly.
        """
        trainer: L.Trainer = self.trainer  # type: ignore[assignment]
        if self.batch_size % trainer.world_size:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be shared by {trainer.world_size} "
                "processes; choose a multiple"
            )
        return TrainingBatches(self, trainer)

    def val_dataloader(self) -> "ValidationBatches":
        """At most 1,024 test images in fixed batches; every process sees them all."""
        return ValidationBatches(self)


class ValidationBatches:
    """The same whole batches of test images in every epoch."""

    def __init__(self, module: ImageDataModule) -> None:
        # Test images often come sorted by class: a fixed random part of them, not the first ones.
        order = torch.randperm(
            len(module.data.test_images), generator=torch.Generator().manual_seed(0)
        )[:1024]
        self.images, self.encode = module.data.test_images[order], module.space.encode
        given = getattr(module.data, f"test_{module.given}")
        self.given = None if given is None else given[order]
        self.size = min(module.batch_size, len(self.images))

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[Batch]:
        for i in range(0, len(self) * self.size, self.size):
            given = None if self.given is None else self.given[i : i + self.size]
            yield self.encode(self.images[i : i + self.size]), given


class TrainingBatches:
    """Iterates one epoch; the order depends on seed and epoch alone, so a resumed run agrees."""

    def __init__(self, module: ImageDataModule, trainer: L.Trainer) -> None:
        self.module = module
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        grey, images = module.data.intensities, module.data.images
        self.intensities = None if grey is None else grey.to(self.device)
        self.images = images.to(self.device) if grey is None else images
        given = getattr(module.data, module.given)
        self.given = None if given is None else given.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own count of batches says where to go on; see ``__iter__``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load; that both are there tells Lightning that an epoch can be resumed."""

    def __len__(self) -> int:
        return self.module.batches

    def __iter__(self) -> Iterator[Batch]:
        module, trainer = self.module, self.trainer
        # A network that learns one batch by heart must meet the same batch in every epoch.
        overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
        epoch = 0 if overfit else trainer.current_epoch
        generator = torch.Generator().manual_seed(1_000_003 * module.seed + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        if isinstance(module.data, RarelyVisited):
            order = order[torch.isin(order, module.data.visited(epoch))]
        mirrored = torch.rand(len(self.images), generator=generator) < 0.5
        # Batches of this epoch that were seen before a checkpoint in the middle of it.
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        for i in range(seen, len(self)):
            chosen = order[i * module.batch_size : (i + 1) * module.batch_size]
            chosen = chosen[trainer.global_rank :: trainer.world_size].to(self.device)
            images = self._images(chosen, epoch)
            if module.flip:
                flip = mirrored[chosen.cpu()].to(images.device)
                images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            given = None if self.given is None else self.given[chosen]
            yield module.space.encode(images), given

    def _images(self, chosen: Tensor, epoch: int) -> Tensor:
        """Those at these places, drawn for the epoch where every epoch draws its own."""
        if self.intensities is None:
            return self.images[chosen]
        return self.intensities.training(chosen, self.module.seed, epoch)
