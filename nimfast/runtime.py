# SPDX-License-Identifier: Apache-2.0
"""Where and how precisely a network runs, and what a result file says of that."""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
from typing import Any, get_args

import torch
from torch import nn

import nimfast
from nimfast.errors import UserError
from nimfast.options import Precision

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; ``auto`` is the first CUDA device, else the CPU.

    Raises:
        UserError: the name is no device, or the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({first_line}); try auto, cpu or cuda:0"
        ) from None
    return device


def check_precision(precision: str, device: torch.device) -> torch.dtype:
    """The tensor type of `precision` on `device`.

    Raises:
        UserError: unknown precision, or one that the device cannot run at a sensible speed.
    """
    if precision not in get_args(Precision):
        raise UserError(
            f"unknown precision {precision!r}; choose one of {', '.join(get_args(Precision))}"
        )
    if precision == "tf32" and device.type != "cuda":
        raise UserError(
            f"precision tf32 exists on CUDA devices only, not on {device.type}; use fp32 or bf16"
        )
    return DTYPES[precision]


def prepare(
    module: nn.Module,
    device: torch.device,
    precision: Precision = "fp32",
    *,
    packed: bool = True,
) -> nn.Module:
    """A copy of `module` made ready for inference: eval mode, frozen, on `device`, in `precision`.

    On a CPU its layers are also packed for the processor, see `nimfast.packed`. torch.compile does
    not take packed layers: `packed` says whether they are wanted. The function computed stays the
    same within the rounding of `precision`, and differentiable with respect to the input;
    `module` is left as it is.

    Raises:
        UserError: see `check_precision`.
    """
    dtype = check_precision(precision, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    ready = copy.deepcopy(module).eval().requires_grad_(False).to(device=device, dtype=dtype)
    if device.type == "cpu":
        if dtype != torch.float32:
            use_plain_attention(ready)
        if packed:
            # Here: it brings timm, which takes as long as torch, and not every command has a model.
            from nimfast.packed import pack

            pack(ready, dtype)
    return ready


def use_plain_attention(module: nn.Module) -> None:
    """Attention of timm's layers in `module` as two matrix products, for half precision on a CPU.

    torch's flash attention converts half-precision tiles back and forth there: for 65 tokens two
    plain matrix products took 0.65 ms where it took 1.62 ms (bf16, 32 x 3 heads of width 64, two
    AVX-512 cores), and a training step of a DMAE 1.20 s where it took 1.62 s.
    """
    layer: Any
    for layer in module.modules():
        if getattr(layer, "fused_attn", False):  # the switch of timm's attention layers
            layer.fused_attn = False


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what this process frees, for good; for long work on a CPU.

    By default it gives large buffers back at once, and every training step pays for their pages
    again: 1.16 s in place of 1.10 s for a DMAE, 1.49 s in place of 1.26 s for a NIM; certifying 15
    images with a small ViT took 8.9 s of system time, and 1.4 s with this. Does nothing where the C
    library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # names in malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    found = {"nimfast": nimfast.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "timm", "torchvision", "numpy", "scipy", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions: what may round two almost equal logits the other way."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {**versions(), "hardware": hardware, "threads": torch.get_num_threads()}


def describe(device: torch.device) -> str:
    """The device's name and what matters of it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    if device.type == "cpu":
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
        return f"{_cpu_name()}, {threads}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
