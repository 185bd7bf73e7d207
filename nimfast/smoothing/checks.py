# SPDX-License-Identifier: Apache-2.0
"""Whether a classifier is one that can be smoothed: a function of the noisy image and nothing else.

Dropout and batch statistics are refused wherever they are at work: as modules that stay in training
mode, or as plain functions, which no eval mode reaches. Inner randomness of another kind is
reported: it is allowed where its law does not depend on the image, which nobody can see from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from nimfast.smoothing.network import Network

# Logits of two calls that differ by less than this share of the largest differ by rounding.
_ROUNDING = 1e-3
_DROPOUT = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


def check_modules(module: nn.Module) -> None:
    """Refuse modules that `eval()`, called before, could not bring into eval mode.

    Raises:
        ValueError: one that stays in training mode, or normalises by the statistics of its batch.
    """
    for name, part in module.named_modules():
        where = f"{type(part).__name__} {name!r}" if name else type(part).__name__
        if part.training:
            raise ValueError(
                f"{where} stays in training mode after eval(); certify it in eval mode"
            )
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{where} normalises by the statistics of its batch, so an image's class depends "
                "on the others; give it running statistics"
            )


@torch.inference_mode()
def check_function(network: Network, image: Tensor, rows: int) -> bool:
    """Try a network on noisy copies of `image` and refuse it where it is no function of each.

    Args:
        network: classifier and noise.
        image: ``[C, H, W]`` on the network's device.
        rows: of the fixed compute shape.

    Returns:
        Whether it is deterministic: two identical calls give the same logits.

    Raises:
        ValueError: dropout or batch statistics are at work, or the logits of a noisy image change
            with the others in its batch.
    """
    network.module.eval()
    check_modules(network.module)
    parts = 2 if rows % 2 == 0 else 1
    images = network.accept(image).expand(parts, *image.shape)
    keys = torch.zeros(parts, dtype=torch.int64, device=image.device)
    first = torch.arange(parts, device=image.device) * rows

    def logits(first: Tensor) -> Tensor:
        return network(images, keys, first, rows // parts)[: rows // parts].float()

    with _Watch():
        once = logits(first)
    if not _same(once, logits(first)):
        return False
    if parts == 2 and not _same(once, logits(first * 2)):
        raise ValueError(
            "an image's logits change with the other images in its batch; a certificate needs a "
            "classifier that looks at each image by itself"
        )
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    scale = float(one.nan_to_num(posinf=0, neginf=0).abs().max())
    return torch.allclose(one, other, rtol=0, atol=_ROUNDING * scale, equal_nan=True)


class _Watch(TorchFunctionMode):
    """Raises ValueError where a function is called that makes its result random or shared."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUT and kwargs.get("training") and kwargs.get("p"):
            raise ValueError(
                f"{function.__name__} is active in eval mode; a certificate is for one function: "
                "call dropout with training=self.training"
            )
        attention = function is F.scaled_dot_product_attention
        if attention and (kwargs.get("dropout_p") or any(args[4:5])):
            raise ValueError("attention dropout is active in eval mode; set dropout_p to 0")
        if function is F.batch_norm and kwargs.get("training"):
            raise ValueError(
                "batch_norm uses the statistics of its batch in eval mode, so an image's class "
                "depends on the others; give it running statistics"
            )
        return function(*args, **kwargs)
