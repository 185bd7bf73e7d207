# SPDX-License-Identifier: Apache-2.0
"""The command: what it refuses, each in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from certified_models import LINEAR, run
from torch import Tensor, nn

from nimfast.data.digits import Digits

BAD = [
    (["--data", "nothing"], "unknown data 'nothing'"),
    (["--data", "imagefolder:/no/such"], "/no/such"),
    (["--model", "nothing"], "unknown model 'nothing'"),
    (["--model", "certified_models:none"], "none"),
    (["--model", "no_such.safetensors"], "no_such.safetensors"),
    (["--model", "certified_models:Five"], "5 classes and the data 10"),
    (["--checkpoint", "no_such.safetensors"], "no_such.safetensors"),
    (["--sigma", 0], "--sigma is 0.0; it must be greater than 0"),
    (["--sigma", -1], "--sigma is -1.0"),
    (["--sigma", "nan"], "--sigma is nan"),
    (["--sigma", 1e-300], "--sigma is 1e-300; it must be between 1e-6 and 1e6"),
    (["--sigma", 1e300], "--sigma is 1e+300; it must be between 1e-6 and 1e6"),
    (["--alpha", 0], "--alpha is 0.0; it must be greater than 0 and less than 0.5"),
    (["--alpha", 0.5], "--alpha is 0.5"),
    (["--n", 0], "--n is 0; it must be at least 1"),
    (["--n0", 0], "--n0 is 0"),
    (["--n", 9], "--n 9 is too small for --alpha 0.001"),
    (["--n", 9], "use at least --n 10"),
    (["--n", 10, "--protocol", "cohen", "--top2"], "use at least --n 11"),
    (["--limit", 0], "--limit is 0"),
    (["--every", -3], "--every is -3"),
    (["--batch-size", 0], "--batch-size is 0"),
    (["--seed", -1], "--seed is -1"),
    (
        ["--radii", 0, 9],
        "--radii 9 is out of range: with n = 320 and alpha = 0.001 radii go from 0 to",
    ),
    (["--radii", -1], "--radii -1 is out of range"),
    (["--radii", 0.5, 0.25], "do not increase; sort them"),
    (["--radii", 0.25, 0.25], "do not increase"),
    (["--top2"], "--top2 is True; it must be left out with --protocol exact"),
    (["--protocol", "dmae", "--label-free"], "--label-free is True; it must be left out"),
    (["--model", "certified_models:Dropped"], "dropout is active in eval mode"),
    (["--model", "certified_models:BatchNormal"], "normalises by the statistics of its batch"),
    (["--model", "certified_models:Stubborn"], "stays in training mode after eval()"),
    (["--precision", "tf32", "--device", "cpu"], "tf32"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--out", "run.json"], "must name the TSV"),
    (["--out", "/proc/none/run.tsv"], "cannot write /proc/none/run.tsv"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_clear_line(
    args: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*LINEAR, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not any(tmp_path.rglob("*.tsv"))


@pytest.mark.filterwarnings("default")
def test_options_that_do_nothing_and_doubtful_units_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--limit", 1, "--device", "cpu", "--out", tmp_path / "run.tsv"]
    odd = ["--sigma", 70, "--radii", 0, "--cuda-graphs", "--n0", 50]
    assert run(*LINEAR, *odd, *out) == 0
    said = capsys.readouterr()
    told = " ".join(said.err.split())
    assert "sigma is read as 70 in pixel units" in told and "70/255 = 0.275" in told
    assert "--cuda-graphs does nothing on cpu" in told
    assert "--n0 does nothing with --protocol exact" in told
    assert "(at most 0.000 asked for)" in " ".join(said.out.split())
    assert run(*LINEAR, "--noise", "grid", "--sigma", 9) == 2
    assert "sigma is 9.0; noise on the grid needs" in capsys.readouterr().err


def test_a_label_outside_the_classes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Digits.__getitem__

    def mislabelled(self: Digits, index: int) -> tuple[Tensor, int]:
        image, label = real(self, index)
        return image, 10 if index > 100 else label

    monkeypatch.setattr(Digits, "__getitem__", mislabelled)
    assert run(*LINEAR, "--limit", 8, "--out", tmp_path / "run.tsv") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "has label 10, but there are 10 classes, 0 to 9" in error


def test_a_model_without_sigma_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "certified_models:linear") == 2
    assert "give --sigma" in capsys.readouterr().err


def test_an_image_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        (tmp_path / "data" / str(label) / "x.png").write_text("not a picture")
    assert run(*LINEAR, "--data", f"imagefolder:{tmp_path / 'data'}") == 2
    error = capsys.readouterr().err
    assert "x.png" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.pt"
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(1024, 7)).state_dict(), wrong)
    assert run(*LINEAR, "--checkpoint", wrong) == 2
    error = capsys.readouterr().err
    assert "wrong.pt" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sigma", 0.25], "sigma is 0.5 there, 0.25 now"),
        (["--n", 640], "n is 320 there, 640 now"),
        (["--seed", 6], "seed is 5 there, 6 now"),
        (["--batch-size", 32], "batch_size is 64 there, 32 now"),
        (["--protocol", "anytime"], 'protocol is "exact" there, "anytime" now'),
        (["--radii", 0, 0.5], "radii is [0.0, 0.25"),
        (["--label-free"], "label_free is false there, true now"),
        (["--model", "certified_models:Slow"], "model is"),
        (["--limit", 3], "images is"),
    ],
)
def test_the_file_of_a_different_run_is_refused(
    args: list[object],
    message: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path_factory.getbasetemp() / "another_run.tsv"
    first = [*LINEAR, "--limit", 2, "--seed", 5, "--batch-size", 64, "--out", out]
    assert run(*first) == 0
    before = out.read_bytes()
    assert run(*first, *args) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == before
