# SPDX-License-Identifier: Apache-2.0
"""One pretraining step of DMAE and of NIM, whole, against the published step.

pytest benchmarks/bench_pretrain.py --results benchmarks/results/NAME.json
"""

from __future__ import annotations

from functools import partial

import published
import pytest
import torch
from timing import peak_memory, run

from nimfast.corruption import Corruption, SigmaLaw
from nimfast.models import MAE, architecture
from nimfast.ops import recon_loss
from train.cpu import speed_up

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {"DMAE": ("0.25", 0.75), "NIM": ("gamma(25,3)/255", 0.0)}  # noise law, mask ratio
# What is trained, and how many images a step takes.
MODELS = {"cpu": ("tiny", 16), "cuda": ("base", 256)}


@pytest.mark.parametrize("who", ["published", "fp32", "bf16", "compiled"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_step(benchmark, device, finish, recipe: str, who: str) -> None:  # type: ignore[no-untyped-def]
    """Noise, mask, forward, loss, backward, AdamW; images at 224 are there already.

    ``compiled`` is bf16 too.
    """
    name, batch = MODELS[device.type]
    noise, ratio = RECIPES[recipe]
    benchmark.group = f"{recipe} step, ViT-{name}, {batch} images at 224"
    torch.manual_seed(0)
    model = MAE(architecture(name, (3, 224, 224))).to(device).train()
    images = torch.rand(batch, 3, 224, 224, device=device)
    indices = torch.arange(batch, device=device)
    law = SigmaLaw.parse(noise)
    ours = who != "published"
    precision = "bf16" if who in ("bf16", "compiled") else "fp32"
    if ours:  # as train.loop does; the C library's memory is one for all
        speed_up(model, device, precision)
        if who == "compiled":
            model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=ours or None)
    corruption = Corruption(law, ratio, 0, MEAN, STD)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # As published: fp16 with a loss scale on GPUs, fp32 on a CPU, which has no fp16 products.
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and not ours)
    epochs = iter(range(10**6))

    def published_step() -> None:
        optimizer.zero_grad()
        sigma = law.draw(0, indices, next(epochs))
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            loss = published.pretraining_loss(model, images, sigma, ratio, MEAN, STD)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    loss_of = partial(recon_loss, patch=16, norm_pix=True, mean=MEAN, std=STD)

    def step() -> None:
        rows, keep, _ = corruption(images, indices, next(epochs), 16, dtype=dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(rows, keep)
        torch.autograd.backward(loss_of(prediction, images))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed = step if ours else published_step
    run(benchmark, finish, timed)
    benchmark.extra_info["images/s"] = batch / benchmark.stats.stats.median
    benchmark.extra_info["peak MiB"] = peak_memory(device, timed)
