# SPDX-License-Identifier: Apache-2.0
"""Choice of back end, and the Triton kernels on a machine without a GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nimfast.ops import OPERATIONS, backend, corrupt, image_keys, use_backend
from nimfast.ops.noise import Stream

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    backend.triton is None, reason="triton has no wheel for this platform"
)


def test_unknown_back_end() -> None:
    with (
        pytest.raises(ValueError, match="it must be one of native, triton, reference"),
        use_backend("numpy"),
    ):
        pass


def test_forced_back_end_never_falls_back() -> None:
    if not backend.why_not("triton", "corrupt", torch.device("cpu")):
        pytest.skip("under the interpreter Triton does serve CPU tensors")
    keys = image_keys(0, Stream.TRAINING, torch.arange(1))
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="back end 'triton' cannot serve corrupt of cpu tensors"),
    ):
        corrupt(torch.zeros(1, 1, 2, 2), keys, 0.5)


def test_without_the_compiled_module_it_works_and_says_so_once() -> None:
    program = (
        "import sys, torch; sys.modules['_nimfast'] = None  # importing it fails from here on\n"
        "from nimfast.ops import corrupt, votes, image_keys, Stream\n"
        "k = image_keys(0, Stream.TRAINING, torch.arange(1))\n"
        "for _ in range(3): x = corrupt(torch.zeros(1, 1, 4, 4), k, 0.5)\n"
        "votes(x.view(1, 16), torch.zeros(1, 17, dtype=torch.int64)); print(float(x.std()) > 0)\n"
    )
    command = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr.count("runs on the reference kernels on cpu, slower") == 1
    assert "import of _nimfast halted" in done.stderr


def test_normal_choice_is_silent() -> None:
    if backend.native() is None:
        pytest.skip("the compiled module is not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("corrupt", torch.device("cpu")) == "native"


@needs_triton
def test_triton_in_its_interpreter() -> None:
    """The operations' own tests, on Triton alone, in a process where its interpreter is on."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "NIMFAST_TEST_BACKENDS": "triton",
        "CUDA_VISIBLE_DEVICES": "",
    }
    files = [str(TESTS / f"test_ops_{name}.py") for name in ("noise", "corrupt_grid", *OPERATIONS)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        *files,
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_compiles_without_a_gpu(architecture: int) -> None:
    program = TESTS / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(program), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for operation in set(OPERATIONS) - backend.CPU_ALONE:
        assert f"compiled {operation} " in done.stdout
