# SPDX-License-Identifier: Apache-2.0
"""Is this model fit for a gradient attack? Findings about the model, before it is attacked.

A robust accuracy is an upper bound, and a bound that an attack failed to lower means nothing. What
makes attacks fail without anyone noticing is looked for here (Athalye et al., 2018; Carlini et al.,
2019; Croce et al., 2022). What the attacks themselves tell is in `crosschecks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nimfast.attacks.square import margin
from nimfast.attacks.target import Target
from nimfast.ops import Stream, image_keys

Randomness = Literal["none", "keyed", "free"]

# Smallest share of images for which a finding is worth a line.
_SOME = 0.1
# A directional derivative may miss the difference quotient by this share (curvature, rounding), and
# of so many images, which stand at a kink.
_AGREES, _KINKS = 0.25, 0.25
# A gradient below this is none: kernels differ in what they make of a probability of e^-100.
_VANISHED = 1e-20
# Draws that tell whether a model draws, and its gradient's signal-to-noise ratio.
_DRAWS = 16


class Finding(NamedTuple):
    """One line of doubt about a robust accuracy.

    Attributes:
        check: its name.
        text: what was seen, what it means, and what to try.
    """

    check: str
    text: str


def randomness(target: Target, x: Tensor, indices: Tensor, seed: int) -> Randomness:
    """Whether the logits of `x` change between 16 draws, or between two calls.

    ``keyed``: only where the draw's number changes, so every image has its own noise. ``free``: at
    every call, by randomness that nobody numbers.
    """
    keys = image_keys(seed, Stream.ATTACK, indices)

    def differ(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)

    # One more draw would not do: of four patches that may be removed it is every fourth the same.
    first = target.logits(x, keys, _DRAWS)
    if differ(first, target.logits(x, keys, _DRAWS)):
        return "free"
    draws = first.view(len(x), _DRAWS, -1)
    return "keyed" if differ(draws, draws[:, :1].expand_as(draws)) else "none"


def check_model(
    target: Target, x: Tensor, y: Tensor, indices: Tensor, *, eot: int, seed: int
) -> list[Finding]:
    """Everything that can be said about a model from its logits and gradients at a few images.

    Args:
        target: the model; as the user gave it, since its mode is looked at.
        x: some clean images ``[B, C, H, W]``; 8 to 32 are enough.
        y: their labels, int64 ``[B]``.
        indices: their places in the data set, int64 ``[B]``.
        eot: draws that the attacks average over.
        seed: of the draws.
    """
    keys = image_keys(seed, Stream.ATTACK, indices)
    kind = randomness(target, x, indices, seed)
    found = [
        _train_mode(target),
        _randomised(kind, target.keyed, eot),
        _probabilities(target.logits(x, keys)),
        _gradient_inside(target, x, keys),
    ]
    try:
        look = target.gradient(x, y, keys=keys, samples=eot)
    except ValueError as error:
        found.append(Finding("gradients", f"no gradient: {error}"))
        return [finding for finding in found if finding]
    found += [
        _broken_gradients(look.gradient),
        _differences(target, x, y, keys, kind),
    ]
    if kind != "none":
        found.append(_noisy_gradient(target, x, y, keys, eot))
    return [finding for finding in found if finding]


def _train_mode(target: Target) -> Finding | None:
    names = sorted({type(m).__name__ for m in target.module.modules() if m.training})
    if not names:
        return None
    return Finding(
        "train mode",
        f"the model is in train mode ({', '.join(names[:4])}); it was attacked and judged in eval "
        "mode, other code may not do so: call model.eval()",
    )


def _randomised(kind: Randomness, keyed: bool, eot: int) -> Finding | None:
    if kind == "free" and keyed:
        return Finding(
            "randomised",
            "the logits change between two calls with the same draw: noise outside of the model's "
            "`draw`, or an operation that does not repeat; results cannot be repeated exactly",
        )
    if kind != "none" and eot < 2:
        return Finding(
            "randomised",
            "the logits change between two calls, and the attack averages its gradient over one "
            "draw only: the model seems more robust than it is; use --eot 20",
        )
    return None


def _probabilities(logits: Tensor) -> Finding | None:
    low, sums = logits.min(), logits.sum(1)
    if low < 0 or (sums - 1).abs().max() > 1e-3:
        return None
    return Finding(
        "probabilities",
        "the model returns probabilities, not logits (none negative, sums of 1): losses saturate "
        "and gradients vanish; leave its softmax out",
    )


def _gradient_inside(target: Target, x: Tensor, keys: Tensor) -> Finding | None:
    with _counted_gradients() as calls:
        target.logits(x, keys)
    if not calls:
        return None
    return Finding(
        "gradient inside",
        "the model asks for gradients inside its forward pass: an attack's gradient may be cut "
        "there, or not see that step; attack with create_graph, or with Square and transfer",
    )


@contextmanager
def _counted_gradients() -> Iterator[list[str]]:
    """Collects every request for a gradient made inside."""
    calls: list[str] = []
    places: list[tuple[Any, str]] = [(torch.autograd, "grad"), (torch.autograd, "backward")]
    originals = [getattr(place, name) for place, name in places]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    try:
        for (place, name), function in zip(places, originals, strict=True):
            setattr(place, name, counting(name, function))
        yield calls
    finally:
        for (place, name), function in zip(places, originals, strict=True):
            setattr(place, name, function)


def _broken_gradients(gradient: Tensor) -> Finding | None:
    rows = gradient.flatten(1)
    infinite = int((~rows.isfinite()).any(1).sum())
    if infinite:
        return Finding(
            "gradients",
            f"the gradient of {infinite} of {len(rows)} images holds NaN or infinity: steps along "
            "it are lost; look for a division, a root or a logarithm at 0 in the model",
        )
    zero = int((rows.abs() < _VANISHED).all(1).sum())
    if zero < max(1, _SOME * len(rows)):
        return None
    return Finding(
        "gradients",
        f"the gradient of the cross-entropy vanishes for {zero} of {len(rows)} images: "
        "gradient attacks stand still there; use DLR, Square, or BPDA where the model rounds",
    )


def _differences(
    target: Target, x: Tensor, y: Tensor, keys: Tensor, kind: Randomness
) -> Finding | None:
    """Compare the gradient with the difference quotient along it, the noise being the same."""

    def lead(at: Tensor) -> Tensor:
        with _same_noise(kind):
            logits = target.logits(at, keys)
        return margin(logits.double(), y, None)

    with _same_noise(kind):
        gradient = target.gradient(x, y, margin, keys=keys).gradient
    length = gradient.flatten(1).norm(dim=1)
    usable = length.isfinite() & (length > 0)
    if not usable.any():
        return None  # zero or not finite: said elsewhere
    shape = (-1, *[1] * (x.dim() - 1))
    direction = gradient / length.clamp(min=1e-30).view(shape)
    disagreement = torch.full_like(length, math.inf, dtype=torch.float64)
    # Small steps meet rounding, large ones curvature; steps that quantisation hides meet neither.
    for pixels in (1e-2, 3e-3, 1e-3, 3e-4):  # root mean square over the image
        step = pixels * math.sqrt(x[0].numel())
        rise = (lead(x + step * direction) - lead(x - step * direction)) / (2 * step)
        disagreement = torch.minimum(disagreement, (rise / length - 1).abs())
    wrong = int((disagreement[usable] > _AGREES).sum())
    if wrong <= _KINKS * int(usable.sum()):
        return None
    return Finding(
        "finite differences",
        f"for {wrong} of {int(usable.sum())} images the gradient is not what a small step along it "
        "does: it is masked, rounded or replaced; use Square and transfer, or a smoother model",
    )


@contextmanager
def _same_noise(kind: Randomness) -> Iterator[None]:
    """Every block of its kind sees the same random numbers."""
    if kind != "free":
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _noisy_gradient(target: Target, x: Tensor, y: Tensor, keys: Tensor, eot: int) -> Finding | None:
    """Power of the mean gradient over that of its error at `eot` draws, from single draws."""
    draws = torch.stack(
        [
            target.gradient(x, y, keys=keys, first_sample=s).gradient.flatten(1).double()
            for s in range(_DRAWS)
        ]
    )  # [S, B, D]
    noise = draws.var(0).sum(1)  # of one draw
    signal = draws.mean(0).square().sum(1) - noise / _DRAWS  # unbiased
    ratio = max(0.0, float(signal.sum() / noise.sum().clamp(min=1e-300)))
    if not math.isfinite(ratio) or eot * ratio >= 1:
        return None
    needed = f"--eot {math.ceil(1 / ratio)}" if ratio > 0.001 else "a much larger --eot"
    return Finding(
        "gradient noise",
        f"the signal of the gradient is {eot * ratio:.2g} times its noise at {eot} draws: steps "
        f"are mostly random; use {needed}, or more steps",
    )
