# SPDX-License-Identifier: Apache-2.0
"""Robust accuracy under attack: the work of ``python -m nimfast.attack``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nimfast import cli
from nimfast.attacks import menu
from nimfast.attacks.evaluate import Setting
from nimfast.attacks.records import Folder
from nimfast.attacks.session import Plan, Session, Unit
from nimfast.data import ImageDataset
from nimfast.data import load as load_data
from nimfast.defense import De3, Reconstructing
from nimfast.errors import UserError
from nimfast.loading import load
from nimfast.models.load import EMBEDDED_AUTOENCODERS
from nimfast.naming import run_name
from nimfast.options import Norm
from nimfast.parsing import number
from nimfast.processes import place
from nimfast.runtime import check_precision, environment, keep_freed_memory

if TYPE_CHECKING:
    from nimfast.attack import Config
    from nimfast.report.attack_files import Report

DEFAULT_IMAGES = 100


def attack(config: Config) -> None:
    """Attack what `config` names, continuing a run that was interrupted."""
    here = place(config.device)
    check_precision(config.precision, here.device)
    if here.device.type == "cpu":
        keep_freed_memory()
    sigmas = parse_sigmas(config.de3_sigma)
    attacks = parse_attacks(config.attacks, config.steps)
    steps, names = config.steps, config.attacks
    if steps and not config.curve and attacks == parse_attacks(names, steps + 1):
        told = f"--steps does nothing: {' '.join(names)} say how many they make"
        warnings.warn(told, stacklevel=2)
    data = load_data(config.data)
    model, sigmas = load_model(config, data, sigmas)
    plan = Plan(
        sigmas=sigmas,
        attacks=attacks,
        curve=parse_curve(config.curve, config.steps, config.eot),
        cross_checks=config.cross_checks,
        checks=config.checks,
        images=tuple(data.places(config.every, config.n_images, DEFAULT_IMAGES)),
        batch_size=config.batch_size,
        keep_all=config.save_images,
        save_every=config.save_every,
    )
    setting = Setting(
        eps=parse_eps(config.eps, config.data, config.norm),
        norm=config.norm,
        eot=config.eot,
        draws=config.draws,
        votes=config.votes,
        protocol=config.protocol,
        precision=config.precision,
        seed=config.seed,
    )
    out = config.out or Path("results") / name_of(config)
    settings = describe(config, plan, setting, model, data, here.device)
    with Folder(out) as folder:
        if here.main:
            folder.begin(settings)
            here.tell("begun", "")
        else:
            here.hear("begun")
        try:
            session = Session(model.to(here.device), data, plan, setting, folder, here)
            if "eot" in plan.curve and not any(session.subject(s).randomised for s in sigmas):
                told = "--curve eot draws nothing: no column is random, and EOT averages draws"
                warnings.warn(told, stacklevel=2)
            _run(session, here.main)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the device has no memory for {config.batch_size} images of this model; give a "
                "smaller --batch-size"
            ) from None
        here.meet("end")
        if here.main:
            # Here: matplotlib takes half a second, which the first attack need not wait for.
            from nimfast.report.attack_files import write_report

            _show(write_report(session, config.worst_of, settings), config, out)


def _run(session: Session, shown: bool) -> None:
    """Attack under a progress bar."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.1f}/{task.total:.0f} attacks on batches"),
        TimeRemainingColumn(),
        console=cli.console,
        disable=not shown,
    )
    with progress:
        task = progress.add_task("", total=1)

        def tell(unit: Unit, done: float, total: int) -> None:
            what = f"sigma {unit.sigma:g}, {unit.named.name if unit.named else 'checks'}"
            progress.update(task, description=what, completed=done, total=total)

        session.run(tell)


def _show(report: Report, config: Config, out: Path) -> None:
    """Tables and findings on the terminal."""
    from nimfast.report.formats import in_parts

    say = partial(cli.console.print, highlight=False, soft_wrap=True)
    for table in report.tables:
        for part in in_parts(table, cli.console.width):
            cli.console.print(part)
            cli.console.print()
    for line in report.findings:
        say(f"[bold yellow]finding[/] {escape(line)}")
    if config.checks and not report.findings:
        say("no findings: nothing was seen that speaks against these numbers")
    say(f"wrote {out}: {', '.join(report.files)}", markup=False)


def parse_attacks(names: Sequence[str], steps: int | None) -> tuple[menu.Named, ...]:
    """What ``--attacks`` names.

    Raises:
        UserError: nothing, what is no attack, or one twice.
    """
    if not names:
        raise UserError("--attacks names none; give for example --attacks none pgd-10 aa-rand")
    found = tuple(menu.parse(name, steps) for name in names)
    if len({attack.name for attack in found}) < len(found):
        raise UserError(f"--attacks names one twice: {' '.join(attack.name for attack in found)}")
    return found


def parse_eps(text: str | None, data: str, norm: Norm) -> float:
    """``4/255`` or ``0.5`` as a number.

    Raises:
        UserError: it is none, or not positive.
    """
    if text is None:
        if norm != "linf":
            raise UserError(f"--norm {norm} has no usual radius; give --eps, for example 0.5")
        text = "24/255" if data == "digits" else "4/255"
    try:
        eps = number(text)
    except ValueError:
        raise UserError(f"--eps {text!r} is no number; give 4/255 or 0.5") from None
    if not 0 < eps < math.inf:
        raise UserError(f"--eps is {text}; it must be greater than 0")
    if norm == "linf" and eps > 1:
        raise UserError(f"--eps {text} is more than all pixels' range; did you mean {text}/255?")
    return eps


def parse_sigmas(words: Sequence[str]) -> tuple[float, ...]:
    """``70 140`` or ``0:160:10`` (both ends included) as strengths, increasing.

    Raises:
        UserError: what is no number, or a range without an end.
    """
    found: set[float] = set()
    for word in words:
        try:
            numbers = [float(part) for part in word.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            found.add(numbers[0])
        elif len(numbers) == 3 and numbers[2] > 0 and numbers[0] <= numbers[1] < math.inf:
            count = math.floor((numbers[1] - numbers[0]) / numbers[2] + 1e-9) + 1
            found.update(numbers[0] + i * numbers[2] for i in range(count))
        else:
            raise UserError(f"--de3-sigma {word!r} is not understood; give 70 140 or 0:160:10")
    if not found or not all(0 <= sigma < math.inf for sigma in found):
        raise UserError("--de3-sigma must be 0 or more, in units of 1/255, as 0 70 140")
    return tuple(sorted(found))


def parse_curve(
    words: Sequence[str], steps: int | None, eot: int
) -> dict[str, tuple[menu.Named, ...]]:
    """``eot 1 5 20 steps 10 50`` as attacks: PGD with that EOT, or with those steps.

    A curve over EOT has a second line: EOT 1 and as many more steps, at the same gradients.

    Raises:
        UserError: numbers without a name, or what is no number.
    """
    found: dict[str, list[menu.Named]] = {}
    base = menu.parse("pgd", steps).steps
    axis = None
    for word in words:
        if word in ("eot", "steps"):
            axis = word
            found[axis] = []
        elif axis is None or not word.isdecimal() or int(word) < 1:
            raise UserError(f"--curve {' '.join(words)} is not understood; give eot 1 5 20 50")
        elif axis == "eot":
            names = dict.fromkeys((f"pgd-{base}@{word}", f"pgd-{base * int(word)}@1"))
            found[axis] += [menu.parse(name) for name in names]
        else:
            found[axis].append(menu.parse(f"pgd-{word}@{eot}"))
    return {axis: tuple(attacks) for axis, attacks in found.items()}


def load_model(
    config: Config, data: ImageDataset, sigmas: tuple[float, ...]
) -> tuple[torch.nn.Module, tuple[float, ...]]:
    """What is attacked, on the CPU, and the strengths it can have.

    Raises:
        UserError: see `nimfast.load`.
    """
    denoiser = config.defense
    if denoiser is None and config.model in EMBEDDED_AUTOENCODERS:
        denoiser = config.model
    fit = {"num_classes": len(data.classes), "shape": data.shape, "checkpoint": config.checkpoint}
    if denoiser in (None, "none"):
        for name in ("de3_sigma", "stats"):
            if getattr(config, name) not in (getattr(type(config), name), ("0",)):
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{option} is of De3 with a denoiser, and there is none; give --defense, or "
                    f"leave {option} out"
                )
        model = load(config.model, **fit)  # type: ignore[arg-type]
        given = model.sigma if isinstance(model, De3) and model.sigma else 0.0
        return model, (given,)
    strongest = max(sigmas)
    spec = f"de3:{denoiser}+{config.model}?sigma={strongest:g}" if strongest else config.model
    if strongest and config.stats != "default":
        spec += f"&stats={config.stats}"
    return load(spec, **fit), sigmas  # type: ignore[arg-type]


def name_of(config: Config) -> str:
    """A folder name that tells other settings apart."""
    parts = ["attack", config.data, config.model]
    named = {"data", "model", "save_every", "device", "out", "worst_of"}
    return run_name(parts, config, named)


def describe(
    config: Config,
    plan: Plan,
    setting: Setting,
    model: torch.nn.Module,
    data: ImageDataset,
    device: torch.device,
) -> dict[str, Any]:
    """All settings that results depend on."""
    return {
        "data": config.data,
        "split": data.split,
        "data_identity": data.identity(),
        "model": config.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint else None,
        "defense": model.name if isinstance(model, Reconstructing) else None,
        "weights_hash": model.weights_hash,
        **plan.describe(),
        **vars(setting),
        "device": device.type,
        "environments": [environment(device)],
    }
