# SPDX-License-Identifier: Apache-2.0
"""Which implementation serves an operation, and the registration they share.

CPU tensors go to the C++ kernels; CUDA tensors to the CUDA kernels where the build has them and the
driver runs them, else to Triton; everything else to the plain-torch reference. ``NIMFAST_BACKEND``
or `use_backend` force one choice, for tests and benchmarks.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import math
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import nimfast

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton = tl = None

BACKENDS = ("native", "triton", "reference")

# One schema namespace for the package: torch.ops.nimfast.<op>.
_LIBRARY = torch.library.Library("nimfast", "DEF")
OPERATIONS: list[str] = []  # those registered, for reports
CPU_ALONE: set[str] = set()  # those that torch serves on other devices, with its own kernels

# The codes of csrc/scalar_types.h.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LARGE = 1 << 20  # bytes of a result whose memory is worth keeping for the next one

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "nimfast_backend", default=None
)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operation inside the block by `name`: native, triton or reference.

    Raises:
        ValueError: no such back end.
        RuntimeError: from the operation, when that back end cannot serve the tensors it is given.
    """
    _check_name(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def register(
    schema: str,
    implementation: Callable[..., object],
    fake: Callable[..., object],
    *,
    cpu_alone: bool = False,
) -> None:
    """Define an operation of torch's: `implementation` on every device, `fake` for its shapes.

    `cpu_alone` says that there is a kernel for the CPU only, because torch has the others.
    """
    name = schema.split("(")[0]
    if not name.endswith("_backward"):  # served by whatever serves the operation itself
        OPERATIONS.append(name)
        if cpu_alone:
            CPU_ALONE.add(name)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nimfast::{name}", fake, lib=_LIBRARY)


def forced() -> str | None:
    """The back end that `use_backend` or ``NIMFAST_BACKEND`` asks for, if any."""
    return _forced.get() or os.environ.get("NIMFAST_BACKEND")


def choose(operation: str, device: torch.device) -> str:
    """The back end that serves `operation` for tensors on `device` now."""
    wanted = forced()
    if wanted:
        _check_name(wanted, "NIMFAST_BACKEND")
        problem = why_not(wanted, operation, device)
        if problem:
            raise RuntimeError(
                f"back end {wanted!r} cannot serve {operation} of {device.type} tensors as asked: "
                f"{problem}"
            )
        return wanted
    return _default(operation, device)


@functools.cache
def _default(operation: str, device: torch.device) -> str:
    order = ("native", "triton", "reference") if device.type == "cuda" else ("native", "reference")
    chosen = next(name for name in order if not why_not(name, operation, device))
    # Triton in place of the CUDA kernels of a build that has them is worth a word; where an
    # operation has none, it is as meant.
    as_meant = operation in CPU_ALONE and device.type != "cpu"
    if (chosen == "reference" and not as_meant) or (
        chosen == "triton" and _cuda_was_built() and _cuda_problem(device)
    ):
        reasons = (
            f"{name}: {why_not(name, operation, device)}" for name in order if name != chosen
        )
        _warn_once(chosen, device, "; ".join(reasons))
    return chosen


@functools.cache  # once for all operations: slower, not wrong
def _warn_once(chosen: str, device: torch.device, reasons: str) -> None:
    warnings.warn(
        f"nimfast runs on the {chosen} kernels on {device}, slower ({reasons})", stacklevel=5
    )


def why_not(name: str, operation: str, device: torch.device) -> str:
    """Why back end `name` cannot serve `operation` on `device`; empty when it can."""
    if name == "reference":
        return ""
    if operation in CPU_ALONE and (name == "triton" or device.type != "cpu"):
        return "torch's own kernels serve other devices than the CPU"
    if name == "triton":
        if triton is None:
            return "triton is not installed"
        if device.type != "cuda" and not interpreting():
            return "Triton kernels run on CUDA devices (or anywhere under TRITON_INTERPRET=1)"
        return ""
    if device.type not in ("cpu", "cuda"):
        return f"there are no compiled kernels for {device.type}"
    if native() is None:
        return f"the compiled module _nimfast cannot be used ({_import_native()[1]})"
    if device.type == "cuda":
        if _cuda_problem(device):
            return _cuda_problem(device)
        if not hasattr(native(), f"{operation}_cuda"):
            return "Triton is as fast for this operation, so it has no CUDA kernel"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, so on CPU tensors too."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@functools.cache  # once per device: the question must not be put while a graph is captured
def _cuda_problem(device: torch.device) -> str:
    if not _cuda_was_built():
        return "the package was built without CUDA"
    with on_device(device):
        return str(native().cuda_problem())  # type: ignore[union-attr]


@functools.cache
def _import_native() -> tuple[types.ModuleType | None, str]:
    try:
        module = importlib.import_module("_nimfast")
    except ImportError as error:
        return None, str(error)
    if module.version != nimfast.__version__:  # an older installation beside a newer checkout
        return None, f"it is of version {module.version}, the package {nimfast.__version__}"
    return module, ""


def native() -> types.ModuleType | None:
    """The compiled module, loaded on first use; None where it cannot be."""
    return _import_native()[0]


def _cuda_was_built() -> bool:
    module = native()
    return module is not None and bool(module.cuda_architectures)


def native_call(operation: str, device: torch.device, *args: object) -> None:
    """Run compiled `operation`: with torch's thread count on the CPU, on its stream on CUDA."""
    module = native()
    if device.type == "cuda":
        with on_device(device):
            stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
            getattr(module, f"{operation}_cuda")(*args, stream)
    else:
        getattr(module, f"{operation}_cpu")(*args, torch.get_num_threads())


def large_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of `like`, for results that may be large.

    On the CPU a large one gets the memory of an earlier one that is gone: fresh pages would cost as
    much as what is written there. At most 256 MiB are kept that way (csrc/cpu_memory.cpp).
    """
    if like.device.type == "cpu":
        bytes_ = math.prod(shape) * dtype.itemsize
        module = native()
        if bytes_ >= _LARGE and module is not None:
            return torch.frombuffer(module.Block(bytes_), dtype=dtype).view(shape)
    return like.new_empty(shape, dtype=dtype)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current for a launch; nothing to do on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}; it must be one of {', '.join(BACKENDS)}")
