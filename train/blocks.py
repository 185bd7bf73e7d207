# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks for training in bfloat16 on a CPU: the same function, its steps written out.

A branch of a block is ``x + gain * linear2(middle(linear1(norm(x))))``, the middle being attention
or GELU. Here it is one node of autograd's graph over the kernels of `nimfast.ops.linear`. Images
whose branch stochastic depth drops (Huang et al., 2016) are left out of it, not multiplied by zero.
Values are rounded to bfloat16 where autocast rounds them, or not at all.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, DropPath, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nimfast.ops.backend import choose
from nimfast.ops.layer_norm import layer_norm, layer_norm_backward, take_rows
from nimfast.ops.linear import (
    linear,
    linear_add,
    linear_gelu,
    linear_times,
    multiplies_bf16,
    weight_gradient,
)


class KernelBlock(Block):
    """timm's block, its weights and their names as they are.

    In training, in bfloat16; else timm's own forward. Made by `train.cpu.speed_up`, of blocks for
    which `can_serve` holds.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's: ``[B, N, width]`` -> ``[B, N, width]``."""
        # In eval mode gradients are an attack's, by the input alone, for which a function of our
        # own would compute those of all weights too.
        ours = self.training and attn_mask is None and not is_causal
        if torch.compiler.is_compiling() or not ours or not _in_bfloat16():
            plain: Tensor = super().forward(x, attn_mask, is_causal)
            return plain
        parts: Any = self
        attn, mlp = parts.attn, parts.mlp
        middle = _Attention(attn.num_heads, attn.scale)
        x = _branch(x, self.drop_path1, self.norm1, attn.qkv, middle, attn.proj)
        return _branch(x, self.drop_path2, self.norm2, mlp.fc1, _Gelu(), mlp.fc2)


def can_serve(block: nn.Module) -> bool:
    """Whether `KernelBlock` computes what `block` does, its attention aside, and faster here."""
    native = choose("linear", torch.device("cpu")) == "native"
    if type(block) is not Block or not native or not multiplies_bf16():
        return False
    parts: Any = block
    attn, mlp = parts.attn, parts.mlp
    norms, layers = (parts.norm1, parts.norm2), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    drops = (parts.drop_path1, parts.drop_path2)
    return (
        type(mlp) is Mlp
        and type(mlp.act) in (nn.GELU, GELU)
        and getattr(mlp.act, "approximate", "none") == "none"
        and not (mlp.drop1.p or mlp.drop2.p)
        and all(type(part) is nn.Identity for part in (parts.ls1, parts.ls2, mlp.norm))
        and all(type(drop) in (nn.Identity, DropPath) for drop in drops)
        and all(type(norm) is nn.LayerNorm and norm.elementwise_affine for norm in norms)
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
        and not any(side % 16 for layer in layers for side in layer.weight.shape)
    )


def _in_bfloat16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _branch(
    x: Tensor, drop: nn.Module, norm: Any, first: Any, middle: _Attention | _Gelu, last: Any
) -> Tensor:
    kept, gain = None, 1.0
    if isinstance(drop, DropPath) and drop.drop_prob:
        share = 1 - drop.drop_prob
        drawn = x.new_empty(len(x), dtype=torch.bfloat16).bernoulli_(share)  # as timm draws
        gain = 1 / share if drop.scale_by_keep else 1.0
        if not drawn.any():
            gain = 0.0  # gradients are zero then, and not missing
        elif not drawn.all():
            kept = drawn.nonzero().flatten()
    result: Tensor = _Branch.apply(
        x.float().contiguous(), kept, gain, norm.eps, middle, norm.weight, norm.bias,
        first.weight, first.bias, last.weight, last.bias,
    )  # fmt: skip
    return result


class _Attention:
    """Queries, keys and values from the first layer; kept for the gradient."""

    def __init__(self, heads: int, scale: float) -> None:
        self.heads, self.scale = heads, scale

    def forward(self, seen: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer gets, and what `backward` needs."""
        qkv = linear(seen, weight, bias)
        return torch.ops.nimfast.attention(qkv, self.heads, self.scale), qkv

    def backward(self, gradient: Tensor, last: Tensor, qkv: Tensor) -> Tensor:
        """From the gradient of the last layer's result to that of the first one's."""
        mixed = linear(gradient, last, across=True)
        result: Tensor = torch.ops.nimfast.attention_backward(mixed, qkv, self.heads, self.scale)
        return result


class _Gelu:
    """GELU of the first layer; its derivative is kept for the gradient."""

    def forward(self, seen: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """As of `_Attention`."""
        return linear_gelu(seen, weight, bias)

    def backward(self, gradient: Tensor, last: Tensor, slope: Tensor) -> Tensor:
        """As of `_Attention`."""
        return linear_times(gradient, last, slope)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, gain: float, eps: float,
        middle: _Attention | _Gelu, norm: Tensor, shift: Tensor, first: Tensor,
        first_bias: Tensor, last: Tensor, last_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        seen, mean, scale = layer_norm(x, norm, shift, eps, kept)
        through, saved = middle.forward(seen, first, first_bias)
        ctx.middle, ctx.gain = middle, gain
        ctx.save_for_backward(x, mean, scale, seen, through, saved, kept, norm, first, last)
        return linear_add(through, last, last_bias, x, gain, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, mean, scale, seen, through, saved, kept, norm, first, last = ctx.saved_tensors
        gradient = gradient.contiguous()
        after = take_rows(gradient, ctx.gain, kept)
        of_last, of_last_bias = weight_gradient(after, through)
        after = ctx.middle.backward(after, last, saved)
        of_first, of_first_bias = weight_gradient(after, seen)
        after = linear(after, first, across=True)
        of_x, of_norm, of_shift = layer_norm_backward(after, x, norm, mean, scale, gradient, kept)
        return (
            of_x, None, None, None, None, of_norm, of_shift, of_first, of_first_bias, of_last,
            of_last_bias,
        )  # fmt: skip
