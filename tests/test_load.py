# SPDX-License-Identifier: Apache-2.0
"""`nimfast.load`: names, files and defences, ready for images in [0, 1]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nimfast
from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models import MAE, Architecture, SimMIM, SimMIMArchitecture, ViT
from nimfast.models.checkpoint import save_checkpoint
from nimfast.models.load import load_autoencoder
from nimfast.runtime import prepare

SMALL = Architecture((32, 32), 1, 8, 32, 1, 1, False, 32, 1, 1)
HEADER: dict[str, Any] = {"mean": [0.3], "std": [0.4]}
TRAINED = {"norm_pix": True, "mask_ratio": 0.75, "sigma": "0"}


@pytest.fixture
def mae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "mae.safetensors", MAE(SMALL), {**HEADER, "settings": TRAINED})
    return tmp_path / "mae.safetensors"


def images(count: int = 3) -> torch.Tensor:
    return digits.load("test").images[:count]


def test_import_is_light() -> None:
    code = "import sys, nimfast; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Du3'"):
        nimfast.Du3  # noqa: B018


def test_classifiers() -> None:
    model = nimfast.load("digits")
    assert torch.equal(model(images()).argmax(1), digits.load("test").labels[:3])
    assert not model.training and model.weights_hash
    assert nimfast.load("digits", num_classes=10, shape=(1, 32, 32)).name == "digits"
    with pytest.raises(UserError, match="has 10 classes and the data 7"):
        nimfast.load("digits", num_classes=7, shape=(1, 32, 32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_precision_takes_the_same_images(precision: Any, mae: Path) -> None:
    """Normalised in fp32, cast after: one more rounding of pixels would be seen."""
    for spec in ("digits", f"de3:{mae}+digits?sigma=70&seed=1"):
        model = nimfast.load(spec)
        ready = prepare(model, torch.device("cpu"), precision)
        torch.testing.assert_close(ready(images()).float(), model(images()), rtol=0.2, atol=0.3)


def test_defences(mae: Path) -> None:
    options = "sigma=140&stats=input&draws=4&combine=vote&seed=3"
    model = nimfast.load(f"de3:{mae}+digits?{options}", num_classes=10, shape=(1, 32, 32))
    assert isinstance(model, nimfast.De3)
    assert (model.sigma, model.stats, model.draws, model.combine) == (140.0, "input", 4, "vote")
    assert (model.seed, model.mean, model.std) == (3, (0.3,), (0.4,))
    assert model.name.startswith("de3:") and len(model.weights_hash) == 64
    assert model(images()).sum(1).tolist() == pytest.approx([1, 1, 1])
    assert nimfast.load(f"de3:{mae}+digits?sigma=70").stats == "noisy"
    off = nimfast.load(f"de3:{mae}+digits?sigma=none")
    assert torch.equal(off(images()), nimfast.load("digits")(images()))
    masked = nimfast.load(f"demask:{mae}+digits?paste=1")
    assert isinstance(masked, nimfast.DeMask)
    assert (masked.mask_ratio, masked.stats, masked.paste) == (0.75, "input", True)
    assert masked(images()).shape == (3, 10)


def test_defences_with_simmim(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "simmim.safetensors"
    model = SimMIM(SimMIMArchitecture((32, 32), 1, 4, 16, (1, 1), (2, 2), 4))
    settings = {"norm_pix": False, "mask_ratio": 0.6, "mask_unit": 16, "sigma": "0"}
    save_checkpoint(path, model, {**HEADER, "settings": settings})
    masked = nimfast.load(f"demask:{path}+digits?mask_ratio=0.5")
    assert (masked.unit, masked.stats, masked.mask_ratio) == (16, "none", 0.5)
    assert nimfast.load(f"de3:{path}+digits?sigma=70").stats == "none"
    with pytest.raises(UserError, match="stats=noisy is not for an autoencoder that predicts pix"):
        nimfast.load(f"de3:{path}+digits?sigma=70&stats=noisy")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("de3:{}", "does not name two files"),
        ("de3:{}+digits", r"add \?sigma=70"),
        ("de3:{}+digits?sigma=-1", "must be positive"),
        ("de3:{}+digits?sigma=seventy", "no value that it can have"),
        ("de3:{}+digits?noise=70", "has no option 'noise'"),
        ("de3:{}+digits?sigma=70&draws=0", "draws is 0"),
        ("de3:{}+digits?sigma=70&stats=none", "predicts standardised patches"),
        ("de3:{}+cats", "unknown model 'cats'"),
        ("de3:gone.safetensors+digits?sigma=70", "no checkpoint at"),
        ("demask:{}+digits?paste=yes", "no value that it can have"),
        ("demask:{}+digits?mask_ratio=1", "mask_ratio"),
    ],
)
def test_bad_defences(spec: str, message: str, mae: Path) -> None:
    with pytest.raises(UserError, match=message):
        nimfast.load(spec.format(mae))


def test_encoders_cannot_denoise(tmp_path: Path, mae: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, ViT(SMALL, 10), HEADER)
    with pytest.raises(UserError, match="has no decoder .it is of kind classifier"):
        nimfast.load(f"de3:{path}+digits?sigma=70")
    assert isinstance(load_autoencoder(mae)[0], MAE)
    large = tmp_path / "large.safetensors"
    save_checkpoint(large, MAE(Architecture((64, 64), 1, 8, 32, 1, 1, False, 32, 1, 1)), HEADER)
    with pytest.raises(UserError, match="takes 1x64x64 images, not 1x32x32"):
        nimfast.load(f"de3:{large}+digits?sigma=70", num_classes=10, shape=(1, 32, 32))


def broken() -> torch.nn.Module:
    raise RuntimeError("no weights\nat all")


def test_a_function_that_raises_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"test_load:broken failed \(RuntimeError: no weights"):
        nimfast.load("test_load:broken")
