# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: our safetensors, which describe themselves, and other people's state dicts.

Our file carries one JSON header in its metadata. It holds everything needed to rebuild the network
and to repeat the run: architecture, normalisation, noise, mask and loss settings, the command, the
seed and the versions of what made it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.models.mae import MAE
from nimfast.models.patches import PatchModel
from nimfast.models.simmim import SimMIM, SimMIMArchitecture
from nimfast.models.simmim_classifier import SimMIMClassifier
from nimfast.models.vit import Architecture, Trunk, ViT
from nimfast.runtime import versions

# Since 2 an architecture says where positions lie and a classifier how it pools; since 3 a SimMIM
# whether its blocks share their table of relative positions.
FORMAT = 3
_KEY = "nimfast"

Header = dict[str, Any]
State = dict[str, Tensor]


def describe(model: PatchModel) -> Header:
    """The header entries that `build` needs to make the same network again."""
    entries: Header = {"architecture": asdict(model.arch)}
    if isinstance(model, ViT):
        head = {"num_classes": model.num_classes, "pooling": model.pooling}
        if model.batch_norm is not None:
            head["batch_norm"] = True
        return {"kind": "classifier", **head, **entries}
    if isinstance(model, SimMIMClassifier):
        probe = {"batch_norm": True} if model.batch_norm is not None else {}
        return {"kind": "simmim classifier", "num_classes": model.num_classes, **probe, **entries}
    kinds = {MAE: "autoencoder", SimMIM: "simmim", Trunk: "encoder"}
    return {"kind": kinds[type(model)], **entries}


def build(header: Header) -> PatchModel:
    """The network `header` describes, with fresh weights.

    Raises:
        ValueError: an architecture that cannot be.
    """
    if header["kind"] == "simmim":
        return SimMIM(SimMIMArchitecture(**header["architecture"]))
    batch_norm = header.get("batch_norm", False)
    if header["kind"] == "simmim classifier":
        simmim = SimMIMArchitecture(**header["architecture"])
        return SimMIMClassifier(simmim, header["num_classes"], batch_norm=batch_norm)
    arch = Architecture(**header["architecture"])
    if header["kind"] == "classifier":
        pooling = header.get("pooling", "mean")
        return ViT(arch, header["num_classes"], pooling=pooling, batch_norm=batch_norm)
    return Trunk(arch) if header["kind"] == "encoder" else MAE(arch)


def save_checkpoint(path: Path, model: PatchModel, header: Header) -> None:
    """Write `model` and its header to `path`; a reader never sees half a file.

    Args:
        path: the safetensors file; its folder must exist.
        model: the network; its architecture is added to the header.
        header: JSON-serialisable entries, see the module's text.
    """
    full = {"format": FORMAT, **describe(model), **header, "versions": versions()}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        file.write(save(state, metadata={_KEY: json.dumps(full)}))


def read_checkpoint(path: Path) -> tuple[State, Header]:
    """Tensors and header of a checkpoint; the header is empty when the file is not one of ours.

    Reads safetensors and what `torch.save` writes (a state dict, or a dict that holds one under
    ``model`` or ``state_dict``). Nothing in the file is ever executed.

    Raises:
        UserError: no such file, or no checkpoint in it.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check the path")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return _read_pickle(path), {}
    if _KEY not in metadata:
        return state, {}
    header = json.loads(metadata[_KEY])
    if header["format"] > FORMAT:
        raise UserError(
            f"{path} was written by nimfast {header['versions']['nimfast']}; upgrade this one"
        )
    return state, header


# What published files hold beside tensors, none of which runs code when it is read: MAE, DMAE and
# NIM their command line, SimMIM its settings, a dict of a class that need not be installed.
_HARMLESS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_REFUSED = re.compile(r"(?:GLOBAL|but got) (?:<class ')?([\w.]+)")


def _read_pickle(path: Path) -> State:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        # torch's first line would advise to read it unsafely; a later one names what it refused.
        refused = _REFUSED.search(str(error))
        reason = f"it holds {refused[1]}" if refused else f"{type(error).__name__}"
        raise UserError(
            f"{path} is not a checkpoint that can be read safely ({reason}); "
            "give a safetensors file or a state dict written by torch.save"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state dict; save model.state_dict()")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: not every entry is a tensor")
    # DataParallel puts "module." before every name.
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Copy `state` into `model`; every name and shape must agree.

    Raises:
        UserError: see `check_fit`.
    """
    check_fit(model.state_dict(), state, source)
    model.load_state_dict(state)


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: object) -> None:
    """Compare names and shapes of a model's weights, `own`, with those of a file, `state`.

    Raises:
        UserError: naming the first entry that does not fit, and `source`.
    """
    for name in own:
        if name not in state:
            raise UserError(f"{source} does not fit the model: it has no {name!r}")
        if state[name].shape != own[name].shape:
            raise UserError(
                f"{source} does not fit the model: {name!r} is {list(state[name].shape)} "
                f"in the file and {list(own[name].shape)} in the model"
            )
    if extra := sorted(set(state) - set(own)):
        raise UserError(f"{source} does not fit the model: the model has no {extra[0]!r}")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all weights and saved buffers, in the order of the names."""
    return state_hash(model.state_dict())


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()
