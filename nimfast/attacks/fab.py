# SPDX-License-Identifier: Apache-2.0
"""FAB (Croce & Hein 2020, "Minimally distorted adversarial examples", Algorithm 1), linf and l2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nimfast.attacks.engine import Attack, State, where
from nimfast.attacks.geometry import distance, length, to_hyperplane
from nimfast.attacks.target import Target


def lead(logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """``z_target - z_label``, mean over the draws: above 0 the target class wins."""
    assert targets is not None
    of_image = logits.view(len(labels), -1, logits.shape[1]).mean(1)
    ahead = of_image.gather(1, targets[:, None]) - of_image.gather(1, labels[:, None])
    return ahead[:, 0]


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Looks for the nearest misclassified point: from plane to plane, and back towards the image.

    `best_loss` of its result is minus the distance of that point; an image is broken when that is
    at most eps.

    Attributes:
        targets: FAB-T: a run (times restarts) against each of that many classes that come next
            after the label. None: the nearest linearised boundary of all classes, K - 1 gradients
            a step.
        alpha_max: most weight of the projection of the image itself.
        overshoot: eta, how far steps go beyond the plane.
        back: beta, what is left of the distance after a step back.
    """

    steps: int = 100
    targets: int | None = 9
    alpha_max: float = 0.1
    overshoot: float = 1.05
    back: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and self.targets < 1:
            raise ValueError(f"targets is {self.targets}; it must be at least 1, or None")
        if self.targeted:
            raise ValueError("FAB leaves the label's class; it cannot be targeted at one class")

    def runs(self, state: State) -> int:
        """Restarts, for each target class in FAB-T."""
        return self.restarts * (1 if self.targets is None else max(1, state["targets"].shape[1]))

    def prepare(self, target: Target, state: State) -> None:
        """The classes to cross to, and the distance of the nearest point found."""
        count = target.classes(state["x"][:1]) if self.targets is None and len(state["x"]) else None
        state["targets"] = self.next_classes(target, state, count or self.targets or 0)
        state["distance"] = torch.full_like(state["best_loss"], torch.inf)
        state["nearest"] = state["origin"]

    def start(self, state: State, run: int) -> Tensor:
        """The image; in restarts a point in the ball of half of eps or of the distance so far."""
        restart = run // max(1, state["targets"].shape[1] if self.targets else 1)
        if restart == 0:
            return state["origin"]
        draw = self.normals(state, run)
        if self.norm == "linf":
            draw = 2 * torch.special.ndtr(draw) - 1
        size = state["distance"].clamp(max=self.eps) / 2 / length(draw, self.norm)
        begin: Tensor = state["origin"] + size.view(-1, 1, 1, 1) * draw
        return begin.clamp(0, 1)

    def tick(self, target: Target, state: State, run: int, k: int) -> None:
        """A step; after the last one, a search between the image and the nearest point."""
        count = max(1, state["targets"].shape[1])
        if k == self.steps:
            self._search(target, state)
            return
        if run == k == 0:
            self._enter(target, state, state["x"])  # the image may be misclassified as it is
        aims = [run % count] if self.targets is not None else list(range(count))
        ahead, normal = self._nearest_plane(target, state, aims)
        x, origin = state["x"], state["origin"]
        step = to_hyperplane(x, normal, -ahead, self.norm)
        # The same plane, seen from the image: ahead + <normal, z - x> = 0.
        there = (normal.double() * (origin - x)).flatten(1).sum(1)
        step_origin = to_hyperplane(origin, normal, -(ahead.double() + there), self.norm)
        sizes = [length(value, self.norm) for value in (step, step_origin)]
        alpha = (sizes[0] / (sizes[0] + sizes[1]).clamp(min=1e-12)).clamp(max=self.alpha_max)
        alpha = alpha.view(-1, 1, 1, 1)
        moved = (1 - alpha) * (x + self.overshoot * step)
        moved = moved + alpha * (origin + self.overshoot * step_origin)
        moved = moved.clamp(0, 1)
        crossed = self._enter(target, state, moved)
        state["x"] = where(crossed, origin + self.back * (moved - origin), moved)

    def _nearest_plane(
        self, target: Target, state: State, aims: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Lead [B] and gradient of the class whose linearised boundary is nearest."""
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for aim in aims:
            towards = state["targets"][:, aim].contiguous()
            seen = self.look(target, state, state["x"], lead, targets=towards)
            if len(aims) == 1:
                return seen.loss, seen.gradient
            slope = length(seen.gradient, "l1" if self.norm == "linf" else "l2")
            away = seen.loss.abs() / slope.clamp(min=1e-12)
            if best is None:
                best = away, seen.loss, seen.gradient
            else:
                nearer = away < best[0]
                found = zip((away, seen.loss, seen.gradient), best, strict=True)
                best = tuple(where(nearer, new, old) for new, old in found)  # type: ignore[assignment]
        assert best is not None
        return best[1], best[2]

    def _crossed(self, target: Target, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether misclassified, and the lead of the best other class, both ``[B]``."""
        # Points next to the boundary: in half precision many that seem across are not.
        seen = self.look(target.exact(), state, x, "ce", gradient=False)
        draws = 1 if self.verdict == "last" else self.eot
        mean = seen.logits.view(len(x), self.eot, -1).mean(1)
        label = mean.gather(1, state["y"][:, None])[:, 0]
        other = mean.scatter(1, state["y"][:, None], -torch.inf).amax(1)
        return 2 * seen.missed > draws, other - label

    def _enter(self, target: Target, state: State, x: Tensor) -> Tensor:
        """Keep `x` where it is the nearest misclassified point; whether it is misclassified."""
        crossed, _ = self._crossed(target, state, x)
        far = distance(x, state["origin"], self.norm)
        nearer = crossed & (far < state["distance"])
        self._record(state, nearer, x, far)
        return crossed

    def _record(self, state: State, nearer: Tensor, x: Tensor, far: Tensor) -> None:
        state["nearest"] = where(nearer, x, state["nearest"])
        state["distance"] = torch.where(nearer, far, state["distance"])
        state["best_loss"] = -state["distance"]
        hit = state["distance"] <= self.eps
        state["x_adv"] = where(hit, state["nearest"], state["origin"])
        if self.verdict != "loss":
            state["broken"] = hit

    def _search(self, target: Target, state: State) -> None:
        """Three secant steps on the segment from the image to its nearest misclassified point."""
        near, far = state["origin"], state["nearest"]
        _, lead_near = self._crossed(target, state, near)
        _, lead_far = self._crossed(target, state, far)
        for _ in range(3):
            share = lead_far / (lead_far - lead_near).clamp(min=1e-12)
            middle = far + share.clamp(0, 1).view(-1, 1, 1, 1) * (near - far)
            crossed, ahead = self._crossed(target, state, middle)
            far_middle = distance(middle, state["origin"], self.norm)
            self._record(state, crossed & (far_middle < state["distance"]), middle, far_middle)
            near, far = where(crossed, near, middle), where(crossed, middle, far)
            lead_near = torch.where(crossed, lead_near, ahead)
            lead_far = torch.where(crossed, ahead, lead_far)
