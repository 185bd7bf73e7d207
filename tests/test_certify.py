# SPDX-License-Identifier: Apache-2.0
"""The command: what it writes, and that a killed run continues exactly."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from certified_models import COHEN, LINEAR, run, without_time

from nimfast.data.digits import Digits
from nimfast.ops import grid_slack
from nimfast.report.runs import load_runs, notes
from nimfast.smoothing import records
from nimfast.smoothing.result_file import Part


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
        assert without_time(one) == without_time(other)
    assert {row.protocol for row in records.read(files[0])} == {protocol}
    assert run(*settings, "--limit", 12, "--seed", 6, "--out", tmp_path / "e.tsv") == 0
    assert without_time(files[0]) != without_time(tmp_path / "e.tsv")


def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path: Path) -> None:
    command = ["--model", "certified_models:Slow", *LINEAR[2:]]
    command += ["--every", "8", "--batch-size", "64"]
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
    assert without_time(killed) == without_time(whole)


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
    stem = "certify_digits_certified_models-linear_sigma0.5_n320"
    assert names == [
        f"{stem}_alpha-0.01_limit-2.tsv",
        f"{stem}_limit-2.tsv",
        f"{stem}_limit-2_seed-3.tsv",
    ]


def test_a_model_that_returns_nan_is_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    args = ["--model", "certified_models:Nan", "--sigma", 0.5, "--n", 1000, "--limit", 3]
    assert run(*args, "--protocol", "cohen", "--out", out) == 0
    assert "NaN or infinity in" in capsys.readouterr().out
    for row in records.read(out):
        assert row.invalid is not None
        assert 400 < row.invalid < 1100
        assert row.predict == -1


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
    assert run("--model", "certified_models:Random", *LINEAR[2:], "--limit", 2, "--out", out) == 0
    assert "answers differently when asked twice" in " ".join(capsys.readouterr().err.split())
    header = records.read_header(out)
    assert header is not None
    assert header["deterministic"] is False


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
