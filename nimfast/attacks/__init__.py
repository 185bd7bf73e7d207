# SPDX-License-Identifier: Apache-2.0
"""Adversarial attacks: ``PGD(eps=8 / 255)(model, x, y)`` with x in [0, 1]."""

from nimfast.attacks.apgd import APGD
from nimfast.attacks.autoattack import Ensemble, plan
from nimfast.attacks.engine import Attack, Norm, Result, State, Verdict
from nimfast.attacks.fab import FAB
from nimfast.attacks.geometry import confine, distance, to_8_bits
from nimfast.attacks.pgd import FGSM, PGD
from nimfast.attacks.published import AutoAttack
from nimfast.attacks.square import Square
from nimfast.attacks.target import Look, Target

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Ensemble",
    "Look",
    "Norm",
    "Result",
    "Square",
    "State",
    "Target",
    "Verdict",
    "confine",
    "distance",
    "plan",
    "to_8_bits",
]
