# SPDX-License-Identifier: Apache-2.0
"""ascend: the next iterate of FGSM, PGD or APGD, from the gradient at the present one.

``z = project(x + step d)`` with ``d = sign(gradient)`` or ``gradient / (|gradient|_2 + 1e-12)``;
with momentum (APGD; Croce & Hein 2020) ``project(x + a (z - x) + (1 - a)(x - previous))``.

There is no CUDA C++ of it: it is bound by memory, and Triton's 16-byte loads and stores, without a
spill, are all that a GPU needs for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nimfast.ops.backend import TYPE_CODES, choose, native_call, on_device, register, tl, triton
from nimfast.ops.check import FLOATING, check, per_image

NORMS = ("linf", "l2")

# --- reference ------------------------------------------------------------------------------------


def _norm(values: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    return norm.view(-1, *[1] * (values.dim() - 1))


def _project(y: Tensor, origin: Tensor, eps: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        inside = torch.min(torch.max(y, origin - eps), origin + eps)
    else:
        away = y - origin
        length = _norm(away)
        inside = origin + away / (length + 1e-12) * torch.min(eps, length)
    return inside.clamp(0, 1)


def _reference(
    x: Tensor,
    origin: Tensor,
    gradient: Tensor,
    step: Tensor,
    eps: Tensor,
    norm: str,
    previous: Tensor | None,
    momentum: float,
) -> Tensor:
    step, eps = (value.view(-1, *[1] * (x.dim() - 1)) for value in (step, eps))
    gradient = gradient.float()
    if norm == "linf":
        direction = torch.where(gradient.isnan(), gradient, gradient.sign())  # sign(NaN) is 0
    else:
        direction = gradient / (_norm(gradient) + 1e-12)
    z = _project(x + step * direction, origin, eps, norm)
    if previous is None:
        return z
    return _project(x + (z - x) * momentum + (x - previous) * (1 - momentum), origin, eps, norm)


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _clip(value, low, high):
        # Not tl.clamp: NaN must pass through, in the interpreter too.
        value = tl.where(value < low, low, value)
        return tl.where(value > high, high, value)

    @triton.jit
    def _load(x, origin, gradient, image, part, values, BLOCK: tl.constexpr):
        """What every kernel reads of one block of one image, and where the block stands."""
        e = part * BLOCK + tl.arange(0, BLOCK)
        inside = e < values
        at = image * values + e
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        return (
            at, inside, tl.load(x + at, mask=inside, other=0.0),
            tl.load(origin + at, mask=inside, other=0.0), g,
        )  # fmt: skip

    @triton.jit
    def _linf_kernel(
        x, origin, gradient, previous, step, eps, out, values, momentum, rest,
        MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        image = tl.program_id(0).to(tl.int64)
        at, inside, x0, o, g = _load(x, origin, gradient, image, tl.program_id(1), values, BLOCK)
        size, radius = tl.load(step + image), tl.load(eps + image)
        move = tl.where(g > 0, size, tl.where(g < 0, -size, g))  # 0 stays 0, NaN stays NaN
        y = _clip(_clip(x0 + move, o - radius, o + radius), 0.0, 1.0)
        if MOMENTUM:
            before = tl.load(previous + at, mask=inside, other=0.0)
            y = x0 + (y - x0) * momentum + (x0 - before) * rest
            y = _clip(_clip(y, o - radius, o + radius), 0.0, 1.0)
        tl.store(out + at, y, mask=inside)

    @triton.jit
    def _sums_kernel(x, origin, gradient, sums, values, BLOCK: tl.constexpr):
        """sums [3, N, parts]: |g|^2, <x - origin, g>, |x - origin|^2 of every block."""
        image = tl.program_id(0).to(tl.int64)
        _, _, x0, o, g = _load(x, origin, gradient, image, tl.program_id(1), values, BLOCK)
        away = x0 - o
        place = sums + image * tl.num_programs(1) + tl.program_id(1)
        plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        tl.store(place, tl.sum(g * g, axis=0))
        tl.store(place + plane, tl.sum(away * g, axis=0))
        tl.store(place + 2 * plane, tl.sum(away * away, axis=0))

    @triton.jit
    def _total(sums, image, PARTS: tl.constexpr):
        # Every program adds the parts again, in one order: no atomics, the same bits each time.
        part = tl.arange(0, PARTS)
        inside = part < tl.num_programs(1)
        return tl.sum(
            tl.load(sums + image * tl.num_programs(1) + part, mask=inside, other=0.0), axis=0
        )

    @triton.jit
    def _shrink(square, radius):
        # See csrc/ascend.cpp; rounding may leave the square below 0.
        length = tl.sqrt(tl.where(square < 0.0, 0.0, square))
        return tl.where(length > radius, radius / (length + 1e-12), 1.0)

    @triton.jit
    def _l2_kernel(
        x, origin, gradient, previous, step, eps, sums, squares, out, values, momentum, rest,
        MOMENTUM: tl.constexpr, STORE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Without STORE: the squared distance from the origin of every block of the point that
        # momentum reaches, which a second launch needs to store that point projected.
        image = tl.program_id(0).to(tl.int64)
        at, inside, x0, o, g = _load(x, origin, gradient, image, tl.program_id(1), values, BLOCK)
        radius = tl.load(eps + image)
        plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        gg = _total(sums, image, PARTS)
        dg = _total(sums + plane, image, PARTS)
        dd = _total(sums + 2 * plane, image, PARTS)
        # ||x + gain g - origin||^2, whose terms are summed before the gain is known.
        gain = tl.load(step + image) / (tl.sqrt(gg) + 1e-12)
        shrink = _shrink(dd + 2.0 * gain * dg + gain * (gain * gg), radius)
        y = _clip(o + (x0 + g * gain - o) * shrink, 0.0, 1.0)
        if MOMENTUM:
            before = tl.load(previous + at, mask=inside, other=0.0)
            y = x0 + (y - x0) * momentum + (x0 - before) * rest
            if STORE:
                y = _clip(o + (y - o) * _shrink(_total(squares, image, PARTS), radius), 0.0, 1.0)
        if STORE:
            tl.store(out + at, y, mask=inside)
        else:
            away = tl.where(inside, y - o, 0.0)
            place = squares + image * tl.num_programs(1) + tl.program_id(1)
            tl.store(place, tl.sum(away * away, axis=0))


def _triton(
    x: Tensor,
    origin: Tensor,
    gradient: Tensor,
    step: Tensor,
    eps: Tensor,
    norm: str,
    previous: Tensor | None,
    momentum: float,
    out: Tensor,
) -> None:
    images, values = x.shape[0], x[0].numel()
    before = x if previous is None else previous
    # l2 in larger blocks: every program adds up the sums of all blocks of its image.
    options = {"BLOCK": 1024 if norm == "linf" else 2048, "enable_fp_fusion": False}
    parts = triton.cdiv(values, options["BLOCK"])
    grid, moving, rest = (images, parts), previous is not None, 1 - momentum
    with on_device(x.device):
        if norm == "linf":
            _linf_kernel[grid](
                x, origin, gradient, before, step, eps, out, values, momentum, rest,
                MOMENTUM=moving, **options,
            )  # fmt: skip
            return
        sums, squares = x.new_empty((3, images, parts)), x.new_empty((images, parts))
        _sums_kernel[grid](x, origin, gradient, sums, values, **options)
        for store in (False, True) if moving else (True,):
            _l2_kernel[grid](
                x, origin, gradient, before, step, eps, sums, squares, out, values, momentum, rest,
                MOMENTUM=moving, STORE=store, PARTS=triton.next_power_of_2(parts), **options,
            )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _implementation(
    x: Tensor,
    origin: Tensor,
    gradient: Tensor,
    step: Tensor,
    eps: Tensor,
    norm: str,
    previous: Tensor | None,
    momentum: float,
) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    if x.device.type == "cpu":  # on a GPU the question would wait for it
        for name, value in (("step", step), ("eps", eps)):
            if not value.min().item() >= 0:
                raise ValueError(f"{name} is {value.tolist()}; no value may be negative or NaN")
    x, origin, gradient = x.contiguous(), origin.contiguous(), gradient.contiguous()
    step, eps = step.contiguous(), eps.contiguous()
    previous = None if previous is None else previous.contiguous()
    backend = choose("ascend", x.device)
    if backend == "reference":
        out.copy_(_reference(x, origin, gradient, step, eps, norm, previous, momentum))
    elif backend == "triton":
        _triton(x, origin, gradient, step, eps, norm, previous, momentum, out)
    else:
        native_call(
            "ascend", x.device, x.data_ptr(), origin.data_ptr(), gradient.data_ptr(),
            TYPE_CODES[gradient.dtype], 0 if previous is None else previous.data_ptr(),
            step.data_ptr(), eps.data_ptr(), out.data_ptr(), x.shape[0], x.numel() // x.shape[0],
            momentum, 1 - momentum, norm == "l2",
        )  # fmt: skip
    return out


register(
    "ascend(Tensor x, Tensor origin, Tensor gradient, Tensor step, Tensor eps, str norm, "
    "Tensor? previous, float momentum) -> Tensor",
    _implementation,
    lambda x, origin, gradient, step, eps, norm, previous, momentum: x.new_empty(x.shape),
)


# --- public ---------------------------------------------------------------------------------------


def ascend(
    x: Tensor,
    origin: Tensor,
    gradient: Tensor,
    *,
    step: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    previous: Tensor | None = None,
    momentum: float = 1.0,
) -> Tensor:
    """The next iterate of a gradient attack, inside the ball and the box.

    FGSM is one call from `origin` with ``step=eps``; PGD (Madry et al., 2018) is this in a loop;
    APGD (Croce & Hein, 2020) passes `previous` too, with momentum 1 at its first step and 0.75
    after. In linf the result has the bits of the same formula in float32 torch operations; in l2
    it agrees within 1e-5. A gradient of zeros moves nothing; NaN in the gradient gives NaN: at its
    place in linf, in the whole image in l2.

    Args:
        x: float32 [N, ...] in [0, 1], where the gradient was taken.
        origin: float32 like `x`, the clean images, centre of the ball.
        gradient: float32, bfloat16 or float16 like `x`, of what is to grow.
        step: length of the step in the norm, one number or float32 [N].
        eps: radius of the ball, one number or float32 [N].
        norm: "linf" or "l2".
        previous: float32 like `x`, the iterate before; None for no momentum.
        momentum: a in [0, 1], the share of the new step; used with `previous` only.

    Returns:
        float32 like `x`, a new contiguous tensor, detached: no gradient flows through a step.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: a shape or device that does not fit; a norm or momentum that is not allowed; a
            negative step or eps (values in a CUDA tensor are not looked at).
    """
    shape = tuple(x.shape) if isinstance(x, Tensor) else ()
    check("x", x, torch.float32, shape or (None,), "[N, ...]")
    like = f"{shape}, that of x"
    check("origin", origin, torch.float32, shape, like, x)
    check("gradient", gradient, FLOATING, shape, like, x)
    if previous is not None:
        check("previous", previous, torch.float32, shape, like, x)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be {' or '.join(map(repr, NORMS))}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1]")
    return torch.ops.nimfast.ascend(
        x.detach(), origin.detach(), gradient.detach(), per_image("step", step, x).detach(),
        per_image("eps", eps, x).detach(), norm, None if previous is None else previous.detach(),
        float(momentum),
    )  # fmt: skip
