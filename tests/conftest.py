# SPDX-License-Identifier: Apache-2.0
"""What the tests share: devices and back ends present, the shared data where it is."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nimfast.ops import backend as backends
from nimfast.smoothing import plan_store

for _name in ("COLUMNS", "FORCE_COLOR"):  # some shells export them; tests read plain texts
    os.environ.pop(_name, None)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `backend` and `device` on every pair this machine can serve.

    The operation is that of the file: test_ops_<operation>.py, or its constant OPERATION.
    """
    if "backend" in metafunc.fixturenames:
        module = metafunc.module
        operation = getattr(module, "OPERATION", module.__name__.removeprefix("test_ops_"))
        chosen = os.environ.get("NIMFAST_TEST_BACKENDS", " ".join(backends.BACKENDS)).split()
        pairs = [
            pytest.param(name, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
            for device in _devices()
            for name in chosen
            if not backends.why_not(name, operation, torch.device(device))
        ]
        metafunc.parametrize(("backend", "device"), pairs)


@pytest.fixture(params=("portable", "x86-64-v2", "x86-64-v3", "x86-64-v4"))
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on every instruction set that the build and the processor have."""
    module = backends.native()
    if module is None:
        pytest.skip("the compiled module is not built")
    before = module.cpu_level()
    try:
        module.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.set_cpu_level(before)


@pytest.fixture(autouse=True, scope="session")
def own_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans are made by the code under test, not read from the user's cache."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_store, "cache_folder", lambda: folder)
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch's setter of its number of threads; the test leaves the number as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def shared_data() -> Path:
    """The folder with CIFAR-10 and the ImageNet sample, named by NIMFAST_DATA."""
    folder = os.environ.get("NIMFAST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("NIMFAST_DATA does not name the folder with the shared data")
    return Path(folder)


@pytest.fixture
def shared_reference(shared_data: Path) -> Path:
    """The folder with the published implementations' numbers, beside the shared data."""
    folder = shared_data.parent / "reference"
    if not folder.is_dir():
        pytest.skip("there is no folder `reference` beside the one NIMFAST_DATA names")
    return folder
