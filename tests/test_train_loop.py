# SPDX-License-Identifier: Apache-2.0
"""The training loop: stops and goes on bit for bit, survives a full disk, skips bad gradients."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nimfast import cli
from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models.checkpoint import read_checkpoint
from train.finetune import Finetune, finetune
from train.losses import Reconstruction
from train.optim import PATIENCE, Optimizer
from train.pretrain import Pretrain, pretrain
from train.settings import Settings, recipes
from train.state import States

COMMON: dict[str, Any] = {
    "data": "digits",
    "model": "digits",
    "sigma": "0.5",
    "mean": (0.3,),
    "std": (0.4,),
    "warmup": 0.0,
    "precision": "fp32",
    "device": "cpu",
    "epochs": 3,
    "batch_size": 299,  # 4 steps of an epoch
    "lr": 4e-3,
    "keep": 9,
}


class Stop(Exception):
    """The run ends here, as if it had been killed."""


def stop(main: Callable[[Any], None], settings: Settings, steps: int) -> None:
    """Run `main` until `steps` steps are made."""
    made, step = [0], Optimizer.step

    def counted(self: Optimizer, rate: float) -> Tensor:
        if made[0] == steps:
            raise Stop
        made[0] += 1
        return step(self, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", counted)
        with pytest.raises(Stop):
            main(settings)


def rows(out: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock."""
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """`value`, but for the bias of attention keys.

    It moves no output, so its gradient is rounding alone, which Adam makes as large as any other.
    """
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("steps", [1, 5, 8, 11])
def test_resumed_run_equals_the_whole_one(steps: int, tmp_path: Path) -> None:
    # save_every 0.5: a state after every second step, so some lie within an epoch.
    settings = Pretrain(
        **COMMON, out=tmp_path / "whole.safetensors", ema=0.9, clip=0.5, save_every=0.5, resume=True
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
    common = {**COMMON, "epochs": 2, "save_every": 0.5, "resume": True, "validation_votes": 2}
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
    settings = Pretrain(**COMMON, out=tmp_path / "x.safetensors", save_every=1.0)
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
    given = {**COMMON, "save_every": 1.0, **changes}
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
        finetune(Finetune(**COMMON, out=settings.out, resume=True))
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
    pretrain(Pretrain(**{**COMMON, "epochs": 1}, out=tmp_path / "x.safetensors"))
    assert not left.exists()
    assert other.exists()


def bad_losses(bad: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of the calls that `bad` chooses infinite."""
    calls, loss = [0], Reconstruction.__call__

    def broken(self: Reconstruction, *args: Any) -> Tensor:
        calls[0] += 1
        factor = float("inf") if bad(calls[0] - 1) else 1.0
        return loss(self, *args) * factor

    monkeypatch.setattr(Reconstruction, "__call__", broken)


def test_bad_gradients_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Pretrain(**COMMON, out=tmp_path / "x.safetensors")
    bad_losses(lambda call: 1 <= call < PATIENCE, monkeypatch)  # nine in a row, in three epochs
    pretrain(settings)
    assert [row["skipped"] for row in rows(settings.out)] == [3, 7, 9]
    assert [row["loss"] is None for row in rows(settings.out)] == [False, True, False]
    assert all(value.isfinite().all() for value in load_file(settings.out).values())


def test_bad_gradients_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Pretrain(**COMMON, out=tmp_path / "x.safetensors", save_every=1.0)
    bad_losses(lambda call: call >= 2, monkeypatch)
    with pytest.raises(UserError, match="not finite in 10 steps in a row; lower --lr"):
        pretrain(settings)
    newest = load_file(tmp_path / "x-step8.safetensors")
    assert all(value.isfinite().all() for value in newest.values())


def linear(start: float, **changes: Any) -> tuple[nn.Linear, Optimizer]:
    model = nn.Linear(3, 2, bias=False)
    nn.init.constant_(model.weight, start)
    settings = Pretrain(**{**COMMON, **changes}, out=Path("x"))
    return model, Optimizer(model, settings, torch.device("cpu"))


def test_clipping_limits_the_norm_of_the_gradient() -> None:
    for clip, expected in ((0.0, 10.0), (2.0, 2.0), (20.0, 10.0)):
        model, optimizer = linear(1.0, clip=clip, betas=(0.5, 0.9), weight_decay=0.0)
        model.weight.grad = torch.full((2, 3), 10 / 6**0.5)
        optimizer.step(1e-3)
        momentum = optimizer.adamw.state[model.weight]["exp_avg"]  # half the gradient
        assert momentum.norm().item() == pytest.approx(expected / 2, rel=1e-4)


def test_moving_average() -> None:
    model, optimizer = linear(1.0, ema=0.75)
    expected = model.weight.detach().clone()
    for value in (1.0, -2.0, 3.0):
        model.weight.grad = torch.full((2, 3), value)
        optimizer.step(0.1)
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    assert optimizer.average is not None
    torch.testing.assert_close(optimizer.average.weight.detach(), expected)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    settings = Pretrain(**{**COMMON, "epochs": 1}, out=tmp_path / "whole.safetensors")
    pretrain(settings)
    parts = replace(settings, out=tmp_path / "parts.safetensors", micro_batch=23)
    pretrain(parts)
    one, other = load_file(settings.out), load_file(parts.out)
    for name in one:
        first, second = without_key_bias(name, one[name]), without_key_bias(name, other[name])
        torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-5)
    losses = [rows(run.out)[0]["loss"] for run in (settings, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("network", ["mae", "simmim"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.6])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_network_learns(
    network: str, mask_ratio: float, precision: str, tmp_path: Path
) -> None:
    changes = {"network": network, "mask_ratio": mask_ratio, "precision": precision}
    settings = Pretrain(
        **{**COMMON, **changes},
        out=tmp_path / "x.safetensors",
        patch=8,
        mask_unit=8,
        p=1 if network == "simmim" else 2,
        region="removed" if mask_ratio else "all",
        norm_pix=network == "mae",
        validate_every=1,
    )
    pretrain(settings)
    told = rows(settings.out)
    assert told[2]["loss"] < told[0]["loss"]
    assert told[2]["validation"] < told[0]["validation"]
    header = read_checkpoint(settings.out)[1]
    assert header["settings"]["network"] == network
    assert header["epochs_done"] == 3


def test_init_continues_from_a_checkpoint(tmp_path: Path) -> None:
    first = Pretrain(**{**COMMON, "epochs": 1}, out=tmp_path / "first.safetensors")
    pretrain(first)
    second = replace(
        first, out=tmp_path / "second.safetensors", init=first.out, model="base", lr=1e-12
    )
    pretrain(replace(second, mean=(0.9,)))  # architecture and normalisation are the file's
    one, other = load_file(first.out), load_file(second.out)
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    assert read_checkpoint(second.out)[1]["mean"] == [0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"network": "simmim"}, "change --network"), ({"data": "big"}, "takes 1x32x32 images")],
)
def test_init_that_does_not_fit(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Pretrain(**{**COMMON, "epochs": 1}, out=tmp_path / "first.safetensors")
    pretrain(first)
    monkeypatch.setattr("train.settings.datasets.load", lambda spec, split: Big(spec))
    with pytest.raises(UserError, match=message):
        pretrain(replace(first, out=tmp_path / "x.safetensors", init=first.out, **change))


class Big(digits.Digits):
    """The digits, or twice as large."""

    def __init__(self, spec: str) -> None:
        super().__init__("train")
        self.shape = (1, 64, 64) if spec == "big" else self.shape


def test_init_of_something_else(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    settings = Pretrain(**COMMON, out=tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not an autoencoder"):
        pretrain(replace(settings, init=tmp_path / "foreign.safetensors"))


def test_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.Digits, "classes", ("0",))
    with pytest.raises(UserError, match="has one class"):
        finetune(Finetune(**COMMON, out=tmp_path / "x.safetensors"))
    pretrain(Pretrain(**{**COMMON, "epochs": 1}, out=tmp_path / "x.safetensors"))


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Pretrain(**{**COMMON, "epochs": 2}, out=tmp_path / "x.safetensors", tensorboard=True)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install tensorboard"):
            pretrain(settings)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(settings)
    events = accumulator.EventAccumulator(str(tmp_path / "x")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["epoch"], pytest.approx(row["loss"])) for row in rows(settings.out)]


@pytest.mark.parametrize(
    ("micro", "message"),
    [(23, "memory for 23 images at once; lower --micro-batch"), (1, "choose a smaller --model")],
)
def test_out_of_memory_says_what_helps(
    micro: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Reconstruction, *args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Reconstruction, "__call__", full)
    settings = Pretrain(**COMMON, out=tmp_path / "x.safetensors", micro_batch=micro)
    with pytest.raises(UserError, match=message):
        pretrain(settings)


def test_processes_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start with torchrun"):
        pretrain(Pretrain(**COMMON, out=tmp_path / "x.safetensors"))


def test_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from train.loop import ON_INTERRUPT
    from train.pretrain import RECIPES

    def interrupt(self: Reconstruction, *args: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reconstruction, "__call__", interrupt)
    out = tmp_path / "x.safetensors"
    monkeypatch.setattr(sys, "argv", ["pretrain", "digits-demo", "--out", str(out)])
    with pytest.raises(SystemExit) as done:
        cli.run(pretrain, recipes(Pretrain, RECIPES), "pretrain", "", on_interrupt=ON_INTERRUPT)
    assert done.value.code == 130
    assert capfd.readouterr().err == f"error: interrupted; {ON_INTERRUPT}\n"
