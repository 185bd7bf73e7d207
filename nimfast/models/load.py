# SPDX-License-Identifier: Apache-2.0
"""From a ``--model`` option to a classifier that takes pixels in [0, 1]."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nimfast.errors import UserError
from nimfast.models.checkpoint import (
    Header,
    build,
    describe,
    load_weights,
    read_checkpoint,
    weights_hash,
)
from nimfast.models.infer import Hints
from nimfast.models.published import from_published, normalisation
from nimfast.models.vit import ViT

EMBEDDED = {"digits": Path(__file__).parent / "weights" / "digits.safetensors"}
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

    mean_: Tensor
    std_: Tensor

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
        self.register_buffer("mean_", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] -> logits ``[N, classes]``."""
        logits: Tensor = self.body((images - self.mean_) / self.std_)
        return logits


def load_classifier(
    spec: str,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    checkpoint: Path | None = None,
    hints: Hints = _NO_HINTS,
) -> Classifier:
    """The classifier called `spec`, in eval mode on the CPU.

    Args:
        spec: ``digits`` (embedded), a safetensors file of ours, a published MAE or DMAE classifier
            (a file; its normalisation is ImageNet's unless `hints` say otherwise), ``timm:NAME``,
            ``hf-hub:NAME``, or ``package.module:function``: a function without arguments that
            returns a module which takes images in [0, 1].
        num_classes: classes K of the data; the model must have as many.
        shape: ``(C, H, W)`` of the data; the model must take it.
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
    if not isinstance(body, ViT):
        kind = (header or describe(body))["kind"]
        raise UserError(
            f"{path} is a pretrained {kind}, not a classifier; fine-tune it first: "
            f"python -m train.finetune cr --init {path}"
        )
    if not header:
        mean, std = normalisation(hints, body.arch.channels, path)
        header = {**describe(body), "mean": mean, "std": std}
        state = body.state_dict()
    if checkpoint is not None:
        state, other = read_checkpoint(checkpoint)
        header = other or header
    load_weights(body, state, checkpoint or path)
    return Classifier(body, spec, header["mean"], header["std"], header)


def _timm(
    spec: str, num_classes: int, shape: tuple[int, int, int], checkpoint: Path | None
) -> Classifier:
    name = spec.removeprefix("timm:")
    architecture = name.partition(".")[0]
    if spec.startswith("timm:") and not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {}
    if checkpoint is not None:
        options = {"num_classes": num_classes, "in_chans": shape[0]}
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


def _function(spec: str, shape: tuple[int, int, int], checkpoint: Path | None) -> Classifier:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise UserError(f"model {spec}: cannot import it ({error}); give {_FORMS}") from None
    except AttributeError:
        raise UserError(f"model {spec}: {module_name} has no {function_name!r}") from None
    body = function() if callable(function) else None
    if not isinstance(body, nn.Module):
        raise UserError(f"model {spec} must be a function that returns a torch.nn.Module")
    if checkpoint is not None:
        load_weights(body, read_checkpoint(checkpoint)[0], checkpoint)
    channels = shape[0]
    return Classifier(body, spec, (0.0,) * channels, (1.0,) * channels)  # it normalises by itself


@torch.inference_mode()
def _check(classifier: Classifier, num_classes: int, shape: tuple[int, int, int]) -> None:
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
    if logits.shape[1] != num_classes:
        raise UserError(
            f"model {classifier.name} has {logits.shape[1]} classes and the data {num_classes}; "
            "choose a model trained for this data, or a --checkpoint of one"
        )
