# SPDX-License-Identifier: Apache-2.0
"""Frozen layers laid out for a CPU: the same function as the layers they replace, faster.

Layers of timm's vision transformers and of our own models are replaced, where they are exactly
those; others stay as they are. All have a gradient with respect to their input, as attacks need
it, and none with respect to weights.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, DropPath, LayerNorm, Mlp
from timm.models.vision_transformer import Attention, Block, LayerScale
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nimfast.ops import attention
from nimfast.ops.backend import choose
from nimfast.ops.frozen_linear import FrozenLinear, can_serve, frozen_linear
from nimfast.ops.transformer_block import FrozenBlock, Norm, transformer_block

# Products of at most this many multiplications are as fast in the plain layout, or faster: a call
# of oneDNN's takes some 12 us more (fp32, one AVX-512 core; they met at 4 to 6 million).
_SMALL = 3 << 20

_FIXED = "a module made by prepare cannot be moved or cast; prepare the original"


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the layers of a frozen `module` on a CPU, in eval mode and `dtype`, in place.

    Blocks and attention are taken over where the compiled kernels serve them, linear layers where
    torch has oneDNN and that has the type; see the classes.
    """
    attend = choose("attention", torch.device("cpu")) == "native"
    _pack_children(module, can_serve(dtype), _has_products(dtype), attend)
    module.eval()  # new layers are in train mode, and whoever looks would set and reset it


def _pack_children(parent: nn.Module, fuse: bool, linear: bool, attend: bool) -> None:
    # Linear layers only inside modules known to call them: others read the weights of a child
    # themselves (torch's own transformer layers, some attention layers of timm).
    calls = type(parent).__module__.startswith("nimfast.") or type(parent) in (Mlp, Attention)
    for name, layer in list(parent.named_children()):
        if type(layer) is Block and fuse and _is_plain(layer, scaled=True) and _is_even(layer):
            setattr(parent, name, FusedBlock(layer))
        elif type(layer) is Block and linear and attend and _is_plain(layer, scaled=False):
            _pack_children(layer, fuse, linear, attend)
            setattr(parent, name, PackedBlock(layer))
        elif type(layer) is Attention and linear and attend and _is_plain_attention(layer):
            setattr(parent, name, PackedAttention(layer))
        # Exactly this class and without hooks, or it might compute something else.
        elif type(layer) is nn.Linear and calls and not _has_hooks(layer):
            gelu = type(parent) is Mlp and name == "fc1" and _is_exact_gelu(parent.act)
            if fuse and not gelu and _is_even(layer):
                setattr(parent, name, FusedLinear(layer))
            elif linear:
                setattr(parent, name, PackedLinear(layer, gelu))
                if gelu:
                    parent.act = nn.Identity()
        else:
            _pack_children(layer, fuse, linear, attend)


def can_pack_any(module: nn.Module) -> bool:
    """Whether `pack` would replace any layer: worth a look before a module is copied for it."""
    ours = (Mlp, Attention)
    return any(
        type(m) in ours or type(m).__module__.startswith("nimfast.models.")
        for m in module.modules()
    )


class PackedLinear(nn.Module):
    """A frozen linear layer in oneDNN's own weight layout, with bias and GELU in the product.

    torch's eager linear lays the weight out anew and adds the bias in a pass of its own at every
    call. On two AVX-512 cores packing took a ViT-tiny (64 tokens, 32 rows) from 6.0 to 4.5 ms per
    sample in fp32, and the embedded model (1,024 rows) from 0.0085 to 0.0062 ms in bf16. Small
    fp32 products stay plain; which ones is a matter of shapes alone, so that equal batches give
    equal bits.

    Args:
        linear: the layer, on a CPU in float32 or bfloat16.
        gelu: whether an exact GELU follows and is taken over.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach().contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = linear.bias
        self.gelu = gelu
        self._transposed: Tensor | None = None
        # Only where a small product can be one: not a second copy of large layers.
        small = weight.dtype == torch.float32 and weight.numel() <= _SMALL // 32
        self._plain = weight if small else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As the layer it replaces: ``[..., in]`` -> ``[..., out]``.

        `residual` is added before rounding; it is not for a layer with a GELU.
        """
        wanted = x.requires_grad or (residual is not None and residual.requires_grad)
        if torch.is_grad_enabled() and wanted and self._plain_for(x) is None:
            result: Tensor = _Linear.apply(x, residual, self)
            return result
        return self.product(x, residual, self.gelu)

    def product(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        """`forward`, with or without the GELU; small products alone are differentiable."""
        plain, call = self._plain_for(x), torch.ops.mkldnn._linear_pointwise
        result: Tensor
        if plain is not None:
            result = functional.linear(x, plain, self.bias)
            if residual is not None:
                result = result.add_(residual)
            elif gelu:
                result = functional.gelu(result)
        elif residual is not None:
            result = call.binary(x, residual, self.weight, self.bias, "add")
        elif gelu:
            result = call(x, self.weight, self.bias, "gelu", [], "none")
        else:
            result = call(x, self.weight, self.bias, "none", [], "")
        return result

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """``[..., out]`` -> ``[..., in]``: what reaches the input of a gradient of the product."""
        plain = self._plain_for(gradient)
        if plain is not None:
            return gradient @ plain
        if self._transposed is None:  # made when first needed: certification never does
            weight = self.weight.to_dense().t().contiguous()
            self._transposed = torch.ops.mkldnn._reorder_linear_weight(weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            gradient, self._transposed, None, "none", [], ""
        )
        return result

    def _plain_for(self, x: Tensor) -> Tensor | None:
        """The plain weight, where a product with `x` is small."""
        if self._plain is None or x.numel() // x.shape[-1] * self._plain.numel() > _SMALL:
            return None
        return self._plain

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        raise TypeError(_FIXED)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        product = layer.product(x, residual)
        if not layer.gelu:
            return product
        ctx.save_for_backward(product)
        return functional.gelu(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_residual, _ = ctx.needs_input_grad
        residual = gradient if of_residual else None
        if ctx.layer.gelu:
            gradient = torch.ops.aten.gelu_backward(gradient, *ctx.saved_tensors)
        return ctx.layer.transposed_product(gradient) if of_x else None, residual, None


class PackedAttention(nn.Module):
    """timm's self-attention over packed layers and our kernel, which reads what `qkv` returns.

    Args:
        layer: without norms or a gate of its own, in eval mode; with a mask, torch's own attention
            is called.
    """

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.qkv = PackedLinear(layer.qkv)
        self.proj = PackedLinear(layer.proj)
        self.heads = layer.num_heads
        self.scale = layer.scale

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the layer it replaces: ``[B, N, width]`` -> ``[B, N, width]``."""
        result: Tensor = self.proj(self.mixed(x, attn_mask, is_causal))
        return result

    def mixed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """What the projection gets, ``[B, N, H * D]``."""
        qkv = self.qkv(x)
        if attn_mask is None and not is_causal:
            return attention(qkv, self.heads, self.scale)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale
        )
        return mixed.transpose(1, 2).flatten(2)


class PackedBlock(nn.Module):
    """timm's transformer block over packed layers, which add the residuals themselves.

    Where `FusedBlock` does not serve: bfloat16 on a processor that multiplies it in tiles.

    Args:
        block: of packed layers, without scales of its own, in eval mode.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        # Any: their packed layers have methods that timm's declarations do not know.
        parts: Any = block
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        self.attn, self.mlp = parts.attn, parts.mlp

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the block it replaces: ``[B, N, width]`` -> ``[B, N, width]``."""
        x = self.attn.proj(self.attn.mixed(self.norm1(x), attn_mask, is_causal), x)
        result: Tensor = self.mlp.fc2(self.mlp.fc1(self.norm2(x)), x)
        return result


class FusedBlock(nn.Module):
    """timm's transformer block, by one call of ours (`nimfast.ops.transformer_block`).

    Args:
        block: exactly timm's, frozen, in eval mode. It stays, for what the kernel does not do:
            attention with a mask.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.plain = block
        parts: Any = block
        attn, mlp = parts.attn, parts.mlp
        norm1, norm2 = (
            Norm(layer.weight, layer.bias, layer.eps) for layer in (parts.norm1, parts.norm2)
        )
        self.frozen = FrozenBlock(
            norm1, _frozen(attn.qkv), attn.num_heads, attn.scale, _frozen(attn.proj, parts.ls1),
            norm2, _frozen(mlp.fc1), _frozen(mlp.fc2, parts.ls2),
        )  # fmt: skip

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the block it replaces: ``[B, N, width]`` -> ``[B, N, width]``."""
        if attn_mask is None and not is_causal and can_serve(x.dtype):
            return transformer_block(x, self.frozen)
        result: Tensor = self.plain(x, attn_mask, is_causal)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> FusedBlock:
        raise TypeError(_FIXED)


class FusedLinear(nn.Module):
    """A linear layer by our products, which give a row the same bits in every batch.

    Args:
        layer: frozen. Its weight stays, for where the kernel is switched off.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.plain = layer
        self.frozen = _frozen(layer)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer it replaces: ``[..., in]`` -> ``[..., out]``."""
        if can_serve(x.dtype):
            return frozen_linear(x, self.frozen)
        result: Tensor = self.plain(x)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> FusedLinear:
        raise TypeError(_FIXED)


def _frozen(layer: nn.Linear, scale: nn.Module | None = None) -> FrozenLinear:
    """The layer and the scale that follows it, if any, as one."""
    if not isinstance(scale, LayerScale):
        return FrozenLinear(layer.weight, layer.bias, layer.weight.dtype)
    gain = scale.gamma.float()
    bias = None if layer.bias is None else gain * layer.bias.float()
    return FrozenLinear(gain[:, None] * layer.weight.float(), bias, layer.weight.dtype)


def _has_products(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module or one inside has a hook, which must see its inputs or outputs."""
    return any(
        inner._forward_hooks
        or inner._forward_pre_hooks
        or inner._backward_hooks
        or inner._backward_pre_hooks
        for inner in module.modules()
    )


def _is_exact_gelu(layer: nn.Module) -> bool:
    return type(layer) in (nn.GELU, GELU) and getattr(layer, "approximate", "none") == "none"


def _is_plain_norm(layer: nn.Module) -> bool:
    return type(layer) is nn.LayerNorm or (type(layer) is LayerNorm and not layer._fast_norm)


def _is_plain_attention(layer: Attention) -> bool:
    linears = (layer.qkv, layer.proj)
    without = (layer.q_norm, layer.k_norm, layer.norm)
    return (
        not _has_hooks(layer)
        and layer.gate is None
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(inner) is nn.Identity for inner in without)
    )


def _is_even(module: nn.Module) -> bool:
    """In the sides of every matrix, as the kernels want it."""
    return not any(side % 2 for w in module.parameters() if w.ndim == 2 for side in w.shape)


def _is_plain(block: Block, scaled: bool) -> bool:
    mlp: Any = block.mlp
    scales = (nn.Identity, LayerScale) if scaled else (nn.Identity,)
    linears = (mlp.fc1, mlp.fc2) if type(mlp) is Mlp else ()
    return (
        not _has_hooks(block)
        and type(block.attn) is Attention
        and _is_plain_attention(block.attn)
        and all(_is_plain_norm(norm) for norm in (block.norm1, block.norm2))
        and type(mlp) is Mlp
        and type(mlp.norm) is nn.Identity
        and _is_exact_gelu(mlp.act)
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(scale) in scales for scale in (block.ls1, block.ls2))
        and all(type(p) in (nn.Identity, DropPath) for p in (block.drop_path1, block.drop_path2))
    )
