# SPDX-License-Identifier: Apache-2.0
"""The command: what it writes, that a killed run continues exactly, and every refusal."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nimfast import certify
from nimfast.data.digits import Digits
from nimfast.ops import grid_slack
from nimfast.report.runs import load_runs, notes
from nimfast.smoothing import records
from nimfast.smoothing.result_file import Part

# The models below are named on the command line as test_certify:NAME.
LINEAR = ["--model", "test_certify:linear", "--sigma", "0.5", "--n", "320"]
COHEN = [*LINEAR, "--protocol", "cohen", "--n0", "32"]


def linear() -> nn.Module:
    """Logits on a coarse grid, so that counts are equal on every machine."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    weight = torch.zeros(10, 1024)
    for label in range(10):
        weight[label, 100 * label : 100 * label + 100] = 0.125
    layers[1].load_state_dict({"weight": weight, "bias": torch.zeros(10)})
    return layers


class Slow(nn.Module):
    """`linear`, slow enough to be killed in the middle of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linear()

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.003)
        logits: Tensor = self.layers(images)
        return logits


class Nan(nn.Module):
    """NaN for about half of all noisy images."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :10].clone()
        logits[images.flatten(1)[:, 500] > 0] = math.nan
        return logits


class Dropped(Slow):
    """Dropout as a function, which eval mode does not reach."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.1)


class BatchNormal(Slow):
    """Statistics of the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.norm(images))


class Stubborn(Slow):
    """Stays in training mode."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


class Random(Slow):
    """Randomness that nobody declared."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.randn(10)


class Five(nn.Module):
    """A classifier of five classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5]


def run(*args: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        certify.command([str(arg) for arg in args])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _without_time(path: Path) -> list[list[str]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    column = rows[0].index("time")
    return [row[:column] + row[column + 1 :] for row in rows]


def test_run_writes_table_header_and_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run.tsv"
    assert run(*COHEN, "--limit", 20, "--radii", 0, 0.25, "--seed", 5, "--out", out) == 0
    printed = capsys.readouterr().out
    for words in ("Certified accuracy over 20 images", "mean time per image", "abstained", "0.25"):
        assert words in printed
    for path in (out, out.with_suffix(".json"), out.with_suffix(".png")):
        assert f"wrote {path}" in printed
        assert path.stat().st_size > 0
    rows = records.read(out)
    header = json.loads(out.with_suffix(".json").read_text())
    assert [row.idx for row in rows] == header["images"]
    assert {(row.n, row.n0, row.samples, row.sigma, row.seed) for row in rows} == {
        (320, 32, 352, 0.5, 5)
    }
    assert len({row.label for row in rows}) >= 8  # a spread of classes
    assert {"weights_hash", "data_identity", "batch_size", "environments"} <= header.keys()


@pytest.mark.parametrize("protocol", ["exact", "cohen", "dmae", "anytime"])
def test_same_seed_same_file_whatever_the_batch_size(tmp_path: Path, protocol: str) -> None:
    files = []
    settings = [*LINEAR, "--protocol", protocol]
    for name, batch_size in [("a", 32), ("b", 64), ("c", 7), ("d", 500)]:
        files.append(tmp_path / f"{name}.tsv")
        common = [*settings, "--limit", 12, "--seed", 5, "--batch-size", batch_size]
        assert run(*common, "--out", files[-1]) == 0
    for one, other in itertools.pairwise(files):
        assert _without_time(one) == _without_time(other)
    assert {row.protocol for row in records.read(files[0])} == {protocol}
    assert run(*settings, "--limit", 12, "--seed", 6, "--out", tmp_path / "e.tsv") == 0
    assert _without_time(files[0]) != _without_time(tmp_path / "e.tsv")


def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path: Path) -> None:
    command = ["--model", "test_certify:Slow", *LINEAR[2:], "--every", "8", "--batch-size", "64"]
    whole, killed = tmp_path / "whole.tsv", tmp_path / "killed.tsv"
    assert run(*command, "--seed", 9, "--out", whole) == 0
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    moments, rows_seen = random.Random(), []
    for kill in range(3):
        # The seed is given once: later sessions take it from the header.
        seed = ["--seed", "9"] if kill == 0 else []
        process = subprocess.Popen(
            [sys.executable, "-m", "nimfast.certify", *command, *seed, "--out", str(killed)],
            env=environment,
            stdout=subprocess.DEVNULL,
            cwd=here.parent,
        )
        if kill < 2:
            target = 12 * kill + moments.randrange(1, 12)
            while process.poll() is None and _lines(killed) <= target:
                time.sleep(0.002)
            time.sleep(moments.random() * 0.03)
            process.kill()
        process.wait()
        rows_seen.append(_lines(killed))
    assert process.returncode == 0
    assert rows_seen == sorted(rows_seen)
    assert 1 < rows_seen[0] < rows_seen[-1] == 51
    assert _without_time(killed) == _without_time(whole)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_control_c_says_that_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "run.tsv", Part.append

    def interrupted(part: Part, row: records.Row) -> None:
        if _lines(out) == 3:
            raise KeyboardInterrupt
        real(part, row)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "append", interrupted)
        assert run(*LINEAR, "--limit", 4, "--out", out) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(records.read(out)) == 2
    assert run(*LINEAR, "--limit", 4, "--out", out) == 0
    assert len(records.read(out)) == 4


def test_a_finished_run_reports_again_without_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    assert run(*LINEAR, "--limit", 3, "--out", out) == 0
    before = out.read_bytes()
    out.with_suffix(".png").unlink()
    capsys.readouterr()
    assert run(*LINEAR, "--limit", 3, "--out", out) == 0
    assert "3 done before" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert out.with_suffix(".png").exists()


def test_default_file_is_found_again_and_settings_tell_files_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in ([], [], ["--alpha", 0.01], ["--seed", 3]):
        assert run(*LINEAR, "--limit", 2, *args) == 0
    names = sorted(path.name for path in Path("results").glob("*.tsv"))
    stem = "certify_digits_test_certify-linear_sigma0.5_n320"
    assert names == [
        f"{stem}_alpha-0.01_limit-2.tsv",
        f"{stem}_limit-2.tsv",
        f"{stem}_limit-2_seed-3.tsv",
    ]


def test_a_model_that_returns_nan_is_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    args = ["--model", "test_certify:Nan", "--sigma", 0.5, "--n", 1000, "--limit", 3]
    assert run(*args, "--protocol", "cohen", "--out", out) == 0
    assert "NaN or infinity in" in capsys.readouterr().out
    for row in records.read(out):
        assert row.invalid is not None
        assert 400 < row.invalid < 1100
        assert row.predict == -1


BAD = [
    (["--data", "nothing"], "unknown data 'nothing'"),
    (["--data", "imagefolder:/no/such"], "/no/such"),
    (["--model", "nothing"], "unknown model 'nothing'"),
    (["--model", "test_certify:none"], "none"),
    (["--model", "no_such.safetensors"], "no_such.safetensors"),
    (["--model", "test_certify:Five"], "5 classes and the data 10"),
    (["--checkpoint", "no_such.safetensors"], "no_such.safetensors"),
    (["--sigma", 0], "--sigma is 0.0; it must be greater than 0"),
    (["--sigma", -1], "--sigma is -1.0"),
    (["--sigma", "nan"], "--sigma is nan"),
    (["--alpha", 0], "--alpha is 0.0; it must be greater than 0 and less than 0.5"),
    (["--alpha", 0.5], "--alpha is 0.5"),
    (["--n", 0], "--n is 0; it must be at least 1"),
    (["--n0", 0], "--n0 is 0"),
    (["--n", 9], "--n 9 is too small for --alpha 0.001"),
    (["--n", 9], "use at least --n 10"),
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
    (["--noise", "grid", "--sigma", 9], "sigma is 9.0; noise on the grid needs"),
    (["--model", "test_certify:Dropped"], "dropout is active in eval mode"),
    (["--model", "test_certify:BatchNormal"], "normalises by the statistics of its batch"),
    (["--model", "test_certify:Stubborn"], "stays in training mode after eval()"),
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


def test_a_parquet_file_stands_beside_the_tsv_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "run.parquet"
    for _ in range(2):  # the second time from the file
        assert run(*LINEAR, "--limit", 3, "--out", out) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        assert records.read(out) == records.read(out.with_suffix(".tsv"))
    (found,) = load_runs([out])
    assert (len(found.rows), found.header["n"]) == (3, 320)


def test_grid_noise_takes_the_digits_and_says_its_slack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    args = ["--noise", "grid", "--n", 320, "--limit", 2]
    assert run(*args, "--out", out) == 0
    slack = grid_slack((1, 32, 32), 0.5)
    assert f"grid noise (slack {slack:.2g})" in " ".join(capsys.readouterr().out.split())
    header = records.read_header(out)
    assert header is not None
    assert header["slack"] == slack
    assert any(f"slack {slack:.2g}" in line for line in notes(load_runs([out])))
    real = Digits.__getitem__
    monkeypatch.setattr(
        Digits, "__getitem__", lambda self, i: (real(self, i)[0] / 3, real(self, i)[1])
    )
    assert run(*args, "--out", tmp_path / "off.tsv") == 2
    assert "noise on the grid is for 8-bit images" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # a warning is what this is about
def test_a_model_that_answers_differently_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    assert run("--model", "test_certify:Random", *LINEAR[2:], "--limit", 2, "--out", out) == 0
    assert "answers differently when asked twice" in " ".join(capsys.readouterr().err.split())
    header = records.read_header(out)
    assert header is not None
    assert header["deterministic"] is False


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


def test_fewer_samples_than_cohen_and_the_same_table(tmp_path: Path) -> None:
    # The embedded model on a spread of digits, where the noise differs from protocol to protocol.
    common = ["--limit", 40, "--radii", 0, 0.25, 0.5, 0.75, 1, "--seed", 3]
    found = {}
    for protocol in ("exact", "cohen"):
        out = tmp_path / f"{protocol}.tsv"
        assert run(*common, "--protocol", protocol, "--out", out) == 0
        found[protocol] = records.read(out)
    samples = {name: sum(row.samples or 0 for row in rows) for name, rows in found.items()}
    assert 3 * samples["exact"] < samples["cohen"]
    for radius in (0, 0.25, 0.5, 0.75, 1):
        exact, cohen = (
            sum(row.correct and row.radius >= radius for row in rows) for rows in found.values()
        )
        assert abs(exact - cohen) <= 1


def test_a_model_without_sigma_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "test_certify:linear") == 2
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
        (["--model", "test_certify:Slow"], "model is"),
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


def test_embedded_digits_with_the_embedded_model(tmp_path: Path) -> None:
    out = tmp_path / "run.tsv"
    assert run("--n", 500, "--limit", 10, "--out", out) == 0
    rows = records.read(out)
    assert sum(row.correct for row in rows) >= 8
    assert {row.sigma for row in rows} == {records.read_header(out)["sigma"]}
    assert max(row.radius for row in rows) > 0.5
    assert {row.protocol for row in rows} == {"exact"}


@pytest.mark.slow
def test_embedded_model_on_the_whole_test_split(tmp_path: Path) -> None:
    # What docs/embedded_model.md promises of the model, with room for other seeds.
    out = tmp_path / "test.tsv"
    command = [sys.executable, "-m", "nimfast.certify", "--n", "10000", "--every", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    rows = records.read(out)
    assert len(rows) == 400
    assert sum(row.correct for row in rows) >= 0.97 * len(rows)
    assert sum(row.correct and row.radius >= 0.5 for row in rows) >= 0.85 * len(rows)
