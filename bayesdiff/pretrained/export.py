"""Models trained here as a folder that diffusers reads: a stock pipeline around our network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import Gaussian
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, ProbabilityPath
from bayesdiff.paths.probability_path import VariancePreserving

_VP = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}
_FLOW = {"velocity": -1.0, "flow": 1.0}  # schedulers of flows take noise minus data
_FLOW_STEPS = 1000


class ExportedUNet(ModelMixin, ConfigMixin):
    """Our U-Net as pipelines of diffusers call it: time is the scheduler's, the sign is too.

    Args:
        options: of ``UNet``; no other class is ever built from a folder.
        steps: T of the schedule.
        offset: our time is 1 - (timestep + offset) / T.
        factor: of the network's output.
        in_channels: of an image, for pipelines.
        sample_size: of an image, for pipelines.
        num_class_embeds: labels with "no class", the last one, among them; None for none.
    """

    @register_to_config
    def __init__(
        self,
        options: dict[str, Any],
        steps: int,
        offset: int,
        factor: float,
        in_channels: int,
        sample_size: Any,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        self.net = UNet(**options)
        self.steps, self.offset, self.factor = steps, offset, factor

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction ``(B, C, H, W)`` that the scheduler expects.

        Args:
            sample: states.
            timestep: of the schedule, one for all or ``(B,)``.
            class_labels: ``(B,)``; None for no class.
            return_dict: whether it comes as ``.sample`` rather than in a tuple.
        """
        time = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device)
        ours = (1 - (time + self.offset) / self.steps).expand(len(sample)).to(sample.dtype)
        output = self.factor * self.net(sample, ours, class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def export_pipeline(
    model: GenerativeModel, folder: str | Path, options: Mapping[str, Any]
) -> DDPMPipeline:
    """Write a pipeline's folder.

    ``model=pretrained`` reads it. In Python this module, or ``BayesianPipeline``, is imported
    first, since diffusers imports none that a folder names::

        from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline
        pipe = DiffusionPipeline.from_pretrained(folder)

    The stock pipeline knows no labels, and makes images of no class where a network has some;
    the network takes ``class_labels``.

    Args:
        model: with our U-Net, trained.
        folder: to write.
        options: of the U-Net.

    Returns:
        The pipeline itself.

    Raises:
        UserError: for a model that no scheduler of diffusers stands for, or other options.
    """
    if not isinstance(model.net, UNet) or not isinstance(model.likelihood, Gaussian):
        raise UserError(
            f"a pipeline is made of a UNet with squared error, this is a "
            f"{type(model.net).__name__} with {type(model.likelihood).__name__}"
        )
    scheduler, steps, offset, factor = _schedule(model.path, model.prediction)
    given = {name: value for name, value in options.items() if not name.startswith("_")}
    labels = model.net.num_classes
    if given.get("embedding_size"):
        raise UserError("net.embedding_size: pipelines of images give no vectors; export without")
    own = ExportedUNet(
        options=given,
        steps=steps,
        offset=offset,
        factor=factor,
        in_channels=given["in_channels"],
        sample_size=given["image_size"],
        num_class_embeds=labels + 1 if labels else None,
    )
    try:
        own.net.load_state_dict(model.net.state_dict())
    except RuntimeError as error:
        raise UserError("the options are not those of this network; give the run's own") from error
    own.net.to(memory_format=torch.channels_last)
    pipe = DDPMPipeline(own.eval(), scheduler)
    pipe.save_pretrained(folder)
    return pipe


def _schedule(path: ProbabilityPath, prediction: str) -> tuple[Any, int, int, float]:
    """A scheduler that stands for the path; T, the offset of its times, the output's factor."""
    if isinstance(path, VariancePreserving) and prediction in _VP:
        betas = -torch.expm1(path.log_abar.diff())
        scheduler = DDIMScheduler(
            num_train_timesteps=len(betas),
            trained_betas=betas.tolist(),
            prediction_type=_VP[prediction],
            clip_sample=False,
            timestep_spacing="trailing",
        )
        return scheduler, len(betas), 1, 1.0
    if type(path) is CondOT and prediction in _FLOW:
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_FLOW_STEPS)
        return flow, _FLOW_STEPS, 0, _FLOW[prediction]
    raise UserError(
        f"no scheduler of diffusers stands for path {type(path).__name__} with "
        f"model.prediction={prediction}; it takes CondOT with velocity, or VariancePreserving "
        f"with {', '.join(_VP)}"
    )
