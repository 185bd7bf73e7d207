# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (Dosovitskiy et al., 2021) in the shape masked autoencoders pretrain it.

Fixed 2-D sin-cos positions, LayerNorm eps 1e-6, and a classifier that averages the patch tokens
(MAE, He et al., 2022, appendix A). The patch embedding is a linear map of patch rows, so that a
kernel can hand rows to the encoder without an image ever being assembled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nimfast.ops.patches import patchify

# Any: timm asks for a class where a factory will do.
LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Architecture:
    """Shape of an encoder and of the decoder it is pretrained with.

    Attributes:
        image_size: ``(H, W)`` in pixels, each a multiple of `patch`.
        channels: image channels.
        patch: patch side p in pixels.
        width, depth, heads: token width, number of blocks, attention heads of the encoder.
        class_token: whether a learned token stands before the patch tokens.
        decoder_width, decoder_depth, decoder_heads: the same of the decoder.
    """

    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    class_token: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON gives a list
        if any(side % self.patch or side < 1 for side in self.image_size):
            raise ValueError(f"image size {self.image_size} is no multiple of patch {self.patch}")
        for part, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % 4 or width % heads:
                raise ValueError(f"{part} {width} must be a multiple of 4 and of its {heads} heads")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        height, width = self.image_size
        return height // self.patch, width // self.patch

    @property
    def patches(self) -> int:
        """Number of patches L."""
        rows, columns = self.grid
        return rows * columns

    @property
    def row_size(self) -> int:
        """Values in one patch row: p * p * C."""
        return self.patch * self.patch * self.channels


# DMAE's text gives 16 blocks and 16 heads for every size; its parameter counts fit only these.
ARCHITECTURES: dict[str, Architecture] = {
    "tiny": Architecture(width=192, depth=12, heads=3),
    "small": Architecture(width=384, depth=12, heads=6),
    "base": Architecture(),
    "large": Architecture(width=1024, depth=24, heads=16),
    "huge": Architecture(width=1280, depth=32, heads=16, patch=14),
    "digits": Architecture(
        image_size=(32, 32),
        channels=1,
        patch=16,
        width=32,
        depth=1,
        heads=1,
        class_token=False,  # 4 tokens and not 5: the classifier never reads it
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=4,
    ),
}


def architecture(name: str, shape: tuple[int, int, int], patch: int | None = None) -> Architecture:
    """The named architecture for images of `shape` ``(C, H, W)``.

    Raises:
        ValueError: unknown name, or an image side that is no multiple of the patch.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    channels, height, width = shape
    known = ARCHITECTURES[name]
    return replace(known, channels=channels, image_size=(height, width), patch=patch or known.patch)


def sincos_positions(grid: tuple[int, int], width: int, class_token: bool) -> Tensor:
    """Fixed positions ``[(1+)L, width]``; the first half codes the column, the second the row.

    Each half is sin and cos of the coordinate times ``10000 ** (-i / (width/4))``. The class
    token's position is zero.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def code(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)  # [length, width/2]

    rows, columns = grid
    column = code(columns)[None].expand(rows, -1, -1)
    row = code(rows)[:, None].expand(-1, columns, -1)
    positions = torch.cat([column, row], 2).reshape(rows * columns, width).float()
    return torch.cat([torch.zeros(1, width), positions]) if class_token else positions


class Encoder(nn.Module):
    """Patch embedding, positions and blocks: what pretraining and classification share.

    Args:
        arch: see `Architecture`.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
    """

    positions: Tensor

    def __init__(self, arch: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embed = nn.Linear(arch.row_size, arch.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width)) if arch.class_token else None
        positions = sincos_positions(arch.grid, arch.width, arch.class_token)
        self.register_buffer("positions", positions, persistent=False)
        rates = [drop_path * i / max(1, arch.depth - 1) for i in range(arch.depth)]
        self.blocks = nn.ModuleList(block(arch.width, arch.heads, rate) for rate in rates)

    def rows(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` of this encoder's size -> patch rows ``[N, L, p*p*C]``.

        Raises:
            ValueError: images of another shape; a single patch would broadcast over any number.
        """
        wanted = (self.arch.channels, *self.arch.image_size)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images must be [N, C, H, W] with {wanted}, not {tuple(images.shape)}"
            )
        return patchify(images, self.arch.patch)

    def encode(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch rows ``[N, L, p*p*C]`` -> tokens ``[N, (1+)L, width]``, before any final norm.

        With `keep` (int64 ``[N, K]``) only those patches are encoded: ``[N, (1+)K, width]``.
        """
        first = int(self.arch.class_token)
        places = self.positions[first:].expand(len(rows), -1, -1)
        if keep is not None:  # gathered before the embedding, so that removed patches cost nothing
            rows, places = take(rows, keep), take(places, keep)
        tokens: Tensor = self.patch_embed(rows) + places
        if self.cls_token is not None:
            start = (self.cls_token + self.positions[:1]).expand(len(rows), -1, -1)
            tokens = torch.cat([start.to(tokens.dtype), tokens], 1)
        for layer in self.blocks:
            tokens = layer(tokens)
        return tokens


class ViT(Encoder):
    """Classifier: the mean of the patch tokens, a LayerNorm, a linear head.

    Input: normalised images ``[N, C, H, W]``; output: logits ``[N, classes]``.
    """

    def __init__(self, arch: Architecture, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(arch, drop_path)
        self.num_classes = num_classes
        self.fc_norm = LayerNorm(arch.width)
        self.head = nn.Linear(arch.width, num_classes)
        initialise(self)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, C, H, W]`` -> logits ``[N, classes]``."""
        tokens = self.encode(self.rows(images))
        logits: Tensor = self.head(self.fc_norm(tokens[:, int(self.arch.class_token) :].mean(1)))
        return logits


def block(width: int, heads: int, drop_path: float = 0.0) -> Block:
    """A timm transformer block with the settings all our models share."""
    return Block(width, heads, qkv_bias=True, norm_layer=LayerNorm, drop_path=drop_path)


def take(tokens: Tensor, keep: Tensor) -> Tensor:
    """Tokens ``[N, L, D]`` at places `keep` ``[N, K]`` -> ``[N, K, D]``."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))


def initialise(model: nn.Module) -> None:
    """Xavier-uniform linears with zero bias; learned tokens normal(0, 0.02)."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            nn.init.normal_(parameter, std=0.02)
