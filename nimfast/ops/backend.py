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
import os
import types
import warnings
from collections.abc import Iterator

import torch

import nimfast

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton = tl = None

BACKENDS = ("native", "triton", "reference")

# One schema namespace for the package: torch.ops.nimfast.<op>.
LIBRARY = torch.library.Library("nimfast", "DEF")

# The codes of csrc/scalar_types.h.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

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


def choose(device: torch.device) -> str:
    """The back end that serves tensors on `device` now."""
    wanted = _forced.get() or os.environ.get("NIMFAST_BACKEND")
    if wanted:
        _check_name(wanted, "NIMFAST_BACKEND")
        problem = why_not(wanted, device)
        if problem:
            raise RuntimeError(
                f"back end {wanted!r} cannot serve {device.type} tensors as asked: {problem}"
            )
        return wanted
    return _default(device)


@functools.cache
def _default(device: torch.device) -> str:
    order = ("native", "triton", "reference") if device.type == "cuda" else ("native", "reference")
    problems = {name: why_not(name, device) for name in order}
    chosen = next(name for name in order if not problems[name])
    if chosen == "reference" or (
        device.type == "cuda" and chosen == "triton" and _cuda_was_built()
    ):
        # Once per device (this function is cached): slower, not wrong.
        reasons = "; ".join(f"{name}: {why}" for name, why in problems.items() if why)
        warnings.warn(
            f"nimfast runs on the {chosen} kernels on {device}, slower ({reasons})", stacklevel=4
        )
    return chosen


def why_not(name: str, device: torch.device) -> str:
    """Why back end `name` cannot serve tensors on `device`; empty when it can."""
    if name == "reference":
        return ""
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
    return _cuda_problem(device) if device.type == "cuda" else ""


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


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current for a launch; nothing to do on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}; it must be one of {', '.join(BACKENDS)}")
