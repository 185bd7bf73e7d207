# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what the classifier gets to see, the recipes, the chosen epoch, refusals."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference_files import hints, read_case
from safetensors.torch import load_file
from torch import Tensor
from training_runs import QUICK, assert_same, rows, stop

import nimfast
import train.finetune
from nimfast.corruption import Corruption, Resize, SigmaLaw
from nimfast.data import digits
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.models import MAE, architecture, load_classifier, patchify
from nimfast.models.checkpoint import read_checkpoint, save_checkpoint
from nimfast.models.published import from_published
from nimfast.models.vit import Trunk
from nimfast.ops import Stream, corrupt, image_keys, recon_loss
from nimfast.smoothing import Smooth
from train.feed import Batch
from train.finetune import RECIPES, Finetune, denoiser_of, finetune, loss_of
from train.inputs import Inputs
from train.mixing import Mixing, one_hot
from train.pretrain import Pretrain, pretrain

SCALE: dict[str, Any] = {"mean": (0.3,), "std": (0.4,)}
PLAIN: dict[str, Any] = {**QUICK, "epochs": 2, "copies": 1, "consistency": 0.0, "entropy": 0.0}
PLAIN |= {"validation_votes": 4, "layer_decay": 1.0, "drop_path": 0.0, "lr": 8e-3}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NIM that has learned a little."""
    out = tmp_path_factory.mktemp("nim") / "nim.safetensors"
    nim = {"sigma": "75/255", "mask_ratio": 0.0, "lr": 1e-2, "epochs": 4}
    pretrain(Pretrain(**{**QUICK, **nim}, out=out, patch=8))
    return out


def batch(count: int = 8) -> Batch:
    data = digits.load("train")
    images, labels = zip(*(data[i] for i in range(count)), strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.arange(count))


def settings(**changes: Any) -> Finetune:
    return Finetune(**{**PLAIN, "out": Path("x.safetensors"), **changes})


def inputs_of(s: Finetune) -> Inputs:
    data = digits.load("train")
    denoiser = denoiser_of(s, data)
    return Inputs(s, data, copies=s.copies, mixing=s.mixing, denoiser=denoiser)


def test_patch_rows_are_drawn_where_nothing_needs_pixels(autoencoder: Path) -> None:
    """They are the images' own, bit for bit, in the type of the products."""
    images, labels, indices = batch()
    data, after = digits.load("train"), Mixing(mixup=0.8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        s = settings(sigma="uniform(0.1,0.5)", copies=2, precision=precision)
        shown, _ = Inputs(s, data, copies=2)(Batch(images, labels, indices), 3, 0, nullcontext)
        made = Inputs(s, data, copies=2, patch=8)
        drawn, _ = made(Batch(images, labels, indices), 3, 0, nullcontext)
        assert drawn.dtype == dtype and torch.equal(drawn, patchify(shown, 8).to(dtype))
        assert made.clean(images).dim() == 4
    s = settings(sigma="0.5")
    denoiser = denoiser_of(settings(denoise=True, denoiser=autoencoder), data)
    assert Inputs(s, data, mixing=after, patch=8).patch is None
    assert Inputs(s, data, denoiser=denoiser, patch=8).patch is None
    assert Inputs(settings(sigma="0.5", resize=64), data, patch=8).patch is None
    before = Mixing(mixup=0.8, mix_order="before")
    assert Inputs(s, data, mixing=before, patch=8).patch == 8


def test_recipes_are_the_papers() -> None:
    given: dict[str, Any] = {"data": "x", "out": Path("x.safetensors")}
    made = {name: Finetune(**given | entries) for name, entries in RECIPES.items()}
    for name in made:
        train.finetune.check(made[name])
    cr, denoised = made["cr"], made["denoised"]
    assert (cr.copies, cr.consistency, cr.entropy, cr.sigma) == (2, 2.0, 0.5, "0.25")
    assert (cr.lr, cr.layer_decay, cr.drop_path, cr.epochs) == (5e-4, 0.65, 0.1, 100)
    assert (cr.batch_size, cr.warmup, cr.min_lr, cr.weight_decay) == (1024, 5.0, 1e-6, 0.05)
    assert (cr.mixing.mixup, cr.mixing.cutmix, cr.mixing.mix_order) == (0.8, 1.0, "after")
    assert cr.pictures.rand_augment == "rand-m9-mstd0.5-inc1" and not cr.pictures.erasing
    assert (cr.label_smoothing, cr.mixing.mix_mode) == (0.1, "batch")
    assert replace(cr, copies=1, consistency=0.0, entropy=0.0) == made["rs"]
    small = made["cr-cifar10"]
    assert (small.epochs, small.batch_size, small.mixing.on) == (50, 256, False)
    assert small.pictures == Augmentation(flip=True)
    assert denoised.denoise and denoised.sigma == "uniform(0,30)/255"
    assert (denoised.lr, denoised.layer_decay, denoised.mixing.mix_order) == (1e-3, 0.75, "before")
    assert replace(denoised, denoise=False) == made["noisy"]
    assert replace(made["noisy"], sigma="0") == made["clean"]


# --- noise, mixing, denoiser and size ------------------------------------------------------------


def test_mixing_before_and_after_the_noise() -> None:
    """After it the noise shrinks, by sqrt(share^2 + (1 - share)^2); before it does not."""
    images, labels, indices = batch(64)
    for order in ("before", "after"):
        s = settings(sigma="0.5", mixing=Mixing(mixup=0.8, mix_order=order), copies=2)
        made = inputs_of(s)
        ratios = []
        for step in range(6):
            mix = s.mixing.draw(s.seed, step, indices, 0, (32, 32))
            assert mix is not None
            shown, targets = made(Batch(images, labels, indices), 0, step, nullcontext)
            torch.testing.assert_close(targets, mix.targets(one_hot(labels, 10)))
            clean = made.clean(mix.images(images)).repeat_interleave(2, 0)
            found = (shown - clean).std().item() * 0.4 / 0.5
            share = mix.share[0, 0].item()
            wanted = 1.0 if order == "before" else (share**2 + (1 - share) ** 2) ** 0.5
            assert found == pytest.approx(wanted, rel=0.02)
            ratios.append(found)
        assert min(ratios) < 0.95 or order == "before"


def test_denoised_images_are_those_of_de3(autoencoder: Path) -> None:
    """The classifier trains on what De3 will show it: same noise, same pixels."""
    s = settings(init=autoencoder, denoise=True, sigma="uniform(0,75)/255", copies=2)
    made, (images, labels, indices) = inputs_of(s), batch()
    shown, _ = made(Batch(images, labels, indices), 3, 0, nullcontext)
    keys = image_keys(s.seed, Stream.TRAINING, indices)
    for place, sigma in enumerate(s_law(s).draw(s.seed, indices, 3).tolist()):
        model = nimfast.load(f"de3:{autoencoder}+digits?sigma={255 * sigma}&stats=noisy")
        part = slice(place, place + 1)
        pixels = model.reconstructed(images[part], keys[part], 2, 6).clamp(0, 1)
        expected = (pixels - 0.3) / 0.4
        torch.testing.assert_close(shown[2 * place : 2 * place + 2], expected, rtol=0, atol=2e-4)
    denoiser = made.denoiser
    assert denoiser is not None
    assert not any(p.requires_grad for p in denoiser.model.parameters())
    # It does take noise away.
    noisy = corrupt(images, keys, 0.3)
    clean = denoiser(images, keys, 0.3, 1, 0, nullcontext)
    assert (clean - images).square().mean() < 0.7 * (noisy.clamp(0, 1) - images).square().mean()


def s_law(s: Finetune) -> SigmaLaw:
    return SigmaLaw.parse(s.sigma)


@pytest.mark.parametrize("antialias", [False, True])
def test_noise_at_32_then_224_is_the_published_one(
    shared_reference: Path, antialias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the objects that pretraining uses: kept rows, prediction and loss."""
    name = "dmae_32_antialias" if antialias else "dmae_32"
    content, state, case = read_case(shared_reference, name)
    model = from_published(state, name, hints(case)).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def recorded(images: Tensor, **given: Any) -> Tensor:
        noisy = images + given["sigma"].view(-1, 1, 1, 1) * content["noise"]
        return (noisy - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    kept = content["mask_scores"].argsort(dim=1)[:, :4].sort(1).values
    monkeypatch.setattr("nimfast.corruption.corrupt", recorded)
    law = SigmaLaw("fixed", case["sigma"])
    corruption = Corruption(law, 0.75, 0, mean, std, Resize((224, 224), antialias))
    masks = corruption.masks(torch.arange(2), 0, 1, 16)
    assert masks is not None and masks.kept.shape == kept.shape
    monkeypatch.setattr(Corruption, "masks", lambda *_: masks._replace(kept=kept))
    rows_ = corruption(content["imgs"], torch.arange(2), 0, 56).rows
    with torch.no_grad():
        prediction = model(rows_, kept)
    torch.testing.assert_close(prediction, content["pred"], rtol=1e-5, atol=1e-5)
    target = corruption.enlarged(content["imgs"])
    loss = recon_loss(prediction, target, patch=56, norm_pix=True, mean=mean, std=std)
    torch.testing.assert_close(loss, content["loss"], rtol=1e-5, atol=1e-6)


def test_transfer_to_a_larger_network(tmp_path: Path) -> None:
    """Pretrained at 32, continued, fine-tuned and certified with the enlargement inside."""
    common = {**QUICK, "epochs": 1, "resize": 48, "antialias": True}
    first = tmp_path / "mae.safetensors"
    pretrain(Pretrain(**common, out=first))
    arch = read_checkpoint(first)[1]["architecture"]
    assert arch["image_size"] == [48, 48] and arch["patch"] == 16
    s = replace(settings(**{**common, "lr": 8e-3}), init=first, out=tmp_path / "c.safetensors")
    finetune(s)
    header = read_checkpoint(s.out)[1]
    assert header["resize"] == {"size": [48, 48], "antialias": True}
    classifier = load_classifier(str(s.out), num_classes=10, shape=(1, 32, 32))
    images = batch(3).images
    large = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
    inner = classifier.body.body
    torch.testing.assert_close(classifier(images), inner((large - 0.3) / 0.4), rtol=1e-4, atol=1e-4)
    smooth = Smooth(classifier, 10, 0.25, seed=1)
    found = smooth.certificate(images[0], 8, 64, 0.001, 32, index=0)
    assert found.samples == 72 and not found.invalid
    with pytest.raises(UserError, match="takes 1x48x48 images; .* give --resize 48"):
        finetune(replace(s, resize=None, out=tmp_path / "d.safetensors"))


# --- runs -----------------------------------------------------------------------------------------


def test_loss_is_that_of_the_papers() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), torch.rand(3, 5).softmax(-1)
    s = settings(copies=2, label_smoothing=0.1)
    smooth = 0.9 * targets + 0.1 / 5
    expected = -(smooth.repeat_interleave(2, 0) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss_of(logits, targets, s), expected)
    p = logits.softmax(-1).view(3, 2, 5)
    mean = p.mean(1, keepdim=True)
    divergence = (mean * (mean / p).log()).sum(-1).mean()
    entropy = -(mean * mean.log()).sum(-1).mean()
    regular = loss_of(logits, targets, replace(s, consistency=2.0, entropy=0.5))
    torch.testing.assert_close(regular, expected + 2 * divergence + 0.5 * entropy)


@pytest.mark.parametrize("recipe", ["rs", "cr", "denoised", "noisy", "clean"])
def test_every_recipe_learns(recipe: str, autoencoder: Path, tmp_path: Path) -> None:
    """With all its augmentation, in bf16; the file is ready for use."""
    given = {k: v for k, v in QUICK.items() if k != "sigma"}
    changes = {"batch_size": 190, "layer_decay": 1.0, "lr": 1e-2, "validation_votes": 3}
    recipe_ = {**RECIPES[recipe], **given, **changes, "init": autoencoder, "precision": "bf16"}
    recipe_["pictures"] = Augmentation(crop="padded", rand_augment="rand-m3-mstd0.5", erasing=0.2)
    s = Finetune(**recipe_, out=tmp_path / "x.safetensors", ema=0.5, validate_every=3)
    finetune(s)
    told = rows(s.out)
    assert told[2]["loss"] < told[0]["loss"]
    header = read_checkpoint(s.out)[1]
    names = {"epoch", "clean"} | ({"vote", "right_votes"} if recipe != "clean" else set())
    assert set(header["validation"]) == names
    assert ("denoiser" in header) == (recipe == "denoised")
    assert ("sigma" in header) == (recipe in ("rs", "cr", "noisy"))
    model = nimfast.load(s.out, num_classes=10, shape=(1, 32, 32))
    assert model(batch().images).shape == (8, 10)


def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of equals, with its average; a run that was stopped keeps the same one."""
    votes = iter([0.3, 0.6, 0.6, 0.2, 0.3, 0.6, 0.6, 0.2])
    monkeypatch.setattr(train.finetune, "validate", lambda *_: {"clean": 0.5, "vote": next(votes)})
    s = settings(epochs=4, validate_every=1, save_every=1.0, ema=0.5, resume=True)
    whole = replace(s, out=tmp_path / "whole.safetensors")
    finetune(whole)
    assert_same(whole.out, tmp_path / "whole-step8.safetensors")  # the second epoch's
    assert_same(tmp_path / "whole.ema.safetensors", tmp_path / "whole-step8.ema.safetensors")
    header = read_checkpoint(whole.out)[1]
    assert header["validation"] == {"epoch": 1, "clean": 0.5, "vote": 0.6}
    assert header["epochs_done"] == 2
    cut = replace(s, out=tmp_path / "cut.safetensors")
    stop(finetune, cut, 9)
    assert (tmp_path / "cut-best.safetensors").exists()
    finetune(cut)
    assert_same(whole.out, cut.out)
    assert not list(tmp_path.glob("*-best*"))
    assert rows(cut.out) == rows(whole.out)


def test_resumed_run_with_everything_equals_the_whole_one(
    autoencoder: Path, tmp_path: Path
) -> None:
    s = settings(
        init=autoencoder, denoise=True, sigma="uniform(0,75)/255", save_every=0.5, resume=True,
        batch_size=190, mixing=Mixing(mixup=0.8, cutmix=1.0, mix_order="before"),
        pictures=Augmentation(flip=True, rand_augment="rand-m5", erasing=0.3), choose="last",
    )  # fmt: skip
    whole = replace(s, out=tmp_path / "whole.safetensors")
    finetune(whole)
    cut = replace(s, out=tmp_path / "cut.safetensors")
    stop(finetune, cut, 8)
    finetune(replace(cut, workers=1))
    assert_same(whole.out, cut.out)
    with pytest.raises(UserError, match="made with --mixup 0.8, this command says 0.3"):
        finetune(replace(cut, mixing=replace(s.mixing, mixup=0.3)))


def test_parts_of_a_batch_equal_the_whole(tmp_path: Path) -> None:
    s = settings(batch_size=240, epochs=1, mixing=Mixing(mixup=0.8, cutmix=1.0), copies=2)
    s = replace(s, consistency=1.0, out=tmp_path / "whole.safetensors")
    finetune(s)
    parts = replace(s, micro_batch=60, out=tmp_path / "parts.safetensors")
    finetune(parts)
    one, other = load_file(s.out), load_file(parts.out)
    for name in one:
        if not name.endswith("qkv.bias"):  # a key's bias moves nothing: rounding alone
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=5e-5)


def test_starts_of_other_kinds(autoencoder: Path, tmp_path: Path) -> None:
    s = settings(epochs=1, init=autoencoder, out=tmp_path / "first.safetensors")
    finetune(s)
    again = replace(s, init=s.out, lr=1e-12, out=tmp_path / "again.safetensors")
    finetune(again)
    torch.testing.assert_close(load_file(again.out), load_file(s.out))
    header = read_checkpoint(s.out)[1]
    other = tmp_path / "seven.safetensors"
    model = nimfast.models.ViT(nimfast.models.Architecture(**header["architecture"]), 7)
    save_checkpoint(other, model, {"mean": [0.3], "std": [0.4]})
    with pytest.raises(UserError, match="tells 7 classes apart and --data digits has 10"):
        finetune(replace(again, init=other, out=tmp_path / "x.safetensors"))
    finetune(replace(again, init=other, new_head=True, out=tmp_path / "x.safetensors"))
    assert load_file(tmp_path / "x.safetensors")["head.weight"].shape == (10, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copies": 1, "consistency": 2.0}, "compares at least 2 noisy copies"),
        ({"copies": 1, "entropy": 0.5}, "compares at least 2 noisy copies"),
        (
            {"copies": 2, "consistency": 2.0, "mixing": Mixing(mixup=0.8, mix_mode="elem")},
            "--mix-mode elem mixes each copy .* differently",
        ),
        ({"mixing": Mixing(mixup=-1.0)}, "--mixup must not be negative"),
        ({"mixing": Mixing(mix_probability=1.5)}, "--mix-probability"),
        ({"mixing": Mixing(mixup=0.8), "batch_size": 299}, "even --batch-size"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"drop_path": -0.1}, "--drop-path"),
        ({"validation_votes": 0}, "--validation-votes"),
        ({"validation_sigma": 0.0}, "--validation-sigma"),
        ({"denoise": True}, "give --denoiser, or --init"),
        ({"denoise": True, "denoiser": Path("gone.safetensors")}, "no checkpoint at"),
        ({"resize": 0}, "--resize must be positive"),
        ({"momentum": 1.0}, "--momentum"),
        ({"pictures": Augmentation(rand_augment="lots")}, "--rand-augment 'lots'"),
        ({"pictures": Augmentation(rand_augment="rand-m9-w3x")}, "--rand-augment"),
        ({"pictures": Augmentation(erasing=2.0)}, "--erasing"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.safetensors"
    with pytest.raises(UserError, match=message):
        finetune(settings(**{"out": out, **change}))
    assert not out.exists()


def test_a_start_for_other_channels(autoencoder: Path, tmp_path: Path) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8).permute(1, 2, 0).numpy()
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "data" / name / "x.png")
    s = settings(init=autoencoder, data=f"imagefolder:{tmp_path}/data?size=32", batch_size=2)
    with pytest.raises(UserError, match="takes images of 1 channels and --data .* has 3"):
        finetune(replace(s, out=tmp_path / "x.safetensors"))


def test_denoisers_that_cannot_be(autoencoder: Path, tmp_path: Path) -> None:
    s = settings(denoise=True, out=tmp_path / "x.safetensors")
    arch = architecture("digits", (1, 32, 32))
    encoder, large = tmp_path / "encoder.safetensors", tmp_path / "large.safetensors"
    save_checkpoint(encoder, Trunk(arch), {"mean": [0.3], "std": [0.4]})
    with pytest.raises(UserError, match="has no decoder .it is of kind encoder"):
        finetune(replace(s, denoiser=encoder))
    header = {"mean": [0.3], "std": [0.4], "settings": {"norm_pix": False}}
    save_checkpoint(large, MAE(architecture("digits", (1, 64, 64))), header)
    with pytest.raises(UserError, match="takes 1x64x64 images"):
        finetune(replace(s, denoiser=large))
    with pytest.raises(UserError, match="--stats none does not go with"):
        finetune(replace(s, denoiser=autoencoder, stats="none"))
    with pytest.raises(UserError, match="needs noise to take away"):
        finetune(replace(s, denoiser=autoencoder, sigma="0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70", "70 in pixel units .*was 70/255 = 0.275 meant"),
        ("uniform(0,30)", "30 in pixel units"),
        ("gamma(25,3)", "75 in pixel units"),
        ("0.25/255", "0.25/255 = 0.00098 .*was 0.25 in pixel units meant"),
        ("uniform(0,0.75)/255", "0.75/255"),
    ],
)
def test_units_of_sigma(text: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        SigmaLaw.parse(text)
