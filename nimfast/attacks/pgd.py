# SPDX-License-Identifier: Apache-2.0
"""FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nimfast.attacks.engine import Attack, State
from nimfast.attacks.target import Target
from nimfast.ops import ascend


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent with steps of one length; a run's last point counts.

    Attributes:
        step_size: length of a step in the norm; None for ``2.5 eps / steps`` (Madry et al.).
        random_start: begin at a uniform point of the ball (linf) or of its sphere (l2).
        loss: of `vote_loss`.
    """

    step_size: float | None = None
    random_start: bool = True
    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size is {self.step_size}; it must be positive")

    def start(self, state: State, run: int) -> Tensor:
        """See `random_start`."""
        if not self.random_start:
            return state["origin"]
        draw = self.normals(state, run)
        if self.norm == "linf":
            away = 2 * torch.special.ndtr(draw) - 1
        else:
            away = draw / torch.linalg.vector_norm(draw, dim=(1, 2, 3), keepdim=True)
        begin: Tensor = state["origin"] + self.eps * away
        return begin.clamp(0, 1)

    def tick(self, target: Target, state: State, run: int, k: int) -> None:
        """A step, or, after the last one, the verdict on where it led."""
        if k == self.steps:
            self.keep(
                state, state["x"], self.look(target, state, state["x"], self.loss, gradient=False)
            )
            return
        seen = self.look(target, state, state["x"], self.loss)
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        state["x"] = ascend(
            state["x"], state["origin"], seen.gradient, step=step, eps=self.eps, norm=self.norm
        )


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """One step to the border of the ball, from the image itself."""

    steps: int = 1
    step_size: float | None = None
    random_start: bool = False

    def __post_init__(self) -> None:
        if self.steps != 1:
            raise ValueError(f"steps is {self.steps}; FGSM makes one, PGD makes more")
        if self.step_size is None:
            object.__setattr__(self, "step_size", self.eps)
        super().__post_init__()
