"""CLIP and DINOv2 from torch-fidelity, with weights that are read and never run.

torch-fidelity unpickles a CLIP file and runs DINOv2's own code from the internet; here both come
from plain tensors: CLIP ViT-B/32 through torch-fidelity's network, DINOv2 ViT-B/14 through
torchvision's, which is the same function after two rewrites of its weights.
"""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import feature_extractor_clip as clip
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torchvision.models import VisionTransformer

from bayesdiff.checks import UserError

Weights = dict[str, Tensor]

CLIP, DINOV2 = "clip-vit-b-32", "dinov2-vit-b-14"
# OpenAI's archive holds code; it is opened only if it is the one that torch-fidelity would take.
CLIP_SHA256 = clip.MODEL_METADATA[CLIP]["hash"]
CLIP_FILE = clip.MODEL_METADATA[CLIP]["filename"] + ".pt"
DINOV2_FILE = "dinov2_vitb14_pretrain.pth"
URL_DINOV2 = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/{DINOV2_FILE}"
# By which the architecture is known: a tensor of the file and its shape.
_CLIP_SHAPE = {
    "visual.conv1.weight": (768, 3, 32, 32),
    "visual.positional_embedding": (50, 768),
    "visual.proj": (768, 512),
}
_DINOV2_SHAPE = {"patch_embed.proj.weight": (768, 3, 14, 14), "pos_embed": (1, 1370, 768)}
_DINOV2_HEADS = 12


class ClipFeatures(FeatureExtractorCLIP):
    """torch-fidelity's CLIP ViT-B/32 for images of 1 or 3 channels, without class scores.

    Args:
        weights: of the visual network at least, by OpenAI's names.
    """

    def __init__(self, weights: Weights) -> None:
        FeatureExtractorBase.__init__(self, CLIP, ["clip"])
        self.feature_extractor_internal_dtype = torch.float32
        state = {name: value for name, value in weights.items() if name.startswith("visual.")}
        # The network asks the text's projection for the length of a feature vector.
        state["text_projection"] = state["visual.proj"]
        self.model = clip.build_model(state, torch.float32)
        self.resolution = self.model.visual.input_resolution
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images ``(B, 1 or 3, H, W) -> (B, 512)``, and no logits ``(B, 0)``."""
        (features,) = super().forward(in_colour(images))
        return features, features.new_zeros(len(features), 0)


class DinoFeatures(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 ViT-B/14 for images of 1 or 3 channels, without class scores.

    Args:
        weights: by Meta's names.
    """

    def __init__(self, weights: Weights) -> None:
        FeatureExtractorBase.__init__(self, DINOV2, ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = dino_network(weights, self.INPUT_IMAGE_SIZE)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of uint8 images ``(B, 1 or 3, H, W) -> (B, 768)``, and no logits ``(B, 0)``."""
        (features,) = super().forward(in_colour(images))
        return features, features.new_zeros(len(features), 0)


def in_colour(images: Tensor) -> Tensor:
    """Grey images as red, green and blue, ``(B, 1 or 3, H, W) -> (B, 3, H, W)``."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def dino_network(weights: Weights, image_size: int, heads: int = _DINOV2_HEADS) -> nn.Module:
    """DINOv2 as torchvision's vision transformer, images ``(B, 3, S, S) -> (B, F)``.

    The scale behind each attention and each perceptron goes into the last layer of these, and the
    embedding of places is brought to the image's grid once.

    Args:
        weights: by Meta's names.
        image_size: S, a multiple of the patch.
        heads: of the attention, which no shape betrays.
    """
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = sum(name.endswith(".norm1.weight") for name in weights)
    network = VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=len(weights["blocks.0.mlp.fc1.weight"]),
    )
    network.heads = nn.Identity()
    state = {
        "class_token": weights["cls_token"],
        "encoder.pos_embedding": _places(weights["pos_embed"], image_size // patch),
    }
    for theirs, own in {"patch_embed.proj": "conv_proj", "norm": "encoder.ln"}.items():
        state |= {f"{own}.{end}": weights[f"{theirs}.{end}"] for end in ("weight", "bias")}
    for number in range(depth):
        block = f"blocks.{number}."
        found = _block({k[len(block) :]: v for k, v in weights.items() if k.startswith(block)})
        state |= {f"encoder.layers.encoder_layer_{number}.{k}": v for k, v in found.items()}
    network.load_state_dict(state)
    return network.eval()


def _block(theirs: Weights) -> Weights:
    """One block's weights by torchvision's names."""
    names = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.0"}
    scaled = {
        "attn.proj": ("self_attention.out_proj", "ls1.gamma"),
        "mlp.fc2": ("mlp.3", "ls2.gamma"),
    }
    own: Weights = {}
    for end in ("weight", "bias"):
        own |= {f"{name}.{end}": theirs[f"{other}.{end}"] for other, name in names.items()}
        own[f"self_attention.in_proj_{end}"] = theirs[f"attn.qkv.{end}"]
        for other, (name, scale) in scaled.items():
            value = theirs[f"{other}.{end}"]
            own[f"{name}.{end}"] = theirs[scale].view(-1, *[1] * (value.ndim - 1)) * value
    return own


def _places(embedding: Tensor, side: int) -> Tensor:
    """Embedding of the class and a grid of places ``(1, 1 + G^2, F)`` for another grid.

    Bicubic, its scale a tenth of a patch too large, as DINOv2 was trained.
    """
    first, grid = embedding[:, :1], embedding[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return embedding
    planes = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    planes = F.interpolate(planes, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, planes.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def clip_weights(path: Path | str | None, option: str) -> Weights:
    """Weights of CLIP ViT-B/32 from OpenAI's archive or a file of plain tensors.

    Args:
        path: the file; None takes torch's download cache or the network.
        option: what the user set to ``path``.

    Raises:
        UserError: if they cannot be had, or the file holds something else.
    """  # noqa: DOC502 - raised one level down
    cure = f"give OpenAI's {CLIP_FILE} or its state_dict saved as plain tensors"
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{CLIP}-{CLIP_SHA256}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            url = clip.MODEL_URLS[CLIP]
            downloaded(
                lambda: torch.hub.download_url_to_file(url, str(path), CLIP_SHA256, False),
                "CLIP",
                option,
                CLIP_FILE,
            )
    if _sha256(path, option, cure) == CLIP_SHA256:
        weights: Weights = torch.jit.load(str(path), map_location="cpu").state_dict()
    else:
        weights = plain_weights(path, option, cure)
    return _known(weights, _CLIP_SHAPE, path, option, "CLIP ViT-B/32", cure)


def dino_weights(path: Path | str | None, option: str) -> Weights:
    """Weights of DINOv2 ViT-B/14, see `clip_weights`.

    Raises:
        UserError: if they cannot be had, or the file holds something else.
    """  # noqa: DOC502 - raised one level down
    cure = f"give a copy of Meta's {DINOV2_FILE}"
    if path is None:
        weights = downloaded(
            lambda: torch.hub.load_state_dict_from_url(
                URL_DINOV2, progress=False, weights_only=True, map_location="cpu"
            ),
            "DINOv2",
            option,
            DINOV2_FILE,
        )
    else:
        weights = plain_weights(path, option, cure)
    return _known(weights, _DINOV2_SHAPE, path, option, "DINOv2 ViT-B/14", cure)


def downloaded(get: Callable[[], Any], name: str, option: str, file: str) -> Any:
    """What ``get`` gives, from torch's download cache or the network.

    Raises:
        UserError: if it cannot be had.
    """
    try:
        return get()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network, or damaged
        raise UserError(
            f"the {name} weights cannot be downloaded ({first_line(error)}); "
            f"set {option} to a copy of {file}"
        ) from error


def plain_weights(path: Path | str, option: str, cure: str) -> Weights:
    """A file of plain tensors; no code in it is ever run.

    Raises:
        UserError: if it is missing or holds something else.
    """
    try:
        weights: Weights = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise UserError(f"{option}={path} does not exist; {cure}") from error
    except Exception as error:  # the reader meets arbitrary bytes and may raise anything
        raise UserError(f"{option}={path} is not a plain weights file; {cure}") from error
    return weights


def first_line(error: Exception) -> str:
    """Of its message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sha256(path: Path | str, option: str, cure: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{option}={path} does not exist; {cure}") from error


def _known(
    weights: Any,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path | str | None,
    option: str,
    name: str,
    cure: str,
) -> Weights:
    """The weights, if they are of the architecture that the metric is named after.

    Raises:
        UserError: if they are not.
    """
    for tensor, shape in shapes.items():
        value = weights.get(tensor) if isinstance(weights, Mapping) else None
        if not isinstance(value, Tensor) or value.shape != shape:
            there = tuple(value.shape) if isinstance(value, Tensor) else "missing"
            raise UserError(
                f"{option}={path} does not hold {name} weights: {tensor} is {there}, "
                f"not {shape}; {cure}"
            )
    return {str(key): value.float() for key, value in weights.items() if torch.is_tensor(value)}
