# SPDX-License-Identifier: Apache-2.0
"""AutoAttack (Croce & Hein 2020): attacks one after another, each on what is left.

Three protocols. `official`: the published one; a randomised model is judged by one draw. `nim`:
the same with 10 iterations, as the NIM paper's code ran it. `fair`: for a deterministic model as
official; of a randomised one no image is ever declared broken on a lucky draw: every attack sees
every image, and the point kept has the highest mean cross-entropy over draws made for that choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nimfast.attacks.apgd import APGD
from nimfast.attacks.engine import Attack, Norm, Purpose, Result, State, check_images, where
from nimfast.attacks.fab import FAB
from nimfast.attacks.square import Square
from nimfast.attacks.target import Target
from nimfast.ops import Stream, image_keys
from nimfast.options import Protocol

Version = Literal["standard", "plus", "rand", "custom"]

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_NOW = "now."  # of the attack that is running, in an ensemble's state


def plan(
    version: Version,
    protocol: Protocol,
    *,
    norm: Norm,
    eps: float,
    classes: int,
    seed: int = 0,
    attacks: Sequence[str | Attack] = (),
) -> list[tuple[str, Attack]]:
    """The attacks of a version by name, with the protocol's budgets.

    Args:
        version: "custom" runs `attacks`.
        protocol: see the module's text.
        norm, eps: of the ball.
        classes: K; the targeted losses need 4, DLR needs 3. With fewer another loss is used, and a
            warning says so.
        seed: of all draws.
        attacks: names (apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square) or attacks as they are.

    Raises:
        ValueError: an unknown version, protocol or name; an attack that does not know the norm.
    """
    if protocol not in ("official", "nim", "fair"):
        raise ValueError(f"protocol is {protocol!r}; it must be official, nim or fair")
    if version != "custom" and version not in VERSIONS:
        raise ValueError(f"version is {version!r}; it must be {', '.join(VERSIONS)} or custom")
    if (version == "custom") != bool(attacks):
        raise ValueError("name attacks with version 'custom', and with no other")
    chosen = tuple(attacks) if version == "custom" else VERSIONS[version]
    if norm == "l1" and {"fab", "fab-t", "square"} & {name for name in chosen if name is str(name)}:
        raise ValueError(
            "in l1 there are APGD attacks only: name 'apgd-ce' and 'apgd-t' (AutoAttack takes them "
            "with version 'custom')"
        )
    steps = 10 if protocol == "nim" else 100
    plus, l1 = version == "plus", norm == "l1"
    shared = {"norm": norm, "eps": eps, "seed": seed}
    apgd = APGD(steps=steps, eot=20 if version == "rand" else 1, widen=l1, **shared)  # type: ignore[arg-type]
    apgd = replace(apgd, restarts=5 if plus or l1 else 1)
    known: dict[str, Attack] = {
        "apgd-ce": apgd,
        "apgd-dlr": replace(apgd, loss="dlr"),
        "apgd-t": replace(apgd, loss="dlr-targeted", targets=5 if l1 else 9, restarts=1),
    }
    if not l1:
        known |= {
            "fab": FAB(steps=steps, targets=None, restarts=5, **shared),  # type: ignore[arg-type]
            "fab-t": FAB(steps=steps, **shared),  # type: ignore[arg-type]
            "square": Square(rescale=protocol == "nim", **shared),  # type: ignore[arg-type]
        }
    found = []
    for entry in chosen:
        if isinstance(entry, Attack):
            found.append((type(entry).__name__.lower(), entry))
        elif entry in known:
            found.append((entry, with_enough_classes(entry, known[entry], classes)))
        else:
            raise ValueError(f"there is no attack {entry!r}; known are {', '.join(known)}")
    return found


def with_enough_classes(name: str, attack: Attack, classes: int) -> Attack:
    """The attack, or another and a warning where its loss needs more classes than there are."""
    if not isinstance(attack, APGD):
        return attack
    needed = {"ce": 2, "dlr": 3, "dlr-targeted": 4}
    if classes >= needed[attack.loss]:
        return attack
    instead = "dlr" if classes == 3 else "ce"
    warnings.warn(
        f"{name} needs {needed[attack.loss]} classes and the model has {classes}; APGD with the "
        f"loss {instead!r} from another start is run instead",
        stacklevel=2,
    )
    return replace(attack, loss=instead, seed=attack.seed + 1)


@dataclass(frozen=True)
class Ensemble:
    """Attacks in turn, as one attack: the same `begin`, `step`, `done` and `result`.

    The state has, besides what every state has, `by` int64 ``[B]``: the number of the attack that
    broke an image or, for `fair`, found the point kept; -1: misclassified without an attack; -2:
    none.

    Attributes:
        attacks: by name, from `plan`.
        fair: see the module's text.
        draws: of a randomised model, for the choice that `fair` makes.
        seed: of the draws by which points are judged.
    """

    attacks: tuple[tuple[str, Attack], ...]
    fair: bool = False
    draws: int = 20
    seed: int = 0

    def begin(self, target: Target, x: Tensor, y: Tensor, indices: Tensor | None = None) -> State:
        """State before the first step; see `Attack.begin`."""
        check_images(x, y, lambda: target.classes(x[:1].detach().to(target.device)))
        x, y = x.detach().to(target.device), y.to(target.device)
        indices = (torch.arange(len(x)) if indices is None else indices).to(x.device)
        keys = image_keys(self.seed, Stream.ATTACK, indices + (int(Purpose.CHOICE) << 48))
        state = {"origin": x, "y": y, "indices": indices, "choice": keys, "x_adv": x}
        state["randomised"] = torch.tensor(target.randomised(x[:2]))
        state["attack"] = state["step"] = torch.tensor(0)
        broken, loss = self._judge(target, state, x, draw=0)
        state["by"] = torch.where(broken, -1, -2)
        state |= {"broken": broken, "best_loss": loss}
        self._enter(target, state)
        return state

    def step(self, target: Target, state: State) -> None:
        """One step of the attack whose turn it is."""
        attack = self._attack(state)
        now = {name[len(_NOW) :]: v for name, v in state.items() if name.startswith(_NOW)}
        if not attack.done(now):
            attack.step(target, now)
            state |= {_NOW + name: value for name, value in now.items()}
        state["step"] = state["step"] + 1
        if attack.done(now):
            self._settle(target, state, attack.result(now))
            for name in now:
                del state[_NOW + name]
            state["attack"] = state["attack"] + 1
            if not self.done(state):
                self._enter(target, state)

    def done(self, state: State) -> bool:
        """Whether all attacks have had their turn."""
        return int(state["attack"]) >= len(self.attacks)

    def result(self, state: State) -> Result:
        """The points kept; `broken` is by one look in fp32, never on for `fair` and randomised."""
        return Result(state["x_adv"], state["best_loss"], state["broken"])

    def run(
        self, target: Target, x: Tensor, y: Tensor, indices: Tensor | None = None
    ) -> tuple[Result, Tensor]:
        """From `begin` to `result`, with `by`."""
        state = self.begin(target, x, y, indices)
        while not self.done(state):
            self.step(target, state)
        return self.result(state), state["by"]

    def _attack(self, state: State) -> Attack:
        attack = self.attacks[int(state["attack"])][1]
        if not bool(state["randomised"]):
            return replace(attack, verdict="majority", leave=True)
        return replace(attack, verdict="loss" if self.fair else "last", leave=False)

    def _lenient(self, state: State) -> bool:
        return self.fair and bool(state["randomised"])

    def _judge(self, target: Target, state: State, x: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Broken and mean cross-entropy, both ``[B]``, in fp32.

        By draws of their own: the same ones each time where means are compared, else number `draw`.
        """
        fair = self._lenient(state)
        seen = target.exact().loss(
            x, state["y"], "ce", keys=state["choice"], samples=self.draws if fair else 1,
            first_sample=0 if fair else draw,
        )  # fmt: skip
        return (seen.missed > 0) & (not fair), seen.loss

    def _enter(self, target: Target, state: State) -> None:
        begun = self._attack(state).begin(
            target, state["origin"], state["y"], state["indices"], skip=state["broken"]
        )
        state |= {_NOW + name: value for name, value in begun.items()}

    def _settle(self, target: Target, state: State, found: Result) -> None:
        broken, loss = self._judge(target, state, found.x_adv, draw=int(state["attack"]) + 1)
        better = loss > state["best_loss"] if self._lenient(state) else broken & ~state["broken"]
        state["x_adv"] = where(better, found.x_adv, state["x_adv"])
        state["best_loss"] = torch.where(better, loss, state["best_loss"])
        state["by"] = torch.where(better, state["attack"].to(better.device), state["by"])
        state["broken"] = state["broken"] | broken
