# SPDX-License-Identifier: Apache-2.0
"""From a ``--model`` option to a classifier that takes pixels in [0, 1]."""

from __future__ import annotations

import difflib
import importlib
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nimfast.corruption import Resize
from nimfast.errors import UserError
from nimfast.models.checkpoint import (
    Header,
    build,
    describe,
    load_weights,
    read_checkpoint,
    weights_hash,
)
from nimfast.models.mae import MAE
from nimfast.models.patches import PatchModel
from nimfast.models.published import from_published, normalisation
from nimfast.models.simmim import SimMIM
from nimfast.models.simmim_classifier import SimMIMClassifier
from nimfast.models.vit import ViT
from nimfast.ops.corrupt import normalisation as scales
from nimfast.options import Hints

_WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = {"digits": _WEIGHTS / "digits.safetensors"}
EMBEDDED_AUTOENCODERS = {"digits": _WEIGHTS / "digits_denoiser.safetensors"}
_SUFFIXES = (".safetensors", ".pt", ".pth")
_NO_HINTS = Hints()
_FORMS = (
    f"{', '.join(EMBEDDED)} (embedded), a safetensors file of ours, a published classifier, "
    "timm:NAME, hf-hub:NAME or package.module:function"
)


class Classifier(nn.Module):
    """A network with its input normalisation inside: images in [0, 1] -> logits ``[N, classes]``.

    Attributes:
        name: what ``--model`` said.
        body: the network after normalisation, for callers whose kernel normalises already.
        mean, std: the normalisation, one value per channel.
        sigma: standard deviation of the noise it was trained with (pixel units), None if not known.
        weights_hash: SHA-256 of the weights.
        header: the checkpoint's header; where the file was not one of ours, what is known of it.
    """

    def __init__(
        self,
        body: nn.Module,
        name: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        header: Header | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.name = name
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.header = header or {}
        self.sigma: float | None = self.header.get("sigma")
        self.weights_hash = weights_hash(body)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] -> logits ``[N, classes]``.

        They are normalised in their own precision and then cast to that of the weights.
        """
        mean, std = (
            value.view(-1, 1, 1) for value in scales(self.mean, self.std, images.device)[2:]
        )
        weight = next(self.body.parameters(), images)
        normalised = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        logits: Tensor = self.body(normalised.to(weight.dtype))
        return logits


class Resized(nn.Module):
    """`body` behind a resize: normalised images ``[N, C, h, w]`` -> what `body` makes of them."""

    def __init__(self, body: nn.Module, resize: Resize) -> None:
        super().__init__()
        self.body, self.resize = body, resize

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.body(self.resize(images))
        return result


def load_classifier(
    spec: str,
    *,
    num_classes: int | None = None,
    shape: tuple[int, int, int] | None = None,
    checkpoint: Path | None = None,
    hints: Hints = _NO_HINTS,
) -> Classifier:
    """The classifier called `spec`, in eval mode on the CPU.

    Args:
        spec: ``digits`` (embedded), a safetensors file of ours, a published MAE or DMAE classifier
            (a file; its normalisation is ImageNet's unless `hints` say otherwise), ``timm:NAME``,
            ``hf-hub:NAME``, or ``package.module:function``: a function without arguments that
            returns a module which takes images in [0, 1].
        num_classes: classes K of the data, which the model must have; None: whatever it has.
        shape: ``(C, H, W)`` of the data, which the model must take; None: whatever it takes.
        checkpoint: weights to use instead of the model's own: a file of ours or a torch state dict.
        hints: what a published file does not say.

    Raises:
        UserError: unknown model, missing or unreadable file, weights that do not fit, or a model
            for another number of classes or other images.
    """
    if spec in EMBEDDED:
        classifier = _file(spec, EMBEDDED[spec], checkpoint, hints)
    elif spec.startswith(("timm:", "hf-hub:")):
        classifier = _timm(spec, num_classes, shape, checkpoint)
    elif Path(spec).suffix in _SUFFIXES or Path(spec).is_file():
        classifier = _file(spec, Path(spec), checkpoint, hints)
    elif ":" in spec:
        classifier = _function(spec, shape, checkpoint)
    else:
        raise UserError(f"unknown model {spec!r}; give {_FORMS}")
    _check(classifier.eval(), num_classes, shape)
    return classifier


def _file(spec: str, path: Path, checkpoint: Path | None, hints: Hints) -> Classifier:
    state, header = read_checkpoint(path)
    body = build(header) if header else from_published(state, path, hints)
    if not isinstance(body, (ViT, SimMIMClassifier)):
        kind = (header or describe(body))["kind"]
        convert = "" if header else "convert it with python -m nimfast.convert and "
        raise UserError(
            f"{path} is a pretrained {kind}, not a classifier; {convert}fine-tune it first: "
            f"python -m train.finetune cr --init {path if header else 'FILE'}"
        )
    if not header:
        header = _described(body, path, hints)
        state = body.state_dict()
    if checkpoint is not None:
        state, other = read_checkpoint(checkpoint)
        header = other or header
    load_weights(body, state, checkpoint or path)
    network: nn.Module = body
    if resize := header.get("resize"):
        network = Resized(body, Resize(tuple(resize["size"]), resize["antialias"]))
    return Classifier(network, spec, header["mean"], header["std"], header)


def load_autoencoder(path: Path, hints: Hints = _NO_HINTS) -> tuple[PatchModel, Header]:
    """The autoencoder of a file, ours or published, in eval mode on the CPU, and its header.

    ``digits`` is the embedded one.

    Raises:
        UserError: no such file, or none that holds an encoder and a decoder.
    """
    path = EMBEDDED_AUTOENCODERS.get(str(path), path)
    state, header = read_checkpoint(path)
    model = build(header) if header else from_published(state, path, hints)
    if not isinstance(model, (MAE, SimMIM)):
        kind = (header or describe(model))["kind"]
        raise UserError(
            f"{path} has no decoder (it is of kind {kind}) and reconstructs nothing; give a "
            "pretrained autoencoder: python -m train.pretrain makes one"
        )
    if header:
        load_weights(model, state, path)
    else:
        header = _described(model, path, hints)
    return model.eval(), header


def _described(model: PatchModel, path: Path, hints: Hints) -> Header:
    """The header of a published file, which has none; says so where normalisation is a guess."""
    mean, std = normalisation(hints, model.arch.channels, path)
    if hints.mean is None:
        warnings.warn(
            f"{path} does not store its normalisation; ImageNet's mean and std are assumed",
            stacklevel=3,
        )
    return {**describe(model), "mean": mean, "std": std}


def _timm(
    spec: str,
    num_classes: int | None,
    shape: tuple[int, int, int] | None,
    checkpoint: Path | None,
) -> Classifier:
    name = spec.removeprefix("timm:")
    architecture = name.partition(".")[0]
    if spec.startswith("timm:") and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {}
    if checkpoint is not None and num_classes is not None:
        options["num_classes"] = num_classes
    if checkpoint is not None and shape is not None:
        options["in_chans"] = shape[0]
    try:
        body = timm.create_model(name, pretrained=checkpoint is None, **options)
    except Exception as error:  # network, hub and file errors have no common base
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"pretrained weights of {spec} cannot be had ({reason}); "
            "check the name and the network, or give a file with --checkpoint"
        ) from None
    if checkpoint is not None:
        load_weights(body, read_checkpoint(checkpoint)[0], checkpoint)
    config: dict[str, Any] = body.pretrained_cfg  # type: ignore[assignment]
    return Classifier(body, spec, config["mean"], config["std"])


def _function(spec: str, shape: tuple[int, int, int] | None, checkpoint: Path | None) -> Classifier:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"model {spec}: cannot import it ({error}); give {_FORMS}") from None
    except AttributeError:
        raise UserError(f"model {spec}: {module_name} has no {function_name!r}") from None
    try:
        body = function() if callable(function) else None
    except Exception as error:  # whatever the user's own code does
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"model {spec} failed ({told}); --debug shows where") from error
    if not isinstance(body, nn.Module):
        raise UserError(f"model {spec} must be a function that returns a torch.nn.Module")
    if checkpoint is not None:
        load_weights(body, read_checkpoint(checkpoint)[0], checkpoint)
    channels = shape[0] if shape else 1  # one value serves any number of channels
    return Classifier(body, spec, (0.0,) * channels, (1.0,) * channels)  # it normalises by itself


@torch.inference_mode()
def _check(
    classifier: Classifier, num_classes: int | None, shape: tuple[int, int, int] | None
) -> None:
    if shape is None:
        return
    # One image through the network finds every disagreement, whatever the network is.
    wanted = "x".join(map(str, shape))
    try:
        logits = classifier(torch.zeros(1, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model {classifier.name} does not take the data's {wanted} images ({reason}); "
            "choose data and model of one size"
        ) from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise UserError(f"model {classifier.name} does not return logits [N, classes]")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise UserError(
            f"model {classifier.name} has {logits.shape[1]} classes and the data {num_classes}; "
            "choose a model trained for this data, or a --checkpoint of one"
        )
