# SPDX-License-Identifier: Apache-2.0
"""One consistency-regularised fine-tuning step, whole, against the published step.

pytest benchmarks/bench_finetune.py --results benchmarks/results/NAME.json
"""

from __future__ import annotations

import published
import pytest
import torch
from timing import peak_memory, run
from torch.nn import functional as F

from nimfast.corruption import Corruption, SigmaLaw
from nimfast.models import ViT, architecture
from train.cpu import speed_up
from train.losses import consistency
from train.optim import parameter_groups

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What is trained, and how many images (of two copies each) a step takes.
MODELS = {"cpu": ("tiny", 8), "cuda": ("base", 128)}
COPIES = 2


@pytest.mark.parametrize("who", ["published", "fp32", "bf16"])
def test_cr_step(benchmark, device, finish, who: str) -> None:  # type: ignore[no-untyped-def]
    """Noise, two copies, forward, both losses, backward, AdamW with layer decay; images at 224."""
    name, batch = MODELS[device.type]
    benchmark.group = f"CR step, ViT-{name}, {batch} images at 224, two noisy copies"
    torch.manual_seed(0)
    model = ViT(architecture(name, (3, 224, 224)), 1000, drop_path=0.1).to(device).train()
    images = torch.rand(batch, 3, 224, 224, device=device)
    labels = torch.arange(batch, device=device)
    indices = torch.arange(batch, device=device)
    ours = who != "published"
    if ours:  # as train.loop does; the C library's memory is one for all
        speed_up(model, device, who)
    groups = parameter_groups(model, 0.05, 0.65)
    for group in groups:
        group["lr"] = 1e-4 * group["scale"]
    optimizer = torch.optim.AdamW(groups, fused=ours or None)
    corruption = Corruption(SigmaLaw.parse("0.25"), 0.0, 0, MEAN, STD)
    dtype = torch.bfloat16 if who == "bf16" else torch.float32
    # As published: fp16 with a loss scale on GPUs, fp32 on a CPU, which has no fp16 products.
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and not ours)
    epochs = iter(range(10**6))

    def published_step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            loss = published.consistency_loss(model, images, labels, 0.25, COPIES, MEAN, STD)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    def step() -> None:
        patch = model.arch.patch
        noisy = corruption(images, indices, next(epochs), patch, copies=COPIES, dtype=dtype).rows
        with torch.autocast(device.type, torch.bfloat16, enabled=who == "bf16"):
            logits = model(noisy).float()
        loss = F.cross_entropy(logits, labels.repeat_interleave(COPIES))
        loss = loss + consistency(logits.view(batch, COPIES, -1), 2.0, 0.5)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed = step if ours else published_step
    run(benchmark, finish, timed)
    benchmark.extra_info["images/s"] = batch / benchmark.stats.stats.median
    benchmark.extra_info["peak MiB"] = peak_memory(device, timed)
