# SPDX-License-Identifier: Apache-2.0
"""``python -m nimfast.attack``: tables, files, resuming, processes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from nimfast import attack
from nimfast.attack import Config
from nimfast.attacks import menu, records
from nimfast.attacks.judge import Share
from nimfast.attacks.records import Row, read_tsv
from nimfast.commands.attack import parse_curve, parse_eps, parse_sigmas
from nimfast.errors import UserError
from nimfast.report import attack as tables
from nimfast.report.attack_files import of_rows
from nimfast.report.attack_runs import attack_tables

ROOT = Path(__file__).parent.parent
SMALL = [
    "--n-images", "6", "--batch-size", "4", "--attacks", "none", "pgd-3", "aa-rand",
    "--protocol", "nim", "--de3-sigma", "0", "70", "--eot", "2", "--draws", "4", "--worst-of", "3",
    "--votes", "50", "--no-checks", "--device", "cpu",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        attack.command(words)
    return int(ended.value.code or 0)


def same(one: Path, other: Path) -> None:
    """Both folders hold the same rows, but for the time they took."""
    rows = [[replace(r, seconds=0) for r in read_tsv(p / "images.tsv")] for p in (one, other)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("attack") / "whole"
    assert run(*SMALL, "--save-images", "--out", str(out)) == 0
    return out


def test_what_a_run_leaves(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_tsv(whole / "images.tsv")
    names = {(row.sigma, row.attack) for row in rows}
    assert {(0.0, "none"), (0.0, "pgd-3"), (0.0, "aa-rand")} <= names
    assert {(70.0, "bare:pgd-3"), (70.0, "bpda:pgd-3"), (70.0, "known:apgd-ce-100")} <= names
    assert not any(sigma == 0 and ":" in name for sigma, name in names)
    assert len(rows) == 6 * len(names)
    assert {row.draws for row in rows if row.sigma == 0} == {1}
    assert {row.draws for row in rows if row.sigma == 70 and "known" not in row.attack} == {4}
    assert max(row.linf for row in rows) == pytest.approx(24 / 255, abs=1e-6)

    result = json.loads((whole / "result.json").read_text())
    column = result["readings"]["70"]
    clean = [row for row in rows if (row.sigma, row.attack) == (70.0, "none")]
    assert column["none"]["mean"][0] == pytest.approx(sum(row.hits for row in clean) / 24)
    assert set(column["strongest"]) == {"mean", "majority", "worst of 3", "known noise"}
    for name in ("pgd-3", "aa-rand"):
        assert column["strongest"]["mean"][0] <= column[name]["mean"][0] + 0.2
    assert (whole / "table.md").read_text().count("| strongest |") == 1
    for picture in ("examples.png", "tradeoff.png"):
        assert Image.open(whole / picture).width > 300


def test_images_that_are_saved_are_the_ones_judged(whole: Path) -> None:
    from nimfast.data import load

    saved = load_file(whole / "adversarial" / "sigma70_pgd-3.safetensors")
    rows = [r for r in read_tsv(whole / "images.tsv") if (r.sigma, r.attack) == (70.0, "pgd-3")]
    assert saved["idx"].tolist() == [row.idx for row in rows]
    data = load("digits")
    for point, row in zip(saved["x_adv"], rows, strict=True):
        clean = data[row.idx][0]
        assert float((point - clean).abs().max()) == pytest.approx(row.linf, abs=1e-7)
        path = whole / "adversarial" / "sigma70_pgd-3" / f"{row.idx:06d}.png"
        levels = torch.from_numpy(np.array(Image.open(path)))
        assert float((levels / 255 - clean[0]).abs().max()) <= 24 / 255 + 1e-6


def test_interrupted_in_the_middle_of_an_attack(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "--save-images", "--save-every", "0", "--out", str(tmp_path / "x")]
    saved: list[str] = []
    save = records.Folder.save

    def stopping(folder: records.Folder, unit: str, state: dict[str, Tensor]) -> None:
        save(folder, unit, state)
        saved.append(unit)
        if len(saved) in (2, 40, 90):
            raise KeyboardInterrupt

    monkeypatch.setattr(records.Folder, "save", stopping)
    assert [run(*words) for _ in range(4)] == [130, 130, 130, 0]
    assert len(saved) > 90
    same(whole, tmp_path / "x")
    for attack_name in ("pgd-3", "aa-rand"):
        points = [
            load_file(folder / "adversarial" / f"sigma70_{attack_name}.safetensors")["x_adv"]
            for folder in (whole, tmp_path / "x")
        ]
        assert torch.equal(*points)
    assert not list((tmp_path / "x" / "units").glob("*.state"))


def test_another_run_is_refused_and_a_finished_one_reported(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--save-images", "--out", str(whole)]
    assert run(*words, "--seed", "1") == 2
    assert "seed is 0 there, 1 now" in " ".join(capsys.readouterr().err.split())
    start = time.monotonic()
    assert run(*words) == 0
    assert "strongest" in capsys.readouterr().out
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_killed_and_shared_by_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "-m", "nimfast.attack", *SMALL, "--save-every", "0",
             "--out", str(tmp_path / name)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    for name, command, kill in (
        ("one", [sys.executable], False),
        ("killed", [sys.executable], True),
        ("two", TORCHRUN, False),
    ):
        process = start(*command)
        if kill:
            deadline = time.monotonic() + 200
            while not list(tmp_path.glob(f"{name}/units/sigma70*.state")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start(*command)
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert told.count("strongest") >= 1
    same(tmp_path / "one", tmp_path / "killed")
    same(tmp_path / "one", tmp_path / "two")


def row(idx: int, attack_name: str, hits: int, loss: float, draws: int = 20, **other: Any) -> Row:
    known: dict[str, Any] = {
        "sigma": 70.0, "attack": attack_name, "idx": idx, "label": 0, "draws": draws, "hits": hits,
        "loss": loss, "margin": 1.0, "majority": "right", "votes": 20, "hits_8bit": hits,
        "hits_low": None, "linf": 0.1, "l2": 1.0, "broken_by": "", "gradients": 1.0, "seconds": 1.0,
    }  # fmt: skip
    return Row(**{**known, **other})


def test_strongest_is_chosen_by_its_loss_and_judged_by_its_draws() -> None:
    rows = [row(0, "none", 20, 9.0), row(0, "fgsm", 3, 1.0), row(0, "bpda:pgd-10", 8, 2.0)]
    rows += [row(0, "known:fgsm", 0, 9.0, 1), row(0, "pgd-10@1", 0, 9.0)]
    assert tables.by_attack(rows)[tables.STRONGEST] == [rows[2]]
    # A deterministic image is broken if any attack breaks it, whatever its loss.
    broken = [row(1, "fgsm", 0, 0.5, 1), row(1, "pgd-10", 1, 0.6, 1)]
    assert tables.strongest(broken) == [broken[0]]


def test_readings() -> None:
    rows = [
        row(0, "fgsm", 20, 1.0, majority="right"),
        row(1, "fgsm", 10, 1.0, majority="undecided"),
        row(2, "fgsm", 0, 1.0, majority="wrong"),
        row(0, "known:fgsm", 1, 1.0, 1),
    ]
    found = tables.readings(rows, 10)["70"]["fgsm"]
    assert found["mean"].value == pytest.approx(0.5)
    assert found["worst of 10"].value == pytest.approx((1 + 1 / 184756) / 3)
    assert found["majority"].value == pytest.approx(1 / 3)
    assert found["majority"].high > tables.share([1, 0, 0]).high  # the undecided one may be right
    assert found["known noise"].value == 1


def test_frontier() -> None:
    points = [(0.99, 0.2), (0.98, 0.5), (0.97, 0.4), (0.9, 0.6), (0.9, 0.55)]
    assert sorted(tables.frontier(points)) == [0, 1, 3]
    readings = {
        str(i): {"none": {"mean": Share(c, c, c)}, "strongest": {"mean": Share(r, r, r)}}
        for i, (c, r) in enumerate(points)
    }
    assert [p["frontier"] for p in tables.tradeoff(readings)] == [True, True, False, True, False]


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    rows = [row(0, "fgsm", 3, 1.25, hits_low=2, broken_by="apgd-ce"), row(1, "none", 20, 0.1)]
    (tmp_path / "x.tsv").write_bytes(records.to_tsv(rows))
    assert read_tsv(tmp_path / "x.tsv") == rows
    (tmp_path / "y.tsv").write_text("idx\tlabel\n1\t2\n")
    with pytest.raises(UserError, match="no table of attack results"):
        read_tsv(tmp_path / "y.tsv")


def test_strengths_radii_curves_and_names() -> None:
    assert parse_sigmas(["0:160:40", "70"]) == (0, 40, 70, 80, 120, 160)
    assert parse_eps("4/255", "digits", "linf") == 4 / 255
    assert parse_eps(None, "cifar10", "linf") == 4 / 255
    curve = parse_curve(["eot", "1", "5", "steps", "10", "50"], None, 20)
    assert [n.name for n in curve["eot"]] == ["pgd-10@1", "pgd-10@5", "pgd-50@1"]
    assert [(n.steps, n.eot) for n in curve["steps"]] == [(10, 20), (50, 20)]
    assert menu.parse("bare:apgd-t") == menu.Named("bare:apgd-t-100", "bare", "apgd-t", 100)
    assert menu.parse("pgd", 7).name == "pgd-7"


def test_curves_from_the_command_to_the_pictures(tmp_path: Path) -> None:
    few = ["--n-images", "4", "--de3-sigma", "0", "70", "--draws", "4", "--worst-of", "2"]
    less = ["--votes", "20", "--no-checks", "--no-cross-checks", "--eot", "2"]
    curve = ["--attacks", "none", "--steps", "2", "--curve", "eot", "1", "3", "steps", "2", "4"]
    assert run(*few, *less, *curve, "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "result.json").read_text())["curves"]
    rows = read_tsv(tmp_path / "images.tsv")

    def accuracy(sigma: float, name: str) -> float:
        hits = [row.hits / row.draws for row in rows if (row.sigma, row.attack) == (sigma, name)]
        assert len(hits) == 4
        return sum(hits) / 4

    expected = {
        "eot": {
            "sigma 70/255, PGD-2": [(1, "pgd-2@1"), (3, "pgd-2@3")],
            "sigma 70/255, PGD at EOT 1, as many gradients": [(1, "pgd-2@1"), (3, "pgd-6@1")],
        },
        "steps": {
            "no De3, PGD": [(2, "pgd-2@2"), (4, "pgd-4@2")],
            "sigma 70/255, PGD, EOT 2": [(2, "pgd-2@2"), (4, "pgd-4@2")],
        },
    }
    for axis, lines in expected.items():
        assert found[axis].keys() == lines.keys()
        assert Image.open(tmp_path / f"curve_{axis}.png").width > 300
        for line, points in lines.items():
            assert [place for place, _ in found[axis][line]] == [place for place, _ in points]
            for (_, share), (_, name) in zip(found[axis][line], points, strict=True):
                assert share[0] == pytest.approx(accuracy(float("sigma 70" in line) * 70, name))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eps", "0"], "--eps is 0; it must be greater than 0"),
        (["--eps", "-1/255"], "must be greater than 0"),
        (["--eps", "8"], "did you mean 8/255?"),
        (["--eps", "x"], "--eps 'x' is no number"),
        (["--norm", "l2"], "give --eps"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--attacks", "pgd-0"], "unknown attack 'pgd-0'"),
        (["--attacks", "deepfool"], "unknown attack 'deepfool'; choose among none, fgsm"),
        (["--attacks", "known:aa-rand"], "single attacks only"),
        (["--attacks", "fgsm", "fgsm"], "names one twice"),
        (["--attacks", "square", "--norm", "l1", "--eps", "5"], "attack square-5000: norm is 'l1'"),
        (["--de3-sigma", "70:"], "'70:' is not understood"),
        (["--de3-sigma", "-5"], "must be 0 or more"),
        (["--eot", "0"], "--eot is 0"),
        (["--worst-of", "30"], "needs as many draws; give --draws 30"),
        (["--curve", "5"], "give eot 1 5 20 50"),
        (["--precision", "fp16"], "fp32 or bf16"),
        (["--defense", "none", "--de3-sigma", "0", "70"], "--de3-sigma is of De3 with a denoiser"),
        (
            ["--curve", "steps", "2", "--norm", "l1", "--eps", "5", "--attacks", "none"],
            "attack pgd-2",
        ),
        (["--stats", "input"], "stats=input is not for an autoencoder that predicts pixels"),
        (["--model", "test_attack_command:constant"], "have no gradient"),
        (["--model", "test_attack_command:of_other_data"], "3 classes and the data 10"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    small = ["--n-images", "2", "--no-checks", "--out", str(tmp_path / "x")]
    assert run(*small, *words) == 2
    line = capsys.readouterr().err.strip()
    assert told in " ".join(line.split())
    assert "Traceback" not in line


class Constant(nn.Module):
    """Returns the same logits for every image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(float(classes)))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def constant() -> nn.Module:
    return Constant(10)


def of_other_data() -> nn.Module:
    return Constant(3)


def test_images_outside_the_box_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nimfast.data.digits import Digits

    monkeypatch.setattr(Digits, "__getitem__", lambda self, i: (2 * self.images[i] - 1, 0))
    assert run("--n-images", "2", "--out", str(tmp_path / "x")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "images range from -1 to 1" in told
    assert "normalisation inside the model" in told


def test_l1_with_checks_and_cross_checks(tmp_path: Path) -> None:
    words = ["--norm", "l1", "--eps", "8", "--attacks", "none", "apgd-t-2", "--eot", "2"]
    less = ["--n-images", "4", "--de3-sigma", "70", "--draws", "4", "--worst-of", "2"]
    assert run(*words, *less, "--votes", "20", "--out", str(tmp_path / "x")) == 0
    names = {row.attack for row in read_tsv(tmp_path / "x" / "images.tsv")}
    assert {"bare:apgd-ce-10", "bpda:apgd-ce-10", "known:apgd-t-2"} <= names
    assert "l1 8," in (tmp_path / "x" / "table.md").read_text()


@pytest.mark.filterwarnings("default")
def test_nothing_but_clean_images_has_no_strongest_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--attacks", "none", "--de3-sigma", "70", "--n-images", "2", "--steps", "3"]
    assert run(*words, "--votes", "20", "--no-checks", "--out", str(tmp_path / "x")) == 0
    assert "--steps does nothing" in capsys.readouterr().err
    assert "strongest" not in (tmp_path / "x" / "table.md").read_text()


@pytest.mark.filterwarnings("always:--curve eot draws nothing")
@pytest.mark.parametrize(
    ("model", "heading"),
    [("demask:digits+digits?mask_ratio=0.25", "DeMask"), ("digits", "no De3")],
)
def test_a_column_is_called_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, heading: str
) -> None:
    less = ["--defense", "none", "--no-checks", "--no-cross-checks", "--draws", "2", "--worst-of"]
    words = [*less, "1", "--n-images", "2", "--votes", "20", "--attacks", "none", "fgsm", "--eot"]
    curve = ["1", "--curve", "eot", "1", "--model", model, "--out", str(tmp_path / "x")]
    assert run(*words, *curve) == 0
    said = capsys.readouterr()
    assert ("--curve eot draws nothing" in said.err) == (heading == "no De3")
    assert f"| attack | {heading} |" in (tmp_path / "x" / "table.md").read_text()
    for table in attack_tables(tmp_path / "x"):
        assert [column.header for column in table.columns][1:] == [heading]


def test_the_order_of_attacks_makes_no_finding() -> None:
    def rows(attack: str, margin: float) -> list[Row]:
        return [row(i, attack, 1, 0.0, draws=1, margin=margin + 0.01 * i) for i in range(8)]

    clean, fgsm, pgd = rows("none", 9.0), rows("fgsm", 5.0), rows("pgd-10", 1.0)
    assert not of_rows([*clean, *pgd, *fgsm])
    assert not of_rows([*clean, *fgsm, *pgd, *rows("bare:pgd-10", 2.0), *rows("pgd-3", 3.0)])
    (finding,) = of_rows([*clean, *rows("pgd-10", 6.0), *fgsm])
    assert finding["check"] == "pgd-10 below fgsm"
    (finding,) = of_rows([*clean, *fgsm, *pgd, *rows("bare:pgd-10", 0.1)])
    assert finding["check"] == "pgd-10 below bare:pgd-10"


@pytest.mark.filterwarnings("ignore:the model returns probabilities")
def test_findings_are_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "test_attack_command:softmaxed", "--n-images", "4", "--attacks", "none"]
    assert run(*words, "fgsm", "--eps", "8/255", "--out", str(tmp_path / "x")) == 0
    findings = json.loads((tmp_path / "x" / "result.json").read_text())["findings"]
    assert "probabilities" in {finding["check"] for finding in findings}
    assert "finding as it is, probabilities:" in " ".join(capsys.readouterr().out.split())


def softmaxed() -> nn.Module:
    import nimfast

    return nn.Sequential(nimfast.load("digits"), nn.Softmax(1))


def test_defaults_are_documented() -> None:
    assert Config().de3_sigma == ("0", "70", "140")
    assert Config().attacks[-1] == "aa-rand"
