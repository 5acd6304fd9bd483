"""Training with weights, gradients and optimiser state split over the processes (FSDP2).

Sampling and curvature are not split: there every process holds the whole network, as with DDP.
"""

import copy
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType, fully_shard
from torch.optim.swa_utils import AveragedModel

from bayesdiff.machine.ranks import rank
from bayesdiff.models import GenerativeModel

_FULL = StateDictOptions(full_state_dict=True)
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullyShard(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, over all processes, with whole checkpoints.

    Lightning's older ``fsdp`` needs GPUs and flattens weights, so that no average can follow them.

    Args:
        timeout: seconds that a process may keep the others waiting.

    Example:
        >>> strategy = FullyShard(timeout=60)
        >>> L.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False).world_size
        2
    """

    def __init__(self, timeout: float = 1800) -> None:
        wait = timedelta(seconds=timeout)
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=wait)

    def setup_environment(self) -> None:
        """Put all processes into one line."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a whole checkpoint, of this strategy or another one, without running code.

        Lightning's own way mixes up tensors that are not contiguous, as a channels-last network's.
        """
        model: Any = self.model
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        set_model_state_dict(model, checkpoint["state_dict"], options=_FULL)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for values in state["state"].values():
                values |= {name: value.contiguous() for name, value in values.items()}
            named = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
            set_optimizer_state_dict(model, optimizer, named, options=_FULL)
        return checkpoint


class ShardedModel(GenerativeModel):
    """A model's twin for training under ``FullyShard``; the model itself stays whole."""

    original: tuple[GenerativeModel]  # in a tuple, so that it is no part of this module

    @classmethod
    def of(cls, model: GenerativeModel) -> Self:
        """The twin, with weights of its own."""
        twin: Any = copy.deepcopy(model)
        twin.__class__ = cls
        twin.original = (model,)
        return twin

    def configure_model(self) -> None:
        """Split the weights, where Lightning asks for it."""
        self.split(self)

    def split(self, model: nn.Module) -> None:
        """Split a model's weights: those of each block, those of the head, and the rest."""
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        net: Any = model.net
        net.to(memory_format=torch.contiguous_format)  # or they cannot be split
        blocks = chain.from_iterable(c for c in net.children() if isinstance(c, nn.ModuleList))
        for part in (*blocks, net.head, net):
            # The rest too is put away after each pass: validation has no backward pass to do it.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def whole(self) -> GenerativeModel:
        """The original with the present weights, on the first process; all must call it."""
        state = get_model_state_dict(self, options=_WHOLE)
        (model,) = self.original
        if rank() == 0:
            model.to(self.device).load_state_dict(state)
        return model.train(self.training)


class ShardedAveraging(EMAWeightAveraging):
    """Lightning's moving average for a ``ShardedModel``, split in the same way."""

    @classmethod
    def of(cls, average: EMAWeightAveraging) -> Self:
        """A moving average of weights that lie split over the processes."""
        twin: Any = copy.copy(average)
        twin.__class__ = cls
        return twin

    @property
    def state_key(self) -> str:
        """The parent's, so that a training may go on under another strategy."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the weights while they are whole; split ones cannot be copied."""
        if stage == "fit":
            model: Any = pl_module
            average = AveragedModel(
                model.original[0], use_buffers=self._use_buffers, **self._kwargs
            )
            model.split(average.module)
            self._average_model = average

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the averages, whole, in the place of the weights, as the parent does."""
        average: Any = self._average_model
        state = get_model_state_dict(average, options=_WHOLE)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        parts = {name: name.startswith("module.") for name in state}
        checkpoint["state_dict"] = {
            name.removeprefix("module."): state[name] for name, inner in parts.items() if inner
        }
        checkpoint["averaging_state"] = {n: state[n] for n, inner in parts.items() if not inner}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages, which the strategy has put into the model, then the weights."""
        average: Any = self._average_model
        set_model_state_dict(average.module, get_model_state_dict(pl_module))
        average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        set_model_state_dict(pl_module, checkpoint["current_model_state"], options=_FULL)
