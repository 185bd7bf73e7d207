# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: each error names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nimfast.ops.backend import TYPE_CODES

FLOATING = tuple(TYPE_CODES)  # what kernels read and write; they compute in float32


def names(dtypes: Sequence[torch.dtype]) -> str:
    """``float32, bfloat16 or float16``."""
    texts = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def check(
    name: str,
    value: Tensor,
    dtypes: Sequence[torch.dtype] | torch.dtype,
    shape: Sequence[int | None],
    meaning: str,
    like: Tensor | None = None,
) -> None:
    """Refuse a tensor of the wrong type, shape or device.

    Args:
        name: of the argument.
        value: the argument.
        dtypes: allowed types.
        shape: allowed sizes; None allows any.
        meaning: the shape in words, as ``[B, C, H, W]``.
        like: a tensor on whose device it must be.

    Raises:
        TypeError: not a tensor of such a type.
        ValueError: another shape or device.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {value!r}; it must be a tensor of {names(allowed)}")
    if value.dtype not in allowed:
        raise TypeError(f"{name} is {value.dtype}; it must be {names(allowed)}")
    if value.dim() != len(shape) or any(
        want is not None and size != want for size, want in zip(value.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {meaning}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device}")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a result type that no kernel writes.

    Raises:
        TypeError: not float32, bfloat16 or float16.
    """
    if dtype not in TYPE_CODES:
        raise TypeError(f"dtype is {dtype}; it must be {names(FLOATING)}")


def check_count(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Refuse a number that is not whole or out of range.

    Raises:
        ValueError: not whole, below `least` or above `most`.
    """
    # Under torch.compile a size may be symbolic.
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value}; it must be a whole number {allowed}")


def per_image(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one per image, as float32 [B] on the device of the images `like` [B, ...].

    Raises:
        TypeError: a tensor that is not float32.
        ValueError: a number that is negative or not finite; a tensor of another shape or device.
    """
    batch = like.shape[0]
    if isinstance(value, Tensor):
        check(name, value, torch.float32, (batch,), f"[{batch}], one value per image", like)
        return value
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be finite and not negative")
    return torch.full((batch,), float(value), dtype=torch.float32, device=like.device)


def per_image_count(name: str, value: int | Tensor, like: Tensor) -> Tensor:
    """A whole number, or one per image, as int64 [B] on the device of the images `like` [B, ...].

    Raises:
        TypeError: a tensor that is not int64.
        ValueError: a negative number; a tensor of another shape or device.
    """
    batch = like.shape[0]
    if isinstance(value, Tensor):
        check(name, value, torch.int64, (batch,), f"[{batch}], one value per image", like)
        return value
    if value < 0:
        raise ValueError(f"{name} is {value}; it must not be negative")
    return torch.full((batch,), value, dtype=torch.int64, device=like.device)


def check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Mean and std as one number per channel; None is 0 and 1.

    Raises:
        ValueError: another number of values, or a std that is not positive.
    """
    means = [0.0] * channels if mean is None else [float(value) for value in mean]
    stds = [1.0] * channels if std is None else [float(value) for value in std]
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values; images have {channels} channels")
    if not all(value > 0 for value in stds):
        raise ValueError(f"std is {stds}; every value must be positive")
    return means, stds
