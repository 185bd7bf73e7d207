# SPDX-License-Identifier: Apache-2.0
"""Attacks by name, as command line and tables have them: ``pgd-10``, ``aa-rand``, ``bare:fgsm``."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from nimfast.attacks.apgd import APGD
from nimfast.attacks.autoattack import Ensemble, Protocol, plan, with_enough_classes
from nimfast.attacks.engine import Attack, Norm
from nimfast.attacks.fab import FAB
from nimfast.attacks.pgd import FGSM, PGD
from nimfast.attacks.square import Square
from nimfast.errors import UserError

View = Literal["itself", "known", "bare", "bpda"]

_FORMS = (
    "none, fgsm, pgd-STEPS, apgd-ce, apgd-dlr, apgd-t, fab-t, square (each also -STEPS), "
    "aa-standard, aa-plus, aa-rand; with bare: before it on the classifier alone, with bpda: "
    "around the denoiser, with known: under noise that is fixed and known; @N after it: EOT N"
)
_KINDS: dict[str, tuple[type[Attack], dict[str, Any]]] = {
    "fgsm": (FGSM, {}),
    "pgd": (PGD, {}),
    "apgd-ce": (APGD, {"loss": "ce"}),
    "apgd-dlr": (APGD, {"loss": "dlr"}),
    "apgd-t": (APGD, {"loss": "dlr-targeted"}),
    "fab-t": (FAB, {}),
    "square": (Square, {}),
}
# Steps where none are given.
_STEPS = {"pgd": 10, "apgd-ce": 100, "apgd-dlr": 100, "apgd-t": 100, "fab-t": 100, "square": 5000}
_VERSIONS = ("standard", "plus", "rand")


class Named(NamedTuple):
    """An attack as it was asked for.

    Attributes:
        name: in full, with its steps.
        view: what is attacked: the model itself, the same with known noise, its bare classifier, or
            its BPDA view.
        kind: ``none``, ``fgsm``, ``pgd`` ..., ``aa-rand`` ...
        steps: iterations; 0 where the kind says how many.
        eot: draws for every gradient; None: those of the run.
    """

    name: str
    view: View
    kind: str
    steps: int
    eot: int | None = None


def parse(text: str, steps: int | None = None) -> Named:
    """What a name means.

    Args:
        text: see the module's text.
        steps: of attacks that have steps and whose name does not say how many.

    Raises:
        UserError: no such attack.
    """
    view, colon, rest = text.partition(":")
    if not colon:
        view, rest = "itself", text
    match = re.fullmatch(r"([a-z]+(?:-[a-z]+)*)(?:-([0-9]+))?(?:@([0-9]+))?", rest)
    kind = match[1] if match else ""
    known = kind in _STEPS or kind in ("none", "fgsm") or kind in {f"aa-{v}" for v in _VERSIONS}
    given = int(match[2]) if match and match[2] else None
    eot = int(match[3]) if match and match[3] else None
    if not known or view not in get_args(View) or 0 in (given, eot):
        raise UserError(f"unknown attack {text!r}; choose among {_FORMS}")
    if view == "known" and kind.startswith("aa-"):
        raise UserError(f"attack {text!r}: with known noise there are single attacks only")
    if kind not in _STEPS:
        if given is not None:
            raise UserError(f"attack {text!r}: {kind} has a number of steps of its own")
        return Named(text, view, kind, 0, eot)  # type: ignore[arg-type]
    number = given or steps or _STEPS[kind]
    name = f"{view}{colon}{kind}-{number}" if colon else f"{kind}-{number}"
    return Named(name + (f"@{eot}" if eot else ""), view, kind, number, eot)  # type: ignore[arg-type]


def build(
    named: Named,
    *,
    eps: float,
    norm: Norm,
    eot: int,
    seed: int,
    classes: int,
    randomised: bool,
    protocol: Protocol,
) -> Attack | Ensemble:
    """The attack called `named`, for a model that draws or does not.

    Against a randomised model the point of highest mean loss is kept and nothing is declared
    broken; else broken images leave the batch.

    Raises:
        UserError: the attack does not exist in this norm.
    """
    ball: dict[str, Any] = {"eps": eps, "norm": norm, "seed": seed}
    draws = (named.eot or eot) if randomised else 1
    try:
        if named.kind.startswith("aa-"):
            version: Any = named.kind.removeprefix("aa-")
            attacks = plan(version, protocol, classes=classes, **ball)
            drawn = tuple((name, replace(attack, eot=draws)) for name, attack in attacks)
            return Ensemble(drawn, fair=protocol == "fair", seed=seed)
        make, options = _KINDS[named.kind]
        settings = {**ball, **options, "eot": draws}
        if named.steps:
            settings["steps"] = named.steps
        settings |= {"verdict": "loss"} if randomised else {"leave": True}
        return with_enough_classes(named.name, make(**settings), classes)
    except ValueError as error:
        raise UserError(f"attack {named.name}: {error}") from None
