# SPDX-License-Identifier: Apache-2.0
"""The architecture of a published state dict, read off its names and shapes."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State
from nimfast.models.patches import Shape
from nimfast.models.vit import ARCHITECTURES, sincos_positions
from nimfast.options import Hints

# Follow from the architecture; some published files have them and some do not.
TABLES = ("relative_position_index", "attn_mask")
POSITIONS = ("pos_embed", "decoder_pos_embed")
_BIAS_TABLE = "relative_position_bias_table"
_SWIN = re.compile(r"(?:encoder\.)?layers\.(\d+)\.")
_Grid = tuple[int, int]


def infer(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    """Header entries for `build`, read off names and shapes, and the state with resized positions.

    Raises:
        UserError: what decides is missing, of another shape, or contradicts `hints`.
    """
    for option in ("heads", "decoder_heads", "window"):
        if getattr(hints, option) is not None and getattr(hints, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    windows = any(_SWIN.match(name) for name in state)
    if hints.window is not None and not windows:
        raise UserError(f"{source} is no Swin Transformer and has no --window; leave it out")
    relative = any(name.startswith("encoder.") or name.endswith(_BIAS_TABLE) for name in state)
    family = _swin if windows else _relative_vit if relative else _vit
    try:
        return family(state, source, hints)
    except ValueError as error:  # an image size that the patch does not divide
        raise UserError(f"{source} does not fit the model: {error}") from None


def _vit(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    width, channels, patch = _embedding(state, "patch_embed.proj.weight", source)
    token = "cls_token" in state
    tables = {"pos_embed": width}
    header: Header = {"kind": "encoder"}
    arch: Header = {
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "heads": hints.heads or _known_heads(width, source),
        "class_token": token,
    }
    if any(name.startswith("decoder_") for name in state):
        header = {"kind": "autoencoder"}
        width = _get(state, "decoder_embed.weight", 2, source).shape[0]
        tables["decoder_pos_embed"] = width
        arch["decoder_width"] = width
        arch["decoder_depth"] = _count(state, r"decoder_blocks\.(\d+)\.")
        heads = hints.decoder_heads or _heads(width, 32, "--decoder-heads", source)
        arch["decoder_heads"] = heads
    elif "head.weight" in state:
        header = {
            "kind": "classifier",
            "num_classes": _get(state, "head.weight", 2, source).shape[0],
            "pooling": "mean" if "fc_norm.weight" in state else "class",
        }
    old, grid = _grids(state, token, channels, patch, source, hints)
    state, fixed = dict(state), True
    for name, width in tables.items():
        table = _get(state, name, 3, source)
        if old != grid and table.shape[:2] == (1, token + math.prod(old)):
            places = _resize(table[0, token:], old, grid)
            state[name] = torch.cat([table[0, :token], places])[None]
        fixed &= torch.equal(state[name][0], sincos_positions(grid, width, token))
    arch["image_size"] = [side * patch for side in grid]
    arch["positions"] = "fixed" if fixed else "stored"
    return {**header, "architecture": arch}, state


def _grids(
    state: State, token: bool, channels: int, patch: int, source: object, hints: Hints
) -> tuple[_Grid, _Grid]:
    """Patches per column and row: those the file has positions for, and those wanted."""
    places = _get(state, "pos_embed", 3, source).shape[1] - token
    old = _square(places)
    if hints.image_size is None:
        if old is None:
            raise UserError(
                f"{source} has {places} positions, which form no square; give their --image-size"
            )
        return old, old
    wanted = Shape(hints.image_size, channels, patch).grid
    if old is None and math.prod(wanted) != places:
        raise UserError(
            f"{source} has {places} positions, which form no square and are not those of "
            f"--image-size {' '.join(map(str, hints.image_size))}; convert it at its own size first"
        )
    return old or wanted, wanted


def _relative_vit(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    """SimMIM's ViT, or a classifier on it: BEiT's relative positions, shared or of each block."""
    prefix, header, arch = _simmim(state, source)
    depth = _count(state, re.escape(prefix) + r"blocks\.(\d+)\.")
    of_block = f"{prefix}blocks.0.attn.{_BIAS_TABLE}"
    shared = of_block not in state
    table = _get(state, f"{prefix}rel_pos_bias.{_BIAS_TABLE}" if shared else of_block, 2, source)
    distances = _square(len(table) - 3)  # 3 more rows are for the class token
    grid = distances and ((distances[0] + 1) // 2, (distances[1] + 1) // 2)
    if hints.image_size is not None:
        wanted = Shape(hints.image_size, arch["channels"], arch["patch"]).grid
        if grid and wanted != grid:
            state = _resize_biases(state, prefix, 3, _distances(wanted))
        grid = wanted
    arch |= {
        "image_size": _pixels(grid, arch["patch"], source),
        "depths": [depth],
        "heads": [table.shape[1]],
        "window": None,
        "shared_bias": shared,
    }
    return {**header, "architecture": arch}, state


def _swin(state: State, source: object, hints: Hints) -> tuple[Header, State]:
    """SimMIM's Swin, or a classifier on it."""
    prefix, header, arch = _simmim(state, source)
    stages = [f"{prefix}layers.{i}." for i in range(_count(state, _SWIN.pattern))]
    tables = [_get(state, f"{stage}blocks.0.attn.{_BIAS_TABLE}", 2, source) for stage in stages]
    depths = [_count(state, re.escape(stage) + r"blocks\.(\d+)\.") for stage in stages]
    window = hints.window or (math.isqrt(len(tables[0])) + 1) // 2
    name = f"{stages[0]}blocks.1.attn_mask"  # [windows, window^2, window^2]
    mask = _get(state, name, 3, source) if name in state else None
    grid = None if mask is None else _square(mask.shape[0] * mask.shape[2])
    if hints.image_size is not None:
        grid = Shape(hints.image_size, arch["channels"], arch["patch"]).grid
    arch |= {
        "image_size": _pixels(grid, arch["patch"], source),
        "depths": depths,
        "heads": [table.shape[1] for table in tables],
        "window": window,
    }
    if grid and (hints.image_size or hints.window):
        for number, stage in enumerate(stages):  # no window is larger than its stage
            rows, columns = (min(side >> number, window) for side in grid)
            state = _resize_biases(state, stage, 0, _distances((rows, columns)))
    return {**header, "architecture": arch}, state


def _simmim(state: State, source: object) -> tuple[str, Header, Header]:
    """What stands before an encoder's names, its kind, and what its embedding tells."""
    prefix = "encoder." if any(name.startswith("encoder.") for name in state) else ""
    width, channels, patch = _embedding(state, f"{prefix}patch_embed.proj.weight", source)
    header: Header = {"kind": "simmim"}
    if not prefix:
        classes = _get(state, "head.weight", 2, source).shape[0]
        header = {"kind": "simmim classifier", "num_classes": classes}
    return prefix, header, {"channels": channels, "patch": patch, "width": width}


def _pixels(grid: _Grid | None, patch: int, source: object) -> list[int]:
    if grid is None:
        raise UserError(f"{source} does not say for what images it is; give their --image-size")
    return [side * patch for side in grid]


def _distances(grid: _Grid) -> _Grid:
    """How many distances two places of `grid` can have, down and to the side."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _resize_biases(state: State, prefix: str, more: int, wanted: _Grid) -> State:
    """The state with biases for `wanted` distances, but for the last `more`, which are no places.

    Tables that follow from the architecture are left out: those of the file are of another one.
    """
    state = {
        name: value
        for name, value in state.items()
        if not (name.startswith(prefix) and name.endswith(TABLES))
    }
    for name, table in state.items():
        if not (name.startswith(prefix) and name.endswith(_BIAS_TABLE)) or table.ndim != 2:
            continue
        places = len(table) - more
        distances = _square(places)
        if distances and places != math.prod(wanted):
            resized = _resize(table[:places], distances, wanted)
            state[name] = torch.cat([resized, table[places:]])
    return state


def _get(state: State, name: str, dimensions: int, source: object) -> Tensor:
    if name not in state:
        raise UserError(f"{source} does not fit the model: it has no {name!r}")
    shape = list(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(
            f"{source} does not fit the model: {name!r} is {shape} in the file and must have "
            f"{dimensions} dimensions"
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


def _square(patches: int) -> _Grid | None:
    side = math.isqrt(max(0, patches))
    return (side, side) if side * side == patches > 0 else None


def _known_heads(width: int, source: object) -> int:
    # ViT-H has heads of width 80, all others of 64.
    known = {size.width: size.heads for size in ARCHITECTURES.values()}
    return known.get(width) or _heads(width, 64, "--heads", source)


def _heads(width: int, size: int, option: str, source: object) -> int:
    if width % size:
        raise UserError(f"{source} does not say how many heads width {width} has; give {option}")
    return width // size


def _resize(table: Tensor, grid: _Grid, wanted: _Grid) -> Tensor:
    """One row for each place of `grid`, ``[L, width]`` -> one for each of `wanted`."""
    image = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=wanted, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2)
