# SPDX-License-Identifier: Apache-2.0
"""Reconstruction: the published numbers, what each statistics mode computes, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference_files import hints, read_case
from torch import Tensor

from nimfast import reconstruct as command
from nimfast.commands import reconstruct as work
from nimfast.corruption import SigmaLaw
from nimfast.data import load
from nimfast.denoiser import Subject, look
from nimfast.errors import UserError
from nimfast.models import (
    MAE,
    Architecture,
    PatchModel,
    SimMIM,
    SimMIMArchitecture,
    patchify,
)
from nimfast.models.checkpoint import save_checkpoint
from nimfast.models.published import from_published
from nimfast.ops import Stream, corrupt, image_keys, recon_loss
from nimfast.reconstruct import Config, main
from nimfast.restoration import predict, psnr, reconstruct, restore, statistics

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = Architecture((32, 32), 1, 8, 32, 1, 1, False, 32, 1, 1)
SCALE = {"mean": (0.3,), "std": (0.4,)}
TRAINED = {"sigma": "0.25", "mask_ratio": 0.0, "norm_pix": True, "region": "all", "p": 2}


class Perfect(MAE):
    """Predicts what it is told to."""

    rows_to_predict: Tensor

    def forward(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.rows_to_predict


def digits(count: int) -> Tensor:
    data = load("digits")
    return torch.stack([data[index][0] for index in range(count)])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_equals_the_published_one(shared_reference: Path, norm_pix: bool) -> None:
    content, state, case = read_case(shared_reference, f"nim_mae_normpix{int(norm_pix)}")
    model = from_published(state, "reference", hints(case))
    mean, std = (torch.tensor(IMAGENET[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = content["imgs"] * std + mean  # the file's are normalised
    with torch.inference_mode():
        prediction = predict(model, content["noisy"])
        sigma = case["sigma_255"] / 255
        stats = "input" if norm_pix else "none"
        pixels = restore(prediction, content["noisy"], images, sigma, stats=stats, **IMAGENET)
        loss = recon_loss(prediction, images, patch=8, norm_pix=norm_pix, **IMAGENET)
    torch.testing.assert_close((pixels - mean) / std, content["rec"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, content["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_de3_by_restore_equals_the_published_one(shared_reference: Path, norm_pix: bool) -> None:
    """Clamped and classified: logits, and the gradient that an attacker gets."""
    content, _, case = read_case(shared_reference, f"de3_normpix{int(norm_pix)}")

    def network(part: str) -> PatchModel:
        state = {k.removeprefix(part): v for k, v in content.items() if k.startswith(part)}
        return from_published(state, part, hints(case)).eval()

    denoiser, classifier = network("denoiser."), network("classifier.")
    mean, std = (torch.tensor(IMAGENET[name]).view(-1, 1, 1) for name in ("mean", "std"))
    normalised, sigma = content["imgs"].clone().requires_grad_(), case["sigma_255"] / 255
    noisy = normalised + content["noise"] * sigma / std
    stats = "input" if norm_pix else "none"
    images = normalised * std + mean
    pixels = restore(predict(denoiser, noisy), noisy, images, sigma, stats=stats, **IMAGENET)
    logits = classifier((pixels.clamp(0, 1) - mean) / std)
    torch.testing.assert_close(logits, content["logits"], rtol=1e-4, atol=1e-5)
    torch.nn.functional.cross_entropy(logits, content["labels"]).backward()
    expected = content["input_grad"]
    torch.testing.assert_close(
        normalised.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
    )


def test_a_perfect_prediction_gives_the_image_back() -> None:
    """With the clean patch's statistics exactly, with the noisy patch's nearly."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = Perfect(replace(SMALL, channels=3, patch=16))
    keys = image_keys(0, Stream.EVALUATION, torch.arange(2))
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.4)}
    mean, std = (torch.tensor(options[name]).view(-1, 1, 1) for name in ("mean", "std"))
    clean = patchify((images - mean) / std, 16)
    variance, average = torch.var_mean(clean, -1, keepdim=True)
    model.rows_to_predict = (clean - average) / (variance + 1e-6).sqrt()
    exact = reconstruct(model, images, keys, 0.5, stats="input", **options)
    torch.testing.assert_close(exact, images, rtol=0, atol=1e-5)
    nearly = reconstruct(model, images, keys, 0.5, stats="noisy", **options)
    assert 1e-3 < (nearly - images).abs().mean() < 0.06
    # Without noise the two are one; levels may differ from image to image.
    levels = torch.tensor([0.0, 0.5])
    mixed = reconstruct(model, images, keys, levels, stats="noisy", **options)
    torch.testing.assert_close(mixed[0], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], nearly[1], rtol=0, atol=1e-5)
    # A prediction of pixels needs no statistics.
    model.rows_to_predict = clean
    pixels = reconstruct(model, images, keys, 0.5, stats="none", **options)
    torch.testing.assert_close(pixels, images, rtol=0, atol=1e-5)


def test_variance_of_the_noise_is_taken_off() -> None:
    """Over many patches the corrected variance is right on average, channel by channel noise."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = image.expand(400, 3, 32, 32)
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.4)}
    keys = image_keys(1, Stream.EVALUATION, torch.arange(400))
    noisy = corrupt(images, keys, 0.2, **options)
    ones = torch.ones(400, 1, 3 * 32 * 32)
    # Of a prediction of ones, pixels are (sqrt(variance) + mean) * std + channel mean.
    pixels = restore(ones, noisy, images, 0.2, stats="noisy", **options)
    expected = restore(ones, noisy, images, 0.2, stats="input", **options)
    assert (pixels - expected).mean().abs() < 0.003
    uncorrected = restore(ones, noisy, images, 0.0, stats="noisy", **options)
    assert (uncorrected - expected).mean() > 0.05


def test_gradient_reaches_the_image() -> None:
    """De3's attacker differentiates through noise and autoencoder; statistics carry some of it."""
    torch.manual_seed(0)
    model = MAE(SMALL)
    keys = image_keys(0, Stream.EVALUATION, torch.arange(2))
    found = []
    for stats in ("input", "noisy", "none"):
        images = digits(2).requires_grad_()
        reconstruct(model, images, keys, 0.3, stats=stats, **SCALE).sum().backward()
        assert images.grad is not None and images.grad.abs().sum() > 0
        found.append(images.grad)
    assert not torch.allclose(found[0], found[2])


def test_removed_patches_do_not_matter() -> None:
    torch.manual_seed(0)
    images, keys = digits(2), image_keys(0, Stream.EVALUATION, torch.arange(2))
    keep = torch.tensor([[0, 3, 5], [1, 2, 15]])
    swin = SimMIMArchitecture((32, 32), 1, 4, 16, (1, 1), (2, 2), 4)
    for model in (
        MAE(SMALL),
        SimMIM(swin),
        SimMIM(SimMIMArchitecture((32, 32), 1, 8, 16, (1,), (2,))),
    ):
        noisy = corrupt(images, keys, 0.2, **SCALE)
        rows = model.rows(noisy)
        first = predict(model, noisy, keep)
        assert first.shape == (2, (32 // model.predicted_patch) ** 2, model.predicted_patch**2)
        hidden = torch.ones(rows.shape[:2], dtype=torch.bool).scatter_(1, keep, False)
        assert int(hidden.sum()) == 2 * (rows.shape[1] - 3)
        changed = torch.where(hidden[..., None], torch.randn_like(rows), rows)
        model.rows = lambda _, changed=changed: changed
        torch.testing.assert_close(predict(model, noisy, keep), first)


def test_psnr() -> None:
    image = torch.zeros(2, 1, 4, 4)
    other = torch.full_like(image, 0.1)
    other[1] = 0
    assert psnr(image, other).tolist() == pytest.approx([20.0, float("inf")])


def subject(model: MAE | SimMIM, **changes: object) -> Subject:
    plain = Subject(
        model.eval(), (0.3,), (0.4,), True, 2, False, SigmaLaw("fixed", 0.25), ("input", "noisy"),
        0.0, 8, torch.device("cpu"), torch.float32, 0,
    )  # fmt: skip
    return plain._replace(**changes)


def test_an_outcome_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    images, places = digits(6), torch.arange(6)
    for ratio in (0.0, 0.5):
        options = subject(MAE(SMALL), mask_ratio=ratio, removed_only=ratio > 0)
        whole = look(options, images, places, 0.3)
        part = look(options, images[4:], places[4:], 0.3)
        assert part.loss == pytest.approx(whole.loss[4:], rel=1e-4)
        for name, values in part.psnr.items():
            assert values == pytest.approx(whole.psnr[name][4:], abs=1e-3)
        torch.testing.assert_close(part.shown, whole.shown[4:])
        grey = patchify((whole.shown == 0.5).float(), 8).mean(-1)
        assert int((grey > 0.99).sum()) == 6 * 16 * ratio
    assert set(whole.psnr) == {"noisy", "noisy_clamped", "stats_input", "stats_noisy"}
    # Noise of 0.3 has a PSNR of 10.46 dB, whatever the image.
    assert sum(whole.psnr["noisy"]) / 6 == pytest.approx(10.46, abs=0.1)


def test_squares_that_simmim_masks() -> None:
    torch.manual_seed(0)
    arch = SimMIMArchitecture((32, 32), 1, 4, 16, (1, 1), (2, 2), 4)
    options = subject(
        SimMIM(arch), mask_ratio=0.6, unit=16, norm_pix=False, p=1, removed_only=True,
        modes=("none",),
    )  # fmt: skip
    outcome = look(options, digits(3), torch.arange(3), 0.0)
    grey = patchify((outcome.shown == 0.5).float(), 16).mean(-1)
    assert int((grey > 0.99).sum()) == 3 * 3  # of four squares, int(4 * 0.4) = 1 is seen


def test_statistics_follow_the_training() -> None:
    assert statistics(True) == ("input", "noisy")
    assert statistics(False) == ("none",)


def test_spread() -> None:
    assert work.spread(10, 4) == [0, 2, 5, 7]
    assert work.spread(3, 8) == [0, 1, 2]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "mae.safetensors"
    save_checkpoint(path, MAE(SMALL), {**SCALE, "settings": TRAINED})
    return path


def config(checkpoint: Path, **changes: object) -> Config:
    plain = Config(
        model=checkpoint,
        sigmas=(0, 70),
        images=2,
        limit=6,
        batch_size=4,
        device="cpu",
        out=checkpoint.parent / "out",
    )
    return replace(plain, **changes)


def test_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(config(checkpoint))
    out = checkpoint.parent / "out"
    names = ("images", "psnr", "levels")
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "json")
    }
    content = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    for name in names:
        Image.open(out / f"{name}.png").verify()
        assert content[name]["settings"]["statistics"] == ["input", "noisy"]
    rows = content["psnr"]["rows"]
    assert [row["image"] for row in rows] == work.spread(400, 6)
    assert content["psnr"]["settings"]["sigma"] == 0.25
    assert set(rows[0]["psnr"]) == {"noisy", "noisy_clamped", "stats_input", "stats_noisy"}
    zero, seventy = content["levels"]["rows"]
    assert zero["psnr"]["noisy"] is None  # no noise, no error: infinite
    assert zero["psnr"]["stats_input"] == pytest.approx(zero["psnr"]["stats_noisy"], abs=1e-3)
    assert seventy["psnr"]["noisy"][0] == pytest.approx(11.23, abs=0.2)  # -20 log10(70/255)
    assert seventy["loss"][0] > 0 and seventy["loss"][1] > 0

    # The same command again measures nothing anew; another level is added, others stay.
    calls = []
    monkeypatch.setattr(work, "look", lambda *a: calls.append(a[3]) or look(*a))
    main(config(checkpoint, sigmas=(0, 35, 70), images=3))
    assert calls == [0.25, 35 / 255, 35 / 255]  # the picture; 6 images in batches of 4
    again = json.loads((out / "levels.json").read_text())["rows"]
    assert [row["sigma"] for row in again] == [0, 35, 70] and again[::2] == [zero, seventy]
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"images.json holds results of another run \(seed\)"):
        main(config(checkpoint, seed=1))
    with pytest.raises(UserError, match=r"psnr.json holds results of another run \(images\)"):
        main(config(checkpoint, limit=5))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert json.loads((out / "levels.json").read_text())["rows"] == again


def test_interrupted_run_goes_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def look_twice(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work, "look", look_twice)
        with pytest.raises(KeyboardInterrupt):
            main(config(checkpoint))
    out = checkpoint.parent / "out"
    first = json.loads((out / "psnr.json").read_text())["rows"]
    assert len(first) == 4
    main(config(checkpoint))
    rows = json.loads((out / "psnr.json").read_text())["rows"]
    assert len(rows) == 6 and rows[:4] == first
    main(config(checkpoint, out=checkpoint.parent / "other"))
    assert json.loads((checkpoint.parent / "other" / "psnr.json").read_text())["rows"] == rows


def test_masked_training_without_noise(checkpoint: Path) -> None:
    """A plain MAE: the loss is that of the removed patches, and nothing is noisy."""
    settings = {**TRAINED, "sigma": "0", "mask_ratio": 0.75, "norm_pix": False, "region": "removed"}
    save_checkpoint(checkpoint, MAE(SMALL), {**SCALE, "settings": settings})
    main(config(checkpoint, sigmas=(0,)))
    settings = json.loads((checkpoint.parent / "out" / "psnr.json").read_text())["settings"]
    assert (settings["sigma"], settings["mask_ratio"], settings["statistics"]) == (
        0,
        0.75,
        ["none"],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model FILE is needed.*digits-demo"),
        ({"model": Path("missing.safetensors")}, "no checkpoint at"),
        ({"data": "cats"}, "unknown data"),
        ({"split": "dev"}, "digits: split must be"),
        ({"sigma": "-1"}, "noise level"),
        ({"sigma": "uniform(0,1)"}, "--sigma .* is a law"),
        ({"sigmas": (-1.0,)}, "--sigmas must not be negative"),
        ({"sigmas": ()}, "--sigmas"),
        ({"stats": "none"}, "--stats none is not for .* standardised patches; choose input or"),
        ({"norm_pix": False, "stats": "noisy"}, "predicts pixels; choose none"),
        ({"mask_ratio": 1.0}, "--mask-ratio must lie"),
        ({"mask_ratio": 0.95}, "leaves none of 16 patches"),
        ({"images": 0}, "--images must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"seed": -1}, "--seed must lie"),
        ({"device": "tpu9"}, "--device tpu9"),
        ({"precision": "tf32"}, "precision tf32"),
        ({"out": Path("/proc/nothing")}, "cannot write to /proc/nothing"),
    ],
)
def test_bad_input(checkpoint: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(config(checkpoint, **changes))
    assert "\n" not in str(caught.value)
    assert not (checkpoint.parent / "out").exists()


def test_other_checkpoints(checkpoint: Path) -> None:
    folder = checkpoint.parent / "x" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    with pytest.raises(UserError, match="takes 1x32x32 images and imagefolder:x has 3x32x32"):
        main(config(checkpoint, data=f"imagefolder:{folder.parent}"))
    save_checkpoint(checkpoint, MAE(SMALL), {**SCALE, "converted_from": "x.pth"})
    with pytest.raises(UserError, match="does not hold its training's settings; give --norm-pix"):
        main(config(checkpoint))
    with pytest.raises(UserError, match="does not say what noise.*--sigma 70/255"):
        main(config(checkpoint, norm_pix=True, mask_ratio=0.0))
    main(config(checkpoint, norm_pix=True, mask_ratio=0.0, sigma="70/255"))
    embedded = Path(command.__file__).parent / "models/weights/digits.safetensors"
    with pytest.raises(UserError, match="is no autoencoder but a classifier"):
        main(config(embedded, out=checkpoint.parent / "out"))


def test_other_content_of_a_result_file(checkpoint: Path) -> None:
    (checkpoint.parent / "out").mkdir()
    (checkpoint.parent / "out" / "psnr.json").write_text("[1]")
    with pytest.raises(UserError, match="psnr.json holds no results of this command"):
        main(config(checkpoint))


def test_command_line(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as done:
            command.command(words)
        return done.value.code

    assert run() == 2
    assert capfd.readouterr().err.startswith("error: --model FILE is needed")
    assert run("--help") == 0
    out = str(checkpoint.parent / "out")
    words = ("--sigmas", "0", "70", "--limit", "3", "--images", "1", "--out", out)
    assert run("--model", str(checkpoint), *words) == 0
    printed = capfd.readouterr().out
    assert "PSNR over 3 images, sigma 63.75/255" in printed
    assert "levels.png and .json" in printed
