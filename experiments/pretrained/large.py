"""Large networks on the meta device, and what they need on one GPU of 80 GB: nothing is computed.

    python experiments/pretrained/large.py

Configurations are those of the published models; text encoders count with their weights alone.
"""

import json

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.machine.peak import Work, worked
from bayesdiff.pretrained.needs import GIB, Sizes, fit_memory, maps_memory, pass_operations
from bayesdiff.pretrained.uvit import UViT

HALF, META = torch.float16, "meta"
FITTED, BATCH, MEMBERS, STEPS = 1000, 8, 16, 25
FREE = 80e9 / GIB
# Millions of weights: CLIP-L, CLIP-G, T5-XXL encoder.
CLIP_L, CLIP_G, T5 = 123, 695, 4762


def empty(*shape, dtype=HALF):
    """A tensor without memory."""
    return torch.empty(*shape, device=META, dtype=dtype)


def vae(channels):
    """The autoencoder of all of them."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
    )


def sd15():
    """Stable Diffusion 1.5 at 512 px, guided."""
    net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return net, (4, 64, 64), {"encoder_hidden_states": (77, 768)}, {}, CLIP_L


def sdxl():
    """SDXL at 1024 px, guided."""
    net = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    added = {"added_cond_kwargs": {"text_embeds": (1280,), "time_ids": (6,)}}
    return net, (4, 128, 128), {"encoder_hidden_states": (77, 2048)} | added, {}, CLIP_L + CLIP_G


def sd3():
    """Stable Diffusion 3 medium at 1024 px, guided."""
    net = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    given = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}
    return net, (16, 128, 128), given, {}, CLIP_L + CLIP_G + T5


def flux():
    """FLUX.1-dev at 1024 px; its guidance is an input."""
    net = FluxTransformer2DModel(guidance_embeds=True)
    given = {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
    whole = {"img_ids": (4096, 3), "txt_ids": (512, 3), "guidance": ()}
    return net, (4096, 64), given, whole, CLIP_L + T5


def uvit_h():
    """U-ViT-H/2 at 256 px, guided."""
    net = UViT(
        img_size=32, patch_size=2, in_chans=4, embed_dim=1152, depth=28, num_heads=16, mlp_ratio=4,
        qkv_bias=False, mlp_time_embed=False, num_classes=1001, conv=False, skip=True,
    )  # fmt: skip
    return net, (4, 32, 32), {}, {}, 0


MODELS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "uvit_h": uvit_h}


def call(net, shape, rowed, whole, rows):
    """Arguments of one evaluation of so many inputs."""

    def made(value):
        if isinstance(value, dict):
            return {name: made(each) for name, each in value.items()}
        return empty(rows, *value)

    given = {name: made(value) for name, value in rowed.items()}
    given |= {name: empty(*(value or (rows,))) for name, value in whole.items()}
    if isinstance(net, UViT):
        return (empty(rows, *shape), empty(rows, dtype=torch.float32)), {
            "y": torch.empty(rows, device=META, dtype=torch.long)
        }
    first = (
        "hidden_states"
        if isinstance(net, FluxTransformer2DModel | SD3Transformer2DModel)
        else "sample"
    )
    return (), {first: empty(rows, *shape), "timestep": empty(rows)} | given


def head_of(net):
    """The last layer, and how often it is applied for one input of ``shape``."""
    for name in ("conv_out", "proj_out", "decoder_pred"):
        if hasattr(net, name):
            return getattr(net, name)
    raise ValueError(type(net).__name__)


@torch.no_grad()
def sizes_of(name):
    """A large network as the model of its needs sees it; attention is fused."""
    with torch.device(META):
        net, shape, rowed, whole, text = MODELS[name]()
        channels = 16 if name in ("sd3", "flux") else 4
        coder = vae(channels)
    net, coder = net.to(HALF).eval(), coder.to(HALF).eval()
    head, seen = head_of(net), []
    hook = head.register_forward_hook(lambda _m, given, output: seen.append((given[0], output)))
    args, kwargs = call(net, shape, rowed, whole, 1)
    _, work = worked(lambda: net(*args, **kwargs), fused=True)
    hook.remove()
    features, output = seen[0]
    geometry = HeadGeometry.of(head)
    rows = head.out_channels if geometry.kernel_size else head.out_features
    side = 32 if name == "uvit_h" else 64 if name == "sd15" else 128
    latent = empty(1, channels, side, side)
    _, decoding = worked(lambda: coder.decode(latent), fused=True)
    own = sum(p.numel() * 2 for part in (net, coder) for p in part.parameters())
    # Followed convolutions have their channels last: a second copy.
    own += sum(p.numel() * 2 for p in net.parameters() if p.dim() == 4 and p[0, 0].numel() > 1)
    sizes = Sizes(
        weights=own + 2_000_000 * text,
        network=work,
        features=4 * features.numel(),  # the head reads float32
        state=torch.Size(shape).numel(),
        head=geometry,
        rows=rows,
        positions=output.numel() // rows,
        decoder=Work(decoding.memory, decoding.operations),
    )
    return sizes, name != "flux"


def table():
    """Figures of all of them, by name."""
    found = {}
    for name in MODELS:
        sizes, guided = sizes_of(name)
        halves = 2 if guided else 1
        fit = fit_memory(sizes, FITTED, BATCH)
        one, all_at_once = (
            maps_memory(sizes, 1, MEMBERS + 1, guided, at_once) for at_once in (1, None)
        )
        evaluations = halves * STEPS * (MEMBERS + 1)
        decoding = (MEMBERS + 1) * sizes.decoder.operations
        own = halves * STEPS * sizes.network.operations + sizes.decoder.operations
        figures = {
            "weights_gib": sizes.weights / GIB,
            "input_gib": sizes.network.memory / GIB,
            "p": sizes.head.size,
            "posterior_gib": 6 * sizes.matrix / GIB,
            "fit_gib": fit / GIB,
            "decoder_gib": sizes.decoder.memory / GIB,
            "members_gib": all_at_once / GIB,
            "members_one_by_one_gib": one / GIB,
            "fits_80": sizes.weights + max(fit, all_at_once) < 80e9,
            "fits_80_one_by_one": sizes.weights + max(fit, one) < 80e9,
            "tflop_input": sizes.network.operations / 1e12,
            "tflop_pass_image": pass_operations(sizes) / 1e12,
            "tflop_decode": sizes.decoder.operations / 1e12,
            "tflop_map": (evaluations * sizes.network.operations + decoding) / 1e12,
            "map_over_image": (evaluations * sizes.network.operations + decoding) / own,
        }
        found |= {f"memory.large.{name}.{key}": value for key, value in figures.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(table(), indent=2))
