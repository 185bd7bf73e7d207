# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer (Dosovitskiy et al., 2021) in the shape masked autoencoders pretrain it.

2-D sin-cos positions, LayerNorm eps 1e-6, and a classifier that averages the patch tokens or reads
the class token (MAE, He et al., 2022, appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nimfast.models.patches import PatchModel, Shape

# Any: timm asks for a class where a factory will do.
LayerNorm: Any = partial(nn.LayerNorm, eps=1e-6)


Pooling = Literal["mean", "class"]


@dataclass(frozen=True)
class Architecture(Shape):
    """Shape of an encoder and of the decoder it is pretrained with.

    Attributes:
        image_size, channels, patch: see `Shape`.
        width, depth, heads: token width, number of blocks, attention heads of the encoder.
        class_token: whether a learned token stands before the patch tokens.
        decoder_width, decoder_depth, decoder_heads: the same of the decoder.
        positions: ``fixed`` are the sin-cos ones of the grid; ``stored`` lie in the checkpoint, as
            in published files whose positions are others (fine-tuned, or resized).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    class_token: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    positions: Literal["fixed", "stored"] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if heads < 1 or width % 4 or width % heads:
                raise ValueError(f"{part} {width} must be a multiple of 4 and of its {heads} heads")


# DMAE's text gives 16 blocks and 16 heads for every size; its parameter counts fit only these.
ARCHITECTURES: dict[str, Architecture] = {
    "nano": Architecture(  # ours, to train on a CPU: 32 x 32 pixels, patch 4
        width=64,
        depth=2,
        heads=1,
        patch=4,
        decoder_width=64,
        decoder_depth=1,
        decoder_heads=2,
    ),
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
    "digits-denoiser": Architecture(  # small enough to be embedded with its decoder
        image_size=(32, 32),
        channels=1,
        patch=16,
        width=40,
        depth=1,
        heads=2,
        class_token=False,
        decoder_width=40,
        decoder_depth=1,
        decoder_heads=2,
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


class Encoder(PatchModel):
    """Patch embedding, positions and blocks: what pretraining and classification share.

    Args:
        arch: see `Architecture`.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
    """

    arch: Architecture
    positions: Tensor

    def __init__(self, arch: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embed = nn.Linear(arch.row_size, arch.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width)) if arch.class_token else None
        self.register_positions("positions", arch.width)
        rates = drop_path_rates(drop_path, arch.depth)
        self.blocks = nn.ModuleList(block(arch.width, arch.heads, rate) for rate in rates)

    def register_positions(self, name: str, width: int) -> None:
        """Make sin-cos positions a buffer, which the checkpoint holds where they are stored."""
        table = sincos_positions(self.arch.grid, width, self.arch.class_token)
        self.register_buffer(name, table, persistent=self.arch.positions == "stored")

    def encode(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rows of the kept patches ``[N, K, p*p*C]`` -> tokens ``[N, (1+)K, width]``, not normed.

        `keep` (int64 ``[N, K]``) says where each row stood; None: all patches, in order.

        Raises:
            ValueError: without `keep`, another number of rows than the image has patches.
        """
        first = int(self.arch.class_token)
        places = self.positions[first:]
        if keep is not None:
            places = places[keep]
        elif rows.shape[1] != self.arch.patches:
            raise ValueError(f"rows must be those of all {self.arch.patches} patches without keep")
        tokens: Tensor = self.patch_embed(rows) + places
        if self.cls_token is not None:
            start = (self.cls_token + self.positions[:1]).expand(len(rows), -1, -1)
            tokens = torch.cat([start.to(tokens.dtype), tokens], 1)
        for layer in self.blocks:
            tokens = layer(tokens)
        return tokens


class ViT(Encoder):
    """Classifier: pooled tokens and a linear head.

    Input: normalised images ``[N, C, H, W]``, or their patch rows; output: logits ``[N, classes]``.

    Args:
        arch: see `Architecture`.
        num_classes: length of the logits.
        drop_path: see `Encoder`.
        pooling: ``mean`` of the patch tokens, then a norm (DMAE, NIM); ``class``: a norm, then the
            class token.
        batch_norm: whether a batch norm without weights stands before the head (linear probes).
    """

    def __init__(
        self,
        arch: Architecture,
        num_classes: int,
        drop_path: float = 0.0,
        pooling: Pooling = "mean",
        batch_norm: bool = False,
    ) -> None:
        super().__init__(arch, drop_path)
        self.num_classes = num_classes
        self.pooling = pooling
        self.batch_norm = nn.BatchNorm1d(arch.width, eps=1e-6, affine=False) if batch_norm else None
        if pooling == "mean":
            self.fc_norm = LayerNorm(arch.width)
        elif arch.class_token:
            self.norm = LayerNorm(arch.width)
        else:
            raise ValueError("pooling 'class' needs an architecture with a class token")
        self.head = nn.Linear(arch.width, num_classes)
        initialise(self)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, C, H, W]``, or all their rows ``[N, L, p*p*C]``, -> logits."""
        rows = self.rows(images) if images.dim() == 4 else images
        logits: Tensor = self.head(self.features(rows))
        return logits

    def features(self, rows: Tensor) -> Tensor:
        """All patch rows ``[N, L, p*p*C]`` -> what the head sees, ``[N, width]``."""
        tokens = self.encode(rows)
        pooled: Tensor
        if self.pooling == "mean":
            pooled = self.fc_norm(tokens[:, int(self.arch.class_token) :].mean(1))
        else:
            pooled = self.norm(tokens[:, 0])  # a norm of each token by itself
        return pooled if self.batch_norm is None else self.batch_norm(pooled)


class Trunk(Encoder):
    """An encoder with its last norm and nothing after it, as encoder-only files hold it."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        self.norm = LayerNorm(arch.width)
        initialise(self)

    def forward(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        """Rows of the kept patches -> normed tokens ``[N, (1+)K, width]``; see `encode`."""
        tokens: Tensor = self.norm(self.encode(rows, keep))
        return tokens


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def block(width: int, heads: int, drop_path: float = 0.0) -> Block:
    """A timm transformer block with the settings all our models share."""
    return Block(width, heads, qkv_bias=True, norm_layer=LayerNorm, drop_path=drop_path)


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
