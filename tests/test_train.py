# SPDX-License-Identifier: Apache-2.0
"""Training: published losses, schedule and groups; draws that depend on nothing but their names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from scipy.special import gammaincinv
from torch import Tensor
from training_runs import COMMON

import train.finetune
import train.pretrain
import train.tasks
from nimfast import cli
from nimfast.corruption import Corruption, Purpose, SigmaLaw, gamma_quantile, uniform
from nimfast.data import digits
from nimfast.data.transforms import Augmentation, Skipped
from nimfast.errors import UserError
from nimfast.models import Architecture, ViT, load_classifier, patchify, removed_mask, take
from nimfast.models.checkpoint import read_checkpoint
from train.augment import Affine
from train.feed import batches
from train.finetune import Finetune, finetune
from train.losses import consistency
from train.optim import cosine, multistep, parameter_groups
from train.parallel import World
from train.pretrain import Pretrain, pretrain
from train.settings import recipes

REFERENCE = Path(__file__).parent / "reference"
CASES = json.loads((REFERENCE / "recipes.json").read_text())
ALONE = World(torch.device("cpu"))


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("setting", ["default", "sigma1"])
def test_consistency_equals_the_published_one(copies: int, setting: str) -> None:
    name = f"consistency_m{copies}"
    ref = load_file(REFERENCE / f"{name}.safetensors")
    weights = CASES[name][setting]
    logits = ref["logits"].transpose(0, 1).clone().requires_grad_()  # [B, m, K]
    loss = consistency(logits, weights["lbd"], weights["eta"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), ref[f"loss.{setting}"], rtol=1e-5, atol=1e-6)
    gradient = logits.grad.transpose(0, 1)
    torch.testing.assert_close(gradient, ref[f"grad.{setting}"], rtol=1e-4, atol=1e-6)


def test_schedule_equals_the_published_one() -> None:
    case = CASES["cosine_schedule"]
    for epoch, rate in case["points"]:
        ours = cosine(epoch, case["epochs"], case["warmup_epochs"], case["lr"], case["min_lr"])
        assert ours == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_layer_decay_equals_the_published_one() -> None:
    case = CASES["layer_decay"]
    arch = Architecture((32, 32), patch=8, width=48, depth=case["depth"], heads=3)
    model = ViT(arch, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = 0
    for group in parameter_groups(model, case["weight_decay"], case["layer_decay"]):
        for parameter in group["params"]:
            name = names[id(parameter)].replace("fc_norm", "norm")
            name = re.sub(r"^patch_embed\.", "patch_embed.proj.", name)
            assert [group["scale"], group["weight_decay"]] == pytest.approx(case["params"][name])
            seen += 1
    assert seen == len(names) == len(case["params"]) - 1  # ours has no learned positions


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("0.25", 0.25, 0.25, 0.25),
        ("75/255", 75 / 255, 75 / 255, 75 / 255),
        ("uniform(0, 0.75)", 0.0, 0.75, 0.375),
        ("uniform(50,100)/255", 50 / 255, 100 / 255, 75 / 255),
        ("gamma(25,3)/255", 0.0, 1.0, 75 / 255),
        ("gamma(3,25)/255", 0.0, 2.0, 75 / 255),
    ],
)
def test_sigma_laws(text: str, low: float, high: float, mean: float) -> None:
    law = SigmaLaw.parse(text)
    assert law.mean == pytest.approx(mean)
    draws = law.draw(3, torch.arange(20_000), 5)
    assert draws.min() >= low - 1e-6
    assert draws.max() <= high + 1e-6
    assert draws.mean().item() == pytest.approx(mean, rel=0.02)
    if law.kind == "gamma":
        assert draws.std().item() == pytest.approx(law.second * law.first**0.5, rel=0.03)
    if law.kind == "uniform":
        assert draws.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
    assert torch.equal(law.draw(3, torch.tensor([77, 5]), 5), draws[[77, 5]])


@pytest.mark.parametrize("shape", [0.05, 0.3, 1.0, 25.0, 1e4])
def test_gamma_quantiles_equal_scipy(shape: float) -> None:
    ends = torch.tensor([2.0**-33, 1.5 * 2.0**-32, 0.5, 1 - 2.0**-33], dtype=torch.float64)
    inside = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.cat([ends, inside])
    exact = torch.from_numpy(gammaincinv(shape, u.numpy()))
    torch.testing.assert_close(gamma_quantile(shape, u), exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("text", ["", "-1", "gamma(25)", "uniform(1,1)", "0.1,0.2", "normal(1,2)"])
def test_unreadable_sigma(text: str) -> None:
    with pytest.raises(UserError, match="noise level"):
        SigmaLaw.parse(text)


def test_corruption_depends_on_the_image_alone() -> None:
    images, indices = torch.rand(6, 1, 16, 16), torch.tensor([4, 9, 2, 700, 1, 0])
    corruption = Corruption(SigmaLaw.parse("uniform(0.1,0.6)"), 0.75, 11, (0.3,), (0.4,))
    whole = corruption(images, indices, 3, 4, copies=2)
    assert whole.rows.shape == (12, 4, 16)
    assert whole.keep is not None and whole.removed is not None
    assert whole.keep.shape == (12, 4)
    assert torch.equal(whole.removed, removed_mask(whole.keep, 16))
    part = corruption(images[[3, 1]], indices[[3, 1]], 3, 4, copies=2)
    places = [6, 7, 2, 3]
    assert torch.equal(part.rows, whole.rows[places])
    assert torch.equal(part.keep, whole.keep[places])
    later = corruption(images, indices, 4, 4, copies=2)
    assert not torch.equal(later.rows, whole.rows)
    assert not torch.equal(later.keep, whole.keep)
    assert not torch.equal(whole.keep[::2], whole.keep[1::2])
    # Rows and whole images hold the same noise.
    noisy = corruption.noisy(images, indices, 3, copies=2)
    assert torch.equal(take(patchify(noisy, 4), whole.keep), whole.rows)
    # Copies of an image share the noise level and differ in noise and mask.
    noise = (noisy * 0.4 + 0.3).view(6, 2, -1) - images.view(6, 1, -1)
    sigma = corruption.sigma.draw(11, indices, 3)
    torch.testing.assert_close(noise.std(-1), sigma[:, None].expand(-1, 2), rtol=0.2, atol=0)
    assert (noise[:, 0] - noise[:, 1]).abs().mean() > 0.05


def test_masks_are_uniform() -> None:
    corruption = Corruption(SigmaLaw.parse("0"), 0.75, 0, (0.0,), (1.0,))
    masks = corruption.masks(torch.arange(4000), 0, 1, 16)
    assert masks is not None
    keep = masks.kept
    assert (keep.diff(dim=1) > 0).all()  # in order, none twice
    share = keep.flatten().bincount(minlength=16) / 4000
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    with pytest.raises(ValueError, match="keeps none"):
        corruption.masks(torch.arange(2), 0, 1, 3)


def test_purposes_never_share_draws() -> None:
    draws = [uniform(0, purpose, torch.arange(50), 4, 0) for purpose in Purpose]
    values = torch.stack(draws).flatten()
    assert len(values.unique()) == len(values)
    assert 0 < values.min() < values.max() < 1


def test_augmentation() -> None:
    data = digits.load("train")
    images = torch.stack([data[i][0] for i in range(8)])
    indices = torch.arange(8)
    affine = Affine(shift=3, rotate=12, scale=0.1, shear=0.1)
    moved = affine(images, indices, 2, 0)
    assert moved.shape == images.shape
    assert 0 <= moved.min() < moved.max() <= 1 + 1e-6
    assert torch.equal(affine(images[5:6], indices[5:6], 2, 0), moved[5:6])
    assert not torch.equal(affine(images, indices, 3, 0), moved)
    torch.testing.assert_close(Affine(shift=1e-9)(images, indices, 0, 0), images, rtol=0, atol=1e-5)
    assert Affine()(images, indices, 0, 0) is images


def order(settings: Pretrain, world: World = ALONE, first: int = 0) -> list[Tensor]:
    data = digits.load("train")
    return [batch.indices for batch in batches(data, settings, world, Skipped(data), first)]


def test_batches_do_not_depend_on_workers() -> None:
    settings = Pretrain(
        **COMMON, out=Path("unused"), epochs=2, batch_size=400, augment=Affine(shift=2)
    )
    data = digits.load("train")
    alone = list(batches(data, settings, ALONE, Skipped(data)))
    shared = list(batches(data, replace(settings, workers=2), ALONE, Skipped(data)))
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    epochs = [torch.cat([batch.indices for batch in alone[i : i + 2]]) for i in (0, 2)]
    assert len(epochs[0].unique()) == 800
    assert not torch.equal(*epochs)
    same = alone[0].indices[0] == torch.cat([batch.indices for batch in alone[2:]])
    if same.any():  # another epoch, another shift
        assert not torch.equal(alone[0].images[0], torch.cat([b.images for b in alone[2:]])[same])


def test_batches_begin_anywhere_and_split() -> None:
    settings = Pretrain(**COMMON, out=Path("unused"), epochs=2, batch_size=240)
    whole = order(settings)  # 4 steps of an epoch
    assert len(whole) == 8
    assert all(map(torch.equal, whole[5:], order(settings, first=5)))
    assert order(settings, first=8) == []
    # Every step's images are those of the one process, however many share them.
    cpu, small = torch.device("cpu"), replace(settings, micro_batch=60)
    parts = [order(small, World(cpu, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        mine = [torch.cat(part[2 * step : 2 * step + 2]) for part in parts]
        assert torch.equal(torch.cat(mine), batch)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "parts", "nearest"),
    [
        (4096, None, 8, (512, 1), None),
        (4096, 64, 8, (64, 8), None),
        (100, None, 1, (100, 1), None),
        (100, None, 3, None, 99),
        (4096, 100, 4, None, 4000),
        (10, 64, 1, None, 64),
        (2, None, 4, None, 4),
    ],
)
def test_split_of_the_batch(
    batch: int, micro: int | None, processes: int, parts: tuple[int, int] | None, nearest: int
) -> None:
    settings = Pretrain(**COMMON, out=Path("unused"), batch_size=batch, micro_batch=micro)
    if parts:
        assert settings.split_batch(processes) == parts
        return
    with pytest.raises(UserError, match=f"cannot be reached.*--batch-size {nearest}$"):
        settings.split_batch(processes)
    replace(settings, batch_size=nearest).split_batch(processes)  # as it was told, it works


def test_multistep_schedule() -> None:
    rates = [multistep(epoch, 800, 10, 2.0, (0.875, 0.95)) for epoch in (0, 5, 10, 699.9, 700, 760)]
    assert rates == pytest.approx([0, 1, 2, 2, 0.2, 0.02])


def test_pretrain_then_finetune(tmp_path: Path) -> None:
    """The whole way, twice: the loss falls, the files are complete, and a repeat is the same."""
    finals = []
    for attempt in "ab":
        first, second = tmp_path / f"{attempt}_mae.safetensors", tmp_path / f"{attempt}.safetensors"
        pretrain(Pretrain(**COMMON, out=first, epochs=2, batch_size=128, lr=4e-3))
        settings = Finetune(**COMMON, out=second, init=first, epochs=2, batch_size=128, lr=8e-3)
        finetune(replace(settings, layer_decay=1.0, drop_path=0.0, consistency=0.0, entropy=0.0))
        for log in (first, second):
            rows = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
            assert [row["epoch"] for row in rows] == [0, 1]
            assert rows[1]["loss"] < rows[0]["loss"]
        state, header = read_checkpoint(second)
        assert header["sigma"] == 0.5
        assert header["pretraining"]["settings"]["mask_ratio"] == 0.75
        assert set(header["validation"]) == {"epoch", "clean", "vote", "right_votes"}
        finals.append(state)
        classifier = load_classifier(str(second), num_classes=10, shape=(1, 32, 32))
        assert classifier.sigma == 0.5
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    encoder, _ = read_checkpoint(tmp_path / "a_mae.safetensors")
    fresh = ViT(Architecture(**header["architecture"]), 10).state_dict()
    tuned, name = finals[0], "blocks.0.mlp.fc1.weight"
    assert (tuned[name] - encoder[name]).norm() < (fresh[name] - encoder[name]).norm() / 2


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Pretrain, {"model": "giant"}, "unknown architecture 'giant'"),
        (Pretrain, {"data": "cats"}, "unknown data"),
        (Pretrain, {"patch": 5}, "no multiple of patch 5"),
        (Pretrain, {"mask_ratio": 1.0}, "--mask-ratio"),
        (Pretrain, {"mask_ratio": -0.1}, "--mask-ratio"),
        (Pretrain, {"mask_ratio": 0.9}, "leaves none of 4 patches"),
        (Pretrain, {"mask_ratio": 0.0, "region": "removed"}, "--region removed"),
        (Pretrain, {"sigma": "-0.25"}, "noise level '-0.25'"),
        (Pretrain, {"patch": 64}, "no multiple of patch 64"),
        (Pretrain, {"network": "simmim", "patch": 8}, "leaves none of 1 squares"),
        (Pretrain, {"network": "simmim", "patch": 8, "mask_unit": 12}, "--mask-unit 12 must div"),
        (Pretrain, {"network": "simmim", "layer_decay": 0.5}, "--layer-decay"),
        (Pretrain, {"micro_batch": 100}, "--batch-size 100"),
        (Pretrain, {"micro_batch": 0}, "--micro-batch must be positive"),
        (Pretrain, {"save_every": 0.0}, "--save-every must be positive"),
        (Pretrain, {"clip": -1.0}, "--clip must not be negative"),
        (Pretrain, {"pictures": Augmentation(crop_scale=(0.5, 0.2))}, "--crop-scale"),
        (Pretrain, {"ema": 1.0}, "--ema must lie in"),
        (Pretrain, {"milestones": (700.0,)}, "--milestones are shares"),
        (Pretrain, {"validate_every": -1}, "--validate-every"),
        (Pretrain, {"mean": (0.1, 0.2, 0.3)}, "--mean and --std"),
        (Pretrain, {"batch_size": 5000}, "--batch-size must be at most 1197"),
        (Pretrain, {"warmup": 9.0}, "--warmup"),
        (Pretrain, {"out": Path("model.pt")}, "must end in .safetensors"),
        (Finetune, {"epochs": 0}, "--epochs must be positive"),
        (Finetune, {"sigma": "0"}, "--copies 2 without noise are equal"),
        (Finetune, {"seed": -1}, "--seed must lie in"),
        (Finetune, {"validate_every": 0}, "--validate-every"),
        (Finetune, {"copies": 1}, "at least 2 noisy copies"),
        (Finetune, {"init": Path("missing.safetensors")}, "no checkpoint at"),
    ],
)
def test_bad_settings(
    kind: type[Pretrain | Finetune],
    change: dict[str, object],
    message: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "new" / "model.safetensors"
    run = pretrain if kind is Pretrain else finetune
    settings = {**COMMON, "out": out, "epochs": 2, "batch_size": 128, **change}
    with pytest.raises(UserError, match=message):
        run(kind(**settings))
    assert not out.parent.exists()  # refused before anything was made


def test_images_on_the_gpu_need_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.Digits, "on_gpu", True)
    with pytest.raises(UserError, match="give --workers 0"):
        pretrain(Pretrain(**COMMON, out=tmp_path / "x.safetensors", epochs=1, workers=1))


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        pretrain(Pretrain(**COMMON, out=out, epochs=2, batch_size=128))
    assert out.read_bytes() == b"precious"


def test_command_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(script: ModuleType, *words: str) -> int:
        kind, main = (Pretrain, pretrain) if script is train.pretrain else (Finetune, finetune)
        with pytest.raises(SystemExit) as done:
            cli.run(main, recipes(kind, script.RECIPES), script.__name__, "", args=words)
        return done.value.code

    missing, out = str(tmp_path / "missing.safetensors"), str(tmp_path / "out.safetensors")
    assert run(train.finetune, "cr", "--data", "digits", "--init", missing, "--out", out) == 2
    assert re.fullmatch("error: no checkpoint at .*\n", capfd.readouterr().err)
    assert run(train.pretrain, "nim-mae", "--help") == 0
    assert "gamma(25,3)/255" in capfd.readouterr().out
    assert run(train.pretrain, "nonsense") == 2
