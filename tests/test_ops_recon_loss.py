# SPDX-License-Identifier: Apache-2.0
"""recon_loss: every back end against plain torch and against the published losses and gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from nimfast.models import patchify
from nimfast.ops import recon_loss, use_backend

REFERENCE = Path(__file__).parent / "reference"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(
    prediction: Tensor,
    images: Tensor,
    *,
    patch: int,
    norm_pix: bool = False,
    p: int = 2,
    mask: Tensor | None = None,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Tensor:
    """The definition, in the prediction's precision, differentiable by torch."""
    channels = images.shape[1]
    m, s = (images.new_tensor(v[:channels]).view(-1, 1, 1) for v in (mean, std))
    target = patchify((images - m) / s, patch)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    target = target.repeat_interleave(len(prediction) // len(images), 0)
    per_patch = (prediction - target).abs().pow(p).mean(-1)
    return per_patch.mean() if mask is None else per_patch[mask].mean()


def case(
    shape: tuple[int, ...], patch: int, samples: int = 1, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, images and a mask that counts some two thirds of the patches."""
    generator = torch.Generator().manual_seed(sum(shape) + patch)
    images = torch.rand(shape, generator=generator)
    rows = patchify(images, patch)
    size = (len(rows) * samples, *rows.shape[1:])
    prediction = torch.randn(size, generator=generator)
    mask = torch.rand(size[:2], generator=generator) < 0.67
    mask[0, 0] = True
    return prediction.to(device), images.to(device), mask.to(device)


def gradient_of(function, prediction: Tensor, *arguments, **options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    prediction = prediction.detach().clone().requires_grad_()
    loss = function(prediction, *arguments, **options)
    loss.backward()
    return loss.detach(), prediction.grad


# The regime each stands for: [B, C, H, W], patch, S.
SHAPES = {
    "one CIFAR image": ((1, 3, 32, 32), 4, 1),
    "digits": ((2, 1, 32, 32), 16, 1),
    "three samples of each image": ((2, 3, 8, 8), 4, 3),
    "patch 14, no multiple of 4, image no square": ((2, 3, 14, 28), 14, 1),
    "patch 2, shorter than any vector": ((1, 3, 4, 6), 2, 2),
    "a pixel a patch": ((1, 3, 2, 2), 1, 1),
    "two channels": ((1, 2, 6, 6), 3, 1),
    "56 x 56 x 3: more than is held at once": ((1, 3, 56, 112), 56, 2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("norm_pix", [False, True], ids=["pixels", "norm_pix"])
@pytest.mark.parametrize(("p", "masked"), [(2, False), (2, True), (1, True)])
def test_equals_definition(backend, device, shape, norm_pix: bool, p: int, masked: bool) -> None:  # type: ignore[no-untyped-def]
    size, patch, samples = shape
    prediction, images, mask = case(size, patch, samples, device)
    mean, std = MEAN[: size[1]], STD[: size[1]]
    options = {"patch": patch, "norm_pix": norm_pix, "p": p, "mask": mask if masked else None}
    expected, slope = gradient_of(plain, prediction.double(), images.double(), **options)
    with use_backend(backend):
        loss, gradient = gradient_of(recon_loss, prediction, images, mean=mean, std=std, **options)
        without = recon_loss(prediction, images, mean=mean, std=std, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, slope.float(), rtol=1e-5, atol=1e-5 * float(slope.max()))
    assert torch.equal(without, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    prediction, images, mask = case((2, 3, 8, 8), 4, 2, device)
    prediction = prediction.to(dtype)
    options = {"patch": 4, "norm_pix": True, "mask": mask}
    exact, exact_slope = gradient_of(plain, prediction.double(), images.double(), **options)
    torchs_slope = gradient_of(plain, prediction, images.to(dtype), **options)[1]
    with use_backend(backend):
        loss, slope = gradient_of(recon_loss, prediction, images, mean=MEAN, std=STD, **options)
    assert slope.dtype == dtype
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)  # better than torch's
    assert (slope - exact_slope).abs().max() <= 2 * (torchs_slope - exact_slope).abs().max()


def test_float16_gradient_does_not_underflow(backend: str, device: str) -> None:
    # 2^-20 in each of 2^13 values: their gradients are far below float16's least number, but not
    # once they are multiplied by the loss scale.
    images = torch.zeros(2, 1, 64, 64, device=device)
    prediction = torch.full((2, 16, 256), 2.0**-8, dtype=torch.float16, device=device)
    prediction.requires_grad_()
    with use_backend(backend):
        (recon_loss(prediction, images, patch=16) * 2.0**16).backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, torch.full_like(prediction, 2.0 ** (16 + 1 - 8 - 13)))


def test_incoming_gradient_and_kept_graph(backend: str, device: str) -> None:
    prediction, images, _ = case((1, 3, 8, 8), 4, 1, device)
    prediction.requires_grad_()
    with use_backend(backend):
        loss = recon_loss(prediction, images, patch=4)
        once = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
        third = torch.autograd.grad(loss / 3, prediction, retain_graph=True)[0]
        again = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
        torch.testing.assert_close(third, once / 3)
        assert torch.equal(once, again)
        with pytest.raises(RuntimeError, match="recon_loss is differentiable once"):
            torch.autograd.grad(loss, prediction, create_graph=True)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradcheck(backend: str, device: str) -> None:
    # In float32, the type that the kernels read: a step large enough for its rounding. The loss is
    # a square, so that central differences are exact.
    prediction, images, mask = case((1, 1, 2, 4), 2, 2, device)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: recon_loss(x, images, patch=2, norm_pix=True, mask=mask),
            prediction.requires_grad_(),
            eps=0.25,
            atol=1e-4,
            rtol=1e-3,
            nondet_tol=0.0,
            check_undefined_grad=False,
        )


def test_constant_patches(backend: str, device: str) -> None:
    images = torch.full((1, 1, 8, 8), 0.3, device=device)
    prediction, _, _ = case((1, 1, 8, 8), 4, 1, device)
    with use_backend(backend):
        loss, slope = gradient_of(recon_loss, prediction, images, patch=4, norm_pix=True)
    # Variance 0: the target is 0, not 0 / 0.
    torch.testing.assert_close(loss, prediction.square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, 2 * prediction / prediction.numel(), rtol=1e-5, atol=0)


def test_absolute_error_has_no_slope_at_zero(backend: str, device: str) -> None:
    images = torch.zeros(1, 1, 2, 2, device=device)
    prediction = torch.tensor([[[-0.5, 0.0, 0.25, 0.0]]], device=device)
    with use_backend(backend):
        loss, slope = gradient_of(recon_loss, prediction, images, patch=2, p=1)
    assert loss == 0.75 / 4
    assert slope.flatten().tolist() == [-0.25, 0.0, 0.25, 0.0]


def test_what_is_not_counted_is_not_read(backend: str, device: str) -> None:
    prediction, images, mask = case((2, 3, 8, 8), 4, 2, device)
    with use_backend(backend):
        clean = gradient_of(recon_loss, prediction, images, patch=4, mask=mask)
        broken = torch.where(mask[..., None], prediction, float("nan"))
        found = gradient_of(recon_loss, broken, images, patch=4, mask=mask)
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1], clean[1])
    assert not found[1][~mask].any()


def test_views(backend: str, device: str) -> None:
    prediction, images, mask = case((4, 3, 8, 8), 4, 1, device)
    token = torch.cat([prediction[:, :1], prediction], 1)[:, 1:]  # as a decoder cuts it off
    views = {
        "without its class token": (token, images, mask),
        "columns first": (prediction.mT.contiguous().mT, images, mask.T.contiguous().T),
        "channels last": (prediction, images.contiguous(memory_format=torch.channels_last), mask),
        "every other": (prediction[::2], images[::2], mask[::2]),
        "one image": (prediction, images[:1].expand(4, -1, -1, -1), mask),
        "sliced": (prediction[:, :1], images[:, :, 2:6, 3:7], mask[:, :1]),
    }
    with use_backend(backend):
        for name, (x, y, m) in views.items():
            expected = gradient_of(
                recon_loss, x.contiguous(), y.contiguous(), patch=4, mask=m.contiguous()
            )
            leaf = x.detach().requires_grad_()
            loss = recon_loss(leaf, y, patch=4, mask=m)
            slope = torch.autograd.grad(loss, leaf)[0]
            assert torch.equal(loss, expected[0]) and torch.equal(slope, expected[1]), name


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_empty(backend: str, device: str, shape: tuple[int, ...]) -> None:
    prediction, images = torch.zeros(shape[0], 4 if shape[2] else 0, 48), torch.zeros(shape)
    with use_backend(backend):
        loss, slope = gradient_of(
            recon_loss, prediction.to(device), images.to(device), patch=4, norm_pix=True
        )
    assert loss.isnan() and slope.shape == prediction.shape


def test_mask_that_counts_nothing(backend: str, device: str) -> None:
    prediction, images, mask = case((2, 3, 8, 8), 4, 1, device)
    nothing = torch.zeros_like(mask)
    with use_backend(backend):
        if device == "cpu":
            with pytest.raises(ValueError, match="mask counts no patch; at least one must be True"):
                recon_loss(prediction, images, patch=4, mask=nothing)
        else:
            assert recon_loss(prediction, images, patch=4, mask=nothing).isnan()


# --- published numbers: reference/recon_loss.safetensors ------------------------------------------
# Losses and gradients as the published implementations gave them. A gradient is that of the last
# layer's weight, so d loss / d prediction times the layer's input (`hidden`, solved for in float64
# from prediction, weight and bias).


def published() -> dict[str, Tensor]:
    return load_file(REFERENCE / "recon_loss.safetensors")


def check_published(loss: Tensor, prediction: Tensor, hidden: Tensor, ref: Tensor, grad: Tensor):  # type: ignore[no-untyped-def]
    torch.testing.assert_close(loss.cpu(), ref, rtol=1e-5, atol=0)
    slope = torch.autograd.grad(loss, prediction)[0].cpu()
    weight = torch.einsum("nld,nlk->dk", slope.double(), hidden.double()).float()
    torch.testing.assert_close(weight, grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("norm_pix", [0, 1])
def test_equals_mae(backend: str, device: str, norm_pix: int) -> None:
    inputs, ref = load_file(REFERENCE / "mae_normpix1.safetensors"), published()
    prediction, images = inputs["pred"].to(device).requires_grad_(), inputs["imgs"].to(device)
    mask = inputs["mask"].bool().to(device)
    with use_backend(backend):
        loss = recon_loss(prediction, images, patch=8, norm_pix=bool(norm_pix), mask=mask)
    expected = ref[f"mae.loss{norm_pix}"], ref[f"mae.grad{norm_pix}"]
    check_published(loss, prediction, ref["mae.hidden"], *expected)


@pytest.mark.parametrize("norm_pix", [0, 1])
def test_equals_nim(backend: str, device: str, norm_pix: int) -> None:
    ref = published()
    prediction, images = ref["nim.pred"].to(device).requires_grad_(), ref["nim.imgs"].to(device)
    with use_backend(backend):
        loss = recon_loss(prediction, images, patch=8, norm_pix=bool(norm_pix))
    expected = ref[f"nim.loss{norm_pix}"], ref[f"nim.grad{norm_pix}"]
    check_published(loss, prediction, ref["nim.hidden"], *expected)


@pytest.mark.parametrize(("name", "antialias"), [("dmae_32", False), ("dmae_32_antialias", True)])
def test_equals_dmae(backend: str, device: str, name: str, antialias: bool) -> None:
    # The last layer's weights are kept in 8 bits, which moves these losses by 4e-6 of themselves.
    ref = published()
    images = F.interpolate(ref["dmae.imgs"], (224, 224), mode="bicubic", antialias=antialias)
    weight = ref["dmae.weight"].float() * ref["dmae.step"]
    prediction = ref[f"{name}.hidden"] @ weight.T + ref["dmae.bias"].float()
    options = {"patch": 56, "norm_pix": True, "mean": MEAN, "std": STD}
    with use_backend(backend):
        loss = recon_loss(prediction.to(device), images.to(device), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.cpu(), ref[f"{name}.loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "patch"), [("simmim_vit", 8), ("simmim_swin", 2)])
def test_equals_simmim(backend: str, device: str, name: str, patch: int) -> None:
    ref = published()  # the reconstruction is an image; the mask has one entry per patch
    prediction = patchify(ref[f"{name}.rec"], patch).to(device)
    mask = ref[f"{name}.mask"].to(device)
    with use_backend(backend):
        loss = recon_loss(prediction, ref["simmim.imgs"].to(device), patch=patch, p=1, mask=mask)
    torch.testing.assert_close(loss.cpu(), ref[f"{name}.loss"], rtol=1e-5, atol=0)


# --- registration, processors, threads, refusals --------------------------------------------------


def test_compiled_equals_eager() -> None:
    prediction, images, mask = case((2, 3, 8, 8), 4)

    def function(x: Tensor) -> Tensor:
        return recon_loss(2 * x, images, patch=4, norm_pix=True, mask=mask) / 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prediction), function(prediction))
    (loss, slope), (loss_, slope_) = (gradient_of(f, prediction) for f in (compiled, function))
    assert torch.equal(loss, loss_)
    torch.testing.assert_close(slope, slope_, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient: bool) -> None:
    prediction, images, mask = case((2, 1, 4, 4), 2)
    for x in (prediction, prediction.half(), prediction.mT.contiguous().mT):
        arguments = (x, images, mask, 2, True, 2, [0.5], [0.5], with_gradient)
        torch.library.opcheck(torch.ops.nimfast.recon_loss.default, arguments)


def test_every_cpu_level(cpu_level: str) -> None:
    cases = [case((2, 3, 28, 42), 14), case((1, 1, 15, 25), 5), case((1, 3, 64, 64), 64)]
    for (prediction, images, _), patch in zip(cases, (14, 5, 64), strict=True):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
            x, options = prediction.to(dtype), {"patch": patch, "norm_pix": True}
            loss, slope = gradient_of(recon_loss, x, images, **options)
            exact = {**options, "mean": (0.0,) * 3, "std": (1.0,) * 3}
            expected = gradient_of(plain, x.double(), images.double(), **exact)
            torch.testing.assert_close(loss, expected[0].float(), rtol=1e-5, atol=0)
            assert (slope - expected[1]).abs().max() <= bound * expected[1].abs().max()


def test_threads_do_not_change_a_bit(set_threads: Callable[[int], None]) -> None:
    prediction, images, mask = case((6, 3, 64, 64), 8, 2)
    set_threads(1)
    alone = gradient_of(recon_loss, prediction, images, patch=8, norm_pix=True, mask=mask)
    set_threads(3)
    found = gradient_of(recon_loss, prediction, images, patch=8, norm_pix=True, mask=mask)
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])


GOOD = {"prediction": torch.zeros(4, 4, 12), "images": torch.zeros(2, 3, 4, 4), "patch": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prediction": torch.zeros(4, 4, 12).double()},
            TypeError,
            "prediction is torch.float64; it must be float32, bfloat16 or float16",
        ),
        (
            {"prediction": torch.zeros(4, 4)},
            ValueError,
            r"prediction has shape \(4, 4\); it must be \[N, L, D\]",
        ),
        (
            {"prediction": torch.zeros(4, 4, 48)},
            ValueError,
            r"prediction has shape \(4, 4, 48\); it must be \[N, 4, 12\] for images of shape "
            r"\(2, 3, 4, 4\) and patch 2",
        ),
        (
            {"prediction": torch.zeros(3, 4, 12)},
            ValueError,
            "prediction has 3 rows; there must be a multiple of 2, one per image",
        ),
        ({"images": torch.zeros(2, 3, 4, 4).half()}, TypeError, "images is torch.float16; it must"),
        ({"images": torch.zeros(3, 4, 4)}, ValueError, r"images has shape \(3, 4, 4\); it must be"),
        (
            {"images": torch.zeros(2, 3, 4, 4, device="meta")},
            ValueError,
            "images is on meta; it must be on cpu",
        ),
        (
            {"images": torch.zeros(2, 5000, 4, 4)},
            ValueError,
            "images have 5000 channels; there must be 1 to 4096",
        ),
        ({"patch": 3}, ValueError, "patch is 3; it must divide the images' 4 x 4 pixels"),
        ({"patch": 0}, ValueError, "patch is 0; it must be a whole number of at least 1"),
        ({"p": 3}, ValueError, "p is 3; it must be 1 or 2"),
        (
            {"mask": torch.ones(4, 4)},
            TypeError,
            "mask is torch.float32; it must be bool",
        ),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask has shape \(2, 4\); it must be \[4, 4\], one value per patch",
        ),
        ({"mean": (0.5,)}, ValueError, "mean has 1 values; images have 3 channels"),
        ({"std": (0.5, 0.0, 1.0)}, ValueError, "std is .*; every value must be positive"),
        (
            {
                "prediction": torch.zeros(2, 16, 1),
                "images": torch.zeros(2, 1, 4, 4),
                "patch": 1,
                "norm_pix": True,
            },
            ValueError,
            "norm_pix is True; a patch of one value has no variance",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recon_loss(**{**GOOD, **change})  # type: ignore[arg-type]
