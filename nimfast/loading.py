# SPDX-License-Identifier: Apache-2.0
"""`nimfast.load`: a name or a path in, a ready classifier or defence out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from nimfast.defense import De3, DeMask, Reconstructing
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header
from nimfast.models.load import Classifier, load_autoencoder, load_classifier
from nimfast.options import Hints
from nimfast.restoration import statistics

_DEFENCES: dict[str, type[De3] | type[DeMask]] = {"de3": De3, "demask": DeMask}
_NO_HINTS = Hints()
_FORM = "de3:AUTOENCODER+CLASSIFIER?sigma=140&stats=noisy&draws=1"


def load(
    spec: str | Path,
    *,
    num_classes: int | None = None,
    shape: tuple[int, int, int] | None = None,
    checkpoint: Path | None = None,
    hints: Hints = _NO_HINTS,
) -> Classifier | Reconstructing:
    """A classifier or defence, ready: in eval mode on the CPU, takes images ``[N, C, H, W]`` in
    [0, 1] (its own normalisation is inside) and returns logits.

    Args:
        spec: what `load_classifier` takes (``digits``, a file, ``timm:NAME``, ``hf-hub:NAME``,
            ``package.module:function``), or a defence of two files:

            - ``de3:AUTOENCODER+CLASSIFIER?sigma=140``: noise in units of 1/255, or ``none``;
            - ``demask:AUTOENCODER+CLASSIFIER``: masked as in pretraining, or ``?mask_ratio=0.75``.

            Further options of `De3` and `DeMask` follow by ``&``: ``stats``, ``draws``,
            ``combine``, ``seed``, ``unit``, ``paste``. Statistics are by default the noisy image's
            (``stats=noisy``) where the autoencoder predicts standardised patches; ``stats=input``
            is the published code's.
        num_classes, shape: of the data, which the model must fit; None: not compared.
        checkpoint: weights to use instead of the classifier's own.
        hints: what a published file does not say.

    Raises:
        UserError: see `load_classifier`; a file without a decoder in the autoencoder's place; an
            option that is unknown or out of range.
    """
    text = str(spec)
    kind, _, rest = text.partition(":")
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "shape": shape,
        "checkpoint": checkpoint,
        "hints": hints,
    }
    if kind not in _DEFENCES:
        return load_classifier(text, **options)
    files, _, query = rest.partition("?")
    first, _, second = files.partition("+")
    if not first or not second:
        raise UserError(f"{text!r} does not name two files; write {_FORM}")
    classifier = load_classifier(second, **options)
    denoiser, header = load_autoencoder(Path(first), hints)
    given = _options(text, _DEFENCES[kind], query)
    chosen = {**_defaults(kind, text, header, given), **given}
    arch = denoiser.arch
    if shape is not None and (arch.channels, *arch.image_size) != shape:
        takes = "x".join(map(str, (arch.channels, *arch.image_size)))
        raise UserError(f"{first} takes {takes} images, not {'x'.join(map(str, shape))}")
    try:
        defence = _DEFENCES[kind](
            denoiser, classifier, mean=tuple(header["mean"]), std=tuple(header["std"]), **chosen
        )
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None
    defence.name = text
    return defence


def _defaults(kind: str, text: str, header: Header, given: dict[str, Any]) -> dict[str, Any]:
    """What the autoencoder's training says of the options."""
    trained = header.get("settings", {})
    standardised = trained.get("norm_pix", header["kind"] == "autoencoder")
    modes = statistics(standardised)
    if "norm_pix" in trained and given.get("stats", modes[0]) not in modes:
        predicts = "standardised patches" if standardised else "pixels"
        raise UserError(
            f"{text}: stats={given['stats']} is not for an autoencoder that predicts {predicts}; "
            f"give {' or '.join(modes)}"
        )
    if kind == "de3":
        if "sigma" not in given:
            raise UserError(f"{text} needs a noise level in units of 1/255: add ?sigma=70")
        return {"stats": modes[-1]}
    if "mask_ratio" not in given and not trained.get("mask_ratio"):
        raise UserError(f"{text}: its training had no mask; add ?mask_ratio=0.75")
    unit = trained.get("mask_unit") if header["kind"] == "simmim" else None
    return {"stats": modes[0], "mask_ratio": trained.get("mask_ratio"), "unit": unit}


def _options(text: str, defence: type[De3] | type[DeMask], query: str) -> dict[str, Any]:
    """``a=1&b=2`` as keyword arguments of `defence`."""
    known = set(inspect.signature(defence).parameters) - {"denoiser", "classifier", "mean", "std"}
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in known:
            raise UserError(f"{text} has no option {name!r}; known are {', '.join(sorted(known))}")
        try:
            if name in ("stats", "combine"):
                options[name] = value
            elif name in ("draws", "seed", "unit"):
                options[name] = int(value)
            elif name == "paste":
                options[name] = {"1": True, "0": False}[value]
            else:
                options[name] = None if (name, value) == ("sigma", "none") else float(value)
        except (ValueError, KeyError):
            raise UserError(f"{text}: {name}={value} is no value that it can have") from None
    return options
