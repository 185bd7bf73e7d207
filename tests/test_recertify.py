# SPDX-License-Identifier: Apache-2.0
"""python -m nimfast.recertify: what a change loses is counted, bounds give way, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from certified_models import LINEAR, linear, run, without_time
from torch import Tensor, nn

from nimfast import recertify
from nimfast.data import load
from nimfast.ops import Stream, image_keys
from nimfast.smoothing import bounds, records
from nimfast.smoothing.changed import Pair
from nimfast.smoothing.network import Network
from nimfast.smoothing.result_file import Part


class Worn(nn.Module):
    """`linear`, which says class 0 of about one noisy copy in twelve, and NaN of one in fifty."""

    def __init__(self, broken: bool = True) -> None:
        super().__init__()
        self.layers = linear()
        self.broken = broken

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images).clone()
        corner = images[:, 0, 0, 0]  # 0 in every digit: noise of 0.5
        logits[corner > 0.7, 0] = 100
        if self.broken:
            logits[corner < -1] = torch.nan
        return logits


class Sound(Worn):
    def __init__(self) -> None:
        super().__init__(broken=False)


def again(*args: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        recertify.command([str(arg) for arg in args])
    code = exit_.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 images, of which some abstained."""
    out = tmp_path_factory.mktemp("before") / "run.tsv"
    args = ["--n", 1000, "--seed", 1, "--limit", 12, "--protocol", "cohen", "--out", out]
    assert run(*LINEAR[:4], *args) == 0
    return out


def test_bounds_give_way_by_what_is_lost(before: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.tsv"
    args = [before, "--model", "test_recertify:Worn", "--n", 500, "--seed", 7, "--out", out]
    assert again(*args) == 0
    old = {row.idx: row for row in records.read(before)}
    rows, data = records.read(out), load("digits")
    assert [row.idx for row in rows] == list(old)
    assert {row.protocol for row in rows} == {"recertify"}
    assert {row.alpha for row in rows} == {0.002}
    certified = [row for row in rows if old[row.idx].predict >= 0]
    assert 0 < len(certified) < len(rows)
    networks = [Network(model, 10, 0.5) for model in (linear(), Worn())]
    for row in rows:
        was = old[row.idx]
        assert (row.label, row.alpha) == (was.label, 0.002)
        if was.predict < 0:
            assert (row.predict, row.radius, row.samples) == (-1, 0.0, 0)
            continue
        keys = image_keys(7, Stream.EVALUATION, torch.tensor([row.idx]))
        first = torch.zeros(1, dtype=torch.int64)
        said, says = (net(data[row.idx][0][None], keys, first, 500) for net in networks)
        broken = says.isnan().any(1)
        lost = int(
            (broken | ((said.argmax(1) == was.predict) & (says.argmax(1) != was.predict))).sum()
        )
        assert lost > 5
        assert (row.count, row.samples, row.invalid) == (500 - lost, 500, int(broken.sum()))
        assert was.p_lower is not None and row.p_lower is not None
        bound = was.p_lower - bounds.upper_bound(lost, 500, 0.001)
        assert row.p_lower == pytest.approx(max(0, bound), abs=2e-12)
        assert row.predict == (was.predict if bound > 0.5 else -1)
        assert row.radius == pytest.approx(bounds.radius(max(0, bound), 0.5), abs=2e-6)


def test_a_killed_run_continues_and_a_finished_one_is_kept(before: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.tsv", tmp_path / "cut.tsv"
    args = [before, "--model", "test_recertify:Sound", "--n", 64, "--seed", 3, "--out"]
    assert again(*args, whole) == 0
    assert again(*args, cut) == 0
    lines = cut.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:6]) + "17\t1")
    assert again(*args, cut) == 0
    assert without_time(cut) == without_time(whole)
    # The new file is carried over in its turn; the errors of three statements add.
    third = tmp_path / "third.tsv"
    assert again(whole, "--model", "certified_models:linear", "--n", 64, "--out", third) == 0
    assert {row.alpha for row in records.read(third)} == {0.003}


def test_nothing_is_lost_to_itself_but_what_few_samples_leave_open(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        before,
        "--model",
        "certified_models:linear",
        "--n",
        2000,
        "--out",
        tmp_path / "same.tsv",
    ]
    assert again(*args) == 0
    assert "alpha 0.002 in all" in " ".join(capsys.readouterr().out.split())
    for old, new in zip(records.read(before), records.read(tmp_path / "same.tsv"), strict=True):
        if old.predict >= 0:
            assert old.p_lower is not None
            assert new.count == 2000
            assert new.p_lower == pytest.approx(old.p_lower - (1 - 0.001 ** (1 / 2000)), abs=1e-9)


def test_slack_is_taken_off_once_more() -> None:
    exact, _ = bounds.recertify(0.9, 3, 500, 0.01, 1.0)
    grid, _ = bounds.recertify(0.9, 3, 500, 0.01, 1.0, 1e-6)
    assert grid == pytest.approx(exact - 1e-6, abs=1e-12)
    assert grid <= exact - 1e-6


def test_a_vote_is_for_what_was_lost() -> None:
    old, new = Network(linear(), 10, 0.5), Network(Sound(), 10, 0.5)
    pair = Pair(old, new)
    image, keys = load("digits")[0][0][None], torch.tensor([5])
    first = torch.zeros(1, dtype=torch.int64)
    votes = pair(image, keys, first, 200)
    assert votes.shape == (200, 11)
    assert torch.equal(votes.sum(1), torch.ones(200))
    said, says = (net(image, keys, first, 200).argmax(1) for net in (old, new))
    assert torch.equal(votes.argmax(1), torch.where(said == says, 10, said))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n", 0], "--n is 0; it must be at least 1"),
        (["--alpha", 0.5], "--alpha is 0.5"),
        (["--seed", -1], "--seed is -1"),
        (["--before", "test_recertify:Sound"], "are not those that"),
        (["--model", "certified_models:Five"], "5 classes and the data 10"),
        (["--model", "certified_models:Dropped"], "dropout is active in eval mode"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_options(
    before: Path,
    args: list[object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = args if "--model" in args else ["--model", "test_recertify:Sound", *args]
    assert again(before, *given, "--out", tmp_path / "new.tsv") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not any(tmp_path.iterdir())


def test_files_that_cannot_be_carried_over(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "test_recertify:Sound"]

    def refused(path: Path, message: str, *more: object) -> None:
        assert again(path, *model, *more) == 2
        assert message in capsys.readouterr().err

    refused(tmp_path / "none.tsv", "cannot read")
    refused(before, "is the file to carry over", "--out", before)
    lines = before.read_text().splitlines(keepends=True)
    header = json.loads(records.header_path(before).read_text())
    copy = tmp_path / "copy.tsv"
    copy.write_text("".join(lines))
    refused(copy, "has no header copy.json beside it")
    records.header_path(copy).write_text(json.dumps({**header, "data_identity": "another"}))
    refused(copy, "data digits is not that of")
    records.header_path(copy).write_text(json.dumps(header))
    copy.write_text("".join(lines[:-2]))
    refused(copy, "holds 10 of its 12 images; finish that run first")
    # Another file to carry over is another run.
    copy.write_text("".join(lines))
    out = tmp_path / "new.tsv"
    args = ["--n", 32, "--seed", 3, "--out", out]
    assert again(copy, *model, *args) == 0
    with Part(copy):
        copy.write_text(copy.read_text().replace("\tcohen\t", "\tcohen-top2\t"))
    refused(copy, "holds another run: before is", *args)


def test_a_compiled_run_is_compared_as_compiled(
    before: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    header = json.loads(records.header_path(before).read_text())
    copy = tmp_path / "copy.tsv"
    copy.write_text(before.read_text())
    records.header_path(copy).write_text(json.dumps({**header, "compile": True}))
    translated: list[int] = []

    def compiles(self: Network, image: Tensor, rows: int) -> bool:
        translated.append(rows)
        return len(translated) == 1

    monkeypatch.setattr(Network, "compile", compiles)
    args = [copy, "--model", "test_recertify:Sound", "--n", 32, "--out", tmp_path / "new.tsv"]
    assert again(*args) == 0
    assert translated == [header["batch_size"]]
    # What does not translate here is another classifier than the one that was certified.
    assert again(*args) == 2
    assert "was certified with --compile" in capsys.readouterr().err
