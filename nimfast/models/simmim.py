# SPDX-License-Identifier: Apache-2.0
"""SimMIM (Xie et al., 2022): the encoder sees every place, masked ones as a learned token.

One linear map then predicts the pixels of each patch of the last stage. NIM-SimMIM is the same
network without a mask. Two encoders: a ViT with a relative position bias, which its blocks share or
have each, and no absolute positions (as in BEiT, Bao et al., 2022), and a Swin Transformer (Liu et
al., 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.beit import Block, RelativePositionBias
from timm.models.swin_transformer import SwinTransformerStage
from torch import Tensor, nn

from nimfast.models.patches import PatchModel, Shape
from nimfast.models.vit import ARCHITECTURES, LayerNorm, drop_path_rates
from nimfast.ops import mask_tokens

LAYER_SCALE = 0.1


@dataclass(frozen=True)
class SimMIMArchitecture(Shape):
    """Shape of a SimMIM network.

    Attributes:
        image_size, channels: see `Shape`; sides are multiples of `predicted_patch`.
        patch: side p in pixels of the patches that are embedded and masked.
        width: token width of the first stage; it doubles with each further stage.
        depths, heads: blocks and attention heads, one entry per stage. A ViT has one stage.
        window: side of Swin's attention windows in tokens; None for a ViT.
        shared_bias: whether a ViT's blocks share one table of relative positions, as in
            pretraining, or have one each (BEiT's form for fine-tuning). A Swin's have one each.
    """

    width: int = 768
    depths: tuple[int, ...] = (12,)
    heads: tuple[int, ...] = (12,)
    window: int | None = None
    shared_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON gives lists
        object.__setattr__(self, "heads", tuple(self.heads))
        if not self.depths or len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads}: one of each per stage")
        if self.window is None and len(self.depths) > 1:
            raise ValueError("a ViT has one stage; several need a window")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(f"width {width} must be a multiple of its {heads} heads")
        if any(side % self.predicted_patch for side in self.image_size):
            raise ValueError(
                f"image size {self.image_size} is no multiple of {self.predicted_patch}, "
                "the patch of the last stage"
            )

    @property
    def widths(self) -> list[int]:
        """Token width of each stage."""
        return [self.width * 2**stage for stage in range(len(self.depths))]

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def predicted_patch(self) -> int:
        """Side P in pixels of a token of the last stage."""
        return self.patch << (len(self.depths) - 1)


def simmim_architecture(
    name: str, shape: tuple[int, int, int], patch: int | None = None
) -> SimMIMArchitecture:
    """``swin-base`` or one of the ViT sizes, for images of `shape` ``(C, H, W)``.

    Raises:
        ValueError: unknown name, or an image side that is no multiple of the patch.
    """
    channels, height, width = shape
    image_size = (height, width)
    if name == "swin-base":
        # 6 at 192 pixels (pretraining), 7 at 224: then every stage is cut into whole windows.
        window = max(4, min(image_size) // 32)
        return SimMIMArchitecture(
            image_size, channels, patch or 4, 128, (2, 2, 18, 2), (4, 8, 16, 32), window
        )
    if name not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, "swin-base"))
        raise ValueError(f"unknown architecture {name!r}; choose one of {known}")
    vit = ARCHITECTURES[name]
    return SimMIMArchitecture(
        image_size, channels, patch or vit.patch, vit.width, (vit.depth,), (vit.heads,)
    )


class SimMIM(PatchModel):
    """Encoder with a mask token, and a linear decoder.

    Input: all patch rows of normalised images, ``[N, L, p*p*C]``, and a mask, bool ``[N, L]``
    (True: the mask token stands for the patch; None: no mask, as in NIM). Output: rows of the
    predicted patches, ``[N, L', P*P*C]`` with P = `predicted_patch`. For a Swin, L' < L.

    Args:
        arch: see `SimMIMArchitecture`.
        drop_path: stochastic depth rate of the last block.
    """

    arch: SimMIMArchitecture

    def __init__(self, arch: SimMIMArchitecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.arch = arch
        self.encoder = make_encoder(arch, drop_path)
        # The published 1x1 convolution with PixelShuffle: a linear map of each token.
        self.decoder = nn.Linear(arch.widths[-1], self.predicted_patch**2 * arch.channels)
        initialise(self)

    @property
    def predicted_patch(self) -> int:
        """Side P in pixels of the predicted patches."""
        return self.arch.predicted_patch

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patch rows and mask -> rows of predicted patches, see the class."""
        prediction: Tensor = self.decoder(self.encoder(rows, mask))
        return prediction


class ViTEncoder(nn.Module):
    """Rows ``[N, L, p*p*C]`` and mask -> normed patch tokens ``[N, L, width]``."""

    def __init__(self, arch: SimMIMArchitecture, drop_path: float) -> None:
        super().__init__()
        width, depth, heads = arch.width, arch.depths[0], arch.heads[0]
        self.patch_embed = nn.Linear(arch.row_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, width))
        self.rel_pos_bias = RelativePositionBias(arch.grid, heads) if arch.shared_bias else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                qkv_bias=True,  # of queries and values only
                drop_path=rate,
                init_values=LAYER_SCALE,
                norm_layer=LayerNorm,
                window_size=None if arch.shared_bias else arch.grid,
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm: nn.Module = LayerNorm(width)

    def forward(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """See the class."""
        tokens = _masked(self.patch_embed(rows), mask, self.mask_token)
        start = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([start, tokens], 1)
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias()[None].to(tokens.dtype)  # attention wants one type
        for layer in self.blocks:
            tokens = layer(tokens, shared_rel_pos_bias=bias)
        patches: Tensor = self.norm(tokens)[:, 1:]
        return patches


class SwinEncoder(nn.Module):
    """Rows ``[N, L, p*p*C]`` and mask -> normed tokens ``[N, L', width]`` of the last stage."""

    def __init__(self, arch: SimMIMArchitecture, drop_path: float) -> None:
        super().__init__()
        self.grid = arch.grid
        self.patch_embed = nn.Linear(arch.row_size, arch.width)
        self.embed_norm = nn.LayerNorm(arch.width)  # eps 1e-5 throughout, as Swin has it
        self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, arch.width))
        rates = drop_path_rates(drop_path, arch.depth)
        self.stages = nn.Sequential()
        size, width = arch.grid, arch.width
        for stage, depth in enumerate(arch.depths):
            first = sum(arch.depths[:stage])
            self.stages.append(
                SwinTransformerStage(
                    dim=width,
                    out_dim=arch.widths[stage],
                    input_resolution=size,
                    depth=depth,
                    downsample=stage > 0,
                    num_heads=arch.heads[stage],
                    window_size=arch.window or arch.grid,
                    drop_path=rates[first : first + depth],
                )
            )
            width = arch.widths[stage]
            size = (arch.grid[0] >> stage, arch.grid[1] >> stage)
        self.norm: nn.Module = nn.LayerNorm(width)

    def forward(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """See the class."""
        tokens = _masked(self.embed_norm(self.patch_embed(rows)), mask, self.mask_token)
        places = self.stages(tokens.reshape(len(tokens), *self.grid, -1))  # [N, H/P, W/P, width]
        patches: Tensor = self.norm(places.flatten(1, 2))
        return patches


def _masked(tokens: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> Tensor:
    if mask is None:
        return tokens
    if mask_token is None:
        raise ValueError("a mask needs an encoder with a mask token, and a classifier's has none")
    return mask_tokens(tokens, mask_token.flatten(), mask)


def make_encoder(arch: SimMIMArchitecture, drop_path: float) -> ViTEncoder | SwinEncoder:
    """The encoder of `arch`; `drop_path` is the last block's."""
    return (ViTEncoder if arch.window is None else SwinEncoder)(arch, drop_path)


def initialise(model: nn.Module) -> None:
    """Linears and tokens truncated normal(0, 0.02), biases zero; a ViT's branches as in BEiT."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_token"):
            nn.init.trunc_normal_(parameter, std=0.02)
    for encoder in model.children():
        if not isinstance(encoder, ViTEncoder):
            continue
        # BEiT, section 2.5: the last map of both branches of block l is divided by sqrt(2 l).
        for name, parameter in encoder.blocks.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                block = 1 + int(name.partition(".")[0])
                parameter.data.div_((2 * block) ** 0.5)
