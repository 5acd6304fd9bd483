"""U-ViT of Bao et al. (2023), a transformer with long skips; published weights load by name."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least, few, one_line

_PERIOD = 10000.0  # of the slowest wave that a time is told by, over 2 pi
_HEADS = ("conv", "linear")


class UViT(nn.Module):
    """forward = fold(head(features(x, t, y))), for the published state dicts.

    The options have the names and meanings of the published configurations::

        net = UViT(32, 2, 4, 1152, 28, 16, num_classes=1001, conv=False)
        net.load_weights("imagenet256_uvit_huge.pth")

    The last label means "no class": 1000 of 1001 for ImageNet. Published scales s of guidance
    are w = 1 + s here, where w = 1 is no guidance.

    Args:
        img_size: side of a square state, or (height, width).
        patch_size: p, side of the patches that become tokens.
        in_chans: C, channels of a state.
        embed_dim: d, width of a token.
        depth: of the blocks; half of them, rounded down, lie on each side of the middle one.
        num_heads: of the attention.
        mlp_ratio: width of a block's hidden layer, in d.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_time_embed: whether the time passes two layers first.
        num_classes: labels with "no class" among them; None, or the published -1, for none.
        conv: whether a 3x3 convolution over the image channels comes last.
        skip: whether the second half reads the first one's outputs.
        head: what becomes Bayesian: ``conv``, the last convolution, or ``linear``, the layer from
            tokens to patches, with the convolution as part of ``fold``; None for the last one
            there is.

    Raises:
        UserError: for sizes that do not fit together, or a head that is not there.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int | None = None,
        conv: bool = True,
        skip: bool = True,
        head: str | None = None,
    ) -> None:
        super().__init__()
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        _check(sides, patch_size, embed_dim, num_heads, head, conv)
        self.last = head or ("conv" if conv else "linear")
        self.grid = tuple(side // patch_size for side in sides)
        labels = max(num_classes or 0, 0)
        self.num_classes = labels - 1 if labels else None
        self.patch, self.skip, self.extras = patch_size, skip, 2 if labels else 1

        self.patch_embed = _Patches(in_chans, embed_dim, patch_size)
        hidden = 4 * embed_dim
        self.time_embed = (
            nn.Sequential(nn.Linear(embed_dim, hidden), nn.SiLU(), nn.Linear(hidden, embed_dim))
            if mlp_time_embed
            else nn.Identity()
        )
        if labels:
            self.label_emb = nn.Embedding(labels, embed_dim)
        tokens = self.extras + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))

        block = partial(_Block, embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(reads_skip=skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self._initialise()

    @property
    def head(self) -> nn.Module:
        """The layer that becomes Bayesian."""
        return self.final_layer if self.last == "conv" else self.decoder_pred

    @property
    def last_block(self) -> nn.Module:
        """The block before the end."""
        return self.out_blocks[-1] if len(self.out_blocks) else self.mid_block

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction, noise for the published networks.

        Args:
            x: states ``(B, C, H, W)``.
            timesteps: ``(B,)``, as in training. The published networks for latents count noising
                steps, 1 ... 1000: index k of ``alphas_cumprod`` is time k + 1. Those for pixels
                take 999 t, for t in [0, 1].
            y: labels ``(B,)``; None for no class.
        """
        return self.fold(self.head(self.features(x, timesteps, y)))

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head: tokens ``(B, L, d)``, or ``(B, C, H, W)`` for the convolution."""
        tokens = [self._time(t)[:, None], self.patch_embed(x)]
        if self.num_classes is not None:
            if y is None:
                y = torch.full((len(x),), self.num_classes, device=x.device)
            tokens.insert(0, self.label_emb(y)[:, None])
        hidden = torch.cat(tokens, 1) + self.pos_embed
        kept = []
        for block in self.in_blocks:
            hidden = block(hidden)
            kept.append(hidden)
        hidden = self.mid_block(hidden)
        for block in self.out_blocks:
            hidden = block(hidden, kept.pop() if self.skip else None)
        hidden = self.norm(hidden[:, self.extras :])
        if self.last == "linear":
            return hidden
        return self._image(self.decoder_pred(hidden))

    def fold(self, output: Tensor) -> Tensor:
        """The head's output as states ``(B, C, H, W)``; affine."""
        if self.last == "conv":
            return output
        return self.final_layer(self._image(output))

    def load_weights(self, path: str | Path) -> "UViT":
        """Read a published state dict; nothing in the file is run.

        Args:
            path: ``.safetensors``, or what ``torch.save`` made of the state dict.

        Returns:
            The network itself, with the weights; ``load_named`` refuses those of other options.
        """
        self.load_named(_read(Path(path)), str(path))
        return self

    def load_named(self, weights: Mapping[str, Any], where: str = "the state dict") -> None:
        """Take weights by their names, all of them.

        Raises:
            UserError: for a name too few or too many, or another shape.
        """
        own = self.state_dict()
        lacking, odd = own.keys() - weights.keys(), weights.keys() - own.keys()
        shapes = [
            f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ]
        wrong = [
            f"{what} {few(sorted(names), 3)}"
            for what, names in (("lacks", lacking), ("has unknown", odd), ("has", shapes))
            if names
        ]
        if wrong:
            raise UserError(
                f"{where} is not of a U-ViT with these options: it {'; it '.join(wrong)}; give "
                "the options of its training"
            )
        self.load_state_dict(dict(weights), strict=True)

    def _time(self, t: Tensor) -> Tensor:
        """Cosines, then sines, of the time, ``(B,) -> (B, d)``."""
        half = self.pos_embed.shape[-1] // 2
        powers = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = t.double()[:, None] * _PERIOD**-powers
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.pos_embed)
        embedded: Tensor = self.time_embed(waves)
        return embedded

    def _image(self, patches: Tensor) -> Tensor:
        """Pixels of tokens, each ``(row, column, channel)``: ``(B, L, p^2 C) -> (B, C, H, W)``."""
        side = self.patch
        cells = patches.unflatten(2, (side, side, -1)).unflatten(1, self.grid)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class _Patches(nn.Module):
    """Patches as tokens, ``(B, C, H, W) -> (B, L, d)``."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class _Attention(nn.Module):
    """Self-attention over all tokens, ``(B, L, d)`` to the same."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Rows of the layer are (query, key, value) x heads x width of a head.
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    """Two layers at every token, ``(B, L, d)`` to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """A transformer block; with ``reads_skip`` it takes an earlier output beside its input."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, reads_skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width, int(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if reads_skip else None

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skipped is not None:
            x = self.skip_linear(torch.cat([x, skipped], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _check(
    sides: tuple[int, ...], patch: int, width: int, heads: int, head: str | None, conv: bool
) -> None:
    at_least("patch_size", patch)
    at_least("num_heads", heads)
    if len(sides) != 2 or any(side % patch for side in sides):
        raise UserError(f"img_size={sides} must be two sides that patch_size={patch} divides")
    if width % heads or width % 2:
        raise UserError(f"embed_dim={width} must be even, and num_heads={heads} must divide it")
    if head not in (None, *_HEADS):
        raise UserError(f"head={head!r} must be one of {', '.join(_HEADS)}, or null")
    if head == "conv" and not conv:
        raise UserError("head='conv' needs conv=True; this network ends in a linear layer")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own
        raise UserError(f"{path} cannot be read as weights: {one_line(error)}") from error
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict; give the file with the weights alone")
    return found
