"""How many processes a run takes on this machine, what they cannot do, and their start."""

import logging

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from omegaconf import DictConfig

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.machine.ranks import rank, start
from bayesdiff.options.targets import class_of
from bayesdiff.runs.build import choose_device, plain

_SHARDING = "bayesdiff.runs.sharding.FullyShard"
_STRATEGIES = ("auto", "ddp", _SHARDING)


def check_devices(cfg: DictConfig) -> int:
    """Number of processes this run will use on this machine.

    Raises:
        UserError: if they are not there, cannot share a batch, or could not be started.
    """
    device, devices = choose_device(str(cfg.trainer.accelerator)), plain(cfg.trainer.devices)
    there = torch.cuda.device_count() if device.type == "cuda" else None
    if devices == "auto" or devices == -1 and there:
        devices = there or 1
    if there is None and isinstance(devices, list):
        raise UserError(f"trainer.devices={devices} names GPUs; give a number of processes here")
    positive("process_timeout", cfg.process_timeout, "give seconds")
    count = at_least("trainer.devices", len(devices) if isinstance(devices, list) else devices)
    if there is not None and count > there:
        raise UserError(f"trainer.devices={devices} but there are {there} GPUs here; use fewer")
    if count > 1:
        check_strategy(cfg)
    if at_least("data.batch_size", cfg.data.batch_size) % count:
        raise UserError(
            f"data.batch_size={cfg.data.batch_size} cannot be shared by {count} processes; "
            "choose a multiple"
        )
    many = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if count > 1 and many:
        # Lightning starts its processes by repeating the command, which is the whole sweep.
        raise UserError(
            f"trainer.devices={devices} does not work with -m; run python train.py trainer=ddp "
            "first, the sweep then finds the finished training"
        )
    return count


def check_strategy(cfg: DictConfig) -> None:
    """Refuse what several processes could not do together.

    Raises:
        UserError: for another strategy, or averages of a kind that cannot be split.
    """
    strategy = cfg.trainer.get("strategy", "auto")
    name = getattr(strategy, "_target_", strategy)
    if name not in _STRATEGIES:
        raise UserError(
            f"trainer.strategy={strategy} cannot share the stages; use trainer=ddp or fsdp"
        )
    kinds = {k: class_of(options) for k, options in (cfg.callbacks or {}).items() if options}
    averages = (WeightAveraging, StochasticWeightAveraging)
    odd = [
        k for k, kind in kinds.items()
        if kind and issubclass(kind, averages) and kind is not EMAWeightAveraging
    ]  # fmt: skip
    if name == _SHARDING and odd:
        raise UserError(
            f"callbacks.{odd[0]} cannot average weights that are split over processes; "
            "use callbacks.ema alone, or trainer=ddp"
        )


def launch(cfg: DictConfig, devices: int) -> None:
    """Start the other processes of this machine, so that every stage is shared by all of them."""
    if devices > 1:
        start(str(cfg.trainer.accelerator), plain(cfg.trainer.devices), cfg.process_timeout)
        if rank():  # one voice is enough
            logging.getLogger("bayesdiff").setLevel(logging.WARNING)
