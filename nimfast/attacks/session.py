# SPDX-License-Identifier: Apache-2.0
"""A whole run: strengths times attacks times batches, shared among processes, resumable.

The pieces of work (units) and what is computed in each depend on the settings alone, so the rows
are the same for one process and several, and for a run that was killed and continued.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nimfast.attacks import menu
from nimfast.attacks.checks import Finding
from nimfast.attacks.crosschecks import check_points
from nimfast.attacks.engine import Norm, check_images
from nimfast.attacks.evaluate import (
    CHECKED,
    Batch,
    Setting,
    Subject,
    evaluate,
    findings,
)
from nimfast.attacks.records import Folder, Row
from nimfast.attacks.target import Target
from nimfast.attacks.watch import Watch
from nimfast.data import ImageDataset
from nimfast.defense import De3, Reconstructing
from nimfast.errors import UserError
from nimfast.processes import Place

SHOWN = 6  # images in the picture
_CHECKS = "checks"


@dataclass(frozen=True)
class Plan:
    """What is attacked how.

    Attributes:
        sigmas: strengths of De3, units of 1/255, increasing; 0: undefended.
        attacks: the rows of the table.
        curve: axis (``eot``, ``steps``) -> attacks along it.
        cross_checks: add PGD on the bare classifier and by BPDA, and known noise.
        checks: look for reasons not to trust the numbers.
        images: places in the data.
        batch_size: images attacked at once; the fixed compute shape.
        keep_all: keep all final points, not only those of the picture.
        save_every: seconds between saved states.
    """

    sigmas: tuple[float, ...]
    attacks: tuple[menu.Named, ...]
    curve: dict[str, tuple[menu.Named, ...]]
    cross_checks: bool
    checks: bool
    images: tuple[int, ...]
    batch_size: int
    keep_all: bool
    save_every: float

    def describe(self) -> dict[str, Any]:
        """All that results depend on."""
        return {
            "sigmas": self.sigmas,
            "attacks": [named.name for named in self.attacks],
            "curve": {axis: [n.name for n in attacks] for axis, attacks in self.curve.items()},
            "cross_checks": self.cross_checks,
            "checks": self.checks,
            "batch_size": self.batch_size,
            "save_images": self.keep_all,
            "images": self.images,
        }

    def of(self, subject: Subject, norm: Norm) -> list[menu.Named]:
        """All attacks on one strength, each once; in l1, where there is no PGD, by APGD."""
        defended = isinstance(subject.model, Reconstructing) and subject.model.active
        fixable = subject.kind == "keyed" and callable(getattr(subject.model, "draw", None))
        found = [n for n in self.attacks if n.view not in ("bare", "bpda") or defended]
        found = [n for n in found if n.view != "known" or fixable]
        itself = [named for named in found if named.view == "itself"]
        attacking = [named for named in itself if named.kind != "none"]
        if self.cross_checks and defended and attacking:
            pgd = [named for named in attacking if named.kind == "pgd"]
            other = menu.parse("apgd-ce-10" if norm == "l1" else "pgd-10")
            strongest = pgd[-1] if pgd else other
            for view in ("bare", "bpda"):
                found.append(replace_view(strongest, view))
        if self.cross_checks and fixable:
            # AutoAttack judges by draws of its own, and there is one only: its first part is run.
            first = menu.parse("apgd-ce")
            known = [first if named.kind.startswith("aa-") else named for named in itself]
            found += [replace_view(named, "known") for named in known]
        for axis, attacks in self.curve.items():
            if axis != "eot" or subject.randomised:
                found += attacks
        return list({named.name: named for named in found}.values())


def replace_view(named: menu.Named, view: str) -> menu.Named:
    """The same attack on another view of the model."""
    return menu.parse(f"{view}:{named.name.rpartition(':')[2]}")


class Unit(NamedTuple):
    """One attack on one batch at one strength, or (`named` None) the checks of a strength."""

    name: str
    sigma: float
    named: menu.Named | None
    batch: int


class Session:
    """A run, as one process sees it.

    Args:
        model: a classifier or defence on its device; the strength of a `De3` is set as needed.
        data: the images.
        plan: what is attacked how.
        setting: see `evaluate`.
        folder: where results are.
        here: this process among others.

    Raises:
        UserError: images or labels that no attack can work with, a model without gradients where an
            attack needs them, an attack that does not exist in the norm.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageDataset,
        plan: Plan,
        setting: Setting,
        folder: Folder,
        here: Place,
    ) -> None:
        self.plan, self.setting, self.folder, self.data = plan, setting, folder, data
        self._model, self._here = model, here
        self._known: tuple[int, Batch] | None = None
        self._done = 0
        some = self._some()
        self._check(some)
        self._kinds = {}
        for sigma in plan.sigmas:
            self._set(sigma)
            self._kinds[sigma] = Subject.of(sigma, model, some, setting.seed)
        self.units = list(self._units())

    def subject(self, sigma: float) -> Subject:
        """The model at strength `sigma`; valid until the next call."""
        self._set(sigma)
        return self._kinds[sigma]

    def batch(self, number: int) -> Batch:
        """Images of batch `number`, on the device."""
        if self._known is None or self._known[0] != number:
            size = self.plan.batch_size
            self._known = number, self.load(self.plan.images[number * size : (number + 1) * size])
        return self._known[1]

    def load(self, places: tuple[int, ...]) -> Batch:
        """Images at these places of the data, on the device."""
        pairs = [self.data[index] for index in places]
        device = self._here.device
        return Batch(
            torch.stack([image for image, _ in pairs]).to(device),
            torch.tensor([label for _, label in pairs], device=device),
            torch.tensor(places, device=device),
        )

    def run(self, tell: Callable[[Unit, float, int], None] = lambda *_: None) -> None:
        """Do what is left to do; with other processes, a share of it.

        Args:
            tell: is told the unit at hand, how many units are done (a fraction of this one
                included) and how many there are, of those that were left.

        Raises:
            UserError: the disk is full, or an image is broken.
        """
        left = {u.name for u in self.units if self.folder.results(u.name) is None}
        # All units are handed out, done or not: processes need not agree on what was left.
        for number in self._here.hand_out("units", len(self.units)):
            unit = self.units[number]
            if unit.name not in left:
                continue
            before = self._count(0)
            tell(unit, before, len(left))

            def within(share: float, unit: Unit = unit, before: float = before) -> None:
                tell(unit, before + share, len(left))

            self._do(unit, within)
            tell(unit, self._count(1), len(left))

    def rows(self) -> list[Row]:
        """All rows, by strength, attack and place in the data."""
        found = []
        for unit in self.units:
            if unit.named:
                found += [Row(**row) for row in self._results(unit)["rows"]]
        return found

    def findings(self) -> list[dict[str, Any]]:
        """All findings, each with its strength; one that repeats by batch, once."""
        found: dict[Any, dict[str, Any]] = {}
        for unit in self.units:
            for check, text in self._results(unit)["findings"]:
                found.setdefault(
                    (unit.sigma, check, unit.named and unit.named.name),
                    {"sigma": unit.sigma, "check": check, "finding": text},
                )
        return list(found.values())

    def points(self, sigma: float, attack: str) -> dict[str, Tensor]:
        """Final points that were kept: ``x_adv`` ``[N, C, H, W]`` and ``idx`` ``[N]``."""
        parts = [
            self.folder.points(unit.name)
            for unit in self.units
            if unit.sigma == sigma and unit.named and unit.named.name == attack
        ]
        kept = [part for part in parts if part]
        return {name: torch.cat([part[name] for part in kept]) for name in kept[0]} if kept else {}

    def _count(self, more: int) -> int:
        """Units done in this session by all processes, `more` of them just now."""
        self._done += more
        return self._done if self._here.size == 1 else self._here.total("done", more)

    def _units(self) -> Iterator[Unit]:
        batches = -(-len(self.plan.images) // self.plan.batch_size)
        for sigma in self.plan.sigmas:
            attacks = self.plan.of(self.subject(sigma), self.setting.norm)
            if self.plan.checks:
                yield Unit(f"sigma{sigma:g}_{_CHECKS}", sigma, None, 0)
            for named in attacks:
                for batch in range(batches):
                    name = re.sub(r"[^\w-]", "_", named.name)
                    yield Unit(f"sigma{sigma:g}_{name}_{batch:04d}", sigma, named, batch)

    def _do(self, unit: Unit, progress: Callable[[float], None]) -> None:
        subject = self.subject(unit.sigma)
        if unit.named is None:
            told = findings(subject, self._some(), self.setting)
            self.folder.finish(unit.name, {"rows": [], "findings": told}, {})
            return
        batch = self.batch(unit.batch)
        watch = Watch(
            self.folder.saved(unit.name),
            lambda state: self.folder.save(unit.name, state),
            self.plan.save_every,
            progress,
        )
        rows, points = evaluate(subject, unit.named, batch, self.setting, watch)
        ball = {"eps": self.setting.eps, "norm": self.setting.norm}
        outside: list[Finding] = check_points(batch.x, points, **ball)  # type: ignore[arg-type]
        count = len(points) if self.plan.keep_all else SHOWN if unit.batch == 0 else 0
        kept = {"x_adv": points[:count], "idx": batch.indices[:count]} if count else {}
        found = {"rows": [asdict(row) for row in rows], "findings": outside}
        self.folder.finish(unit.name, found, kept)

    def _results(self, unit: Unit) -> dict[str, Any]:
        found = self.folder.results(unit.name)
        if found is None:
            raise UserError(f"{unit.name} is not done; run the same command again")
        return found

    def _set(self, sigma: float) -> None:
        if isinstance(self._model, De3):
            self._model.sigma = sigma or None

    def _some(self) -> Batch:
        """A spread of images for the checks."""
        images = self.plan.images
        count = min(CHECKED, len(images))
        return self.load(tuple(images[i * len(images) // count] for i in range(count)))

    def _check(self, some: Batch) -> None:
        """Refuse what no attack can work with, in one line, before anything is computed."""
        self._set(max(self.plan.sigmas))
        target = Target(self._model)
        gradients = any(named.kind not in ("none", "square") for named in self.plan.attacks)
        try:
            classes = target.classes(some.x[:1])
            check_images(some.x, some.y, classes)
            if gradients:
                target.gradient(some.x[:1], some.y[:1], keys=torch.zeros_like(some.y[:1]))
            for named in (*self.plan.attacks, *chain(*self.plan.curve.values())):
                if named.kind != "none":
                    menu.build(
                        named,
                        eps=self.setting.eps,
                        norm=self.setting.norm,
                        eot=self.setting.eot,
                        seed=self.setting.seed,
                        classes=classes,
                        randomised=False,
                        protocol=self.setting.protocol,
                    )
        except ValueError as error:
            raise UserError(str(error)) from None
