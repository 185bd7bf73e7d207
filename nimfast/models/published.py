# SPDX-License-Identifier: Apache-2.0
"""Published MAE, DMAE, NIM and SimMIM state dicts, in and out by name.

They differ from ours in names and in layout: the patch embedding is a convolution, SimMIM's decoder
a 1x1 convolution with PixelShuffle, positions are always there, and so are a few tables that follow
from the architecture. They do not describe themselves: the architecture is read off the shapes, and
what shapes do not say comes from `Hints` (both in infer.py).

Classifiers on SimMIM's encoders are laid out as BEiT's and Swin's, which they are: no ``encoder.``
before the names, ``head`` behind ``fc_norm`` (ViT) or ``norm`` (Swin). timm's code for these two
tells the names (its `checkpoint_filter_fn` those of Swin's own files); no fine-tuned SimMIM file
was at hand to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from nimfast.errors import UserError
from nimfast.models.checkpoint import State, build, check_fit
from nimfast.models.infer import POSITIONS, TABLES, Hints, infer
from nimfast.models.patches import PatchModel
from nimfast.models.simmim_classifier import SimMIMClassifier

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


def to_published(model: PatchModel) -> State:
    """The weights of `model` under the published names, sharing no memory with it."""
    names = _names(model)
    return {
        names[name]: _to_published(name, value.detach(), model).contiguous().clone()
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
    header, state = infer(state, source, hints)
    try:
        model = build(header)
    except ValueError as error:
        raise UserError(f"{source} does not fit the model: {error}") from None
    own = _tensors(model)
    names = _names(model)
    expected = {
        names[name]: _to_published(name, value.to("meta"), model)
        for name, value in own.items()
        if names[name] in state or not name.endswith(TABLES)
    }
    check_fit(expected, state, source)
    for name, theirs in names.items():
        if name.endswith(TABLES) and theirs in state and not torch.equal(state[theirs], own[name]):
            raise UserError(f"{source} does not fit the model: {theirs!r} has other values")
    model.load_state_dict(
        {name: _to_ours(name, state[names[name]], model) for name in model.state_dict()}
    )
    return model


def normalisation(
    hints: Hints, channels: int, source: object
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a published file's input, which the file does not store.

    ImageNet's, for images of three channels, unless `hints` give them; callers should say so.

    Raises:
        UserError: not one value per channel, or none given for images that are not RGB.
    """
    mean, std = hints.mean, hints.std
    if mean is None and std is None and channels == 3:
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


def _names(model: PatchModel) -> dict[str, str]:
    """The published name of each of the model's tensors."""
    prefix = "encoder." if isinstance(model, SimMIMClassifier) else ""
    return {name: _theirs(name).removeprefix(prefix) for name in _tensors(model)}


def _theirs(name: str) -> str:
    for pattern, replacement in _NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def _to_published(name: str, value: Tensor, model: PatchModel) -> Tensor:
    arch, pixels = model.arch, model.predicted_patch
    if _theirs(name) in POSITIONS:
        return value[None]
    if name.endswith("patch_embed.weight"):  # [width, p*p*C] -> [width, C, p, p]
        return value.reshape(-1, arch.patch, arch.patch, arch.channels).permute(0, 3, 1, 2)
    if name in ("decoder.weight", "decoder.bias"):  # [P*P*C, ...] -> [C*P*P, ...]
        cut = value.reshape(pixels * pixels, arch.channels, -1).transpose(0, 1)
        return cut.flatten() if value.ndim == 1 else cut.flatten(0, 1)[..., None, None]
    return value


def _to_ours(name: str, value: Tensor, model: PatchModel) -> Tensor:
    arch, pixels = model.arch, model.predicted_patch
    if _theirs(name) in POSITIONS:
        return value[0]
    if name.endswith("patch_embed.weight"):
        return value.permute(0, 2, 3, 1).flatten(1)
    if name in ("decoder.weight", "decoder.bias"):
        cut = value.reshape(arch.channels, pixels * pixels, -1).transpose(0, 1)
        return cut.flatten() if value.ndim == 1 else cut.flatten(0, 1)
    return value
