"""Flow-matching and diffusion training: one LightningModule, a path and a prediction."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least
from bayesdiff.likelihoods import Gaussian, Likelihood
from bayesdiff.models.conditions import Condition, Labels, check_network
from bayesdiff.models.objectives import Objective, made_objective
from bayesdiff.networks import Network
from bayesdiff.paths import PREDICTIONS, ProbabilityPath
from bayesdiff.paths.prediction import mix

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class GenerativeModel(L.LightningModule):
    """A network that predicts along a probability path.

    Flow matching is the conditional-OT path with ``prediction="velocity"`` (Lipman et al. 2023,
    eq. 23); diffusion is a variance-preserving path with ``"noise"`` (Ho et al. 2020, eq. 14),
    ``"data"`` or ``"v"``.

    Args:
        net: network with ``features``, ``head`` and ``fold``; forward = fold(head(features)).
        path: probability path.
        prediction: what the network outputs: velocity, noise, data or v.
        optimizer: makes the optimiser from the parameters.
        num_classes: classes of a conditional network, None for an unconditional one.
        class_dropout: share of labels (or other values of the condition) replaced by "no class"
            in training, for guidance.
        time_sampling: ``uniform`` in t, or ``logit_normal`` (Esser et al. 2024, section 3.1).
        warmup_steps: steps of linear learning-rate warm-up; a cosine to zero follows.
        seed: fixes times, noise and label dropout of every step.
        condition: what the network is given beside the time; None for ``num_classes`` labels.
        likelihood: of the data given the output; None for a Gaussian, that is squared error.
        objective: makes the loss from path, likelihood and prediction; None for the likelihood's.

    Raises:
        UserError: for an unknown prediction or time sampling, one that does not go with the
            likelihood, a share outside [0, 1), or a network that is made for another condition.

    Example:
        >>> from bayesdiff.networks import UNet
        >>> from bayesdiff.paths import CondOT
        >>> net = UNet(in_channels=1, image_size=8, channels=(8,), blocks=1)
        >>> model = GenerativeModel(net, CondOT(), "velocity", torch.optim.Adam)
        >>> x_0, x_1, t = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 8, 8), torch.tensor([0.0, 1.0])
        >>> x_t, target = model.corrupt(x_1, x_0, t)
        >>> torch.equal(x_t[0], x_0[0]), torch.equal(x_t[1], x_1[1])  # noise at 0, data at 1
        (True, True)
        >>> model(x_t, t).shape == target.shape
        True
    """

    def __init__(
        self,
        net: nn.Module,
        path: ProbabilityPath,
        prediction: str,
        optimizer: Optimizer,
        num_classes: int | None = None,
        class_dropout: float = 0.1,
        time_sampling: str = "uniform",
        warmup_steps: int = 200,
        seed: int = 0,
        condition: Condition | None = None,
        likelihood: Likelihood | None = None,
        objective: Callable[..., Objective] | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(
                f"unknown model.prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}"
            )
        if time_sampling not in ("uniform", "logit_normal"):
            raise UserError(
                f"unknown model.time_sampling {time_sampling!r}; choose from uniform, logit_normal"
            )
        if not 0 <= class_dropout < 1:
            raise UserError(f"model.class_dropout must be in [0, 1), got {class_dropout}")
        at_least("model.warmup_steps", warmup_steps, 0)
        if condition is None and num_classes:
            condition = Labels(num_classes)
        check_network(net, condition)
        self.net = cast(Network, net.to(memory_format=torch.channels_last))
        self.path = path
        self.prediction = prediction
        self.likelihood = _checked(likelihood or Gaussian(), prediction)
        self.objective = made_objective(objective, path, self.likelihood, prediction)
        self.condition = condition
        self.num_classes = None if condition is None else condition.num_classes
        self.class_dropout = 0.0 if condition is None else class_dropout
        self.time_sampling = time_sampling
        self.warmup_steps = warmup_steps
        self.seed = seed
        self._optimizer = optimizer
        self._loss_sum: Tensor | float = 0.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction for images ``(B, C, H, W)`` at times ``t (B,)``: ``(B, C, H, W)``."""
        return self.net(x, t, y)

    def whole(self) -> "GenerativeModel":
        """This model with all its weights; one that is split over processes gathers them."""
        return self

    def corrupt(self, x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Training input x_t and target for data, noise ``(B, ...)`` and times ``(B,)``."""
        x_1 = self.likelihood.values(x_1)
        path = self.path.coefficients(t)
        r, s = mix(self.prediction, path)
        alpha, sigma, r, s = (
            c.to(x_1.dtype).view(*c.shape, *[1] * (x_1.dim() - c.dim()))
            for c in (path.alpha, path.sigma, r, s)
        )
        return alpha * x_1 + sigma * x_0, r * x_1 + s * x_0

    def times(self, uniform: Tensor) -> Tensor:
        """Training times in [0, path.last_time] for uniform numbers in [0, 1)."""
        if self.time_sampling == "logit_normal":
            # The ends of the unit interval would map to infinity.
            uniform = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return uniform * self.path.last_time

    def on_train_start(self) -> None:
        """Lays a restored optimiser out like the weights; fused ones read memory in its order."""
        for optimizer in self.trainer.optimizers:
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == weight.shape:
                        state[name] = torch.empty_like(weight).copy_(value)

    def training_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        """Loss of the prediction on this process's share of the batch."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = self.trainer.fit_loop.total_batch_idx  # not steps: gradients may accumulate
        loss = self._loss(*batch, step=batches, share=slice(rank, None, world))
        self._loss_sum = self._loss_sum + loss.detach()
        if batch_idx % 50 == 0:
            self._refuse_divergence()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> None:
        """The same loss on test images, with the same draws in every epoch."""
        loss = self._loss(*batch, step=-1 - batch_idx, share=slice(None))
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))

    def on_train_epoch_end(self) -> None:
        """Stops before a checkpoint of a diverged network could replace a good one."""
        self._refuse_divergence()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm; Lightning's own way refuses fused optimisers, needlessly without fp16."""
        if gradient_clip_val:
            norm: Any = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            if hasattr(norm, "full_tensor"):  # of weights that are split over processes
                norm = norm.full_tensor()
            self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The given optimiser with warm-up and a cosine to zero, stepped per batch."""
        optimizer = self._optimizer(self.parameters())
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = min(self.warmup_steps, total // 2)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / (total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _loss(self, x_1: Tensor, y: Tensor | None, step: int, share: slice) -> Tensor:
        # Draws are made for the whole batch from (seed, batch) and then shared out: a resumed run
        # and a run on many devices see the numbers that one uninterrupted process sees.
        size = len(x_1) * (self.trainer.world_size if share.step else 1)
        torch.manual_seed((self.seed + 1) * 1_000_000_007 + step)
        spread = torch.arange(size, device=x_1.device) / size
        uniform = torch.rand(2, size, device=x_1.device)
        x_0 = torch.randn(size, *x_1.shape[1:], device=x_1.device)[share]
        t = self.objective.times(self.times((uniform[0, :1] + spread) % 1))[share]
        if y is None or self.condition is None:
            y = None
        elif self.training:
            y = self.condition.hide(y, uniform[1, share] < self.class_dropout)
        if share.start:  # the dropout masks of the other processes must differ
            torch.manual_seed((self.seed + 1) * 1_000_000_007 + step + 2**40 * share.start)
        x_t, target = self.corrupt(x_1, x_0, t)
        output = self(x_t, t, y).float()
        return self.objective(output, target, x_t, self.likelihood.values(x_1), t)

    def _refuse_divergence(self) -> None:
        if not math.isfinite(float(self._loss_sum)):
            raise UserError(
                f"the training loss is not finite at step {self.global_step}; the last good "
                "checkpoint is kept, lower model.optimizer.lr or trainer.gradient_clip_val"
            )
        self._loss_sum = 0.0


def whole_of(module: Any) -> Any:
    """A module with all its weights; one of a user's own that does not say is whole already.

    Example:
        >>> whole_of(nn.Linear(2, 3))  # whole already: its weights are on one process
        Linear(in_features=2, out_features=3, bias=True)
    """
    return module.whole() if hasattr(module, "whole") else module


def _checked(likelihood: Likelihood, prediction: str) -> Likelihood:
    """The likelihood, if it is one and has a law for this prediction."""
    if not hasattr(likelihood, "predictions"):
        raise UserError(
            f"model.likelihood={likelihood!r} is no likelihood; choose it by name, as in "
            "likelihood=bernoulli"
        )
    if prediction not in likelihood.predictions:
        raise UserError(
            f"model.prediction={prediction} has no law under likelihood={likelihood.name}; use "
            f"model.prediction={likelihood.predictions[0]}"
        )
    return likelihood
