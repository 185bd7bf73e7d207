# SPDX-License-Identifier: Apache-2.0
"""Result files: format, rounding, resuming after a kill, and refusing what is not the same run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nimfast.errors import UserError
from nimfast.report import certified_accuracy
from nimfast.smoothing import parquet, records
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.records import Row
from nimfast.smoothing.result_file import Part, ResultFile, part_path

REFERENCE = Path(__file__).parent / "reference"

HEADER: dict[str, Any] = {
    "data": "digits",
    "sigma": 0.5,
    "n": 100,
    "seed": 7,
    "images": [0, 20, 40],
    "environments": [{"torch": "2.15"}],
}


def _row(idx: int, **changes: Any) -> Row:
    row = Row(
        idx=idx, label=3, predict=3, radius=0.75, correct=True, time=1.5, count=99, samples=200,
        sigma=0.5, n=100, alpha=0.001, p_lower=0.9, protocol="cohen", noise="gaussian",
        precision="fp32", seed=7, n0=100, invalid=0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def _write(path: Path, indices: list[int], header: dict[str, Any] = HEADER) -> None:
    with ResultFile(path) as file:
        file.begin(header)
        for idx in indices:
            file.append(_row(idx))


def test_rows_come_back_and_the_first_columns_are_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.tsv"
    _write(path, [0, 20])
    assert records.read(path) == [_row(0), _row(20)]
    assert path.read_text().startswith("idx\tlabel\tpredict\tradius\tcorrect\ttime\t")
    assert json.loads((path.parent / "run.json").read_text())["images"] == [0, 20, 40]


def test_radius_and_bound_are_rounded_down(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with ResultFile(path) as file:
        file.begin(HEADER)
        file.append(_row(0, radius=0.7499999999, p_lower=0.99999999999999, time=2.0))
        file.append(_row(20, radius=0.1 + 0.2, p_lower=0.3))
        file.append(_row(40, predict=ABSTAIN, radius=0.0, p_lower=0.0))
        file.append(_row(60, radius=0.7))  # a target, certified with room to spare
    radii = [line.split("\t")[3] for line in path.read_text().splitlines()[1:]]
    assert radii == ["0.749999", "0.300000", "0.000000", "0.700000"]
    # 0.3 lies below three tenths in binary: rounding down may not lift it.
    assert [row.p_lower for row in records.read(path)][:3] == [0.999999999999, 0.299999999999, 0.0]


@pytest.mark.parametrize(
    ("name", "first", "time"),
    [
        ("imagenet_sigma_0.50_first30.tsv", (0, 0, 394, 0.0125, False), 152.717239),
        ("cifar10_sigma_0.25_first30.tsv", (0, 3, 3, 0.378, True), 15.4),
    ],
)
def test_files_of_the_original_format(name: str, first: tuple[Any, ...], time: float) -> None:
    rows = records.read(REFERENCE / name)
    assert len(rows) == 30
    assert dataclasses.astuple(rows[0])[:5] == first
    assert rows[0].time == pytest.approx(time)
    assert rows[0].count is None
    assert any(row.predict == ABSTAIN and row.radius == 0 for row in rows)


def test_every_real_log_is_read(shared_data: Path) -> None:
    logs = sorted((shared_data.parent / "reference" / "certify_logs").glob("*.tsv"))
    if not logs:
        pytest.skip("no certification logs beside the shared data")
    for log in logs:
        assert len(records.read(log)) >= 400


def test_any_cut_of_the_file_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [0, 20, 40])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with ResultFile(path) as file:
            file.begin(HEADER)
            left = [idx for idx in HEADER["images"] if idx not in file.done]
            for idx in left:
                file.append(_row(idx))
        assert path.read_bytes() == whole, f"cut at byte {size}"


def test_a_file_being_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [0, 20])
    path.write_bytes(path.read_bytes()[:-30])
    assert records.read(path) == [_row(0)]


def test_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [0])
    before = path.read_bytes()
    with (
        ResultFile(path) as file,
        pytest.raises(UserError, match=r"sigma is 0\.5 there, 0\.25 now.*--out"),
    ):
        file.begin({**HEADER, "sigma": 0.25, "n": 10})
    with ResultFile(path) as file, pytest.raises(UserError, match=r"extra is null there, 1 now"):
        file.begin({**HEADER, "extra": 1})
    assert path.read_bytes() == before


def test_a_run_without_rows_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [])
    _write(path, [0], {**HEADER, "sigma": 0.25})
    header = records.read_header(path)
    assert header is not None
    assert header["sigma"] == 0.25


def test_each_machine_that_took_part_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [0])
    _write(path, [20])
    _write(path, [40], {**HEADER, "environments": [{"torch": "2.16"}]})
    header = records.read_header(path)
    assert header is not None
    assert header["environments"] == [{"torch": "2.15"}, {"torch": "2.16"}]


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    script = (
        "from nimfast.smoothing.result_file import ResultFile; from pathlib import Path\n"
        f"ResultFile(Path({str(path)!r}))"
    )
    with ResultFile(path) as file:
        file.begin(HEADER)
        with pytest.raises(UserError, match="another process"):
            ResultFile(path)
        root = Path(__file__).parent.parent
        other = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=root
        )
    assert "another process is writing" in other.stderr
    ResultFile(path).__exit__(None, None, None)  # free again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n", "not a certification result"),
        (
            "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.7\t1\t1.0\n1\tx\t3\t0.7\t1\t1.0\n",
            "line 3",
        ),
        (
            "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\n1\t3\t3\t0.7\t1\t1.0\n",
            "line 2.*3 columns",
        ),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.7\t5\t1.0\n", "line 2"),
        ("", "not a certification result"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        records.read(path)


def test_damaged_or_foreign_files_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [0, 20])
    path.write_text(path.read_text().replace("0.750000", "0.7\x00"))
    with pytest.raises(UserError, match="line 2 is not a result row"):
        ResultFile(path)
    records.header_path(path).unlink()
    with pytest.raises(UserError, match="has no header"):
        ResultFile(path)
    records.header_path(path).write_text('{"mine": 1}')
    with pytest.raises(UserError, match="not a header of"):
        ResultFile(path)
    records.header_path(path).write_text("{")
    with pytest.raises(UserError, match="cannot read the header"):
        ResultFile(path)


def test_rows_in_any_order_end_in_that_of_the_header(tmp_path: Path) -> None:
    path, sorted_path = tmp_path / "run.tsv", tmp_path / "sorted.tsv"
    _write(sorted_path, [0, 20, 40])
    _write(path, [40, 0])
    with ResultFile(path) as file:
        file.begin(HEADER)
        assert file.done == {0, 40}
        file.append(_row(20))
        assert [row.idx for row in file.finish()] == [0, 20, 40]
    assert path.read_bytes() == sorted_path.read_bytes()
    with ResultFile(path) as file:  # a finished run, repeated
        file.begin(HEADER)
        assert len(file.finish()) == 3


def test_parts_are_taken_in_once(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [20])
    for rank, indices in ((1, [0, 20]), (12, [40]), (2, [])):
        with Part(part_path(path, rank)) as part:
            for idx in indices:
                part.append(_row(idx))
    with Part(part_path(tmp_path / "run.part1.tsv", 3)) as other:  # of another run, run.part1
        other.append(_row(60))
    with ResultFile(path) as file:
        file.begin(HEADER)
        assert file.done == {0, 20, 40}
        assert [row.idx for row in file.finish()] == [0, 20, 40]
    assert {p.name for p in tmp_path.iterdir()} == {
        "run.tsv",
        "run.json",
        "run.part1.part3.tsv",
    }


def test_parts_are_taken_in_to_the_last_digit(tmp_path: Path) -> None:
    # 0.929625495575 is read as a float below it, which rounds down to ...574.
    rows = [_row(idx, p_lower=0.9296254955750001) for idx in (0, 20, 40)]
    alone, path = tmp_path / "alone.tsv", tmp_path / "run.tsv"
    for out, mine in ((alone, rows), (path, rows[:1])):
        with ResultFile(out) as file:
            file.begin(HEADER)
            for row in mine:
                file.append(row)
    with Part(part_path(path, 1)) as part:
        for row in rows[1:]:
            part.append(row)
    with ResultFile(path) as file:
        file.begin(HEADER)
        file.finish()
    assert path.read_bytes() == alone.read_bytes()


def test_parts_without_a_run_are_not_begun_over(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with Part(part_path(path, 1)) as part:
        part.append(_row(0))
    with pytest.raises(UserError, match="has no header"):
        ResultFile(path)
    assert part_path(path, 1).exists()


def test_rows_of_other_images_and_missing_ones(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    _write(path, [20, 21])
    with (
        ResultFile(path) as file,
        pytest.raises(UserError, match="its header does not name"),
    ):
        file.begin(HEADER)
    other = tmp_path / "other.tsv"
    _write(other, [20])
    with ResultFile(other) as file:
        file.begin(HEADER)
        with pytest.raises(UserError, match="each of its images once"):
            file.finish()


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "run.parquet"
    rows = [_row(0, seed=2**64 - 1), _row(20, predict=ABSTAIN, seed=2**64 - 1)]
    records.write_parquet(path, rows, HEADER)
    assert records.read(path) == rows
    names, _ = parquet.read(path)
    assert tuple(names) == records.COLUMNS
    records.write_parquet(path, [dataclasses.replace(row, n=None) for row in rows], HEADER)
    assert {row.n for row in records.read(path)} == {None}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "check the path"), (b"PAR1 is not all", "not a Parquet file")]
)
def test_parquet_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "run.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.read(path)
    parquet.write(path, {"idx": "int"}, {"idx": [1]}, {})
    with pytest.raises(UserError, match="is not a certification result"):
        records.read(path)
    with pytest.raises(UserError, match="cannot write"):
        parquet.write(Path("/proc/none/run.parquet"), {"idx": "int"}, {"idx": [1]}, {})


def test_without_pyarrow_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs pyarrow"):
        records.write_parquet(tmp_path / "run.parquet", [_row(0)], HEADER)


def test_protocols_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "run.tsv"
    with ResultFile(path) as file:
        file.begin(HEADER)
        file.append(_row(0))
        file.append(_row(20, protocol="exact"))
    with pytest.raises(UserError, match="mixes the protocols cohen and exact"):
        records.read(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.tsv", tmp_path, Path("/proc/none/run.tsv")):
        with pytest.raises(UserError, match="cannot write"):
            ResultFile(path)
    with pytest.raises(UserError, match="must name the TSV"):
        ResultFile(tmp_path / "run.json")
    with pytest.raises(UserError, match="cannot read"):
        records.read(tmp_path / "missing.tsv")


def test_a_refused_run_leaves_no_empty_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is not a header of this version's"):
        ResultFile(tmp_path / "run.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("protocol", ["exact", "anytime-label-free"])
def test_a_target_of_many_decimals_is_reached_by_its_own_rows(protocol: str) -> None:
    target = 36 / 255
    row = Row(0, 1, 1, target, True, 0.5, p_lower=0.7, protocol=protocol)
    columns = dict(zip(records.COLUMNS, records.format_row(row).split("\t"), strict=True))
    assert float(columns["radius"]) == target
    again = dataclasses.replace(row, radius=float(columns["radius"]))
    assert certified_accuracy([again], [target])[0] == 1
    # What is no target is rounded down as ever, and targets of few decimals look as ever.
    for radius, written in ((target, "0.141176"), (0.7, "0.700000")):
        other = dataclasses.replace(row, radius=radius, protocol="cohen")
        assert records.format_row(other).split("\t")[3] == written
    assert records.format_row(dataclasses.replace(row, radius=0.7)).split("\t")[3] == "0.700000"
    assert records.format_row(dataclasses.replace(row, radius=1e-07)).split("\t")[3] == "0.0000001"
