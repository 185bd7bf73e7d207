# SPDX-License-Identifier: Apache-2.0
"""python -m nimfast.report: numbers against direct counts and the published table, bad input."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table
from scipy.stats import norm

from nimfast.attacks import records as attack_records
from nimfast.report import formats
from nimfast.report.__main__ import Config, command, main
from nimfast.report.paired import mcnemar, narrow_paired_table, paired_table
from nimfast.report.runs import (
    accuracy_csv,
    accuracy_table,
    groups,
    load_runs,
    notes,
    radii_reached,
    runs_table,
)
from nimfast.smoothing import bounds
from nimfast.smoothing.records import COLUMNS, Row, format_row

FIRST30 = Path(__file__).parent / "reference" / "imagenet_sigma_0.50_first30.tsv"

# Cohen et al. (2019), Table 1: certified top-1 accuracy on ImageNet, in %, by training sigma.
PUBLISHED = {0.25: {0.5: 49}, 0.5: {1.0: 37, 1.5: 29}, 1.0: {2.0: 19, 3.0: 12}}


def write(path: Path, rows: list[Row]) -> Path:
    lines = ["\t".join(COLUMNS), *(format_row(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def ours(sigma: float, counts: list[int]) -> list[Row]:
    """Rows of images 0, 10, ... with these votes of 1,000; every third is wrong."""
    rows = []
    for i, count in enumerate(counts):
        p = bounds.lower_bound(count, 1000, 0.001)
        rows.append(
            Row(
                idx=10 * i, label=1, predict=-1 if p < 0.5 else 1 + (i % 3 == 2),
                radius=bounds.radius(p, sigma), correct=p >= 0.5 and i % 3 != 2, time=0.5,
                count=count, samples=1100, sigma=sigma, n=1000, alpha=0.001, p_lower=p,
                protocol="cohen", noise="grid", precision="fp32", seed=3, n0=100, invalid=0,
            )
        )  # fmt: skip
    return rows


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    few = ours(0.25, [999, 990, 980, 600, 520, 800])
    many = ours(0.5, [950, 900, 980, 520, 500, 700])
    return [write(tmp_path / "few.tsv", few), write(tmp_path / "many.tsv", many)]


def cells(table: Table) -> list[list[str]]:
    return [list(map(str, line)) for line in zip(*(c.cells for c in table.columns), strict=True)]


def test_table_counts_and_names_the_best(two: list[Path]) -> None:
    runs, radii = load_runs(two), (0.0, 0.25, 0.5, 3.0)
    table = cells(accuracy_table(runs, radii))
    for run, line in zip(runs, table, strict=False):
        for radius, cell in zip(radii, line[3:], strict=True):
            right = sum(row.correct and row.radius >= radius for row in run.rows)
            assert cell.startswith(f"{100 * right / 6:.1f} (")
    best = table[-1]
    assert best[3:] == ["50.0 (sigma 0.25)", "33.3 (sigma 0.25)", "33.3 (sigma 0.5)", "0.0"]
    # Two runs of one sigma are told apart by their numbers.
    same = [runs[0], dataclasses.replace(runs[1], sigma=0.25)]
    assert cells(accuracy_table(same, (0.0,)))[-1][3] == "50.0 (#1)"


def test_paired_comparison(two: list[Path]) -> None:
    # McNemar by hand: 14 images differ, 3 of them fall to the first run.
    first, other = np.zeros(50, bool), np.zeros(50, bool)
    first[:13], other[3:24] = True, True  # 3 lost, 11 gained, 10 in both
    assert mcnemar(first, other)[:2] == (11, 3)
    tail = sum(math.comb(14, k) for k in range(4)) / 2**14
    assert mcnemar(first, other)[2] == pytest.approx(2 * tail)
    assert mcnemar(first, first) == (0, 0, 1.0)
    # Images are matched by index, whatever the order of a file's rows.
    (first_run, _) = load_runs(two)
    wide = [dataclasses.replace(first_run.rows[0], idx=i, radius=0.1 * i) for i in range(12)]
    shifted = [dataclasses.replace(row, radius=row.radius + 0.3) for row in wide[::-1]]
    runs = [dataclasses.replace(first_run, rows=wide), dataclasses.replace(first_run, rows=shifted)]
    (line,) = cells(paired_table(runs, (0.55, 5.0)))
    assert line[1:] == ["+25.0 (0.250)", "+0.0 (1.000)"]
    narrow = narrow_paired_table(runs, (0.55, 5.0))
    assert cells(narrow) == [["0.55", "+25.0 (0.250)"], ["5", "+0.0 (1.000)"]]


def test_radii_that_were_not_asked_for_are_no_zeros(two: list[Path]) -> None:
    cohen, other = load_runs(two)
    rows = [dataclasses.replace(row, protocol="exact", radius=0.5) for row in other.rows]
    exact = dataclasses.replace(other, rows=rows, header={"radii": [0.0, 0.5]})
    radii = (0.0, 0.25, 0.5, 0.58)
    reached = 100 * sum(row.correct for row in rows) / 6
    line = cells(accuracy_table([cohen, exact], radii))[1][3:]
    assert line[3] == "-" and line[1].startswith(f">= {reached:.1f} (")
    assert line[0].startswith(f"{reached:.1f} (") and line[2].startswith(f"{reached:.1f} (")
    assert cells(accuracy_table([cohen, exact], radii))[-1][-1] == "16.7 (sigma 0.25)"
    (pairs,) = cells(paired_table([cohen, exact], radii))
    assert [cell == "-" for cell in pairs[1:]] == [False, True, False, True]
    assert any("certifies the radii it was asked for" in line for line in notes([cohen, exact]))
    assert not any("asked for" in line for line in notes([cohen]))


def test_protocols_with_options_and_carried_certificates(two: list[Path]) -> None:
    cohen, other = load_runs(two)
    rows = [dataclasses.replace(row, protocol="cohen-top2") for row in other.rows]
    top2 = dataclasses.replace(other, rows=rows, header={"radii": None})
    assert top2.targets is None and top2.tests(0.3)
    (line,) = cells(paired_table([cohen, top2], (0.0, 0.25)))
    assert "-" not in line[1:]
    # Carried over from `exact`, radii lie just below its targets.
    rows = [dataclasses.replace(row, protocol="recertify", radius=0.49) for row in other.rows]
    carried = dataclasses.replace(other, rows=rows, header={"radii": [0.0, 0.5], "before": {}})
    line = cells(accuracy_table([cohen, carried], (0.0, 0.5, 1.0)))[1][3:]
    assert line[1].startswith(">= 0.0") and line[2] == "-"
    best = cells(accuracy_table([carried, dataclasses.replace(carried, number=9)], (0.0,)))[-1]
    assert best[3].startswith(">= ")
    # A file without its header does not say what it was asked for.
    alone = [dataclasses.replace(row, protocol="exact-label-free") for row in other.rows]
    assert any("no header" in line for line in notes([dataclasses.replace(other, rows=alone)]))


def test_accuracy_as_numbers(two: list[Path]) -> None:
    cohen, other = load_runs(two)
    rows = [dataclasses.replace(row, protocol="exact", radius=0.5) for row in other.rows]
    exact = dataclasses.replace(other, rows=rows, header={"radii": [0.0, 0.5]})
    lines = list(csv.DictReader(accuracy_csv([cohen, exact], (0.0, 0.25, 0.58)).splitlines()))
    assert [(line["number"], line["radius"], line["known"]) for line in lines] == [
        ("1", "0.0", "="), ("1", "0.25", "="), ("1", "0.58", "="), ("2", "0.0", "="),
        ("2", "0.25", ">="),
    ]  # fmt: skip
    for line, run in zip(lines, [cohen] * 3 + [exact] * 2, strict=True):
        right = sum(row.correct and row.radius >= float(line["radius"]) for row in run.rows) / 6
        assert float(line["certified"]) == pytest.approx(right, abs=1e-6)
        assert float(line["low"]) <= right <= float(line["high"])


def test_runs_table(two: list[Path]) -> None:
    runs = load_runs(two)
    table = runs_table(runs)
    line = dict(zip([str(c.header) for c in table.columns], cells(table)[0], strict=True))
    radii = np.array([row.radius if row.correct else 0.0 for row in runs[0].rows])
    half = 1.96 * radii.std(ddof=1) / 6**0.5
    assert line["ACR"] == f"{radii.mean():.3f} +- {half:.3f}"
    assert (line["samples/image"], line["noise"], line["n"]) == ("1,100", "grid", "1,000")
    assert line["abstained"] == "16.7%"


def test_lower_bounds_of_p_a(two: list[Path], tmp_path: Path) -> None:
    run = load_runs(two)[0]
    np.testing.assert_allclose(run.lower_bounds(), [r.p_lower for r in run.rows], atol=1e-9)
    # Six columns: from the radius and the sigma in the name, of certified images.
    copy = shutil.copy(FIRST30, tmp_path / "model_sigma_0.50.tsv")
    (six,) = load_runs([copy])
    certified = [row.radius for row in six.rows if row.predict != -1]
    assert six.sigma == 0.5
    np.testing.assert_allclose(six.lower_bounds(), norm.cdf(np.array(certified) / 0.5))
    (nameless,) = load_runs([shutil.copy(FIRST30, tmp_path / "model.tsv")])
    assert nameless.sigma is None and len(nameless.lower_bounds()) == 0


def test_published_logs_give_the_published_table(shared_reference: Path) -> None:
    paths = sorted((shared_reference / "certify_logs").glob("*.tsv"))
    runs = load_runs(paths)
    assert [run.sigma for run in runs] == [0.25, 0.5, 0.25, 0.5, 1.0]
    assert radii_reached(runs) == (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    # The two CIFAR-10 runs share their images, and so do the finished ImageNet runs.
    assert [len(group) for group in groups(runs)] == [2, 1, 2]
    for run in runs[2:]:
        for radius, percent in PUBLISHED[run.sigma or 0].items():
            (line,) = cells(accuracy_table([run], (radius,)))
            assert abs(float(line[3].split()[0]) - percent) <= 0.5


def test_everything_is_written(two: list[Path], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "deep" / "report"
    main(Config(files=(*two, FIRST30), out=out, title="a < b_$"))
    for name in ("curves.png", "p_lower.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    markdown = (out / "tables.md").read_text()
    assert "| 1 | few | 0.25 | 50.0 (18.8-81.2) |" in markdown
    assert "six columns only" in markdown and "not over the same images" in markdown
    lines = list(csv.reader((out / "tables.csv").read_text().splitlines()))
    assert ["1", "few", "0.25"] in [line[:3] for line in lines]
    latex = (out / "tables.tex").read_text()
    assert latex.count(r"\toprule") == 4 and r"50.0 (18.8-81.2) &" in latex
    assert r"imagenet\_sigma\_0.50\_first30" in latex and r"\%" in latex
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "a &lt; b_$" in page
    assert not re.search(r"(src|href)=\"?http", page) and "<script" not in page
    printed = capsys.readouterr().out
    assert "50.0*" in printed and "wrote" in printed


def test_formats_escape() -> None:
    table = Table(title="100% of a_b", caption="x & y")
    table.add_column("name")
    table.add_column("value", justify="right")
    table.add_row("a|b, <c>", r"50% \ ~5_3")
    assert r"| a\|b, <c> | 50% \ ~5_3 |" in formats.to_markdown(table)
    assert "| --- | ---: |" in formats.to_markdown(table)
    latex = formats.to_latex(table)
    assert r"a|b, <c> & 50\% \textbackslash{} \textasciitilde{}5\_3 \\" in latex
    assert r"\caption{100\% of a\_b (x \& y)}" in latex and r"{lr}" in latex
    assert list(csv.reader(formats.to_csv(table).splitlines()))[1] == ["a|b, <c>", r"50% \ ~5_3"]
    assert "<td>a|b, &lt;c&gt;</td><td class=r>" in formats.to_html(table)


def test_names_tell_files_apart(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    other = shutil.copy(two[0], tmp_path / "x" / "few.tsv")
    names = [run.name for run in load_runs([two[0], other])]
    assert names == [f"{tmp_path.name}/few", "x/few"]
    long = shutil.copy(two[0], tmp_path / f"{'a' * 100}.tsv")
    assert len(load_runs([long])[0].name) == 60


def refusal(capsys, *args: object) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as stopped:
        command([str(arg) for arg in args])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and error.count("\n") == 1
    return str(error)


def test_bad_input_is_one_clear_line(two: list[Path], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = ("--out", tmp_path / "out")
    assert "no result file is named" in refusal(capsys, *out)
    assert "cannot read" in refusal(capsys, tmp_path / "none.tsv", *out)
    assert "cannot read" in refusal(capsys, tmp_path, *out)
    (tmp_path / "text.tsv").write_text("hello\n")
    assert "is not a certification result" in refusal(capsys, tmp_path / "text.tsv", *out)
    write(tmp_path / "begun.tsv", [])
    assert "holds no image yet" in refusal(capsys, tmp_path / "begun.tsv", *out)
    assert "named twice" in refusal(capsys, two[0], two[0], *out)
    rows = ours(0.25, [900, 900])
    write(tmp_path / "twice.tsv", [rows[0], rows[0]])
    assert "holds image 0 twice" in refusal(capsys, tmp_path / "twice.tsv", *out)
    write(tmp_path / "mixed.tsv", [rows[0], dataclasses.replace(rows[1], sigma=0.5)])
    assert "mixes several sigma" in refusal(capsys, tmp_path / "mixed.tsv", *out)
    for radius in ("-1", "nan", "inf"):
        assert "is out of range" in refusal(capsys, two[0], "--radii", radius, *out)
    assert "cannot write to" in refusal(capsys, two[0], "--out", two[1])
    assert not (tmp_path / "out").exists()


def test_attack_runs_give_the_papers_table(two: list[Path], tmp_path: Path) -> None:
    def row(sigma: float, attack: str, idx: int, hits: int) -> attack_records.Row:
        return attack_records.Row(
            sigma=sigma, attack=attack, idx=idx, label=0, draws=20, hits=hits, loss=1.0 - hits / 20,
            margin=0.0, majority="right" if hits > 10 else "wrong", votes=100, hits_8bit=hits,
            hits_low=None, linf=0.03, l2=1.0, broken_by="", gradients=10.0, seconds=0.1,
        )  # fmt: skip

    rows = [row(sigma, "none", idx, 20) for sigma in (0.0, 70.0) for idx in range(4)]
    rows += [row(0.0, "pgd-10", idx, 5) for idx in range(4)]
    rows += [row(70.0, "pgd-10", idx, 15) for idx in range(4)]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "images.tsv").write_bytes(attack_records.to_tsv(rows))
    for files in ((folder,), (folder / "images.tsv", *two)):
        main(Config(files=files, out=tmp_path / "out"))
        markdown = (tmp_path / "out" / "tables.md").read_text()
        assert "run, 4 images" in markdown
        (line,) = [text for text in markdown.splitlines() if text.startswith("| pgd-10 ")]
        assert re.findall(r"(\d+\.\d) \(", line) == ["25.0", "75.0"]
    assert "| 1 | few |" in markdown


def test_unfinished_attack_run(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "run" / "units").mkdir(parents=True)
    assert "finish the run" in refusal(capsys, tmp_path / "run", "--out", tmp_path / "out")
