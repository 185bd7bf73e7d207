# SPDX-License-Identifier: Apache-2.0
"""Balls, the box [0, 1] and hyperplanes: distances, exact projections, points made sound.

Everything is by image, over tensors ``[B, C, H, W]``. Projections on the intersection of the box
with something else come down to one unknown of a piecewise linear function.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 255  # steps of an 8-bit image


def length(away: Tensor, norm: str) -> Tensor:
    """Norm of every image, ``[B]``, in the type of `away`."""
    rows = away.flatten(1)
    if norm == "l2":
        result: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return result
    # Its other orders take six to sixteen times as long as these on a CPU.
    return rows.abs().amax(1) if norm == "linf" else rows.abs().sum(1)


def distance(x: Tensor, origin: Tensor, norm: str) -> Tensor:
    """Norm of ``x - origin``, ``[B]``, in the type of `x`."""
    return length(x - origin, norm)


def nonzeros(x: Tensor, origin: Tensor) -> Tensor:
    """How many values differ, fp32 ``[B]``."""
    return (x != origin).flatten(1).sum(1).float()


def confine(x: Tensor, origin: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest fp32 points that lie in ball and box when both are computed in float64.

    Iterates are inside up to fp32 rounding; this takes that away, by some 1e-7.
    """
    start = origin.double()
    if norm == "linf":
        exact = torch.min(torch.max(x.double(), start - eps), start + eps).clamp(0, 1)
        rounded = exact.float()
        outside = (rounded.double() - start).abs() > eps
        return torch.where(outside, torch.nextafter(rounded, origin), rounded)
    away = x.double().clamp(0, 1) - start
    size = distance(x.double().clamp(0, 1), start, norm)
    # Rounding to fp32 moves every value by at most 2^-25, the norm by at most `margin`.
    values = origin[0].numel() if len(origin) else 1
    margin = 2.0**-25 * (values**0.5 if norm == "l2" else values)
    shrink = torch.where(size > eps - margin, (eps - margin) / size.clamp(min=1e-30), 1.0)
    return (start + away * shrink.clamp(0, 1).view(-1, 1, 1, 1)).float()


def to_8_bits(x: Tensor, origin: Tensor, eps: float, norm: str) -> Tensor:
    """The 8-bit images next to `x`, still in the ball: uint8 like `x`.

    In linf every value takes the nearest level inside; in l2 and l1 the nearest one that is not
    further from the origin.

    Raises:
        ValueError: `origin` is not of 8-bit images, so that no rounding is sure to stay inside.
    """
    start = origin.double() * GRID
    level = start.round()
    if bool(((start - level).abs() > 1e-3).any()):
        raise ValueError(
            "the clean images are not multiples of 1/255, so their neighbours rounded to 8 bits "
            "need not lie in the ball; round the clean images first"
        )
    away = x.double() * GRID - level
    if norm == "linf":
        most = int(eps * GRID + 1e-6)
        away = away.round().clamp(-most, most)
    else:
        away = away.trunc()
    return (level + away).clamp(0, GRID).to(torch.uint8)


def project_l1(x: Tensor, origin: Tensor, eps: float) -> Tensor:
    """The point nearest to `x` (l2) in l1-ball and box; Croce & Hein 2021, Proposition 2.1.

    Its distance from the origin is, value by value, ``clip(|x - origin| - shift, 0, room)`` with
    the one shift at which the sum is eps.
    """
    away = (x - origin).flatten(1).double()
    start = origin.flatten(1).double()
    size, room = away.abs(), torch.where(away > 0, 1 - start, start)
    # The sum as a function of a falling shift: a value begins to count at its size and stops at
    # size - room; negative shifts are not looked at.
    places = torch.cat([size, (size - room).clamp(min=0)], 1)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    places, order = places.sort(1, descending=True)
    slopes = slopes.gather(1, order).cumsum(1)
    sums = (slopes[:, :-1] * (places[:, :-1] - places[:, 1:])).cumsum(1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)  # the sum at each place
    after = torch.searchsorted(sums, torch.full_like(sums[:, :1], eps))  # first one of at least eps
    before = (after - 1).clamp(min=0)
    rest = eps - sums.gather(1, before)
    shift = places.gather(1, before) - rest / slopes.gather(1, before).clamp(min=1)
    shift = torch.where(after < sums.shape[1], shift, 0.0)
    inside = torch.minimum((size - shift.clamp(min=0)).clamp(min=0), room)
    return (start + away.sign() * inside).float().view_as(x)


def to_hyperplane(x: Tensor, normal: Tensor, rise: Tensor, norm: str) -> Tensor:
    """The shortest step d with ``<normal, d> = rise`` that keeps x + d in the box.

    Croce & Hein 2020 (FAB), Eq. 4. Every value moves by ``min(scale m, room)`` with m = 1 in linf
    and m = ``|normal|`` in l2, and one scale for all. Where the box does not reach the plane, the
    step goes as near to it as the box allows.

    Args:
        x: ``[B, C, H, W]`` in [0, 1].
        normal: like `x`.
        rise: ``[B]``.
        norm: "linf" or "l2", in which the step is the shortest.
    """
    w = normal.flatten(1).double() * rise.sign().double()[:, None]
    start = x.flatten(1).double()
    side, weight, aim = w.sign(), w.abs(), rise.abs().double()[:, None]
    room = (side / 2 + 0.5 - start).abs()  # to 1 or to 0; where w is 0 it counts for nothing
    pace, rate = (side.abs(), weight) if norm == "linf" else (weight, weight.square())
    reach = weight * room
    total = reach.sum(1, keepdim=True)
    # What the plane sees of the step, sum of min(scale rate, reach), is concave in the scale, so
    # Newton's steps come from below and end, exactly, once no more values run out of room: after
    # three or four of them as a rule. Sorting by where each value ends took four times as long as
    # with torch.where for the masks, and that three times as long as with products.
    scale, before = torch.zeros_like(aim), None
    while before is None or bool((scale > before).any()):
        left = torch.addcmul(reach, scale, rate, value=-1).gt_(0)  # 1: has room left, 0: has not
        moving = (rate * left).sum(1, keepdim=True)
        done = total - (reach * left).sum(1, keepdim=True)
        before, ahead = scale, (aim - done) / moving.clamp(min=1e-300)
        scale = torch.maximum(ahead, before)
    return (side * torch.minimum(scale * pace, room)).float().view_as(x)
