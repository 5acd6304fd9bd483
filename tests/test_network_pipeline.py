"""Networks that diffusers does not know, as pipelines: U-ViT, and one in another style."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import pretrained_checks as checks  # noqa: E402
from diffusers import DDIMScheduler, EulerDiscreteScheduler  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.pretrained.network_pipeline import ClassPipeline, NetworkPipeline  # noqa: E402
from bayesdiff.pretrained.uvit import UViT  # noqa: E402
from bayesdiff.uncertainty import Ensemble  # noqa: E402

SCHEDULE = {"beta_end": 0.002, "clip_sample": False, "timestep_spacing": "trailing"}


def uvit(conv: bool, gain: float = 1.0) -> ClassPipeline:
    """A small one; with a gain its layers do something, and images differ in their maps."""
    torch.manual_seed(0)
    net = UViT(
        img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2,
        qkv_bias=False, mlp_time_embed=False, num_classes=6, conv=conv, skip=True,
    ).eval()  # fmt: skip
    for weight in net.parameters():
        weight.requires_grad_(False).mul_(gain if weight.dim() > 1 else 1.0)
    return ClassPipeline(net, DDIMScheduler(**SCHEDULE), (3, 8, 8), time_shift=1.0, nothing=5)


CALL = {"class_labels": [3], "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.mark.parametrize("conv", [False, True])
def test_a_u_vit_is_followed_like_any_pipeline(conv):
    pipe = uvit(conv)
    bayes, call, images = checks.fitted(pipe, CALL, 4)
    assert bayes.followed._models and bayes.posterior.curvature.mean.shape[0] == (
        3 if conv else 12
    )
    model = next(iter(bayes.followed._models.values()))[0]
    assert model.net.module.call.shift == 1
    assert checks.split_error(bayes) < 1e-5
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5


class Foreign(nn.Module):
    """Channels of the time first, features not exposed, a 1x1 head, images not square."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.GroupNorm(2, 8))
        self.time = nn.Linear(16, 8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, image, timestep):
        angles = timestep[None] * torch.logspace(0, -3, 8)[:, None]
        embedded = self.time(torch.cat([angles.sin(), angles.cos()]).T.to(image))
        return self.last(torch.tanh(self.body(image) + embedded[..., None, None]))


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_network_in_another_style(kind):
    torch.manual_seed(1)
    scheduler = kind.from_config(DDIMScheduler(**SCHEDULE).config)
    pipe = NetworkPipeline(Foreign().eval(), scheduler, (1, 6, 10))
    call = {"num_inference_steps": 5}
    bayes, call, images = checks.fitted(pipe, call, 4)
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5
    assert checks.split_error(bayes) < 1e-5
    wide, _, images = checks.fitted(pipe, call, 4, wide=True)
    assert checks.curvature_error(wide, images, None) < 1e-8
    out = bayes(num_images=2, num_inference_steps=3, uncertainty=Ensemble(members=3))
    assert out.variance.shape == (2, 1, 6, 10)


def test_a_network_without_a_time_is_refused():
    with pytest.raises(UserError, match="0 networks that take a timestep"):
        BayesianPipeline.of(
            NetworkPipeline(nn.Conv2d(1, 1, 1), DDIMScheduler(**SCHEDULE), (1, 4, 4))
        )
