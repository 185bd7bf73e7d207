# SPDX-License-Identifier: Apache-2.0
"""Adversarial attacks: ``PGD(eps=8 / 255)(model, x, y)`` with x in [0, 1]."""

from nimfast.attacks.engine import Attack, Norm, Result, State, Verdict
from nimfast.attacks.pgd import FGSM, PGD
from nimfast.attacks.target import Look, Target

__all__ = ["FGSM", "PGD", "Attack", "Look", "Norm", "Result", "State", "Target", "Verdict"]
