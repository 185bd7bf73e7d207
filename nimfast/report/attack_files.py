# SPDX-License-Identifier: Apache-2.0
"""Everything that a finished attack run leaves: tables, pictures, adversarial images."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from safetensors.torch import save as save_tensors
from torch import Tensor

from nimfast.attacks import menu
from nimfast.attacks.crosschecks import check_readings, check_results, on_grid
from nimfast.attacks.records import Row, ball, to_json, to_tsv
from nimfast.attacks.session import SHOWN, Session
from nimfast.defense import Reconstructing
from nimfast.ops import Stream, image_keys
from nimfast.report import attack as tables
from nimfast.report.attack_plot import plot_curves, plot_examples, plot_tradeoff
from nimfast.report.formats import to_markdown


class Report(NamedTuple):
    """What a run found and where it was written, to be shown.

    Attributes:
        tables: for the terminal.
        findings: a line each.
        files: names in the run's folder.
    """

    tables: list[Table]
    findings: list[str]
    files: list[str]


def write_report(session: Session, worst_of: int, settings: dict[str, Any]) -> Report:
    """Write the results of a finished run.

    Args:
        session: the run.
        worst_of: draws of the reading "worst of k".
        settings: of the run, for the result file and the titles.
    """
    rows = session.rows()
    found = tables.readings(rows, worst_of)
    findings = [*session.findings(), *(of_rows(rows) if session.plan.checks else [])]
    radius = ball(settings["norm"], settings["eps"])
    title = f"{settings['data']}, model {settings['model']}, {radius}"
    folder = session.folder
    plain = tables.plain_name(settings)
    told = [
        f"{tables.column_name(f['sigma'], plain)}, {f['check']}: {f['finding']}" for f in findings
    ]
    report = Report([], told, ["images.tsv", "result.json"])
    of = f"{title}, {len(session.plan.images)} images"
    report.tables.append(tables.attack_table(found, of, plain))
    if (readings := tables.readings_table(found, plain)) is not None:
        report.tables.append(readings)
    points = tables.tradeoff(found)
    if len(points) > 1:
        report.tables.append(tables.tradeoff_table(points))
        plot_tradeoff(points, folder.path / "tradeoff.png", title)
        report.files.append("tradeoff.png")
    curves = {axis: _curve(session, rows, axis, plain) for axis in session.plan.curve}
    for axis, lines in curves.items():
        if lines:
            name = {"eot": "draws for each gradient (EOT)", "steps": "steps"}[axis]
            report.files.append(f"curve_{axis}.png")
            plot_curves(lines, name, folder.path / report.files[-1], title)
    if _examples(session, rows, title, plain):
        report.files.append("examples.png")
    if session.plan.keep_all:
        _adversarial_images(session, rows)
        report.files.append("adversarial/")
    content = {
        "settings": settings,
        "readings": found,
        "findings": findings,
        "tradeoff": points,
        "curves": curves,
    }
    folder.write("images.tsv", to_tsv(rows))
    folder.write("result.json", to_json(content))
    lines = [*map(to_markdown, report.tables), *(f"- {line}" for line in report.findings)]
    folder.write("table.md", ("\n".join(lines) + "\n").encode())
    return report._replace(files=[*report.files, "table.md"])


def of_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What only the results of all attacks together can tell."""
    found = []
    for sigma, at_strength in tables.by_strength(rows).items():
        attacks = tables.by_attack(at_strength)
        margins = {
            name: np.array([row.margin for row in of_attack])
            for name, of_attack in attacks.items()
            if name == tables.CLEAN or (name != tables.STRONGEST and tables.of_attacker(of_attack))
        }
        own = [name for name in margins if name != tables.CLEAN and ":" not in name]
        told = []
        if tables.CLEAN in margins and own:
            best = max(own, key=_effort)
            # Less effort, or the same on another view of the model: no reason to do more.
            less = [
                name
                for name in margins
                if _effort(name) < _effort(best) or (":" in name and _effort(name) == _effort(best))
            ]
            told = check_results({name: margins[name] for name in (*less, best)}, best)
        for name in own:
            hits = {
                kind: [getattr(row, kind) for row in attacks[name]]
                for kind in ("hits", "hits_8bit", "hits_low")
            }
            told += check_readings(name, attacks[name][0].draws, **hits)
        found += [{"sigma": sigma, "check": f.check, "finding": f.text} for f in told]
    return found


def _effort(name: str) -> tuple[bool, bool, int]:
    """Where an attack stands among others: what stands higher should do no less."""
    named = menu.parse(name)
    return named.kind.startswith("aa-"), named.kind not in ("none", "square"), named.steps


def _curve(session: Session, rows: Sequence[Row], axis: str, plain: str) -> Any:
    attacks = {named.name: named for named in session.plan.curve[axis]}
    steps = min((named.steps for named in attacks.values()), default=0)

    def places(row: Row) -> list[tuple[str, float]]:
        named, drawn = attacks.get(row.attack), row.draws > 1
        if named is None or (axis == "eot" and not drawn):  # no draws, no EOT
            return []
        eot = named.eot or 1
        if axis == "steps":
            return [(f"PGD, EOT {eot}" if drawn else "PGD", named.steps)]
        found: list[tuple[str, float]] = [(f"PGD-{steps}", eot)] if named.steps == steps else []
        if eot == 1:  # also where it is both
            found.append(("PGD at EOT 1, as many gradients", named.steps / steps))
        return found

    return tables.curves(rows, places, plain)


def _examples(session: Session, rows: Sequence[Row], title: str, plain: str) -> bool:
    """The picture: the last attack on the model itself, at the greatest strength."""
    sigma = session.plan.sigmas[-1]
    own = [named.name for named in session.plan.attacks if named.view == "itself"]
    if not own or own[-1] == tables.CLEAN:
        return False
    found = session.points(sigma, own[-1])
    points, idx = found["x_adv"][:SHOWN], found["idx"][:SHOWN]
    batch = session.load(tuple(idx.tolist()))
    model = session.subject(sigma).model
    defended = None
    if isinstance(model, Reconstructing) and model.active:
        keys = image_keys(session.setting.seed, Stream.EVALUATION, idx.to(batch.x.device))
        with torch.no_grad():
            pixels = model.reconstructed(points.to(batch.x.device), keys, 1, 0)
        defended = pixels.clamp(0, 1).cpu()
    of = {(row.attack, row.idx): row for row in rows if row.sigma == sigma}

    def accuracy(attack: str) -> list[str]:
        found = [of.get((attack, int(i))) for i in idx]
        return [f"{row.hits} of {row.draws} right" if row else "" for row in found]

    classes = session.data.classes
    captions = {
        "clean": [classes[int(label)][:20] for label in batch.y],
        "adversarial": accuracy(own[-1]),
    }
    text = f"{title}, {tables.column_name(sigma, plain)}, {own[-1]}"
    plot_examples(
        batch.x.cpu(), points, defended, captions, session.folder.path / "examples.png", text
    )
    return True


def _adversarial_images(session: Session, rows: Sequence[Row]) -> None:
    """All final points: fp32 in safetensors, and 8-bit PNG rounded inside the ball."""
    eps, norm = session.setting.eps, session.setting.norm
    for sigma, attack in {(row.sigma, row.attack): None for row in rows}:
        if attack == tables.CLEAN or "@" in attack:
            continue
        found = session.points(sigma, attack)
        name = f"adversarial/sigma{sigma:g}_{re.sub(r'[^a-z0-9-]', '_', attack)}"
        session.folder.write(f"{name}.safetensors", save_tensors(found))
        for point, index in zip(found["x_adv"], found["idx"].tolist(), strict=True):
            clean = session.data[index][0]
            rounded = on_grid(clean[None], point[None], eps=eps, norm=norm)[0]
            session.folder.write(f"{name}/{index:06d}.png", _png(rounded))


def _png(image: Tensor) -> bytes:
    """An 8-bit PNG of ``[C, H, W]`` in [0, 1]."""
    levels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(file, "PNG")
    return file.getvalue()
