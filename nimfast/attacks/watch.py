# SPDX-License-Identifier: Apache-2.0
"""An attack from its first step to its last, saved on the way and continued bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nimfast.attacks.autoattack import Ensemble
from nimfast.attacks.engine import Attack, State
from nimfast.attacks.records import random_states, restore_random
from nimfast.attacks.target import Target


class Watch:
    """Is told how far an attack is, and keeps what it is given to be continued from.

    Args:
        saved: what an earlier session kept of this attack.
        save: keeps a state; called at most every `seconds`.
        seconds: see there.
        progress: called with the share of the attack that is done.
    """

    def __init__(
        self,
        saved: State | None = None,
        save: Callable[[State], None] = lambda state: None,
        seconds: float = 30.0,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._saved, self._save = saved, save
        self._seconds, self._progress = seconds, progress

    def run(
        self, attack: Attack | Ensemble, target: Target, begin: Callable[[], State]
    ) -> tuple[State, int]:
        """Take every step that is left.

        Args:
            attack: what makes them.
            target: the model.
            begin: gives the state before the first step; called where nothing was kept.

        Returns:
            The last state, and the gradient evaluations of all sessions.
        """
        before = target.gradients
        if self._saved is None:
            state = begin()
        else:
            state = dict(self._saved)
            restore_random(state)
            before -= int(state.pop("spent"))
            # Clocks, which have no dimension, stay on the CPU.
            state = {k: v.to(target.device) if v.dim() else v for k, v in state.items()}
        last = time.monotonic()
        while not attack.done(state):
            attack.step(target, state)
            if time.monotonic() - last >= self._seconds:
                spent = torch.tensor(target.gradients - before)
                self._save({**state, **random_states(), "spent": spent})
                last = time.monotonic()
            self._progress(_share(attack, state))
        return state, target.gradients - before


def _share(attack: Attack | Ensemble, state: State) -> float:
    """How much of an attack is done, about."""
    if not isinstance(attack, Ensemble):
        return int(state["step"]) / (attack.ticks * attack.runs(state))
    turn = int(state["attack"])
    if attack.done(state):
        return 1.0
    now = {name.removeprefix("now."): v for name, v in state.items() if name.startswith("now.")}
    return (turn + _share(attack.attacks[turn][1], now)) / len(attack.attacks)
