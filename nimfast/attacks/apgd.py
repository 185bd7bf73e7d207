# SPDX-License-Identifier: Apache-2.0
"""APGD (Croce & Hein 2020, Algorithm 1) and its l1 form (Croce & Hein 2021, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nimfast.attacks.engine import Attack, Norm, State, where
from nimfast.attacks.geometry import length, nonzeros, project_l1
from nimfast.attacks.target import Target
from nimfast.ops import ascend


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Projected gradient ascent that halves its steps, and goes back to its best point, by itself.

    Attributes:
        loss: "ce", "dlr" or "dlr-targeted"; the last makes a run (times restarts) against each of
            the `targets` classes that come next after the label.
        targets: number of target classes, at most K - 1.
        rho: share of the steps that have to raise the loss (condition 1).
        widen: l1 only: 30% of the steps in a ball of 3 eps, 30% in 2 eps, the rest in eps.
    """

    loss: str = "ce"
    targets: int = 9
    rho: float = 0.75
    widen: bool = False

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise ValueError(f"targets is {self.targets}; it must be at least 1")
        if self.widen and self.norm != "l1":
            raise ValueError(f"widen is for l1; the norm is {self.norm}")

    @property
    def stages(self) -> list[tuple[float, int]]:
        """Radius and steps of each part of a run."""
        if not self.widen:
            return [(self.eps, self.steps)]
        part = max(1, round(0.3 * self.steps))
        last = max(1, self.steps - 2 * part)
        return [(3 * self.eps, part), (2 * self.eps, part), (self.eps, last)]

    @property
    def ticks(self) -> int:
        """Every stage looks at its start, and after each of its steps."""
        return sum(steps + 1 for _, steps in self.stages)

    def runs(self, state: State) -> int:
        """Restarts, for each target class where there are such."""
        return self.restarts * max(1, state["targets"].shape[1])

    def prepare(self, target: Target, state: State) -> None:
        """Iterates, gradients and the schedule's memory, per image."""
        x, scalar = state["x"], torch.zeros(len(state["x"]), device=state["x"].device)
        targeted = self.loss == "dlr-targeted"
        state["targets"] = self.next_classes(target, state, self.targets if targeted else 0)
        state |= {name: torch.zeros_like(x) for name in ("gradient", "gradient_best")}
        state |= {"previous": x, "x_best": x}
        names = ("size", "size_before", "best", "best_before", "last", "rises", "sparsity", "moved")
        state |= dict.fromkeys(names, scalar)

    def start(self, state: State, run: int) -> Tensor:
        """On the border of the ball (linf, l2); a projected normal draw (l1)."""
        draw, origin = self.normals(state, run), state["origin"]
        if self.norm == "l1":
            return project_l1(origin + draw, origin, self.stages[0][0])
        if self.norm == "linf":
            draw = 2 * torch.special.ndtr(draw) - 1
        begin: Tensor = origin + self.eps * draw / length(draw, self.norm).view(-1, 1, 1, 1)
        return begin.clamp(0, 1)

    def tick(self, target: Target, state: State, run: int, k: int) -> None:
        """A step and a look at where it led."""
        eps, steps, k = self._stage(k)
        if k > 0:
            state["previous"], state["x"] = state["x"], self._step(state, eps, first=k == 1)
        elif eps < self.stages[0][0]:
            state["x"] = project_l1(state["x_best"], state["origin"], eps)
        count = state["targets"].shape[1]
        towards = state["targets"][:, run % count].contiguous() if count else None
        x = state["x"]
        seen = self.look(target, state, x, self.loss, targets=towards, gradient=k < steps)
        if eps == self.eps:
            self.keep(state, x, seen)
        if k == 0:
            self._restart(state, eps)
        if k == steps:
            return
        higher = seen.loss > state["best"]
        # The published first comparison is with 0, not with the loss of the start.
        state["rises"] = state["rises"] + (seen.loss > state["last"]) * (k > 0)
        state["last"] = seen.loss if k else torch.zeros_like(seen.loss)
        state["best"] = torch.where(higher, seen.loss, state["best"])
        state["gradient"] = seen.gradient
        state["x_best"] = where(higher, x, state["x_best"])
        state["gradient_best"] = where(higher, seen.gradient, state["gradient_best"])
        if k == 0:
            state["best_before"] = state["best"]
        else:
            self._adapt(state, eps, steps, k)

    def _stage(self, k: int) -> tuple[float, int, int]:
        """Radius and steps of the stage that tick `k` of a run falls into, and its tick there."""
        for eps, steps in self.stages:
            if k <= steps:
                return eps, steps, k
            k -= steps + 1
        raise ValueError(f"a run has no tick {k + self.ticks}")

    def _restart(self, state: State, eps: float) -> None:
        scalar = torch.zeros_like(state["best"])
        size = torch.full_like(scalar, eps if self.norm == "l1" else 2 * eps)
        state |= {"size": size, "size_before": size, "best": scalar - torch.inf, "rises": scalar}
        state |= {"previous": state["x"], "x_best": state["x"]}
        values = state["x"][0].numel()
        if eps == self.stages[0][0]:
            state |= {"sparsity": scalar + 0.2, "moved": scalar + values}
        else:
            moved = nonzeros(state["x"], state["origin"])
            state |= {"sparsity": moved / (1.5 * values), "moved": moved}

    def _step(self, state: State, eps: float, first: bool) -> Tensor:
        if self.norm == "l1":
            return sparse_step(
                state["x"],
                state["origin"],
                state["gradient"],
                state["size"],
                state["sparsity"],
                eps,
            )
        return ascend(
            state["x"], state["origin"], state["gradient"], step=state["size"], eps=eps,
            norm=self.norm, previous=state["previous"], momentum=1.0 if first else 0.75,
        )  # fmt: skip

    def _adapt(self, state: State, eps: float, steps: int, k: int) -> None:
        """At checkpoints: shorter steps, from the best point so far."""
        if self.norm == "l1":
            if k % max(int(0.04 * steps), 1):
                return
            moved = nonzeros(state["x_best"], state["origin"])
            back = moved < 0.95 * state["moved"]
            state["sparsity"] = moved / (1.5 * state["x"][0].numel())
            shorter = (state["size"] / 1.5).clamp(min=eps / 10)
            state["size"] = torch.where(back, eps, shorter)
            state["moved"] = moved
        else:
            gap = checkpoints(steps).get(k)
            if gap is None:
                return
            back = state["rises"] <= self.rho * gap  # condition 1
            same = state["size_before"] == state["size"]
            back = back | (same & (state["best_before"] == state["best"]))  # condition 2
            state |= {"size_before": state["size"], "best_before": state["best"]}
            state["size"] = torch.where(back, state["size"] / 2, state["size"])
            state["rises"] = torch.zeros_like(state["rises"])
        state["x"] = where(back, state["x_best"], state["x"])
        state["gradient"] = where(back, state["gradient_best"], state["gradient"])


def checkpoints(steps: int) -> dict[int, int]:
    """Steps at which APGD takes stock, and how many steps each looks back on.

    ``w_{j+1} = w_j + max(w_j - w_{j-1} - 0.03, 0.06)`` in whole steps, as the published runs have
    it: each share of the steps is rounded down, but not to 0.
    """
    gap, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = {}, gap
    while at <= steps:
        found[at] = gap
        gap = max(gap - less, least)
        at += gap
    return found


def sparse_step(
    x: Tensor, origin: Tensor, gradient: Tensor, size: Tensor, sparsity: Tensor, eps: float
) -> Tensor:
    """A step of l1 length `size` along the signs of the largest gradients, projected.

    Args:
        x, origin, gradient: ``[B, C, H, W]``.
        size: ``[B]``.
        sparsity: share of the values that moves, ``[B]``.
        eps: radius of the l1-ball.
    """
    height = gradient.abs().flatten(1)
    values = height.shape[1]
    least = height.sort(1)[0].gather(
        1, ((1 - sparsity) * values).long().clamp(0, values - 1)[:, None]
    )
    direction = gradient.flatten(1).sign() * (height >= least)
    count = direction.abs().sum(1, keepdim=True).clamp(min=1)
    moved = x + (size[:, None] * direction / count).view_as(x)
    return project_l1(moved, origin, eps)
