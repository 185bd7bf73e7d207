# SPDX-License-Identifier: Apache-2.0
"""What all attacks share: state, random draws, looks at the model, bookkeeping.

An attack is a frozen set of settings; all that changes is a `State`, a dict of tensors, so that it
can be saved after any step and continued bit for bit. An attack makes one or more *runs* (restarts,
target classes) of a fixed number of *ticks* each. A tensor with dimensions has one row per image;
one without is a clock, kept on the CPU, so that reading it never waits for a GPU.

Draws depend on (seed, what they are for, image index, tick and draw), nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nimfast.attacks.geometry import confine
from nimfast.attacks.target import Look, Loss, Target, evaluate
from nimfast.ops import Stream, corrupt, image_keys
from nimfast.options import Norm

State = dict[str, Tensor]

# How a point is judged by the draws of the model taken at it:
# majority: broken when more than half of them are misclassified; a broken point beats any other.
# loss: the highest mean loss beats; nothing is ever broken. For randomised models.
# last: as majority, by the last draw alone, as the published code has it.
Verdict = Literal["majority", "loss", "last"]


class Purpose(IntEnum):
    """What a draw from the stream ATTACK is for."""

    NOISE = 0  # of the model
    START = 1
    SEARCH = 2
    CHOICE = 3


class Result(NamedTuple):
    """What an attack found for B images.

    Attributes:
        x_adv: fp32 ``[B, C, H, W]``, the point kept of each image.
        best_loss: highest loss seen, ``[B]``.
        broken: whether `x_adv` was misclassified when the attack looked, bool ``[B]``.
    """

    x_adv: Tensor
    best_loss: Tensor
    broken: Tensor


A = TypeVar("A", bound="Attack")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Settings that all attacks have.

    Attributes:
        eps: radius of the ball, for pixels in [0, 1].
        norm: of the ball.
        steps: iterations of a run.
        restarts: runs from different random starts.
        eot: draws of the model for every gradient.
        targeted: y is the class to reach, not the one to leave.
        verdict: see `Verdict`.
        leave: broken images leave the batch and keep the point they have; the others' draws stay
            as they are, so their verdicts do too.
        seed: of all draws.

    Raises:
        ValueError: a setting out of range.
    """

    eps: float = 8 / 255
    norm: Norm = "linf"
    steps: int = 10
    restarts: int = 1
    eot: int = 1
    targeted: bool = False
    verdict: Verdict = "majority"
    leave: bool = False
    seed: int = 0

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    interval: ClassVar[int] = 10  # ticks between two looks at who may leave

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            known = " and ".join(self.norms)
            raise ValueError(f"norm is {self.norm!r}; {type(self).__name__} has {known} only")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps is {self.eps}; it must be positive (8/255 is usual for linf)")
        for name in ("steps", "restarts", "eot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    # --- to be said by each attack ----------------------------------------------------------------

    @property
    def ticks(self) -> int:
        """Ticks of a run: here one for each step and one for a last look."""
        return self.steps + 1

    def runs(self, state: State) -> int:
        """Number of runs."""
        return self.restarts

    def prepare(self, target: Target, state: State) -> None:
        """Add what this attack keeps of each image to a new state."""

    def tick(self, target: Target, state: State, run: int, k: int) -> None:
        """Tick `k` of run `run`, for all images in `state`."""
        raise NotImplementedError

    # --- the protocol -----------------------------------------------------------------------------

    def begin(
        self,
        target: Target,
        x: Tensor,
        y: Tensor,
        indices: Tensor | None = None,
        *,
        start: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> State:
        """State before the first tick.

        Args:
            target: the model.
            x: images, fp32 ``[B, C, H, W]`` in [0, 1].
            y: labels, int64 ``[B]``.
            indices: their places in the data set, int64 ``[B]``; with the seed they decide all
                draws. Default 0 to B - 1.
            start: where the first run begins, like `x`; by default the attack's own choice.
            skip: images to leave alone, bool ``[B]``.

        Raises:
            TypeError, ValueError: see `check_images`.
        """
        check_images(x, y, lambda: target.classes(x[:1].detach().to(target.device)))
        x = x.detach().to(target.device)
        if indices is None:
            indices = torch.arange(len(x))
        indices = indices.to(x.device)
        state = {
            "origin": x,
            "y": y.to(x.device),
            "indices": indices,
            "noise": self._keys(Purpose.NOISE, indices),
            "x": x,
            "x_adv": x,
            "best_loss": torch.full((len(x),), -torch.inf, device=x.device),
            "kept": torch.full((len(x),), -torch.inf, device=x.device),  # loss of x_adv
            "broken": torch.zeros(len(x), dtype=torch.bool, device=x.device),
            "away": torch.zeros(len(x), dtype=torch.bool, device=x.device),
            "step": torch.tensor(0),
        }
        if skip is not None:
            state["away"] = skip.to(x.device)
        state["present"] = (~state["away"]).sum().cpu()
        self.prepare(target, state)
        if start is not None:
            state["x"] = start.detach().to(x.device)
        elif len(x):
            state["x"] = self.start(state, 0)
        return state

    def step(self, target: Target, state: State) -> None:
        """One tick."""
        run, k = divmod(int(state["step"]), self.ticks)
        present = int(state["present"])
        part = given = state
        if present < len(state["x"]):
            rows = state["away"].to(torch.uint8).argsort(stable=True)[:present]
            part = {name: v[rows] if v.dim() else v for name, v in state.items()}
            given = dict(part)
        if present:
            if k == 0 and run > 0:
                part["x"] = self.start(part, run)
            self.tick(target, part, run, k)
        if part is not state:
            for name, value in part.items():
                if value is not given[name]:  # a tick puts new tensors, it writes into none
                    state[name] = state[name].index_copy(0, rows, value) if value.dim() else value
        state["step"] = state["step"] + 1
        if self.leave and (k + 1 == self.ticks or (k + 1) % self.interval == 0):
            state["away"] = state["away"] | state["broken"]
            state["present"] = (~state["away"]).sum().cpu()

    def done(self, state: State) -> bool:
        """Whether nothing is left to do."""
        ended = int(state["step"]) >= self.ticks * self.runs(state)
        return ended or int(state["present"]) == 0

    def result(self, state: State) -> Result:
        """What has been found so far; points lie in ball and box in float64."""
        inside = confine(state["x_adv"], state["origin"], self.eps, self.norm)
        return Result(inside, state["best_loss"], state["broken"])

    def run(
        self, target: Target, x: Tensor, y: Tensor, indices: Tensor | None = None, **options: Tensor
    ) -> Result:
        """From `begin` to `result`; arguments as of `begin`."""
        state = self.begin(target, x, y, indices, **options)
        while not self.done(state):
            self.step(target, state)
        return self.result(state)

    def __call__(
        self, model: nn.Module | Target, x: Tensor, y: Tensor, indices: Tensor | None = None
    ) -> Tensor:
        """Adversarial images, like `x`; arguments as of `begin`, the model as it is or a Target."""
        target = model if isinstance(model, Target) else Target(model, packed=True)
        return self.run(target, x, y, indices).x_adv

    def with_settings(self: A, **settings: object) -> A:
        """The same attack with other settings."""
        return replace(self, **settings)  # type: ignore[arg-type]

    # --- for the attacks --------------------------------------------------------------------------

    def look(
        self,
        target: Target,
        state: State,
        x: Tensor,
        loss: str | Loss,
        *,
        targets: Tensor | None = None,
        gradient: bool = True,
    ) -> Look:
        """Look at `x` with this tick's draws; the loss is what the attack makes grow."""
        see = target.gradient if gradient else target.loss
        first = int(state["step"]) * self.eot
        seen = see(
            x, state["y"], loss, targets=targets, keys=state["noise"], samples=self.eot,
            first_sample=first,
        )  # fmt: skip
        if self.verdict == "last":
            seen = self._last_draw(seen, state["y"], loss, targets)
        if self.targeted:
            draws = 1 if self.verdict == "last" else self.eot
            seen = Look(-seen.loss, -seen.gradient, seen.logits, draws - seen.missed)
        # An infinite or undefined derivative says nothing of the direction; 0 stays in the ball.
        return seen._replace(gradient=seen.gradient.nan_to_num(0, 0, 0))

    def _last_draw(self, seen: Look, y: Tensor, loss: str | Loss, targets: Tensor | None) -> Look:
        last = seen.logits.view(len(y), self.eot, -1)[:, -1].contiguous()
        value, missed = evaluate(last, y, loss, targets)
        return seen._replace(loss=value, missed=missed)

    def keep(self, state: State, x: Tensor, seen: Look) -> None:
        """Enter a point into the bookkeeping."""
        state["best_loss"] = torch.fmax(state["best_loss"], seen.loss)  # NaN is no record
        better = seen.loss > state["kept"]
        if self.verdict != "loss":
            draws = 1 if self.verdict == "last" else self.eot
            before, broken = state["broken"], 2 * seen.missed > draws
            better = (broken & ~before) | (better & (broken | ~before))
            state["broken"] = before | broken
        state["x_adv"] = where(better, x, state["x_adv"])
        state["kept"] = torch.where(better, seen.loss, state["kept"])

    def next_classes(self, target: Target, state: State, count: int) -> Tensor:
        """The `count` classes (or K - 1) that come next after the label, int64 ``[B, count]``."""
        x, y = state["origin"], state["y"]
        if not count or not len(x):
            return torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
        logits = target.logits(x, state["noise"], self.eot)
        mean = logits.view(len(x), self.eot, -1).mean(1)
        mean = mean.scatter(1, y[:, None], -torch.inf)
        order = torch.sort(mean, dim=1, descending=True, stable=True)[1]
        return order[:, : min(count, mean.shape[1] - 1)]

    def start(self, state: State, run: int) -> Tensor:
        """Where a run begins: here at the clean images."""
        return state["origin"]

    def normals(self, state: State, run: int) -> Tensor:
        """The normal draws behind a random start, like the images."""
        keys = self._keys(Purpose.START, state["indices"])
        return corrupt(torch.zeros_like(state["origin"]), keys, 1.0, first_sample=run)

    def _keys(self, purpose: Purpose, indices: Tensor) -> Tensor:
        # The purpose stands above any index a data set can have, so no two purposes share a key.
        return image_keys(self.seed, Stream.ATTACK, indices + (int(purpose) << 48))


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` by image: `condition` is ``[B]``, `a` and `b` are ``[B, ...]``."""
    return torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)


def check_images(x: Tensor, y: Tensor, classes: int | Callable[[], int]) -> None:
    """Refuse images and labels that no attack can work with.

    Raises:
        TypeError: images not fp32 or labels not int64.
        ValueError: not ``[B, C, H, W]`` and ``[B]``, images outside [0, 1], labels that are no
            classes.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise TypeError(f"images are {getattr(x, 'dtype', type(x))}; they must be a float32 tensor")
    if x.ndim != 4:
        raise ValueError(f"images have shape {tuple(x.shape)}; they must be [B, C, H, W]")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"labels are {getattr(y, 'dtype', type(y))}; they must be an int64 tensor")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels have shape {tuple(y.shape)}; there are {len(x)} images")
    if not len(x):
        return
    low, high = (float(value) for value in x.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"images range from {low:.4g} to {high:.4g}; attacks take pixels in [0, 1]: put the "
            "normalisation inside the model, as its first layer"
        )
    classes = classes if isinstance(classes, int) else classes()  # once the images are known good
    low, high = (int(value) for value in y.aminmax())
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"labels range from {low} to {high}; the model has {classes} classes, "
            f"0 to {classes - 1}"
        )
