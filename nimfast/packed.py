# SPDX-License-Identifier: Apache-2.0
"""Frozen layers laid out for a CPU: the same function as the layers they replace, faster.

Layers of timm's vision transformers and of our own models are replaced, where they are exactly
those; others stay as they are. All have a gradient with respect to their input, as attacks need
it, and none with respect to weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import GELU, DropPath, LayerNorm, Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nimfast.ops import attention
from nimfast.ops.backend import choose

# Products of at most this many multiplications are as fast in the plain layout, or faster: a call
# of oneDNN's takes some 12 us more (fp32, one AVX-512 core; they met at 4 to 6 million).
_SMALL = 3 << 20


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace the layers of a frozen `module` on a CPU, in eval mode and `dtype`, in place.

    Attention is taken over where the compiled kernels serve it, linear layers where torch has
    oneDNN and that has the type; see the classes.
    """
    if not _can_pack(dtype):
        return
    attend = choose("attention", torch.device("cpu")) == "native"
    # Only inside modules known to call their layers: others read the weights of a child themselves
    # (torch's own transformer layers, some attention layers of timm).
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if attend and type(layer) is Attention and _is_plain_attention(layer):
                setattr(parent, name, PackedAttention(layer))
        ours = type(parent).__module__.startswith("nimfast.")
        if not (ours or type(parent) in (Mlp, Attention)):
            continue
        for name, layer in list(parent.named_children()):
            # Exactly this class and without hooks, or it might compute something else.
            if type(layer) is nn.Linear and not _has_hooks(layer):
                gelu = type(parent) is Mlp and name == "fc1" and _is_exact_gelu(parent.act)
                setattr(parent, name, PackedLinear(layer, gelu))
                if gelu:
                    parent.act = nn.Identity()
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Block and _is_plain_block(layer):
                setattr(parent, name, PackedBlock(layer))
    module.eval()  # new layers are in train mode, and whoever looks would set and reset it


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
        raise TypeError("a module made by prepare cannot be moved or cast; prepare the original")


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

    With a gradient it is one node of autograd's graph, its steps written out on plain matrices:
    with small batches bookkeeping takes as long as the products. Forward and backward pass of a
    block (256 tokens of width 40, one AVX-512 core): 1.03 ms as timm has it, 0.79 ms here, of which
    the operations by themselves take 0.58.

    Args:
        block: of packed layers and plain layer norms, without scales of its own, in eval mode.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        # Any: their packed layers have methods that timm's declarations do not know.
        parts: Any = block
        self.norm1, self.norm2 = parts.norm1, parts.norm2
        self.attn, self.mlp = parts.attn, parts.mlp
        self.steps = _Steps(
            _Norm.of(parts.norm1), parts.attn.qkv, parts.attn.heads, parts.attn.scale,
            parts.attn.proj, _Norm.of(parts.norm2), parts.mlp.fc1, parts.mlp.fc2,
        )  # fmt: skip

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the block it replaces: ``[B, N, width]`` -> ``[B, N, width]``."""
        result: Tensor
        if attn_mask is None and not is_causal and torch.is_grad_enabled() and x.requires_grad:
            result = _Block.apply(x, self.steps)
            return result
        mixed = self.attn.mixed(self.norm1(x), attn_mask, is_causal)
        x = self.attn.proj(mixed, x)
        result = self.mlp.fc2(self.mlp.fc1(self.norm2(x)), x)
        return result


class _Norm(NamedTuple):
    """A layer norm of rows, without nn.Module's ways around it."""

    shape: list[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @staticmethod
    def of(layer: nn.LayerNorm) -> _Norm:
        return _Norm(list(layer.normalized_shape), layer.weight, layer.bias, layer.eps)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows normed, and their means and inverse deviations for `backward`."""
        found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
            rows, self.shape, self.weight, self.bias, self.eps
        )
        return found

    def backward(self, gradient: Tensor, rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """From the gradient of what was normed to that of the rows."""
        result: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, rows, self.shape, mean, scale, self.weight, self.bias, [True, False, False]
        )[0]
        return result


class _Steps(NamedTuple):
    """What a transformer block does, and its derivative, over rows ``[B * N, width]``."""

    norm1: _Norm
    qkv: PackedLinear
    heads: int
    scale: float
    proj: PackedLinear
    norm2: _Norm
    fc1: PackedLinear
    fc2: PackedLinear

    def forward(self, x: Tensor, saved: list[Tensor]) -> Tensor:
        """Tokens ``[B, N, width]`` -> the same; what `backward` needs is added to `saved`."""
        rows = x.reshape(-1, x.shape[2])
        seen, mean1, scale1 = self.norm1.forward(rows)
        qkv = self.qkv.product(seen).view(*x.shape[:2], -1)
        mixed = torch.ops.nimfast.attention(qkv, self.heads, self.scale)
        middle = self.proj.product(mixed.view(-1, mixed.shape[2]), rows)
        seen, mean2, scale2 = self.norm2.forward(middle)
        hidden = self.fc1.product(seen)
        saved += [rows, mean1, scale1, qkv, middle, mean2, scale2, hidden]
        return self.fc2.product(functional.gelu(hidden), middle).view(x.shape)

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """From the gradient of the block's tokens to that of its input, ``[B, N, width]``."""
        rows, mean1, scale1, qkv, middle, mean2, scale2, hidden = saved
        after = gradient.reshape(rows.shape)
        slope = torch.ops.aten.gelu_backward(self.fc2.transposed_product(after), hidden)
        slope = self.norm2.backward(self.fc1.transposed_product(slope), middle, mean2, scale2)
        after = slope.add_(after)
        slope = torch.ops.nimfast.attention_backward(
            self.proj.transposed_product(after).view(gradient.shape[0], gradient.shape[1], -1),
            qkv, self.heads, self.scale,
        ).view(len(rows), -1)  # fmt: skip
        slope = self.norm1.backward(self.qkv.transposed_product(slope), rows, mean1, scale1)
        return slope.add_(after).view(gradient.shape)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: _Steps) -> Tensor:
        saved: list[Tensor] = []
        result = steps.forward(x, saved)
        ctx.save_for_backward(*saved)
        ctx.steps = steps
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.steps.backward(gradient, ctx.saved_tensors), None


def _can_pack(dtype: torch.dtype) -> bool:
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


def _is_plain_block(block: Block) -> bool:
    mlp: Any = block.mlp
    return (
        not _has_hooks(block)
        and isinstance(block.attn, PackedAttention)
        and all(_is_plain_norm(norm) for norm in (block.norm1, block.norm2))
        and type(mlp) is Mlp
        and type(mlp.norm) is nn.Identity
        and type(mlp.act) is nn.Identity
        and isinstance(mlp.fc1, PackedLinear)
        and isinstance(mlp.fc2, PackedLinear)
        and all(type(scale) is nn.Identity for scale in (block.ls1, block.ls2))
        and all(type(p) in (nn.Identity, DropPath) for p in (block.drop_path1, block.drop_path2))
    )
