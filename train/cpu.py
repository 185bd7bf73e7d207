# SPDX-License-Identifier: Apache-2.0
"""What makes a training step on a CPU faster and leaves weights, names and results alone."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from nimfast import runtime
from nimfast.ops import attention
from nimfast.ops.backend import choose
from train.blocks import KernelBlock, can_serve


def speed_up(model: nn.Module, device: torch.device, precision: str) -> None:
    """Make ready for training, or for gradients, on a CPU; in place. Elsewhere does nothing.

    Self-attention goes through our kernel where it is compiled (see `KernelAttention`); what that
    does not serve is plain products in half precision. In bfloat16 whole blocks train through our
    kernels where these are the faster ones (see `train.blocks`). Freed memory stays with the
    process.
    """
    if device.type != "cpu":
        return
    runtime.keep_freed_memory()
    if choose("attention", device) == "native":
        for layer in model.modules():
            if type(layer) is Attention and _is_plain(layer):
                layer.__class__ = KernelAttention
    if precision == "bf16":
        runtime.use_plain_attention(model)
        for block in model.modules():
            if type(getattr(block, "attn", None)) is KernelAttention and can_serve(block):
                block.__class__ = KernelBlock


class KernelAttention(Attention):
    """timm's layer, its weights and their names as they are, over `nimfast.ops.attention`.

    It keeps for its gradient what the `qkv` layer returns, and nothing else. Made by `speed_up`, of
    layers without a norm, a gate or dropout of their own.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's: ``[B, N, width]`` -> ``[B, N, width]``."""
        if attn_mask is not None or is_causal:
            masked: Tensor = super().forward(x, attn_mask, is_causal)
            return masked
        result: Tensor = self.proj(attention(self.qkv(x), self.num_heads, self.scale))
        return result


def _is_plain(layer: Attention) -> bool:
    norms = (layer.q_norm, layer.k_norm, layer.norm)
    dropout = layer.attn_drop.p or layer.proj_drop.p
    return layer.gate is None and not dropout and all(type(n) is nn.Identity for n in norms)
