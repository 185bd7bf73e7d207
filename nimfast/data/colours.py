# SPDX-License-Identifier: Apache-2.0
"""timm's RandAugment and RandomErasing as functions of a seed.

timm draws from the global generators of Python, NumPy and torch. They are seeded for one image at a
time and put back after it, so an image comes out the same in whichever process it is read.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nimfast.errors import UserError

_FILL = (124, 116, 104)  # ImageNet's mean: what moves into the picture
_CENTRE, _SPREAD = 0.5, 0.25  # of the colours in an erased rectangle


def check_rand_augment(config: str) -> None:
    """Raise `UserError` unless timm understands `config`, or it is ``none``."""
    if config == "none":
        return
    try:
        _transform(config, 3, 224)
    except (AssertionError, ValueError, KeyError):
        raise UserError(
            f"--rand-augment {config!r} is not understood; give none, or e.g. rand-m9-mstd0.5-inc1"
        ) from None


def rand_augment(picture: Tensor, config: str, seed: int) -> Tensor:
    """RandAugment (Cubuk et al., 2020) of one picture ``[C, H, W]``, uint8 or fp32 in [0, 1].

    Args:
        picture: see above; one or three channels.
        config: as timm writes it, ``rand-m9-mstd0.5-inc1``.
        seed: of all draws, below 2^31.

    Returns:
        uint8 ``[C, H, W]``.
    """
    from torchvision.transforms.v2 import functional as transforms

    transform = _transform(config, len(picture), min(picture.shape[1:]))
    with _seeded(seed):
        changed = transform(transforms.to_pil_image(picture))
    return transforms.pil_to_tensor(changed)  # type: ignore[no-any-return]


def erase(pixels: Tensor, probability: float, seed: int) -> Tensor:
    """RandomErasing (Zhong et al., 2020): one rectangle of normal colours.

    Their mean is 0.5, their deviation 0.25: timm draws standard normals after normalisation, and
    here nothing is normalised yet.

    Args:
        pixels: fp32 ``[C, H, W]`` in [0, 1].
        probability: that anything is erased.
        seed: of all draws, below 2^31.

    Returns:
        ``[C, H, W]`` in [0, 1].
    """
    from timm.data.random_erasing import RandomErasing

    erasing: Any = RandomErasing(  # type: ignore[no-untyped-call]
        probability, mode="pixel", device="cpu"
    )
    with _seeded(seed + 1):  # other draws than those of RandAugment
        drawn: Tensor = erasing(torch.full_like(pixels, torch.nan))
    return torch.where(drawn.isnan(), pixels, (drawn * _SPREAD + _CENTRE).clamp(0, 1))


@functools.lru_cache(maxsize=8)
def _transform(config: str, channels: int, side: int) -> Any:
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    fill = _FILL if channels == 3 else _FILL[:1]
    # As timm's own training does: shifts up to 45% of the side, bicubic.
    options = {
        "translate_const": int(0.45 * side),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(config, options)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            # timm may ask for 0 bits (all black), which newer Pillow refuses.
            op.level_fn = functools.partial(_some_bits, op.level_fn)
    return transform


def _some_bits(level_fn: Any, *args: Any) -> tuple[int]:
    return (max(1, *level_fn(*args)),)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The CPU's generator itself: torch.manual_seed formats a stack trace at every call.
    generator = torch.default_generator
    before = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        generator.set_state(before[2])
