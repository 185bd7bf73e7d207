# SPDX-License-Identifier: Apache-2.0
"""Published MAE, DMAE, NIM and SimMIM state dicts, in and out by name.

They differ from ours in names and in layout: the patch embedding is a convolution, SimMIM's decoder
a 1x1 convolution with PixelShuffle, positions are always there, and so are a few tables that follow
from the architecture. They do not describe themselves: the architecture is read off the shapes, and
what shapes do not say comes from `Hints`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State, build, check_fit
from nimfast.models.patches import PatchModel, Shape
from nimfast.models.vit import ARCHITECTURES, sincos_positions

_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^positions$", "pos_embed"),
    (r"^decoder_positions$", "decoder_pos_embed"),
    (r"^((?:encoder\.)?patch_embed)\.(weight|bias)$", r"\1.proj.\2"),
    (r"^encoder\.embed_norm\.", "encoder.patch_embed.norm."),
    # timm merges patches before the blocks of a stage, the published Swin after those of the last.
    (
        r"^encoder\.stages\.(\d+)\.downsample\.",
        lambda match: f"encoder.layers.{int(match[1]) - 1}.downsample.",
    ),
    (r"^encoder\.stages\.", "encoder.layers."),
    (r"^decoder\.(weight|bias)$", r"decoder.0.\1"),
)
# Follow from the architecture; some published files have them and some do not.
_TABLES = ("relative_position_index", "attn_mask")
_POSITIONS = ("pos_embed", "decoder_pos_embed")
_BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Hints:
    """What a published file does not say."""

    heads: int | None = None
    """attention heads (default: as in the sizes known by name, else width / 64)"""
    decoder_heads: int | None = None
    """attention heads of the decoder (default: its width / 32)"""
    image_size: tuple[int, int] | None = None
    """height and width in pixels (default: the file's); positions are resized bicubically"""
    mean: tuple[float, ...] | None = None
    """normalisation it was trained with, one value per channel (default: ImageNet's)"""
    std: tuple[float, ...] | None = None
    """normalisation it was trained with, one value per channel (default: ImageNet's)"""


def to_published(model: PatchModel) -> State:
    """The weights of `model` under the published names, sharing no memory with it."""
    return {
        _theirs(name): _to_published(name, value.detach(), model).contiguous().clone()
        for name, value in _tensors(model).items()
    }


def from_published(state: State, source: object, hints: Hints) -> PatchModel:
    """The network of a published state dict: classifier, autoencoder, SimMIM or encoder alone.

    Args:
        state: as the file holds it, names without ``module.``.
        source: where it came from, for messages.
        hints: what the file does not say.

    Raises:
        UserError: no network known here, or one that does not fit; names the first mismatch.
    """
    try:
        infer = _simmim if any(name.startswith("encoder.") for name in state) else _vit
        header, state = infer(state, source, hints)
        model = build(header)
    except ValueError as error:
        raise UserError(f"{source} does not fit the model: {error}") from None
    own = _tensors(model)
    expected = {
        _theirs(name): _to_published(name, value.to("meta"), model)
        for name, value in own.items()
        if _theirs(name) in state or not name.endswith(_TABLES)
    }
    check_fit(expected, state, source)
    for name in own:
        theirs = _theirs(name)
        if name.endswith(_TABLES) and theirs in state and not torch.equal(state[theirs], own[name]):
            raise UserError(f"{source} does not fit the model: {theirs!r} has other values")
    model.load_state_dict(
        {name: _to_ours(name, state[_theirs(name)], model) for name in model.state_dict()}
    )
    return model


def normalisation(
    hints: Hints, channels: int, source: object
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a published file's input, which the file does not store.

    Warns where ImageNet's are assumed.

    Raises:
        UserError: not one value per channel, or none given for images that are not RGB.
    """
    mean, std = hints.mean, hints.std
    if mean is None and std is None and channels == 3:
        warnings.warn(
            f"{source} does not store its normalisation; ImageNet's mean and std are assumed",
            stacklevel=3,
        )
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if mean is None or std is None or not len(mean) == len(std) == channels:
        raise UserError(
            f"{source} does not store its normalisation; convert it with --mean and --std, "
            f"{channels} values each: python -m nimfast.convert"
        )
    if min(std) <= 0:
        raise UserError(f"--std must be positive, not {min(std)}")
    return mean, std


def _tensors(model: PatchModel) -> State:
    # Buffers too, saved or not, but for the zero k_bias that timm's attention keeps.
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value for name, value in tensors.items() if not name.endswith("k_bias")}


def _theirs(name: str) -> str:
    for pattern, replacement in _NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def _to_published(name: str, value: Tensor, model: PatchModel) -> Tensor:
    arch, pixels = model.arch, model.predicted_patch
    if _theirs(name) in _POSITIONS:
        return value[None]
    if name.endswith("patch_embed.weight"):  # [width, p*p*C] -> [width, C, p, p]
        return value.reshape(-1, arch.patch, arch.patch, arch.channels).permute(0, 3, 1, 2)
    if name in ("decoder.weight", "decoder.bias"):  # [P*P*C, ...] -> [C*P*P, ...]
        cut = value.reshape(pixels * pixels, arch.channels, -1).transpose(0, 1)
        return cut.flatten() if value.ndim == 1 else cut.flatten(0, 1)[..., None, None]
    return value


def _to_ours(name: str, value: Tensor, model: PatchModel) -> Tensor:
    arch, pixels = model.arch, model.predicted_patch
    if _theirs(name) in _POSITIONS:
        return value[0]
    if name.endswith("patch_embed.weight"):
        return value.permute(0, 2, 3, 1).flatten(1)
    if name in ("decoder.weight", "decoder.bias"):
        cut = value.reshape(arch.channels, pixels * pixels, -1).transpose(0, 1)
        return cut.flatten() if value.ndim == 1 else cut.flatten(0, 1)
    return value


def _vit(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    width, channels, patch = _embedding(state, "patch_embed.proj.weight", source)
    token = "cls_token" in state
    positions = _get(state, "pos_embed", 3, source)
    grid = _square(positions.shape[1] - token)
    if hints.image_size is not None:
        wanted = Shape(hints.image_size, channels, patch).grid
        if grid is None and math.prod(wanted) == positions.shape[1] - token:
            grid = wanted
        if grid is not None and grid != wanted:
            state = {
                name: _resize(value, grid, wanted) if name in _POSITIONS else value
                for name, value in state.items()
            }
            grid = wanted
    if grid is None:
        raise UserError(
            f"{source} has {positions.shape[1] - token} positions, which form no square; "
            "give their --image-size"
        )
    known = {size.width: size.heads for size in ARCHITECTURES.values()}  # ViT-H: not width / 64
    header: Header
    arch: Header = {
        "image_size": [side * patch for side in grid],
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "heads": hints.heads or known.get(width) or _heads(width, 64, "--heads", source),
        "class_token": token,
    }
    tables = [(state["pos_embed"], width)]
    if any(name.startswith("decoder_") for name in state):
        header = {"kind": "autoencoder"}
        decoder_width = _get(state, "decoder_embed.weight", 2, source).shape[0]
        arch["decoder_width"] = decoder_width
        arch["decoder_depth"] = _count(state, r"decoder_blocks\.(\d+)\.")
        arch["decoder_heads"] = hints.decoder_heads or _heads(
            decoder_width, 32, "--decoder-heads", source
        )
        tables.append((_get(state, "decoder_pos_embed", 3, source), decoder_width))
    elif "head.weight" in state:
        header = {
            "kind": "classifier",
            "num_classes": len(state["head.weight"]),
            "pooling": "mean" if "fc_norm.weight" in state else "class",
        }
    else:
        header = {"kind": "encoder"}
    fixed = all(
        torch.equal(table[0], sincos_positions(grid, size, token)) for table, size in tables
    )
    arch["positions"] = "fixed" if fixed else "stored"
    return {**header, "architecture": arch}, state


def _simmim(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    width, channels, patch = _embedding(state, "encoder.patch_embed.proj.weight", source)
    if hints.image_size is not None:
        wanted = Shape(hints.image_size, channels, patch).grid
        state = {name: value for name, value in state.items() if not name.endswith(_TABLES)}
    stages = _count(state, r"encoder\.layers\.(\d+)\.")
    if stages:
        prefixes = [f"encoder.layers.{stage}." for stage in range(stages)]
        tables = [
            _get(state, f"{prefix}blocks.0.attn.{_BIAS_TABLE}", 2, source) for prefix in prefixes
        ]
        window = (math.isqrt(len(tables[0])) + 1) // 2
        depths = [_count(state, re.escape(prefix) + r"blocks\.(\d+)\.") for prefix in prefixes]
        mask = state.get("encoder.layers.0.blocks.1.attn_mask")  # [windows, window^2, window^2]
        grid = None if mask is None else _square(mask.shape[0] * mask.shape[-1])
    else:
        name = f"encoder.rel_pos_bias.{_BIAS_TABLE}"
        tables = [_get(state, name, 2, source)]
        window, depths = None, [_count(state, r"encoder\.blocks\.(\d+)\.")]
        distances = _square(len(tables[0]) - 3)  # 3 more rows are for the class token
        grid = None if distances is None else ((distances[0] + 1) // 2, (distances[1] + 1) // 2)
        if hints.image_size is not None and grid is not None and grid != wanted:
            rows = (2 * wanted[0] - 1) * (2 * wanted[1] - 1) + 3
            new_shape = (rows, tables[0].shape[1])
            state = {**state, name: resize_rel_pos_bias_table(tables[0], wanted, new_shape)}
    if hints.image_size is not None:
        grid = wanted
    if grid is None:
        raise UserError(f"{source} does not say for what images it is; give their --image-size")
    arch = {
        "image_size": [side * patch for side in grid],
        "channels": channels,
        "patch": patch,
        "width": width,
        "depths": depths,
        "heads": [table.shape[1] for table in tables],
        "window": window,
    }
    return {"kind": "simmim", "architecture": arch}, state


def _get(state: State, name: str, dimensions: int, source: object) -> Tensor:
    if name not in state:
        raise UserError(f"{source} does not fit the model: it has no {name!r}")
    if state[name].ndim != dimensions:
        raise UserError(
            f"{source} does not fit the model: {name!r} is {list(state[name].shape)} "
            f"in the file, and must have {dimensions} dimensions"
        )
    return state[name]


def _embedding(state: State, name: str, source: object) -> tuple[int, int, int]:
    if name not in state:
        raise UserError(
            f"{source} does not say what network it is for; name one with --model timm:NAME or "
            "package.module:function and give this file as --checkpoint"
        )
    width, channels, patch, other = _get(state, name, 4, source).shape
    if patch != other:
        raise UserError(f"{source} does not fit the model: patches of {name!r} are no squares")
    return width, channels, patch


def _count(state: State, pattern: str) -> int:
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _square(patches: int) -> tuple[int, int] | None:
    side = math.isqrt(max(0, patches))
    return (side, side) if side * side == patches else None


def _heads(width: int, size: int, option: str, source: object) -> int:
    if width % size:
        raise UserError(f"{source} does not say how many heads width {width} has; give {option}")
    return width // size


def _resize(positions: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions ``[1, (1+)L, width]`` of `grid` -> those of the grid `wanted`."""
    first = positions.shape[1] - math.prod(grid)
    places = positions[:, first:].float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :first], places.permute(0, 2, 3, 1).flatten(1, 2)], 1)
