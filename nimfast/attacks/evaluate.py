# SPDX-License-Identifier: Apache-2.0
"""One attack on one batch at one strength of a defence: from clean images to judged rows.

Attack; judge the final points on fresh draws, in fp32, as they are and rounded to 8 bits; find the
majority by a sequential test. What was reached is saved after any step, and continued bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nimfast.attacks import menu
from nimfast.attacks.autoattack import Ensemble, Protocol
from nimfast.attacks.checks import Finding, Randomness, check_model, randomness
from nimfast.attacks.crosschecks import check_attack, distance, on_grid
from nimfast.attacks.engine import Norm, State
from nimfast.attacks.judge import Verdict, judge, majority
from nimfast.attacks.records import Row
from nimfast.attacks.target import Target
from nimfast.attacks.views import Bpda, Fixed
from nimfast.attacks.watch import Watch
from nimfast.defense import Reconstructing
from nimfast.errors import UserError
from nimfast.ops import Stream
from nimfast.runtime import Precision

# Draws that choose between attacks begin here, far from those that attacks take their steps by.
_SELECTION = 2**40
# Images that the checks look at.
CHECKED = 16
_CHECK_STEPS = 10


@dataclass(frozen=True)
class Setting:
    """How images are attacked and judged.

    Attributes:
        eps, norm: the ball, pixels in [0, 1].
        eot: draws that an attack on a randomised model averages its gradient over.
        draws: fresh draws that judge a final point of a randomised model.
        votes: most draws for the majority.
        protocol: of AutoAttack.
        precision: of the attack; judged in fp32 always.
        seed: of everything random.
    """

    eps: float
    norm: Norm
    eot: int
    draws: int
    votes: int
    protocol: Protocol
    precision: Precision
    seed: int


class Batch(NamedTuple):
    """Images ``[B, C, H, W]`` in [0, 1], labels and places in the data, int64 ``[B]``."""

    x: Tensor
    y: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Subject:
    """A classifier or defence at one strength.

    Attributes:
        sigma: the strength, units of 1/255; 0: undefended.
        model: on its device, in eval mode.
        kind: its randomness.
    """

    sigma: float
    model: nn.Module
    kind: Randomness

    @staticmethod
    def of(sigma: float, model: nn.Module, some: Batch, seed: int) -> Subject:
        """Find out whether `model` draws, from its logits of `some` images."""
        return Subject(sigma, model, randomness(Target(model), some.x, some.indices, seed))

    @property
    def randomised(self) -> bool:
        """Whether two calls may differ."""
        return self.kind != "none"

    def view(self, named: menu.Named) -> nn.Module:
        """What the attack gets to see.

        Raises:
            UserError: a view that only defences by reconstruction have.
        """
        if named.view == "itself":
            return self.model
        if named.view == "known":
            return Fixed(self.model)
        if not isinstance(self.model, Reconstructing):
            raise UserError(f"attack {named.name} is for defences; this model has no denoiser")
        return self.model.classifier if named.view == "bare" else Bpda(self.model)


def evaluate(
    subject: Subject, named: menu.Named, batch: Batch, setting: Setting, watch: Watch
) -> tuple[list[Row], Tensor]:
    """Attack and judge a batch.

    Returns:
        A row for each image, and the final points, like the images.
    """
    start = time.perf_counter()
    points, names, gradients = _attacked(subject, named, batch, setting, watch)
    # Known noise is that of the attack; all other verdicts are on fresh draws.
    known = named.view == "known"
    judged = Fixed(subject.model) if known else subject.model
    draws = setting.draws if subject.randomised and not known else 1
    stream = Stream.ATTACK if known else Stream.EVALUATION

    judge_target = Target(judged, packed=True)

    def verdict(x: Tensor, target: Target = judge_target, first: int = 0) -> Verdict:
        of = stream if not first else Stream.ATTACK
        return judge(
            target,
            x,
            batch.y,
            batch.indices,
            draws=draws,
            seed=setting.seed,
            stream=of,
            first=first,
        )

    exact = verdict(points)
    rounded = verdict(on_grid(batch.x, points, eps=setting.eps, norm=setting.norm))
    chosen = verdict(points, first=_SELECTION) if draws > 1 else exact
    low = None
    if setting.precision != "fp32":
        low = verdict(points, Target(judged, precision=setting.precision))  # type: ignore[arg-type]
    votes = majority(
        judge_target,
        points,
        batch.y,
        batch.indices,
        exact,
        most=setting.votes if draws > 1 else 1,
        seed=setting.seed,
    )
    linf, l2 = (distance(batch.x, points, norm).tolist() for norm in ("linf", "l2"))
    hits, hits_8bit = _hits(exact), _hits(rounded)
    hits_low = [None] * len(hits) if low is None else _hits(low)
    seconds = (time.perf_counter() - start) / len(hits)
    rows = [
        Row(
            sigma=subject.sigma,
            attack=named.name,
            idx=int(batch.indices[i]),
            label=int(batch.y[i]),
            draws=draws,
            hits=hits[i],
            loss=float(chosen.loss[i]),
            margin=float(exact.margin[i]),
            majority=votes[i].verdict,
            votes=votes[i].samples,
            hits_8bit=hits_8bit[i],
            hits_low=hits_low[i],
            linf=linf[i],
            l2=l2[i],
            broken_by=names[i] if votes[i].verdict == "wrong" else "",
            gradients=gradients / len(hits),
            seconds=seconds,
        )
        for i in range(len(hits))
    ]
    return rows, points


def _hits(verdict: Verdict) -> list[int]:
    found: list[int] = verdict.right.sum(1).tolist()
    return found


def _attacked(
    subject: Subject, named: menu.Named, batch: Batch, setting: Setting, watch: Watch
) -> tuple[Tensor, list[str], int]:
    """Final points, which attack found each, and gradient evaluations."""
    if named.kind == "none":
        return batch.x, ["none"] * len(batch.y), 0
    draws = subject.randomised and named.view in ("itself", "bpda")
    target = Target(subject.view(named), precision=setting.precision, packed=True)  # type: ignore[arg-type]
    attack = menu.build(
        named,
        eps=setting.eps,
        norm=setting.norm,
        eot=setting.eot,
        seed=setting.seed,
        classes=target.classes(batch.x[:1]),
        randomised=draws,
        protocol=setting.protocol,
    )

    def begin() -> State:
        if subject.kind == "free":
            torch.manual_seed(setting.seed)  # nothing else decides the draws of such a model
        return attack.begin(target, batch.x, batch.y, batch.indices)

    state, gradients = watch.run(attack, target, begin)
    names = [named.kind] * len(batch.y)
    if isinstance(attack, Ensemble):
        names = [attack.attacks[by][0] if by >= 0 else "none" for by in state["by"].tolist()]
    return attack.result(state).x_adv, names, gradients


def findings(subject: Subject, some: Batch, setting: Setting) -> list[Finding]:
    """The checks of a subject, on a few images."""
    eot = setting.eot if subject.randomised else 1
    found = check_model(Target(subject.model), *some, eot=eot, seed=setting.seed)
    if any(finding.check == "gradients" for finding in found):
        return found  # what attacks by gradients would tell is known
    return found + check_attack(
        Target(subject.model),
        *some,
        eps=setting.eps,
        norm=setting.norm,
        steps=_CHECK_STEPS,
        eot=eot,
        randomised=subject.randomised,
        seed=setting.seed,
    )
