# SPDX-License-Identifier: Apache-2.0
"""Square attack (Andriushchenko et al. 2020): random search by squares, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nimfast.attacks.engine import Attack, Purpose, State, where
from nimfast.attacks.target import Target
from nimfast.ops import random_bits

_WORDS = 8  # random words of an image in a tick
_AHEAD = 64  # ticks whose words are drawn at once: it takes as long for many as for few


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Lead of the best other class over the label, mean over the draws ``[B]``."""
    rows = labels.repeat_interleave(len(logits) // max(1, len(labels)))
    label = logits.gather(1, rows[:, None])[:, 0]
    other = logits.scatter(1, rows[:, None], -torch.inf).amax(1)
    return (other - label).view(len(labels), -1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Changes one square after another; a change that raises the margin's loss stays.

    Attributes:
        steps: queries of the model for each image and restart.
        share: p, the share of the pixels that the first squares take.
        rescale: stretch the schedule of p, made for 10,000 queries, to `steps`.
        leave: as always, but here by default.
    """

    steps: int = 5000
    share: float = 0.8
    rescale: bool = True
    leave: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be in (0, 1]")

    @property
    def ticks(self) -> int:
        """One for each query."""
        return self.steps

    def prepare(self, target: Target, state: State) -> None:
        """The highest margin loss so far of the run, and the keys of the random search."""
        state["best"] = torch.full_like(state["best_loss"], -torch.inf)
        state["search"] = self._keys(Purpose.SEARCH, state["indices"])
        state["words"] = self._words(state)

    def start(self, state: State, run: int) -> Tensor:
        """Stripes of +-eps, one sign for each column (linf); a grid of squares (l2)."""
        origin = state["origin"]
        height, width = origin.shape[2:]
        draw = self.normals(state, run)
        if self.norm == "linf":
            stripes = draw[:, :, :1, :].sign()
            begin: Tensor = origin + self.eps * stripes
            return begin.clamp(0, 1)
        side = min(max(3, min(height, width) // 5), height, width)
        tile = bump(side, origin.device)
        away = torch.zeros_like(origin)
        for top in range(0, height - side + 1, side):
            for left in range(0, width - side + 1, side):
                here = (..., slice(top, top + side), slice(left, left + side))
                signs, turn = draw[:, :, top, left].sign(), draw[:, 0, top, left + side - 1] > 0
                away[here] = signs[:, :, None, None] * turned(tile, turn)[:, None]
        length = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, 1, 1, 1)
        begin = origin + away * (self.eps / length)
        return begin.clamp(0, 1)

    def tick(self, target: Target, state: State, run: int, k: int) -> None:
        """A query: the start, or a changed square."""
        ahead = int(state["step"]) % _AHEAD
        if ahead == 0:
            state["words"] = self._words(state)
        words = state["words"][:, ahead * _WORDS : (ahead + 1) * _WORDS]
        proposal = state["x"] if k == 0 else self._propose(state, k, words)
        seen = self.look(target, state, proposal, margin, gradient=False)
        if k == 0:
            state["best"] = torch.full_like(state["best"], -torch.inf)
        better = seen.loss > state["best"]
        state["best"] = torch.where(better, seen.loss, state["best"])
        state["x"] = where(better, proposal, state["x"])
        self.keep(state, proposal, seen)

    def side(self, k: int, shape: torch.Size) -> int:
        """Side of the square of query `k` in images ``[B, C, H, W]``."""
        at = k * 10_000 // self.steps if self.rescale else k
        halved = sum(at > turn for turn in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        height, width = shape[2:]
        side: int = max(1, round((self.share * height * width / 2**halved) ** 0.5))
        if self.norm == "l2":
            side = max(3, side + 1 - side % 2)
        return min(side, height, width)

    def _words(self, state: State) -> Tensor:
        """Words of the ticks from this one on, int64 ``[B, _AHEAD * _WORDS]``."""
        return random_bits(state["search"], _AHEAD * _WORDS, first=int(state["step"]) * _WORDS)

    def _propose(self, state: State, k: int, words: Tensor) -> Tensor:
        x, origin = state["x"], state["origin"]
        side = self.side(k, x.shape)
        places = [places_of(words[:, 2 * i : 2 * i + 2], side, x.shape) for i in range(2)]
        channels = torch.arange(x.shape[1], device=x.device)
        signs = ((words[:, 4:5] >> channels) & 1).float() * 2 - 1  # [B, C]
        signs = signs.view(*signs.shape, 1, 1)
        if self.norm == "linf":
            changed = (origin + self.eps * signs).clamp(0, 1)
            return torch.where(inside(places[0], side, x.shape), changed, x)
        return self._move_mass(x, origin, side, places, signs, words[:, 5] & 1 == 1)

    def _move_mass(
        self,
        x: Tensor,
        origin: Tensor,
        side: int,
        places: list[Tensor],
        signs: Tensor,
        turn: Tensor,
    ) -> Tensor:
        """Algorithm 3: the norm spent in two windows, and what is unused, goes into the first."""
        first, second = (inside(place, side, x.shape) for place in places)
        away = x - origin
        unused = (self.eps**2 - away.square().flatten(1).sum(1)).clamp(min=0).view(-1, 1, 1, 1)
        both = (away.square() * (first | second)).sum((2, 3), keepdim=True)
        available = (both + unused / x.shape[1]).sqrt()
        shape = turned(bump(side, x.device), turn)
        old = away * first
        length = old.square().sum((2, 3), keepdim=True).sqrt()
        new = old / length.clamp(min=1e-12) + put(shape, places[0], x.shape) * signs
        new = new / new.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12) * available
        moved = torch.where(first, new, torch.where(second, 0.0, away))
        # Rounding only: the norm of what was put in is what was taken out.
        size = moved.square().flatten(1).sum(1).sqrt().clamp(min=self.eps).view(-1, 1, 1, 1)
        proposal: Tensor = origin + moved * (self.eps / size)
        return proposal.clamp(0, 1)


def places_of(words: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Top and left of a square from two random words, int64 ``[B, 2]``."""
    top, left = words[:, 0] * (shape[2] - side + 1), words[:, 1] * (shape[3] - side + 1)
    return torch.stack([top, left], 1) >> 32


def inside(place: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Which pixels lie in the square, bool ``[B, 1, H, W]``."""
    rows, columns = (torch.arange(size, device=place.device) for size in shape[2:])
    down, right = rows - place[:, :1], columns - place[:, 1:]
    vertical, horizontal = (down >= 0) & (down < side), (right >= 0) & (right < side)
    return (vertical[:, :, None] & horizontal[:, None, :])[:, None]


def put(pattern: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """Patterns ``[B, side, side]`` at their places in zeros, ``[B, 1, H, W]``."""
    side = pattern.shape[-1]
    rows, columns = (torch.arange(size, device=place.device) for size in shape[2:])
    down = (rows - place[:, :1]).clamp(0, side - 1)  # [B, H]
    right = (columns - place[:, 1:]).clamp(0, side - 1)  # [B, W]
    image = torch.arange(len(place), device=place.device)[:, None, None]
    spread = pattern[image, down[:, :, None], right[:, None, :]]
    return spread[:, None] * inside(place, side, shape)


def turned(pattern: Tensor, turn: Tensor) -> Tensor:
    """The pattern, or its transpose where `turn` says so, for each image ``[B, side, side]``."""
    shape = (len(turn), *pattern.shape)
    return where(turn, pattern.T.expand(shape), pattern.expand(shape))


@lru_cache(maxsize=64)
def bump(side: int, device: torch.device) -> Tensor:
    """Eq. 2 of the paper, of norm 1: a hill up and a hill down side by side ``[side, side]``."""
    half = side // 2
    pattern = torch.cat([_hill(side, half), -_hill(side, side - half)], 1)
    scaled: Tensor = pattern / torch.linalg.vector_norm(pattern)
    return scaled.to(device)


def _hill(height: int, width: int) -> Tensor:
    n = height // 2
    rows = (torch.arange(1, height + 1) - n - 1).abs()[:, None]
    columns = (torch.arange(1, width + 1) - width // 2 - 1).abs()[None, :]
    most = n - torch.maximum(rows, columns)  # [height, width], M(r, s)
    terms = 1.0 / (n + 1 - torch.arange(n + 1)).double().square()
    sums = terms.cumsum(0)
    return torch.where(most >= 0, sums[most.clamp(min=0)], 0.0).float()
