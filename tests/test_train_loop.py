# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, accumulation, bad gradients, averages, and what it starts from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_runs import QUICK, rows, without_key_bias

from nimfast import cli
from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models.checkpoint import read_checkpoint
from train.finetune import Finetune, finetune
from train.losses import Reconstruction
from train.optim import PATIENCE, Optimizer
from train.pretrain import Pretrain, pretrain
from train.settings import recipes


def bad_losses(bad: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the losses of the calls that `bad` chooses infinite."""
    calls, loss = [0], Reconstruction.__call__

    def broken(self: Reconstruction, *args: Any) -> Tensor:
        calls[0] += 1
        factor = float("inf") if bad(calls[0] - 1) else 1.0
        return loss(self, *args) * factor

    monkeypatch.setattr(Reconstruction, "__call__", broken)


def test_bad_gradients_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Pretrain(**QUICK, out=tmp_path / "x.safetensors")
    bad_losses(lambda call: 1 <= call < PATIENCE, monkeypatch)  # nine in a row, in three epochs
    pretrain(settings)
    assert [row["skipped"] for row in rows(settings.out)] == [3, 7, 9]
    assert [row["loss"] is None for row in rows(settings.out)] == [False, True, False]
    assert all(value.isfinite().all() for value in load_file(settings.out).values())


def test_bad_gradients_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Pretrain(**QUICK, out=tmp_path / "x.safetensors", save_every=1.0)
    bad_losses(lambda call: call >= 2, monkeypatch)
    with pytest.raises(UserError, match="not finite in 10 steps in a row; lower --lr"):
        pretrain(settings)
    newest = load_file(tmp_path / "x-step8.safetensors")
    assert all(value.isfinite().all() for value in newest.values())


def linear(
    start: float, average: nn.Linear | None = None, **changes: Any
) -> tuple[nn.Linear, Optimizer]:
    model = nn.Linear(3, 2, bias=False)
    nn.init.constant_(model.weight, start)
    settings = Pretrain(**{**QUICK, **changes}, out=Path("x"))
    return model, Optimizer(model, settings, torch.device("cpu"), average)


def test_clipping_limits_the_norm_of_the_gradient() -> None:
    for clip, expected in ((0.0, 10.0), (2.0, 2.0), (20.0, 10.0)):
        model, optimizer = linear(1.0, clip=clip, betas=(0.5, 0.9), weight_decay=0.0)
        model.weight.grad = torch.full((2, 3), 10 / 6**0.5)
        optimizer.step(1e-3)
        momentum = optimizer.inner.state[model.weight]["exp_avg"]  # half the gradient
        assert momentum.norm().item() == pytest.approx(expected / 2, rel=1e-4)


def test_moving_average() -> None:
    average = linear(1.0)[0].requires_grad_(False)
    model, optimizer = linear(1.0, average, ema=0.75)
    expected = model.weight.detach().clone()
    for value in (1.0, -2.0, 3.0):
        model.weight.grad = torch.full((2, 3), value)
        optimizer.step(0.1)
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    torch.testing.assert_close(average.weight.detach(), expected)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    settings = Pretrain(**{**QUICK, "epochs": 1}, out=tmp_path / "whole.safetensors")
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
        **{**QUICK, **changes},
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
    first = Pretrain(**{**QUICK, "epochs": 1}, out=tmp_path / "first.safetensors")
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
    first = Pretrain(**{**QUICK, "epochs": 1}, out=tmp_path / "first.safetensors")
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
    settings = Pretrain(**QUICK, out=tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not an autoencoder"):
        pretrain(replace(settings, init=tmp_path / "foreign.safetensors"))


def test_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.Digits, "classes", ("0",))
    with pytest.raises(UserError, match="has one class"):
        finetune(Finetune(**QUICK, out=tmp_path / "x.safetensors"))
    pretrain(Pretrain(**{**QUICK, "epochs": 1}, out=tmp_path / "x.safetensors"))


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Pretrain(**{**QUICK, "epochs": 2}, out=tmp_path / "x.safetensors", tensorboard=True)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="needs it: pip install"):
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
    settings = Pretrain(**QUICK, out=tmp_path / "x.safetensors", micro_batch=micro)
    with pytest.raises(UserError, match=message):
        pretrain(settings)


def test_processes_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start with torchrun"):
        pretrain(Pretrain(**QUICK, out=tmp_path / "x.safetensors"))


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


def test_threads_are_the_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    loss = Reconstruction.__call__

    def watched(self: Reconstruction, *args: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return loss(self, *args)

    monkeypatch.setattr(Reconstruction, "__call__", watched)
    chosen = before + 1
    pretrain(Pretrain(**{**QUICK, "epochs": 1, "threads": chosen}, out=tmp_path / "x.safetensors"))
    assert seen == [chosen] * 4
    assert torch.get_num_threads() == before
