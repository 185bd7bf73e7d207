# SPDX-License-Identifier: Apache-2.0
"""Saved states: a run goes on bit for bit, refuses other runs' states, survives a full disk."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import QUICK, assert_same, rows, stop

from nimfast.errors import UserError
from train.finetune import Finetune, finetune
from train.optim import Optimizer
from train.pretrain import Pretrain, pretrain
from train.state import States


@pytest.mark.parametrize("steps", [1, 5, 8, 11])
def test_resumed_run_equals_the_whole_one(steps: int, tmp_path: Path) -> None:
    # save_every 0.5: a state after every second step, so some lie within an epoch.
    settings = Pretrain(
        **QUICK, out=tmp_path / "whole.safetensors", ema=0.9, clip=0.5, save_every=0.5, resume=True
    )
    pretrain(settings)
    cut = replace(settings, out=tmp_path / "cut.safetensors")
    stop(pretrain, cut, steps)
    assert not cut.out.exists()
    found = [path.name for path in States(cut.out, 9).found()]
    assert found == [f"cut-step{n}.state" for n in range(steps // 2 * 2, 0, -2)]
    (tmp_path / "cut.jsonl").open("a").write('{"epoch": 2, "lo')  # a kill tears lines
    pretrain(cut)
    for name in ("{}.safetensors", "{}.ema.safetensors", "{}-step10.safetensors"):
        assert_same(tmp_path / name.format("whole"), tmp_path / name.format("cut"))
    assert rows(cut.out) == rows(settings.out)
    assert [row["epoch"] for row in rows(cut.out)] == [0, 1, 2]
    average, weights = load_file(tmp_path / "cut.ema.safetensors"), load_file(cut.out)
    assert not torch.equal(average["decoder_pred.weight"], weights["decoder_pred.weight"])


def test_resumed_finetuning_draws_the_same_drop_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One block, so its drop path is switched on by hand.
    monkeypatch.setattr("nimfast.models.vit.drop_path_rates", lambda last, depth: [0.5] * depth)
    common = {**QUICK, "epochs": 2, "save_every": 0.5, "resume": True, "validation_votes": 2}
    settings = Finetune(**common, out=tmp_path / "whole.safetensors")
    finetune(settings)
    cut = replace(settings, out=tmp_path / "cut.safetensors")
    stop(finetune, cut, 3)
    finetune(cut)
    assert_same(settings.out, cut.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.Run._seed", lambda self: None)
        finetune(replace(settings, out=tmp_path / "other.safetensors"))
    other = load_file(tmp_path / "other.safetensors")["head.weight"]
    assert not torch.equal(other, load_file(cut.out)["head.weight"])  # drop path does draw


def test_finished_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Pretrain(**QUICK, out=tmp_path / "x.safetensors", save_every=1.0)
    settings = replace(settings, keep=2)
    pretrain(settings)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "x-step8.safetensors", "x-step8.state", "x.jsonl", "x.safetensors", "x.state",
    ]  # fmt: skip
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Optimizer, "step", None)  # nobody may
    pretrain(replace(settings, resume=True))
    assert "finished already" in capfd.readouterr().out
    assert content == {path: path.read_bytes() for path in tmp_path.iterdir()}


def stopped(tmp_path: Path, **changes: Any) -> Pretrain:
    """Settings of a run that was stopped in its second epoch and has one state."""
    given = {**QUICK, "save_every": 1.0, **changes}
    settings = Pretrain(**given, out=tmp_path / "x.safetensors")
    stop(pretrain, settings, 6)
    return replace(settings, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 0.5}, "made with --mask-ratio 0.75, this command says 0.5; give the same"),
        ({"lr": 1e-3, "betas": (0.8, 0.9)}, "made with --lr 0.004, this command says 0.001"),
        ({"betas": (0.8, 0.9)}, "made with --betas 0.9 0.95, this command says 0.8 0.9"),
        ({"sigma": "0.25"}, "--sigma 0.5, this command says 0.25"),
        ({"epochs": 4}, "--epochs 3, this command says 4"),
        ({"init": Path("other.safetensors")}, "no checkpoint at other.safetensors"),
        ({"ema": 0.5}, "--ema 0.0, this command says 0.5"),
        ({"resume": False}, r"x-step4.state exists; go on from it with --resume"),
    ],
)
def test_states_of_other_settings_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = stopped(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        pretrain(replace(settings, **change))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_states_of_other_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stopped(tmp_path)
    with pytest.raises(UserError, match="was made by train.pretrain; choose another --out"):
        finetune(Finetune(**QUICK, out=settings.out, resume=True))
    monkeypatch.setattr("nimfast.data.digits.Digits.identity", lambda self: "other")
    with pytest.raises(UserError, match="made with other --data"):
        pretrain(settings)


def test_where_and_how_may_change(tmp_path: Path) -> None:
    settings = stopped(tmp_path)
    pretrain(replace(settings, workers=1, micro_batch=23, save_every=9.0, keep=1))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        ".jsonl",
        ".safetensors",
        ".state",
    ]


def test_damaged_state(tmp_path: Path) -> None:
    settings = stopped(tmp_path, save_every=0.5)
    newest = States(settings.out, 9).found()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(UserError, match="x-step6.state cannot be read .* remove it"):
        pretrain(settings)
    newest.unlink()
    pretrain(settings)
    assert settings.out.exists()


def test_full_disk(tmp_path: Path) -> None:
    settings = stopped(tmp_path, ema=0.9)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "x-step4.state").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(UserError, match=r"cannot save .*x-step8.safetensors \(File too large"):
            pretrain(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()  # nothing half written
    assert all(after[path] == before[path] for path in before if path.suffix != ".jsonl")
    pretrain(settings)
    pretrain(replace(settings, out=tmp_path / "whole.safetensors"))
    assert_same(settings.out, tmp_path / "whole.safetensors")


def test_full_disk_names_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    settings = stopped(tmp_path)
    monkeypatch.setattr("nimfast.models.checkpoint.replacing", full)
    with pytest.raises(UserError, match=r"x-step4.state is whole: make room .* --resume"):
        pretrain(settings)
    with pytest.raises(UserError, match="nothing was saved before; make room and start again"):
        pretrain(replace(settings, out=tmp_path / "y.safetensors"))
    assert [path.name for path in tmp_path.glob("*.state")] == ["x-step4.state"]


def test_state_without_weights_is_none(tmp_path: Path) -> None:
    settings = stopped(tmp_path)
    for name in ("x.state", "x-step8.state"):  # killed between the halves of a pair
        (tmp_path / name).write_bytes((tmp_path / "x-step4.state").read_bytes())
    stop(pretrain, settings, 2)
    assert not (tmp_path / "x-step8.state").exists()  # nobody would ever remove it
    pretrain(settings)
    assert [row["epoch"] for row in rows(settings.out)] == [0, 1, 2]


def test_half_written_files_are_swept_away(tmp_path: Path) -> None:
    left = tmp_path / ".x-step4.ema.safetensors.4711"
    other = tmp_path / ".x2.safetensors.4711"
    for path in (left, other):
        path.write_bytes(b"half")
    pretrain(Pretrain(**{**QUICK, "epochs": 1}, out=tmp_path / "x.safetensors"))
    assert not left.exists()
    assert other.exists()
