"""One small random diffusers pipeline of each family, built in memory: nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    LDMPipeline,
    LMSDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = 8  # tokens of a prompt
# Betas of the networks for latents, and what their pipelines ask of a scheduler.
LATENT: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
DDIM_LATENT = LATENT | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
# A tenth of the usual noise: a network that knows nothing would end at numbers of a hundred.
LINEAR = {"beta_start": 1e-4, "beta_end": 0.002, "beta_schedule": "linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def unet2d() -> DiffusionPipeline:
    """DDPM of Ho et al.: the network's states are the images, 12x8."""
    unet = _unet2d((12, 8))
    return _ready(DDPMPipeline(unet, DDIMScheduler(**LINEAR, clip_sample=False)))


def adm() -> DiffusionPipeline:
    """Six channels, the last three for the variance; scale and shift by time."""
    unet = _unet2d(
        8,
        out_channels=6,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=4,
    )
    scheduler = DDPMScheduler(**LINEAR, clip_sample=False, variance_type="learned_range")
    return _ready(DDPMPipeline(unet, scheduler))


def ncsnpp() -> DiffusionPipeline:
    """Score network with Fourier time and an image beside its features; images in [0, 1]."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        act_fn="silu",
        freq_shift=0,
        flip_sin_to_cos=False,
        mid_block_scale_factor=2**0.5,
        norm_eps=1e-6,
    )
    return _ready(ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(sigma_max=0.6, correct_steps=0)))


def ldm() -> DiffusionPipeline:
    """Latents of a vector-quantised autoencoder, without a condition."""
    unet = _unet2d(8)
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    )
    return _ready(LDMPipeline(vqvae, unet, DDIMScheduler(**LATENT, clip_sample=False)))


def sd() -> DiffusionPipeline:
    """Stable Diffusion 1: predicts noise, latents 4x8x8 of images 16x16."""
    return _sd("epsilon")


def sd_v() -> DiffusionPipeline:
    """Stable Diffusion 2: the same with v."""
    return _sd("v_prediction")


def sdxl() -> DiffusionPipeline:
    """Two text encoders, pooled embedding and sizes as added conditions."""
    unet = _unet_condition(
        cross_attention_dim=8 + 12,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
        use_linear_projection=True,
    )
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(8),
        text_encoder_2=_clip(12, CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**LATENT, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _ready(pipe)


def dit() -> DiffusionPipeline:
    """DiT: a label, tokens of 2x2 latents, the last four channels for the variance."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return _ready(DiTPipeline(transformer, _vae(), DDIMScheduler(**LINEAR, clip_sample=False)))


def pixart() -> DiffusionPipeline:
    """PixArt Sigma: DiT that reads a prompt through T5; four more channels."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
    )
    scheduler = DPMSolverMultistepScheduler(**LINEAR)
    return _ready(PixArtSigmaPipeline(_t5_tokenizer(), _t5(12), _vae(), transformer, scheduler))


def sd3() -> DiffusionPipeline:
    """Flow matching with two CLIP encoders and T5; latents are scaled and shifted."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06),
        text_encoder=_clip(8, CLIPTextModelWithProjection),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(12, CLIPTextModelWithProjection),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(32),
        tokenizer_3=_t5_tokenizer(),
    )
    return _ready(pipe)


def flux() -> DiffusionPipeline:
    """Flow matching on packed tokens; guidance is an input of the network."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(12),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )
    return _ready(pipe)


def lumina2() -> DiffusionPipeline:
    """Output negated, time reversed, and a last layer over the prompt's tokens as well."""
    torch.manual_seed(0)
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
        )
    )
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=8,
    )
    coder = _vae(
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _ready(Lumina2Pipeline(transformer, scheduler, coder, text, _t5_tokenizer()))


_PROMPT = {"prompt": "a cat", "num_inference_steps": 4, "height": 16, "width": 16}
# Arguments of one image.
CALLS: dict[str, dict[str, Any]] = {
    "unet2d": {"num_inference_steps": 4},
    "adm": {"num_inference_steps": 4},
    "ncsnpp": {"num_inference_steps": 6},
    "ldm": {"num_inference_steps": 4},
    "sd": _PROMPT | {"guidance_scale": 3.0, "width": 24},
    "sd_v": _PROMPT | {"guidance_scale": 3.0},
    "sdxl": _PROMPT | {"guidance_scale": 3.0},
    "dit": {"class_labels": [3], "num_inference_steps": 4, "guidance_scale": 3.0},
    "pixart": _PROMPT
    | {"guidance_scale": 3.0, "use_resolution_binning": False, "clean_caption": False}
    | {"max_sequence_length": WORDS},
    "sd3": _PROMPT | {"guidance_scale": 3.0, "width": 24, "max_sequence_length": WORDS},
    "flux": _PROMPT | {"guidance_scale": 3.0, "width": 24, "max_sequence_length": WORDS},
}

PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    each.__name__: each
    for each in (unet2d, adm, ncsnpp, ldm, sd, sd_v, sdxl, dit, pixart, sd3, flux)
}


def _of_latents(**options: Any) -> list[Any]:
    """Schedulers that the pipelines for latents run."""
    given = LATENT | options
    return [
        DDIMScheduler(**DDIM_LATENT, **options),
        PNDMScheduler(**given, skip_prk_steps=True, steps_offset=1),
        LMSDiscreteScheduler(**given),
        DEISMultistepScheduler(**given),
        UniPCMultistepScheduler(**given),
        DPMSolverMultistepScheduler(**given),
        DPMSolverMultistepScheduler(**given, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(**given, algorithm_type="sde-dpmsolver++"),
        DPMSolverSinglestepScheduler(**given),
        EulerDiscreteScheduler(**given),
        EulerAncestralDiscreteScheduler(**given),
        HeunDiscreteScheduler(**given),
        KDPM2DiscreteScheduler(**given),
        DDPMScheduler(**given, clip_sample=False),
    ]


def _deterministic() -> list[Any]:
    """Those that draw no noise, for pipelines that hand over no generator."""
    drawing = (EulerAncestralDiscreteScheduler, DDPMScheduler)
    return [
        each
        for each in _of_latents()
        if not isinstance(each, drawing) and "sde" not in each.config.get("algorithm_type", "")
    ]


def _flow() -> list[Any]:
    return [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    ]


_FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
# Those that the pipeline as it stands can run; the first is what it was built with or close to it.
SCHEDULERS: dict[str, list[Any]] = {
    "unet2d": [
        DDIMScheduler(**LINEAR, clip_sample=False),
        DDPMScheduler(**LINEAR, clip_sample=False),
        DPMSolverMultistepScheduler(**LINEAR),
        DPMSolverSinglestepScheduler(**LINEAR),
    ],
    "adm": [
        DDPMScheduler(**LINEAR, clip_sample=False, variance_type="learned_range"),
        DPMSolverMultistepScheduler(**LINEAR, variance_type="learned_range"),
        DPMSolverSinglestepScheduler(**LINEAR, variance_type="learned_range"),
    ],
    "ncsnpp": [ScoreSdeVeScheduler(sigma_max=0.6, correct_steps=0)],
    "ldm": _deterministic(),
    "sd": [*_of_latents(), IPNDMScheduler()],  # that one goes a path of its own
    "sd_v": _of_latents(prediction_type="v_prediction"),
    "sdxl": _of_latents(),
    "dit": _deterministic(),
    "pixart": _of_latents(),
    "sd3": [
        *_flow(),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(**_FLOW_SIGMAS),
        UniPCMultistepScheduler(**_FLOW_SIGMAS),
    ],
    "flux": [*_flow(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)],
}


def _ready(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """With weights that depend on nothing but the seed, none of them all zero."""
    generator = torch.Generator().manual_seed(0)
    for _, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            for values in part.eval().requires_grad_(False).parameters():
                if not values.any():
                    values.copy_(0.1 * torch.randn(values.shape, generator=generator))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet2d(sample_size: int | tuple[int, int], **options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=sample_size,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **{"attention_head_dim": 8, **options},
    )


def _unet_condition(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _sd(prediction_type: str) -> DiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        unet=_unet_condition(cross_attention_dim=8),
        scheduler=DDIMScheduler(**DDIM_LATENT, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def _vae(**options: Any) -> AutoencoderKL:
    """Images twice as wide as latents of four channels."""
    torch.manual_seed(1)
    given = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
    }
    return AutoencoderKL(latent_channels=4, norm_num_groups=4, sample_size=16, **(given | options))


def _clip(width: int, kind: type = CLIPTextModel) -> Any:
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def _clip_tokenizer() -> CLIPTokenizer:
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=WORDS)


def _t5(width: int) -> T5EncoderModel:
    torch.manual_seed(width)
    config = T5Config(
        vocab_size=4 + len(LETTERS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config)


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    vocab = [*special, *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=WORDS)
